"""The teacher that a command's settings name."""

from __future__ import annotations

from typing import Any

import torch

from distill.config.loading import ConfigError, checking
from distill.config.settings import ModelSettings
from distill.models.derived import WeightedLoRA, is_single_file
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.from_file import folder_of_file
from distill.models.merged import folder_with_loras


def located(model: ModelSettings) -> ModelSettings:
    """The same model as a pipeline folder or hub id: what a single file, or LoRAs to be merged, have become.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ConfigError: settings that do not go together, or files that cannot be used.
    """
    path = model.pretrained_model_name_or_path
    with checking():
        single = is_single_file(path)
    if not single and model.config is not None:
        raise ConfigError(f"model.config is for a model in a single .safetensors file, and {path} is none")
    if not single and not model.loras:
        return model
    if single and (model.variant or model.revision):
        raise ConfigError("model.variant and model.revision are for folders and the hub: a single file has neither")
    given = {"revision": model.revision, "variant": model.variant}
    with checking():
        if single:
            path = str(folder_of_file(path, model.config))
        if model.loras:
            path = str(folder_with_loras(path, [WeightedLoRA.read(lora) for lora in model.loras], **given))
    found: dict[str, Any] = {"pretrained_model_name_or_path": path, "revision": None, "config": None, "loras": []}
    return model.model_copy(update=found)


def open_teacher(model: ModelSettings, parts: tuple[str, ...] = (), **loading: Any) -> Teacher:
    """The parts of a teacher, at what the settings name (see `as_set`); `loading` are arguments of `load_teacher`.

    Raises:
        FileNotFoundError: see `load_teacher`.
        ConfigError: what `load_teacher` refuses; see `as_set`.
    """
    model = located(model)
    with checking():
        teacher = load_teacher(
            model.pretrained_model_name_or_path,
            parts=parts,
            revision=model.revision,
            variant=model.variant,
            family=model.family,
            text_dtype=getattr(torch, model.text_dtype),
            max_tokens=model.max_tokens,
            allow_distilled=model.allow_distilled,
            **loading,
        )
    return as_set(teacher, model)


def as_set(teacher: Teacher, model: ModelSettings) -> Teacher:
    """The teacher for pictures of the size, and at the noise levels, that settings name.

    Raises:
        ConfigError: a resolution that the network cannot have, or a shift where there is none.
    """
    with checking("model."):
        return teacher.at_resolution(model.resolution).at_shift(model.shift)


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a network that is not trained, by its name in settings, on a device.

    "auto" is what loses least at a device's full speed: float16 on GPUs, which has three bits more than bfloat16, and
    in whose range the teachers' UNets stay; float32 on CPUs.
    """
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
