"""Students: how the network that is trained starts from its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from distill.models.denoiser import NetworkDenoiser
from distill.models.families import Teacher
from distill.models.lora import add_lora, save_lora


class LoRAStudent:
    """Adapters on the teacher's own network: switched off, it is the teacher, so there is one copy in memory.

    Args:
        rank, alpha: the adapters compute `alpha / rank * B A x`.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    def __init__(self, rank: int = 64, alpha: float = 64) -> None:
        if rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {rank}")
        if alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {alpha}")
        self.rank, self.alpha = rank, alpha

    def networks(self, teacher: Teacher, seed: int = 0) -> dict[str, NetworkDenoiser]:
        """The teacher's UNet with adapters drawn from `seed`: with them on, "student"; with them off, "teacher"."""
        add_lora(teacher.unet, self.rank, self.alpha, seed=seed)
        original = teacher.denoiser()
        return {"student": replace(original, adapters=True), "teacher": original}

    def export(self, folder: Path, teacher: Teacher, weights: Mapping[str, Tensor]) -> None:
        """Writes trained `weights`, by their names in the UNet, as LoRA files for diffusers and for peft."""
        save_lora(folder, teacher.unet, weights)
