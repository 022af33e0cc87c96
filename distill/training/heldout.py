"""The student's loss on teacher solves that it does not learn from, beside its loss on as many of those that it does.

The first keeps falling while the student learns what holds for any prompt and noise. Where it stays behind the second,
the store is too small: more solves help then, and more steps do not. `distill trajectories` writes the held-out ones,
a small store within the store, so that training has the same data, in the same order, with them and without.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from distill.data.errors import ReadError, StoreError
from distill.data.reader import Store
from distill.data.record import BadSample, Sample
from distill.diffusion.random import Context, generator, seed_of
from distill.diffusion.trajectory import Batch
from distill.methods.base import HELDOUT, Method
from distill.training.engine import Engine
from distill.training.processes import Processes

log = logging.getLogger("distill")

TRAINING = "validation/training_loss"
REPEATS = 4
"""How often each solve is measured, each time with its own states and noise."""
MOST_AT_ONCE = 32


@dataclass(frozen=True)
class HeldOutLoss:
    """Measures a method's loss without training, on two stores that are read at the same places.

    States and noise are the same at every step, and on any number of ranks, which share the work. Of images of several
    sizes, both losses are of as many samples of each size, and a batch is of one.

    Args:
        method: its `held_out` says which loss.
        heldout: solves that are not learned from.
        training: those that are; as many of them are measured, evenly spaced.
        seed: the run's.
        most_at_once: samples in one call of a network; those of a training step fit in any case.
    """

    method: Method
    heldout: Store
    training: Store
    seed: int
    most_at_once: int = MOST_AT_ONCE

    def __call__(self, engine: Engine, step: int) -> dict[str, float]:
        """The two losses after `step` steps, on all ranks alike; see `parts`."""
        return {name: mean_of(parts) for name, parts in self.parts(engine, step).items()}

    def parts(self, engine: Engine, step: int) -> dict[str, list[tuple[float, int]]]:
        """Of each of the two losses (loss, samples) of each batch, on all ranks alike; none where the method has no
        such loss.

        What cannot be read is a warning, and nothing is measured this time.
        """
        last = max(0, step - 1)  # the loss of that step is the one that is being trained
        turn = self.method.held_out(last)
        if turn is None:
            return {}
        processes: Processes = engine.processes
        found: dict[str, list[tuple[float, int]]] = {}
        heldout, evenly, sizes = self._samples()
        places = self._shares(sizes, engine.processes.rank, engine.processes.world_size)
        if not places:
            log.warning("%s is not measured at step %d: no held-out solve has a size that is learned", HELDOUT, step)
            return {}
        for name, store, samples in ((HELDOUT, self.heldout, heldout), (TRAINING, self.training, evenly)):
            batches, problem = self._read(store, samples, places, last)
            if processes.any(problem is not None):
                if problem is not None:
                    log.warning("%s is not measured at step %d: %s", name, step, problem)
                return {}
            context = [Context(seed_of(self.seed, "held out"), 0, batch.positions) for batch in batches.values()]
            measured = engine.measure(turn, list(batches.values()), context)
            parts = {part: (loss, len(batches[part])) for part, loss in zip(batches, measured, strict=True)}
            losses = dict(pair for one in processes.gathered(list(parts.items())) for pair in one)
            found[name] = [losses[part] for part in sorted(losses)]
        return found

    def _samples(self) -> tuple[list[int], list[int], list[int]]:
        """The held-out samples, as many training samples evenly spaced among those of their size, and how many are of
        each size, one size after another; sizes that the training lacks are left out.
        """
        learned, texts = self.training.by_size(), self.training.index.image_sizes
        known = {texts[number]: samples for number, samples in learned.items()}
        heldout, evenly, counts = [], [], []
        for number, samples in self.heldout.by_size().items():
            among = known.get(self.heldout.index.image_sizes[number])
            if among is not None:
                n = len(samples)
                heldout += samples.tolist()
                evenly += [int(among[i * len(among) // n]) for i in range(n)]
                counts.append(n)
        return heldout, evenly, counts

    def _shares(self, sizes: Sequence[int], rank: int, ranks: int) -> dict[int, range]:
        """This rank's batches, by their number: all ranks have as many, under ZeRO-3 they call networks together.

        Args:
            sizes: how many samples in a row are of one size.
        """
        parts, begin = [], 0
        for end in accumulate(n * REPEATS for n in sizes):
            parts += [range(at, min(at + self.most_at_once, end)) for at in range(begin, end, self.most_at_once)]
            begin = end
        if not parts:
            return {}
        mine = [(rank + i * ranks) % len(parts) for i in range(-(-len(parts) // ranks))]
        return {part: parts[part] for part in mine}

    def _read(
        self, store: Store, samples: Sequence[int], places: Mapping[int, range], step: int
    ) -> tuple[dict[int, Batch], Exception | None]:
        """This rank's batches by their number, or why there are none."""
        reads, batches = self.method.reads(step), {}
        try:
            for part, numbers in places.items():
                picks = [reads.pick(store.index.times, generator(self.seed, "held out", i)) for i in numbers]
                wanted = [(samples[i // REPEATS], pick) for i, pick in zip(numbers, picks, strict=True)]
                found = store.read_many(wanted)
                if bad := next((one for one in found if isinstance(one, BadSample)), None):
                    raise bad
                good = [one for one in found if not isinstance(one, BadSample)]
                batches[part] = _batch_of(store, good, tuple(numbers))
        except (StoreError, ReadError) as error:
            return {}, error
        return batches, None


def mean_of(parts: Sequence[tuple[float, int]]) -> float:
    """The mean over samples of the means (loss, samples) of batches."""
    return sum(loss * size for loss, size in parts) / sum(size for _, size in parts)


def _batch_of(store: Store, samples: Sequence[Sample], positions: tuple[int, ...]) -> Batch:
    conditioning = {name: torch.stack([one.conditioning[name] for one in samples]) for name in samples[0].conditioning}
    empty = {name: x.expand(len(samples), *x.shape[1:]) for name, x in store.unconditional.items()}
    return Batch(
        states=torch.stack([one.states for one in samples]),
        times=torch.stack([one.times for one in samples]),
        conditioning=conditioning,
        unconditional={**conditioning, **empty} if empty else {},  # time ids and the like are those of the prompt
        guidance=torch.tensor([one.guidance for one in samples]),
        positions=positions,
    )
