"""Segments: a partition of the times 0 ... T, for multistep consistency (Heek et al. 2024; MLCM)."""

from __future__ import annotations

import torch
from torch import Tensor


class Segments:
    """`count` segments (milestone, next milestone], the first one starting at clean data.

    Args:
        T: the noisiest time.
        count: number of segments; 1 makes multistep consistency ordinary consistency.

    Raises:
        ValueError: count outside 1 ... T.
    """

    def __init__(self, T: int, count: int) -> None:
        if not 1 <= count <= T:
            raise ValueError(f"segments must be within 1 ... {T}, got {count}")
        self.count = count
        self.milestones = tuple(round(i * T / count) for i in range(count + 1))  # 0 = ... = T

    def index(self, t: Tensor) -> Tensor:
        """The segment (0 is the cleanest) that holds t, [B]; every t in 1 ... T is in exactly one."""
        edges = torch.tensor(self.milestones[1:-1], device=t.device)
        return torch.bucketize(t, edges)  # right edges belong to their segment

    def start(self, t: Tensor) -> Tensor:
        """The time that a student at t jumps to, [B]."""
        return torch.tensor(self.milestones, device=t.device)[self.index(t)]

    def end(self, t: Tensor) -> Tensor:
        """The noisiest time of t's segment, [B]."""
        return torch.tensor(self.milestones, device=t.device)[self.index(t) + 1]
