"""Which sample stands at which position of a run: a pure function of the seed, whatever the ranks and workers.

Positions number the samples of a run from 0 on; step s of a run with global batch G covers [s G, (s + 1) G). Where the
batch changes its size within a run, each step begins where the one before has ended, or further on, where samples are
passed over. Each N positions are an epoch, in
which every one of N samples stands once, in a random order by (seed, epoch). An epoch may end within a batch, which
is then filled from the next: there is no tail to drop, and no rank has fewer steps.

Where samples have several sizes, all samples of a step have one, and each size has an order and epochs of its own. The
steps of a size lie at random times, evenly over the run: by any step, the samples of all sizes have been seen equally
often but for about one batch of each size.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

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
def _permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    return torch.randperm(samples, generator=generator(seed, "order", epoch)).numpy()


class SizedOrder:
    """The order of samples of several sizes under `seed`: those of a step are of one size.

    The j-th batch of a size is due at a random moment between j and j + 1 times the part of its epoch that a batch is,
    and steps come in the order in which they are due. Nothing is dropped: where an epoch of a size ends within a batch,
    its next epoch fills that.

    Args:
        groups: the samples of each size, by the number of the size, which its random numbers depend on.
        share: how large each step is.
    """

    def __init__(self, seed: int, groups: Mapping[int, Sequence[int] | NDArray[np.int64]], share: BatchShare) -> None:
        if not groups or any(len(group) < 1 for group in groups.values()):
            raise ValueError("an order needs at least 1 sample of every size")
        self.seed, self.groups, self.share = seed, {number: groups[number] for number in sorted(groups)}, share
        self._numbers, self._firsts = array("i"), array("q")  # of each step: its size, and where in that size's order
        self._taken = dict.fromkeys(self.groups, 0)
        self._batches = dict.fromkeys(self.groups, 0)

    def size(self, step: int) -> int:
        """The number of the size of a step's samples."""
        self._reach(step)
        return self._numbers[step]

    def index(self, position: int) -> int:
        """The sample at a position."""
        step = self.share.step_of(position)
        number = self.size(step)
        group, slot = self.groups[number], self._firsts[step] + position - self.share.extent(step)[0]
        epoch, at = divmod(slot, len(group))
        return int(group[int(_permutation_of(self.seed, number, epoch, len(group))[at])])

    def _reach(self, step: int) -> None:
        """Decides the sizes of the steps up to this one, each from what all before it have taken."""
        for new in range(len(self._numbers), step + 1):
            samples, over = self.share.extent(new)[1], self.share.passed_before(new)
            while over > 0:  # in batches like those that were seen
                over -= self._take(min(samples, over))[1]
            number, _ = self._take(samples)
            self._numbers.append(number)
            self._firsts.append(self._taken[number] - samples)

    def _take(self, samples: int) -> tuple[int, int]:
        """Takes the next batch: the number of its size, and how many samples it has."""
        number = min(self.groups, key=lambda number: self._due(number, samples))
        self._taken[number] += samples
        self._batches[number] += 1
        return number, samples

    def _due(self, number: int, samples: int) -> float:
        """When the next batch of a size is due, in epochs."""
        block, at = divmod(self._batches[number], MOMENTS)
        moment = _moments(self.seed, number, block)[at]
        return (self._taken[number] + moment * samples) / len(self.groups[number])


MOMENTS = 1024


@lru_cache(maxsize=512)
def _moments(seed: int, number: int, block: int) -> list[float]:
    found: list[float] = torch.rand(MOMENTS, generator=generator(seed, "size", number, block)).tolist()
    return found


@lru_cache(maxsize=128)
def _permutation_of(seed: int, number: int, epoch: int, samples: int) -> NDArray[np.int64]:
    return torch.randperm(samples, generator=generator(seed, "order", number, epoch)).numpy()


@dataclass(frozen=True)
class BatchShare:
    """Which positions of every step are whose.

    A rank's are contiguous, and so are those of each of its micro-batches: of G = 8 on 2 ranks in micro-batches of 2,
    rank 1 takes 4 5, then 6 7.

    Args:
        changes: steps from which on the global batch has another size, rising, each with the size. There are as many
            micro-batches in a step as before, of another size too.
        passed: steps, each once, before which so many samples are passed over.

    Raises:
        ValueError: a global batch is not a whole number of micro-batches on every rank.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    changes: tuple[tuple[int, int], ...] = ()
    passed: tuple[tuple[int, int], ...] = ()

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
        first, size = self.extent(step)
        of_rank = size // self.world_size
        of_micro_batch = of_rank // self.accumulation
        first += self.rank * of_rank + micro_batch * of_micro_batch
        return range(first, first + of_micro_batch)

    def following(self, position: int) -> int:
        """The next position of the same step; the last one's is the first."""
        first, size = self.extent(self.step_of(position))
        return first + (position - first + 1) % size

    def micro_batches(self, start_step: int = 0) -> Iterator[range]:
        """Positions of this rank's micro-batches from a step on, without end."""
        step = start_step
        while True:
            yield from (self.positions(step, i) for i in range(self.accumulation))
            step += 1

    def extent(self, step: int) -> tuple[int, int]:
        """The first position of a step, and how many it has."""
        first, start, size = [part for part in self._parts() if part[1] <= step][-1]
        return first + (step - start) * size, size

    def passed_before(self, step: int) -> int:
        """How many samples are passed over just before a step."""
        return dict(self.passed).get(step, 0)

    def _parts(self) -> list[tuple[int, int, int]]:
        """The parts of the run in which steps of one size follow each other: first position, first step, and size."""
        parts, sizes = [(0, 0, self.global_batch_size)], dict(self.changes)
        for step in sorted({*sizes, *(step for step, _ in self.passed)}):
            first, start, before = parts[-1]
            at = first + (step - start) * before + self.passed_before(step)
            parts.append((at, step, sizes.get(step, before)))
        return parts
