"""Batches for training, without end: read ahead by worker processes, and the same on any number of ranks and workers.

A sample that is bad is replaced by the next good one of the index, if `max_bad_fraction` of the store allows any. Which
one that is depends on the store alone, so ranks stay in step without talking. Replaced samples are counted and said;
seen and skipped ones together are the index. Each rank counts those that it meets. A sample that cannot be read is
another matter: it may be as good as any, so nothing takes its place, and a `ReadError` ends the iteration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from distill.data.errors import ReadError
from distill.data.order import BatchShare, Order
from distill.data.reader import Store
from distill.data.record import BadSample, Sample
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
) -> Loader:
    """A loader of this rank's micro-batches, from optimizer step `start_step` on; nothing is fast-forwarded.

    Args:
        reads: which states of each trajectory, at an optimizer step; they are drawn from (seed, position).
        num_workers: processes that read ahead, each `prefetch_factor` micro-batches; 0 reads in this process.
        prompts: read every sample's prompt too, and that of the next one.

    Raises:
        ValueError: the stored times cannot serve the first step, or the global batch does not divide among the ranks.
    """
    reads(start_step).check(store.index.times)
    share = BatchShare(global_batch_size, micro_batch_size, rank, world_size)
    return Loader(store, reads, seed, share, start_step, num_workers, prefetch_factor, prompts)


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
    ) -> None:
        self.store, self.seed, self.share, self.start_step = store, seed, share, start_step
        self.skipped: dict[str, str] = {}
        self.allowed = int(store.max_bad_fraction * len(store))
        self._loader: DataLoader[dict[str, Any]] = DataLoader(
            _Samples(store, reads, seed, self.allowed, share.global_batch_size, prompts),
            batch_sampler=_Places(Order(seed, len(store)), share, start_step, prompts),  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_apart if num_workers else None,
            generator=generator(seed, "loader"),  # or each `iter` would draw from the global one
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        for found in self._loader:
            if "unread" in found:
                raise ReadError(found["unread"])
            self._note(found["bad"])
            yield self._batch(found)

    def _note(self, bad: dict[str, str]) -> None:
        """Counts bad samples, and stops the run when they are more than allowed. Raises BadSample."""
        for key, problem in bad.items():
            if key in self.skipped:
                continue
            self.skipped[key] = problem
            if len(self.skipped) > self.allowed:
                raise BadSample(f"{problem} ({len(self.skipped)} bad of {len(self.store)}, allowed: {self.allowed})")
            log.warning("skipped %s (%d of %d allowed)", problem, len(self.skipped), self.allowed)

    def _batch(self, found: dict[str, Any]) -> Batch:
        B, conditioning = len(found["states"]), found["conditioning"]
        empty = {name: x.expand(B, *x.shape[1:]) for name, x in self.store.unconditional.items()}
        return Batch(
            states=found["states"],
            times=found["times"],
            conditioning=conditioning,
            unconditional={**conditioning, **empty},  # time ids and the like are the prompt's
            guidance=found["guidance"],
            keys=tuple(found["keys"]),
            positions=tuple(found["positions"]),
            prompts=tuple(found["prompts"]),
            next_prompts=tuple(found["next_prompts"]),
        )


def _apart(worker: int) -> None:
    """Takes a worker out of its process's group: Ctrl-C and a launcher's signals are sent to all of that.

    The process finishes a step and saves, for which it needs its workers; it ends them itself, and they notice when it
    is gone.
    """
    os.setsid()


class _Places:
    """A batch sampler over positions; `one_more` adds the one that follows a micro-batch, for its prompt."""

    def __init__(self, order: Order, share: BatchShare, start_step: int, one_more: bool) -> None:
        self.order, self.share, self.start_step, self.one_more = order, share, start_step, one_more

    def __iter__(self) -> Iterator[list[Place]]:
        for positions in self.share.micro_batches(self.start_step):
            more = [self.share.following(positions[-1])] if self.one_more else []
            yield [(position, self.order.index(position)) for position in (*positions, *more)]


class _Samples(Dataset[dict[str, Any]]):
    """Reads micro-batches, in a worker process. Gives dicts: their tensors are pinned, unlike those of a dataclass."""

    def __init__(
        self,
        store: Store,
        reads: Callable[[int], Reads],
        seed: int,
        allowed: int,
        global_batch_size: int,
        prompts: bool,
    ) -> None:
        self.store, self.reads, self.seed, self.allowed = store, reads, seed, allowed
        self.global_batch_size, self.prompts = global_batch_size, prompts

    def __getitems__(self, places: Sequence[Place]) -> dict[str, Any]:
        try:
            return self._micro_batch(places)
        except ReadError as error:  # an exception would arrive from a worker with its traceback for a message
            return {"unread": str(error)}

    def _micro_batch(self, places: Sequence[Place]) -> dict[str, Any]:
        reads = self.reads(places[0][0] // self.global_batch_size)  # a micro-batch is of one step
        picks = [reads.pick(self.store.index.times, generator(self.seed, "read", p)) for p, _ in places]
        bad: dict[str, str] = {}
        samples = []
        found = self.store.read_many([(i, pick) for (_, i), pick in zip(places, picks, strict=True)], self.prompts)
        for (_, i), pick, sample in zip(places, picks, found, strict=True):
            good = self._replacement(i, pick, bad, sample) if isinstance(sample, BadSample) else sample
            if good is None:
                return {"bad": bad}  # more than allowed: the loader stops at it
            samples.append(good)
        if not self.prompts:
            return {
                "bad": bad,
                "positions": [p for p, _ in places],
                "prompts": [],
                "next_prompts": [],
                **_stack(samples),
            }
        prompts = [s.prompt for s in samples]
        texts = {"prompts": prompts[:-1], "next_prompts": prompts[1:]}
        return {"bad": bad, "positions": [p for p, _ in places[:-1]], **texts, **_stack(samples[:-1])}

    def _replacement(self, i: int, pick: tuple[int, ...], bad: dict[str, str], first: BadSample) -> Sample | None:
        """The next good sample of the index after i; None once more are bad than allowed."""
        bad[self.store.key(i)] = str(first)
        for offset in range(1, self.allowed + 1):
            j = (i + offset) % len(self.store)
            sample = self.store.read_many([(j, pick)], self.prompts)[0]
            if not isinstance(sample, BadSample):
                return sample
            bad[self.store.key(j)] = str(sample)
        return None


def _stack(samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "states": torch.stack([s.states for s in samples]),  # [B, n, C, h, w]
        "times": torch.stack([s.times for s in samples]),  # [B, n]
        "conditioning": {k: torch.stack([s.conditioning[k] for s in samples]) for k in samples[0].conditioning},
        "guidance": torch.tensor([s.guidance for s in samples]),  # [B]
        "keys": [s.key for s in samples],
    }


def _as_it_is(found: Any) -> Any:
    return found
