"""The network that learns the score of a student's samples (DMD, Yin et al. 2024); it starts as the teacher's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from distill.models.denoiser import NetworkDenoiser
from distill.models.families.teacher import Teacher
from distill.models.lora import add_lora, check_sizes
from distill.models.shared import on_the_weights_of


@dataclass(frozen=True)
class FakeScore:
    """A setting: a fully trained copy of the teacher's network, or a LoRA on the teacher's own frozen weights.

    Args:
        rank, alpha: of the LoRA; rank None trains all weights of the copy.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    rank: int | None = None
    alpha: float = 64.0

    def __post_init__(self) -> None:
        check_sizes("networks.fake_score", self.rank, self.alpha)

    def network(self, teacher: Teacher, seed: int = 0) -> NetworkDenoiser:
        """The network for a teacher with its own, before any adapter is added to that."""
        if self.rank is None:
            network = copy.deepcopy(teacher.network).requires_grad_(True)
        else:
            network = on_the_weights_of(teacher.lend())
            add_lora(network, self.rank, self.alpha, seed=seed, family=teacher.family)
        return teacher.denoiser_of(network)
