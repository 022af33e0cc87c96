"""The teacher that a command's settings name."""

from __future__ import annotations

from typing import Any

import torch

from distill.config.loading import checking
from distill.config.settings import ModelSettings, TrainSettings
from distill.models.devices import gpu_is_used
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


def compute_dtype(settings: TrainSettings) -> torch.dtype:
    """In which dtype the teacher makes stores: that of `mixed_precision` on a GPU, float32 on a CPU."""
    half = settings.mixed_precision == "bf16" and gpu_is_used()
    return torch.bfloat16 if half else torch.float32
