"""Batches for training, without end: read ahead by threads, and the same on any number of ranks and threads.

A sample that is bad is replaced by the next good one of its size in the index, if `max_bad_fraction` of the store
allows any. Which one that is depends on the store alone, so ranks stay in step without talking. Replaced samples are
counted and said; seen and skipped ones together are the index. Each rank counts those that it meets. A sample that
cannot be read is another matter: it may be as good as any, so nothing takes its place, and a `ReadError` ends the
iteration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from distill.data.ahead import read_ahead
from distill.data.memory import Recycled
from distill.data.order import BatchShare, Order, SizedOrder
from distill.data.reader import Store
from distill.data.record import BadSample
from distill.data.rows import Memory, Rows
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import generator
from distill.diffusion.trajectory import Batch, Reads

log = logging.getLogger(__name__)
Place = tuple[int, int]
"""Position in the run, index of the sample that stands there."""


def make_loader(
    store: Store,
    reads: Callable[[int], Reads],
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    prompts: bool = False,
    changes: tuple[tuple[int, int], ...] = (),
    passed: tuple[tuple[int, int], ...] = (),
    largest: bool = False,
) -> Loader:
    """A loader of this rank's micro-batches, from optimizer step `start_step` on; nothing is fast-forwarded.

    Args:
        reads: which states of each trajectory, at an optimizer step; they are random, by (seed, position).
        num_workers: threads that read ahead, each `prefetch_factor` micro-batches; 0 reads when a batch is wanted.
        prompts: read every sample's prompt too, and that of the next one.
        changes: of the global batch's size, and `passed`: samples that no step has; see `BatchShare`.
        largest: only samples of the largest size, to see what a step takes at most.

    Raises:
        ValueError: the stored times cannot serve the first step, or the global batch does not divide among the ranks.
    """
    reads(start_step).check(store.index.times)
    share = BatchShare(global_batch_size, micro_batch_size, rank, world_size, changes, passed)
    return Loader(store, reads, seed, share, start_step, num_workers, prefetch_factor, prompts, largest)


def order_of(store: Store, seed: int, share: BatchShare, largest: bool = False) -> Order | SizedOrder:
    """The order of a store's samples; of the largest size alone, if that is wanted."""
    if len(store.index.image_sizes) == 1:
        return Order(seed, len(store))
    groups = store.by_size()
    if largest:
        most = max(groups, key=lambda number: store.index.image_sizes[number].pixels)
        groups = {most: groups[most]}
    return SizedOrder(seed, groups, share)


class Loader:
    """An endless iterable of `Batch`: `share.accumulation` micro-batches a step. Each `iter` begins at `start_step`.

    `skipped` names every sample that was replaced, by key, and why.
    """

    def __init__(
        self,
        store: Store,
        reads: Callable[[int], Reads],
        seed: int,
        share: BatchShare,
        start_step: int,
        num_workers: int,
        prefetch_factor: int,
        prompts: bool = False,
        largest: bool = False,
    ) -> None:
        self.store, self.seed, self.share, self.start_step = store, seed, share, start_step
        self.skipped: dict[str, str] = {}
        self._empty: dict[int, Conditioning] = {}  # what stands for no prompt, by the size of batches
        self.allowed = int(store.max_bad_fraction * len(store))
        self._places = _Places(order_of(store, seed, share, largest), share, start_step, prompts)
        self._read = partial(
            _Samples,
            reads=reads,
            seed=seed,
            allowed=self.allowed,
            step_of=share.step_of,
            prompts=prompts,
        )
        self._workers, self._ahead, self._prompts = num_workers, num_workers * prefetch_factor, prompts

    def __iter__(self) -> Generator[Batch, None, None]:
        for found in self._found():
            self._note(found.bad)
            yield self._batch(found)

    def _found(self) -> Iterator[Found]:
        memory = _pinned if torch.cuda.is_available() else Recycled()
        if not self._workers:
            return map(self._read(self.store, memory), self._places)
        readers = [_on_this_device(self._read(self.store.apart(), memory)) for _ in range(self._workers)]
        return read_ahead(readers, self._places, self._ahead)

    def _note(self, bad: dict[str, str]) -> None:
        """Counts bad samples, and stops the run when they are more than allowed. Raises BadSample."""
        for key, problem in bad.items():
            if key in self.skipped:
                continue
            self.skipped[key] = problem
            if len(self.skipped) > self.allowed:
                raise BadSample(f"{problem} ({len(self.skipped)} bad of {len(self.store)}, allowed: {self.allowed})")
            log.warning("skipped %s (%d of %d allowed)", problem, len(self.skipped), self.allowed)

    def _batch(self, found: Found) -> Batch:
        """A micro-batch; `found` has one prompt more than it has samples, that of the next sample."""
        B, rows = len(found.positions) - self._prompts, found.rows
        conditioning = rows.conditioning
        if self._prompts:
            conditioning = {name: x[:B] for name, x in conditioning.items()}
        if B not in self._empty:
            self._empty[B] = {name: x.expand(B, *x.shape[1:]) for name, x in self.store.unconditional.items()}
        empty = self._empty[B]
        return Batch(
            states=rows.states[:B],
            times=rows.times[:B],
            conditioning=conditioning,
            unconditional={**conditioning, **empty} if empty else {},  # time ids and the like are the prompt's
            guidance=rows.guidance[:B],
            keys=tuple(rows.keys[:B]),
            positions=tuple(found.positions[:B]),
            prompts=tuple(rows.prompts[:B]) if self._prompts else (),
            next_prompts=tuple(rows.prompts[1:]) if self._prompts else (),
        )


