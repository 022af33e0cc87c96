"""The teacher that a command's settings name."""

from __future__ import annotations

from typing import Any

import torch

from distill.config.loading import checking
from distill.config.settings import ModelSettings
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher


def open_teacher(model: ModelSettings, parts: tuple[str, ...] = (), **loading: Any) -> Teacher:
    """The parts of a teacher, at what the settings name (see `as_set`); `loading` are arguments of `load_teacher`.

    Raises:
        FileNotFoundError: see `load_teacher`.
        ConfigError: what `load_teacher` refuses; see `as_set`.
    """
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
