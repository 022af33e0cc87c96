"""Which sample stands at which position of a run: a pure function of the seed, whatever the ranks and workers.

Positions number the samples of a run from 0 on; step s of a run with global batch G covers [s G, (s + 1) G). Each N
positions are an epoch, in which every one of N samples stands once, in an order drawn from (seed, epoch). An epoch may
end within a batch, which is then filled from the next: there is no tail to drop, and no rank has fewer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from distill.diffusion.random import generator


@dataclass(frozen=True)
class Order:
    """The order of `samples` samples under `seed`."""

    seed: int
    samples: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"an order needs at least 1 sample, got {self.samples}")

    def index(self, position: int) -> int:
        """The sample at a position."""
        epoch, slot = divmod(position, self.samples)
        return int(_permutation(self.seed, epoch, self.samples)[slot])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> Tensor:
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


@dataclass(frozen=True)
class BatchShare:
    """Which positions of every step are whose.

    A rank's are contiguous, and so are those of each of its micro-batches: of G = 8 on 2 ranks in micro-batches of 2,
    rank 1 takes 4 5, then 6 7.

    Raises:
        ValueError: the global batch is not a whole number of micro-batches on every rank.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        G, m, R = self.global_batch_size, self.micro_batch_size, self.world_size
        if min(G, m, R) < 1 or G % (m * R):
            raise ValueError(f"global_batch_size {G} must be a multiple of micro_batch_size {m} x {R} processes")
        if not 0 <= self.rank < R:
            raise ValueError(f"rank must be within 0 ... {R - 1}, got {self.rank}")

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def positions(self, step: int, micro_batch: int) -> range:
        """Positions of one micro-batch (0 ... accumulation - 1) of a step."""
        first = step * self.global_batch_size + self.rank * (self.global_batch_size // self.world_size)
        first += micro_batch * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def following(self, position: int) -> int:
        """The next position of the same step; the last one's is the first."""
        step, place = divmod(position, self.global_batch_size)
        return step * self.global_batch_size + (place + 1) % self.global_batch_size

    def micro_batches(self, start_step: int = 0) -> Iterator[range]:
        """Positions of this rank's micro-batches from a step on, without end."""
        step = start_step
        while True:
            yield from (self.positions(step, i) for i in range(self.accumulation))
            step += 1
