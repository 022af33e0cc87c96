"""The student's samples beside held-out solves of the teacher: how far they are, one by one and as a distribution.

Both are measured without labels, with the weights that an export has. From a solve's own noise and conditioning the
student generates, and where it ends is compared with where the solve ends.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.errors import ReadError, StoreError
from distill.data.reader import Store
from distill.data.record import BadSample, Sample
from distill.diffusion.guidance import with_guidance
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Denoiser
from distill.diffusion.random import seed_of, starting_noise
from distill.diffusion.schedule import NoiseSchedule
from distill.methods.base import CONSISTENCY, DISTANCE
from distill.methods.sampling import Sampling, sample
from distill.training.engine import Engine
from distill.training.heldout import MOST_AT_ONCE

log = logging.getLogger("distill")

FEWEST = 4
"""Solves of one size from which the distance of two distributions can be measured."""
Ends = tuple[Tensor, Tensor]
"""Where the student ends and where the solves end, clean latents [B, C, h, w] on the CPU."""


@dataclass(frozen=True)
class HeldOutSamples:
    """Generates from held-out solves; the ranks share the work.

    Args:
        heldout: solves that are not learned from. Of clean latents alone there is no noise to begin with, and only the
            distributions are compared.
        schedule: the teacher's.
        sampling: how the method's students are sampled, in `steps` where that leaves their number open.
        seed: the run's, of noise.
        most_at_once: samples in one call of the network.
    """

    heldout: Store
    schedule: NoiseSchedule
    sampling: Sampling
    steps: int
    seed: int
    most_at_once: int = MOST_AT_ONCE

    def __call__(self, engine: Engine, step: int) -> dict[str, list[float]]:
        """What each measure is of every solve, on all ranks alike; the measure is the mean.

        `CONSISTENCY` is the mean squared difference of a latent's elements from the solve's end, `DISTANCE` the energy
        distance of the samples from the solves' ends as distributions (`energy_terms`). What cannot be read is a
        warning, and nothing is measured this time.
        """
        processes, batches = engine.processes, self._batches()
        ranks = processes.world_size  # each takes as many batches: under ZeRO-3 they call the network together
        mine = [(processes.rank + i * ranks) % len(batches) for i in range(-(-len(batches) // ranks))]
        read, problem = self._read([batches[place] for place in mine])
        if processes.any(problem is not None):
            if problem is not None:
                log.warning("the student is not compared with held-out solves at step %d: %s", step, problem)
            return {}
        own: list[tuple[int, Ends]] = []
        with engine.inference("student", ema=engine.has_ema("student")) as student:
            for place, samples in zip(mine, read, strict=True):
                own.append((place, self._ends(student, batches[place], samples, processes.device)))
        found = dict(pair for part in processes.gathered(own) for pair in part)
        return measured([found[place] for place in sorted(found)], self._has_noise)

    @property
    def _has_noise(self) -> bool:
        return self.heldout.index.times[0] == self.schedule.T

    def _batches(self) -> list[list[int]]:
        """The solves, of one size in each batch."""
        by_size = [samples.tolist() for samples in self.heldout.by_size().values()]
        return [own[at : at + self.most_at_once] for own in by_size for at in range(0, len(own), self.most_at_once)]

    def _read(self, batches: Sequence[Sequence[int]]) -> tuple[list[list[Sample]], Exception | None]:
        states = (0, len(self.heldout.index.times) - 1)
        found = []
        try:
            for batch in batches:
                samples = self.heldout.read_many([(i, states) for i in batch])
                if bad := next((one for one in samples if isinstance(one, BadSample)), None):
                    raise bad
                found.append([one for one in samples if not isinstance(one, BadSample)])
        except (StoreError, ReadError) as error:
            return [], error
        return found, None

    def _ends(self, student: Denoiser, places: Sequence[int], samples: Sequence[Sample], device: torch.device) -> Ends:
        first, ends = torch.stack([one.states.float() for one in samples], dim=1)  # [B, C, h, w] each
        generators = [torch.Generator().manual_seed(seed_of(self.seed, "held-out sample", i)) for i in places]
        x = first if self._has_noise else starting_noise(generators, tuple(ends.shape[1:]))
        conditioning = {
            name: torch.stack([one.conditioning[name] for one in samples]).to(device)
            for name in samples[0].conditioning
        }
        w = torch.tensor([one.guidance for one in samples], device=device)
        x, how = x.to(device), self.sampling
        times = how.times(self.schedule.T, self.steps)
        c = with_guidance(conditioning, w, x)
        found = sample(student, self.schedule, x, times, c, how.sampler, generators, how.gamma)
        return found.float().cpu(), ends


def measured(batches: Sequence[Ends], paired: bool) -> dict[str, list[float]]:
    """Each measure's value of every solve; of pictures of several sizes the distances are within a size.

    Args:
        paired: whether each sample was made from the noise of its solve.
    """
    by_shape: dict[tuple[int, ...], list[Ends]] = {}
    for samples, ends in batches:
        by_shape.setdefault(tuple(ends.shape[1:]), []).append((samples, ends))
    found: dict[str, list[float]] = {}
    for alike in by_shape.values():
        samples, ends = (torch.cat(parts).double() for parts in zip(*alike, strict=True))
        if paired:
            found.setdefault(CONSISTENCY, []).extend(l2(samples, ends).tolist())
        if len(samples) >= FEWEST:
            found.setdefault(DISTANCE, []).extend(energy_terms(samples, ends).tolist())
    return found


def energy_terms(x: Tensor, y: Tensor) -> Tensor:
    """Terms [n] whose mean is the energy distance of the distributions of x and y, [n, ...] each (Székely and Rizzo
    2013): 2 E|x - y| - E|x - x'| - E|y - y'|, over the root of the elements' number.

    It is 0, on average over samples, where they are one, and may then be below. x_i and y_i may depend on each other:
    no pair of one place is compared.
    """
    n, scale = len(x), x[0].numel() ** 0.5
    x, y = x.flatten(1), y.flatten(1)
    cross, within_x, within_y = torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)
    cross = cross + cross.T
    others = 1 - torch.eye(n, dtype=cross.dtype)
    return ((cross - within_x - within_y) * others).sum(1) / (n - 1) / scale
