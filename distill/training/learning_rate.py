"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True)
class LearningRate:
    """Which share of the optimizer's learning rate is in force at a step: diffusers' schedules, without their memory.

    Args:
        name: one of `SCHEDULES`.
        warmup_steps: steps of a linear rise from 0; `constant` has none.
        total_steps: where `linear` and `cosine` reach 0.

    Raises:
        ValueError: an unknown name, or a warm-up longer than the run.
    """

    name: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"lr_scheduler must be one of {', '.join(SCHEDULES)}, got {self.name!r}")
        if not 0 <= self.warmup_steps:
            raise ValueError(f"lr_warmup_steps must not be negative, got {self.warmup_steps}")
        if self.name in ("linear", "cosine") and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"lr_warmup_steps must be below the run's {self.total_steps} steps for lr_scheduler={self.name}, "
                f"got {self.warmup_steps}"
            )

    def __call__(self, step: int) -> float:
        if self.name == "constant":
            return 1.0
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.name == "constant_with_warmup":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return 1.0 - progress if self.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
