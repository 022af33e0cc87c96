"""Teacher trajectories as data: what a stored solve is, which of its states a method reads, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from distill.diffusion.prediction import Conditioning
from distill.diffusion.segments import Segments


@dataclass(frozen=True)
class Trajectory:
    """The kept states of teacher ODE solves, one for each of B prompts.

    `states` [B, K, C, h, w] at the falling `times` [K]; `guidance` [B] is the w that each was solved with; `seeds` [B]
    made their starting noise.
    """

    states: Tensor
    times: tuple[int, ...]
    conditioning: Conditioning
    guidance: Tensor
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Transition:
    """A step along one trajectory, from x_t at t to x_s at s < t. States [B, C, h, w], times [B]."""

    x_t: Tensor
    t: Tensor
    x_s: Tensor
    s: Tensor


@dataclass(frozen=True)
class Batch:
    """What a method's loss sees: for each of B samples the n states that the method reads.

    `states` [B, n, C, h, w] at `times` [B, n] (int64); `conditioning` and `unconditional` hold the network's keyword
    tensors [B, ...], the latter none where guidance takes no second pass; `guidance` [B] is the teacher's w;
    `positions` are places in the stream of global batches; `prompts` are there for a method that needs them, and with
    them `next_prompts`: of each sample, that of the next one in its global batch (after the last comes the first),
    which may be in another micro-batch or on another rank.
    """

    states: Tensor
    times: Tensor
    conditioning: Conditioning
    unconditional: Conditioning
    guidance: Tensor
    keys: tuple[str, ...] = field(default=())
    positions: tuple[int, ...] = field(default=())
    prompts: tuple[str, ...] = field(default=())
    next_prompts: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            states=move(self.states),
            times=move(self.times),
            conditioning={k: move(v) for k, v in self.conditioning.items()},
            unconditional={k: move(v) for k, v in self.unconditional.items()},
            guidance=move(self.guidance),
        )

    def transition(self, i: int = 0, j: int = 1) -> Transition:
        """The i-th and j-th of the states read, as a step of the teacher's solver."""
        return Transition(self.states[:, i], self.times[:, i], self.states[:, j], self.times[:, j])


class Reads(Protocol):
    """Which states of a stored trajectory a method wants; the reader fetches those bytes only."""

    def check(self, times: Sequence[int]) -> None:
        """Raises ValueError if a trajectory stored at `times` cannot serve this."""

    def pick(self, times: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
        """Places in `times` of the states to fetch, chosen at random with `generator`."""


@dataclass(frozen=True)
class Pair:
    """Two states, x_t and the one `skip` later in the solve, uniformly among all t that have one.

    From times nearer to clean data than `skip` it is the clean end itself, and with `segments` (milestones) none spans
    the start of t's segment. So every stored time is trained, and every chain of pairs runs down to the start. With the
    solver's own step as `skip` a pair is one step of the solver; a longer one spans several, no less exactly, since
    both states lie on the solve. With `apart` t is one of its multiples.
    """

    skip: int
    segments: Segments | None = None
    apart: int | None = None
    lowest: int = 1

    def check(self, times: Sequence[int]) -> None:
        if all(t - self.skip not in times for t in times if t >= self.lowest):
            raise ValueError(f"skip {self.skip} is off the stored grid: no two of {_short(times)} lie so far apart")
        if self.segments and (missing := sorted(set(self.segments.milestones) - set(times))):
            raise ValueError(f"the segments start at {missing}, which the store does not keep: it has {_short(times)}")
        if self.apart and (missing := sorted(set(range(0, max(times) + 1, self.apart)) - set(times))):
            raise ValueError(f"the store does not keep the times {missing}: it has {_short(times)}")

    def pick(self, times: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
        pairs = self._pairs(tuple(times))
        return pairs[int(torch.randint(len(pairs), (), generator=generator))]

    @lru_cache(maxsize=64)  # noqa: B019 - a few objects, which last as long as the run
    def _pairs(self, times: tuple[int, ...]) -> list[tuple[int, int]]:
        place = {int(t): i for i, t in enumerate(times)}
        starts = [t for t in place if t >= self.lowest and (self.apart is None or t % self.apart == 0)]
        ends = self.segments.start(torch.tensor(starts)).tolist() if self.segments else [0] * len(starts)
        follows = {t: max(t - self.skip, end) for t, end in zip(starts, ends, strict=True)}
        return [(place[t], place[s]) for t, s in follows.items() if s in place]


@dataclass(frozen=True)
class Steps:
    """Two states, at the times (t, s) of one of `pairs`, with odds `weights`; without these each is as likely.

    Raises:
        ValueError: weights that are not one for each pair, negative, or all 0.
    """

    pairs: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        if len(self.weights) != len(self.pairs):
            raise ValueError(f"weights must be {len(self.pairs)} as the pairs are, got {list(self.weights)}")
        if not all(0 <= w < math.inf for w in self.weights) or sum(self.weights) == 0:
            raise ValueError(f"weights must not be negative, nor all 0, got {list(self.weights)}")

    def check(self, times: Sequence[int]) -> None:
        odds = self.weights or (1.0,) * len(self.pairs)
        read = {t for pair, weight in zip(self.pairs, odds, strict=True) if weight > 0 for t in pair}
        if missing := sorted(read - set(times)):
            raise ValueError(f"the store does not keep the times {_short(missing)}: it has {_short(times)}")

    def pick(self, times: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
        place = {int(t): i for i, t in enumerate(times)}
        t, s = self.pairs[self._chosen(generator)]
        return place[t], place[s]

    def _chosen(self, generator: torch.Generator) -> int:
        if self.weights is None:
            return int(torch.randint(len(self.pairs), (), generator=generator))
        return int(torch.multinomial(torch.tensor(self.weights, dtype=torch.float64), 1, generator=generator))


@dataclass(frozen=True)
class CleanEnd:
    """The end of the solve: the clean latent at time 0."""

    def check(self, times: Sequence[int]) -> None:
        if 0 not in tuple(times):
            raise ValueError(f"the store keeps no clean latent: its times {_short(times)} lack 0")

    def pick(self, times: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
        return (tuple(times).index(0),)


def _short(times: Sequence[int]) -> str:
    times = [int(t) for t in times]
    return str(times) if len(times) <= 8 else f"[{times[0]}, {times[1]}, … {times[-2]}, {times[-1]}]"
