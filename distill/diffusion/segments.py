"""Segments: a partition of the times 0 ... T, for multistep consistency (Heek et al. 2024; MLCM)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distill.diffusion.tables import Table


@dataclass(frozen=True)
class Segments:
    """`count` segments (milestone, next milestone], the first one starting at clean data.

    Args:
        T: the noisiest time.
        count: number of segments; 1 makes multistep consistency ordinary consistency.

    Raises:
        ValueError: count outside 1 ... T.
    """

    T: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.T:
            raise ValueError(f"segments must be within 1 ... {self.T}, got {self.count}")

    @cached_property
    def milestones(self) -> tuple[int, ...]:
        """0, then the noisiest time of each segment, up to T."""
        return tuple(round(i * self.T / self.count) for i in range(self.count + 1))

    @cached_property
    def _edges(self) -> Table:
        return Table(self.milestones[1:-1], torch.int64)

    @cached_property
    def _milestones(self) -> Table:
        return Table(self.milestones)

    def index(self, t: Tensor) -> Tensor:
        """The segment (0 is the cleanest) that holds t, [B]; every t in 1 ... T is in exactly one."""
        return torch.bucketize(t.contiguous(), self._edges.on(t.device))  # right edges belong to their segment

    def start(self, t: Tensor) -> Tensor:
        """The time that a student at t jumps to, [B]."""
        return self._milestones.on(t.device)[self.index(t)]

    def end(self, t: Tensor) -> Tensor:
        """The noisiest time of t's segment, [B]."""
        return self._milestones.on(t.device)[self.index(t) + 1]
