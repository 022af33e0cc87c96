"""The teacher that a command's settings name."""

from __future__ import annotations

from typing import Any

import torch

from distill.config.loading import checking
from distill.config.settings import ModelSettings
from distill.models.families import Teacher, load_teacher


def open_teacher(model: ModelSettings, parts: tuple[str, ...] = (), **loading: Any) -> Teacher:
    """The parts of a teacher, at the resolution that the settings ask for; `loading` are arguments of `load_teacher`.

    Raises:
        FileNotFoundError: see `load_teacher`.
        ConfigError: what `load_teacher` refuses; a resolution that the network cannot have.
    """
    with checking():
        teacher = load_teacher(
            model.pretrained_model_name_or_path,
            parts=parts,
            revision=model.revision,
            variant=model.variant,
            family=model.family,
            **loading,
        )
    with checking("model."):
        return teacher.at_resolution(model.resolution)


def solving_dtype(teacher_dtype: str, device: str) -> torch.dtype:
    """What `data.teacher_dtype` stands for on a device, a name such as "cuda:0".

    A solve is computed once and trained on many times, so "auto" is what loses least at a GPU's full speed: float16 has
    three bits more than bfloat16, and the teachers' UNets stay within its range. On a CPU it is float32.
    """
    if teacher_dtype == "auto":
        teacher_dtype = "float16" if device.startswith("cuda") else "float32"
    found = getattr(torch, teacher_dtype)
    assert isinstance(found, torch.dtype)
    return found