class Found(NamedTuple):
    """A micro-batch as it was read; `bad` names the samples that others stand in for, by key, and says why."""

    positions: list[int]
    rows: Rows
    bad: dict[str, str]


def _on_this_device(read: Callable[[Sequence[Place]], Found]) -> Callable[[Sequence[Place]], Found]:
    """A function for threads: pinned memory belongs to the current device, which in a new thread is the first one."""
    if not torch.cuda.is_available():
        return read
    device = torch.cuda.current_device()

    def there(places: Sequence[Place]) -> Found:
        torch.cuda.set_device(device)
        return read(places)

    return there


class _Places:
    """The places of micro-batches, without end; `one_more` adds the one that follows a micro-batch, for its prompt."""

    def __init__(self, order: Order | SizedOrder, share: BatchShare, start_step: int, one_more: bool) -> None:
        self.order, self.share, self.start_step, self.one_more = order, share, start_step, one_more

    def __iter__(self) -> Iterator[list[Place]]:
        for positions in self.share.micro_batches(self.start_step):
            more = [self.share.following(positions[-1])] if self.one_more else []
            yield [(position, self.order.index(position)) for position in (*positions, *more)]


class _Samples:
    """Reads micro-batches; each thread has one, whose store has files of its own. They lie in `memory`."""

    def __init__(
        self,
        store: Store,
        memory: Memory,
        reads: Callable[[int], Reads],
        seed: int,
        allowed: int,
        step_of: Callable[[int], int],
        prompts: bool,
    ) -> None:
        self.store, self.memory, self.reads, self.seed, self.allowed = store, memory, reads, seed, allowed
        self.step_of, self.prompts = step_of, prompts

    def __call__(self, places: Sequence[Place]) -> Found:
        reads = self.reads(self.step_of(places[0][0]))  # a micro-batch is of one step
        picks = [reads.pick(self.store.index.times, generator(self.seed, "read", p)) for p, _ in places]
        rows = self.store.rows(len(places), len(picks[0]), self.memory, self.store.size_of(places[0][1]))
        found = self.store.fill([(rows, at, (i, picks[at])) for at, (_, i) in enumerate(places)], self.prompts)
        bad = {self.store.key(places[at][1]): str(error) for at, error in found.items()}
        for at in found:
            if not self._replace(rows, at, places[at][1], picks[at], bad):
                break  # more are bad than allowed: the loader stops at it
        return Found([position for position, _ in places], rows, bad)

    def _replace(self, rows: Rows, at: int, i: int, pick: tuple[int, ...], bad: dict[str, str]) -> bool:
        """Reads the next good sample of i's size after it into a row; whether there is one among those allowed."""
        for j in islice(self._after(i), self.allowed):
            found = self.store.fill([(rows, at, (j, pick))], self.prompts)
            if not found:
                return True
            bad[self.store.key(j)] = str(found[0])
        return False

    def _after(self, i: int) -> Iterator[int]:
        """The samples of i's size that follow it in the index, around its end."""
        n, size = len(self.store), self.store.size_of(i)
        following = ((i + offset) % n for offset in range(1, n + 1))
        return (j for j in following if self.store.size_of(j) == size)


def _pinned(size: int) -> Tensor:
    """Memory from which a copy to the device does not make the host wait."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
