"""Which sample stands at which position of a run: a pure function of the seed, whatever the ranks and workers.

Positions number the samples of a run from 0 on; step s of a run with global batch G covers [s G, (s + 1) G). Where the
batch changes its size within a run, each step begins where the one before has ended. Each N positions are an epoch, in
which every one of N samples stands once, in a random order by (seed, epoch). An epoch may end within a batch, which
is then filled from the next: there is no tail to drop, and no rank has fewer steps.
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

    Args:
        changes: steps from which on the global batch has another size, rising, each with the size. There are as many
            micro-batches in a step as before, of another size too.

    Raises:
        ValueError: a global batch is not a whole number of micro-batches on every rank.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    changes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        G, m, R = self.global_batch_size, self.micro_batch_size, self.world_size
        if min(G, m, R) < 1 or G % (m * R):
            raise ValueError(f"global_batch_size {G} must be a multiple of micro_batch_size {m} x {R} processes")
        parts = self.accumulation * R
        for step, size in self.changes:
            if size < 1 or size % parts:
                raise ValueError(
                    f"the batch of {size} samples from step {step} on must be a multiple of {parts}: {R} processes x "
                    f"{self.accumulation} micro-batches"
                )
        if not 0 <= self.rank < R:
            raise ValueError(f"rank must be within 0 ... {R - 1}, got {self.rank}")

    @property
    def accumulation(self) -> int:
        """How many micro-batches a rank has in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def step_of(self, position: int) -> int:
        """The step that a position belongs to."""
        first, start, size = [part for part in self._parts() if part[0] <= position][-1]
        return start + (position - first) // size

    def positions(self, step: int, micro_batch: int) -> range:
        """Positions of one micro-batch (0 ... accumulation - 1) of a step."""
        first, size = self._step(step)
        of_rank = size // self.world_size
        of_micro_batch = of_rank // self.accumulation
        first += self.rank * of_rank + micro_batch * of_micro_batch
        return range(first, first + of_micro_batch)

    def following(self, position: int) -> int:
        """The next position of the same step; the last one's is the first."""
        first, size = self._step(self.step_of(position))
        return first + (position - first + 1) % size

    def micro_batches(self, start_step: int = 0) -> Iterator[range]:
        """Positions of this rank's micro-batches from a step on, without end."""
        step = start_step
        while True:
            yield from (self.positions(step, i) for i in range(self.accumulation))
            step += 1

    def _step(self, step: int) -> tuple[int, int]:
        """The first position of a step, and how many it has."""
        first, start, size = [part for part in self._parts() if part[1] <= step][-1]
        return first + (step - start) * size, size

    def _parts(self) -> list[tuple[int, int, int]]:
        """The parts of the run with batches of one size: first position, first step, and size of each."""
        parts = [(0, 0, self.global_batch_size)]
        for step, size in self.changes:
            first, start, before = parts[-1]
            parts.append((first + (step - start) * before, step, size))
        return parts
