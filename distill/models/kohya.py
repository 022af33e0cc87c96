"""LoRA files under kohya-ss' names, which the webui, Forge, ComfyUI and most other programs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill.diffusion.prediction import Prediction
from distill.models.families import Teacher
from distill.models.files import save_file
from distill.models.formats import rounded
from distill.models.lora import lora_config, lora_state_dict

_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
_PREDICTIONS = {Prediction.EPSILON: "epsilon", Prediction.V: "v"}
_SD2_WIDTH = 1024  # of the text states that SD 2.x reads; SD 1.x reads 768


def save_kohya(path: Path, teacher: Teacher, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Writes the adapters of `teacher.unet`, with the values of `state` (see `lora_state_dict`), to one file.

    Raises:
        ValueError: an adapter that `state` lacks, or a value that the dtype cannot hold.
    """
    alpha = lora_config(teacher.unet).lora_alpha
    tensors = kohya_state_dict(lora_state_dict(teacher.unet, state), alpha, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=_metadata(teacher, path.name.removesuffix(".safetensors")))


def kohya_state_dict(
    weights: Mapping[str, Tensor], alpha: float, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights of `lora_state_dict` as `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Readers compute `alpha / rank * up down x`. Where the dtype rounds alpha, the up weights make good for it.
    """
    stored_alpha = torch.tensor(alpha, dtype=dtype)
    amends = alpha / stored_alpha.item()
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, factor, _ = name.rsplit(".", 2)
        key = "lora_unet_" + module.replace(".", "_")
        exact = tensor * amends if factor == "lora_B" else tensor
        named[f"{key}.{_FACTORS[factor]}.weight"] = rounded(name, exact, dtype)
        named[f"{key}.alpha"] = stored_alpha.clone()
    return named


def _metadata(teacher: Teacher, name: str) -> dict[str, str]:
    """What user interfaces show and sort by: kohya-ss' keys and those of Stability's ModelSpec 1.0."""
    config = lora_config(teacher.unet)
    alpha = f"{config.lora_alpha:g}"
    velocity = teacher.prediction is Prediction.V
    version, architecture = _architecture(teacher, velocity)
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": str(config.r), "conv_alpha": alpha}),
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_sd_model_name": teacher.teacher_id,
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{teacher.resolution}x{teacher.resolution}",
    }
    if teacher.prediction in _PREDICTIONS:
        metadata["modelspec.prediction_type"] = _PREDICTIONS[teacher.prediction]
    return metadata


def _architecture(teacher: Teacher, velocity: bool) -> tuple[str, str]:
    """The base model as kohya-ss and as ModelSpec call it."""
    if teacher.family.name == "sdxl":
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if teacher.unet.config["cross_attention_dim"] != _SD2_WIDTH:
        return ("sd_v1_v" if velocity else "sd_v1"), "stable-diffusion-v1"
    return ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")
