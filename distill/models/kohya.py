"""What a file says of itself in its header, in kohya-ss' and Stability's words: user interfaces show and sort by it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill.diffusion.prediction import Prediction
from distill.models.families.teacher import Teacher
from distill.models.lora import lora_config, save_lora_file

_PREDICTIONS = {Prediction.EPSILON: "epsilon", Prediction.V: "v"}


def save_kohya(
    path: Path,
    teacher: Teacher,
    state: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    format: str = "kohya",
) -> None:
    """Writes the adapters of `teacher.network`, with the values of `state` (see `lora_state_dict`), to one file.

    It is called like the export, because user interfaces show files by their names.

    Raises:
        ValueError: an adapter that `state` lacks, or a value that the dtype cannot hold.
    """
    metadata = kohya_metadata(teacher, path.name.removesuffix(".safetensors"))
    save_lora_file(path, teacher.network, state, format=format, dtype=dtype, metadata=metadata, family=teacher.family)


def kohya_metadata(teacher: Teacher, name: str) -> dict[str, str]:
    """The metadata of a LoRA of `teacher.network`: kohya-ss' keys and those of ModelSpec."""
    config = lora_config(teacher.network)
    alpha = f"{config.lora_alpha:g}"
    version, architecture = _architecture(teacher, teacher.prediction)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": str(config.r), "conv_alpha": alpha}),
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_sd_model_name": teacher.teacher_id,
        "ss_output_name": name,
    } | _modelspec(teacher, teacher.prediction, name, f"{architecture}/lora")


def checkpoint_metadata(teacher: Teacher, prediction: Prediction, name: str) -> dict[str, str]:
    """The metadata of a full student in one file, by the keys of ModelSpec."""
    return _modelspec(teacher, prediction, name, _architecture(teacher, prediction)[1])


def _modelspec(teacher: Teacher, prediction: Prediction, name: str, architecture: str) -> dict[str, str]:
    """Stability's ModelSpec 1.0, which has no word for a network that predicts clean data."""
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{teacher.resolution}x{teacher.resolution}",
    }
    return metadata | ({"modelspec.prediction_type": _PREDICTIONS[prediction]} if prediction in _PREDICTIONS else {})


def _architecture(teacher: Teacher, prediction: Prediction) -> tuple[str, str]:
    """The base model as kohya-ss and as ModelSpec call it."""
    return teacher.family.lora.architecture(teacher.network.config, prediction is Prediction.V)
