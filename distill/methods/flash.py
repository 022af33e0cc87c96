"""Flash Diffusion (Chadebec et al. 2024, arXiv 2406.02347): from a few noise levels straight to where the teacher ends.

The teacher's solve of every sample is a stored one. Beside the distance from its end there may be an adversarial loss,
and distribution matching in which the student is its own fake score. A curriculum visits the times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from distill.diffusion.adversarial import AdversarialScalars, Adversary
from distill.diffusion.consistency import landing, where
from distill.diffusion.guidance import guided, with_guidance
from distill.diffusion.losses import l2, pseudo_huber
from distill.diffusion.matching import matching_loss, matching_time
from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise, wide
from distill.diffusion.solver import trailing_times
from distill.diffusion.tables import Table
from distill.diffusion.trajectory import Batch, CleanEnd, Reads, Steps
from distill.methods.base import Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling

SOURCES = ("trajectory", "noised")
DISTANCES = ("l2", "huber", "perceptual")


@dataclass(frozen=True)
class FlashStage:
    """A part of the run, of which the run takes `iterations` steps.

    Args:
        odds: of the method's times, in their order.
        distillation, matching, adversarial: weights of the distance from the teacher's end, of distribution matching
            and of the adversarial loss. A term of weight 0 calls no network.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    iterations: int
    odds: tuple[float, ...]
    distillation: float = 1.0
    matching: float = 0.0
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "odds", tuple(self.odds))
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if not all(0 <= odd < math.inf for odd in self.odds) or sum(self.odds) == 0:
            raise ValueError(f"odds must not be negative, nor all 0, got {list(self.odds)}")
        for key in ("distillation", "matching", "adversarial"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be at least 0, got {getattr(self, key)}")
        if not self.distillation + self.matching + self.adversarial:
            raise ValueError("distillation, matching and adversarial are all 0: one of them has to be above")


class Flash(Method):
    """The end of the teacher's solve in one step, from one of a few times (Flash Diffusion, algorithm 1).

    Args:
        schedule: the teacher's.
        stages: `FlashStage`s, or their arguments.
        times: from which the student answers, falling; None is T, 3/4 T, T/2 and T/4.
        source: of x_t and of where the teacher ends. `trajectory`: two states of one stored solve, at the stored
            guidance, which is that of the matching too. `noised`: noised clean latents, from which the teacher solves
            in `teacher_steps` DDIM steps to clean data, in every step of training (the paper).
        teacher_steps: K of the noised source, as many from every time.
        w_min, w_max: guidance of the noised source, uniform for each sample; trajectories have their own.
        distance: of the student's answer from the teacher's end: `l2`, `huber` (with `huber_c`), or `perceptual`, the
            one of latents that the run is given (the paper: LPIPS).
        discriminator_learning_rate: None keeps the run's.
        adversarial_loss: one of `distill.diffusion.adversarial.ADVERSARIAL_LOSSES`; the paper's is `least_squares`.
        renoise_times, renoise_weights: the discriminator sees samples at one of these times (for flow matching, of
            Stable Diffusion's by their signal-to-noise ratio), with these odds.

    Raises:
        ValueError: a value out of its range, naming it, and the stage it is of.
    """

    title = "Flash distillation"
    paper = "Flash Diffusion (Chadebec et al. 2024, arXiv 2406.02347)"
    tag = "flash"

    def __init__(
        self,
        schedule: NoiseSchedule,
        stages: list[FlashStage],
        times: Sequence[int] | None = None,
        source: str = "trajectory",
        teacher_steps: int = 32,
        w_min: float = 3.0,
        w_max: float = 13.0,
        distance: str = "l2",
        huber_c: float = 0.001,
        discriminator_learning_rate: float | None = None,
        adversarial_loss: str = "least_squares",
        renoise_times: Sequence[int] = (10, 250, 500, 750),
        renoise_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    ) -> None:
        T, rate = schedule.T, discriminator_learning_rate
        if source not in SOURCES:
            raise ValueError(f"method.source must be one of {', '.join(SOURCES)}, got {source!r}")
        if distance not in DISTANCES:
            raise ValueError(f"method.distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
        if not 1 <= teacher_steps <= T:
            raise ValueError(f"method.teacher_steps must be within 1 ... {T}, got {teacher_steps}")
        if not 0 <= w_min <= w_max < math.inf:
            raise ValueError(f"method.w_min and w_max must satisfy 0 <= w_min <= w_max, got {w_min} and {w_max}")
        for key, value in {"huber_c": huber_c, "discriminator_learning_rate": rate}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"method.{key} must be above 0, got {value}")
        self.schedule, self.source, self.teacher_steps, self.rate = schedule, source, teacher_steps, rate
        self.w_min, self.w_max, self.distance, self.huber_c = w_min, w_max, distance, huber_c
        self.times = _times(T, times)
        self.table = Table(self.times)
        self.stages = _stages(stages, len(self.times))
        self.shares = {stage.odds: _shares(stage.odds) for stage in self.stages}
        *lengths, last = [stage.iterations for stage in self.stages]
        self.starts, self.steps = tuple(accumulate(lengths, initial=0)), sum(lengths) + last
        try:
            self.adversary = Adversary(schedule, adversarial_loss, tuple(renoise_times), tuple(renoise_weights))
        except ValueError as error:
            raise ValueError(f"method.{error}") from None
        self.sampling = Sampling(schedule.usual_sampling[0], "trailing")
        adversarial, matched, near = (
            any(getattr(stage, key) > 0 for stage in self.stages) for key in ("adversarial", "matching", "distillation")
        )
        self.trains = ("student", "discriminator") if adversarial else ("student",)
        self.adversarial = AdversarialScalars() if adversarial else None
        self.requires = ("teacher",) if matched or (near and source == "noised") else ()
        self.guidance = (w_min, w_max) if self.requires and source == "noised" else None
        self.requires += ("perceptual",) if near and distance == "perceptual" else ()

    def place(self, step: int) -> int:
        """Which stage a step is in; the last one lasts as long as the run does."""
        return sum(step >= start for start in self.starts) - 1

    def reads(self, step: int = 0) -> Reads:
        if self.source == "noised":
            return CleanEnd()
        return Steps(tuple((t, 0) for t in self.times), self.stages[self.place(step)].odds)

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        return self.rate if network == "discriminator" else None

    def turns(self, step: int) -> Iterable[Turn]:
        place = self.place(step)
        stage = self.stages[place]

        def loss(networks: Networks, batch: Batch, context: Context) -> Losses:
            losses = self.loss(stage, networks, batch, context)
            return Losses(losses.total, {**losses.parts, "stage": float(place + 1)})

        if stage.adversarial > 0:
            yield Turn("discriminator", partial(self.discriminator_loss, stage))
        yield Turn("student", loss)

    def held_out(self, step: int) -> Turn:
        """The distance alone: the other terms are no measure of what holds for new prompts and noise."""
        stage = replace(self.stages[self.place(step)], distillation=1.0, matching=0.0, adversarial=0.0)
        return Turn("student", partial(self.loss, stage))

    def loss(self, stage: FlashStage, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The weighted sum of the terms of a stage, each of the student's x0 at x_t (Flash Diffusion, eq. 9)."""
        x_t, t, w = self.state(stage, batch, context)
        c = with_guidance(batch.conditioning, w, x_t)
        terms: dict[str, tuple[float, Tensor]] = {}
        x_0 = self.end(networks, batch, x_t, t, w) if stage.distillation > 0 else None
        x = networks["student"](x_t, t, c).x0
        if x_0 is not None:
            terms["distillation"] = stage.distillation, self.d(networks, x, x_0).mean()
        if stage.matching > 0:
            real = guided(networks["teacher"], batch.unconditional, w)
            at, noise = matching_time(self.schedule.T, context, x.device), context.normal(x, "noise'")
            matched = matching_loss(self.schedule, real, networks["student"], x, at, noise, c)
            terms["matching"] = stage.matching, matched.mean()
        if stage.adversarial > 0:
            judged = with_guidance(batch.conditioning, 1.0, x)
            game = self.adversary.generator(networks["discriminator"], x, judged, context, (x_t, t))
            terms["adversarial"] = stage.adversarial, game.mean()
        total = sum((weight * term for weight, term in terms.values()), torch.zeros((), device=x.device))
        parts = {f"{name}_loss": term.detach() for name, (_, term) in terms.items()}
        return Losses(total, {"loss": total.detach(), **parts})

    def discriminator_loss(self, stage: FlashStage, networks: Networks, batch: Batch, context: Context) -> Losses:
        """Real are the clean latents of the store, fake the student's answers, both noised alike (the paper, eq. 7)."""
        x_t, t, w = self.state(stage, batch, context)
        with torch.no_grad():
            fake = networks["student"](x_t, t, with_guidance(batch.conditioning, w, x_t)).x0
        c = with_guidance(batch.conditioning, 1.0, fake)
        verdict = self.adversary.discriminator(
            networks["discriminator"], batch.states[:, -1], fake, c, context, (x_t, t)
        )
        loss = verdict.loss.mean()
        return Losses(loss, {"loss": loss.detach(), **verdict.accuracies()})

    def d(self, networks: Networks, a: Tensor, b: Tensor) -> Tensor:
        """The distance of two clean latents, [B]."""
        if self.distance == "perceptual":
            return networks["perceptual"](a, b)
        return l2(a, b) if self.distance == "l2" else pseudo_huber(a, b, self.huber_c)

    def state(self, stage: FlashStage, batch: Batch, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """x_t [B, C, h, w], t and the teacher's w, [B] each."""
        if self.source == "trajectory":
            step = batch.transition()
            return step.x_t, step.t, batch.guidance
        x_0, device = batch.states[:, 0], batch.states.device
        shares = self.shares[stage.odds].on(device)
        t = self.table.on(device)[torch.bucketize(context.uniform(0, 1, "t", device).double(), shares, right=True)]
        noise = context.normal(x_0, "noise")
        x_t = where(t == self.schedule.T, noise, add_noise(self.schedule, x_0, noise, t))  # at T no data at all
        return x_t, t, context.uniform(self.w_min, self.w_max, "w", device)

    @torch.no_grad()
    def end(self, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """Where the teacher's solve from x_t ends, [B, C, h, w]."""
        if self.source == "trajectory":
            return wide(batch.states[:, -1])
        return self.solved(guided(networks["teacher"], batch.unconditional, w), batch.conditioning, x_t, t)

    def solved(self, teacher: Denoiser, c: Conditioning, x: Tensor, t: Tensor) -> Tensor:
        """The end of `teacher_steps` DDIM steps of equal length in time."""
        K = self.teacher_steps
        for i in range(K):
            here, there = (t * (K - j) // K for j in (i, i + 1))
            x = landing(self.schedule, teacher, x, here, there, c)
        return x


def _times(T: int, times: Sequence[int] | None) -> tuple[int, ...]:
    times = trailing_times(T, 4)[:-1] if times is None else list(times)
    if not times or not all(1 <= t <= T for t in times) or times != sorted(set(times), reverse=True):
        raise ValueError(f"method.times must fall within {T} ... 1, got {times}")
    return tuple(times)


def _shares(odds: Sequence[float]) -> Table:
    """Where in [0, 1) the share of each time ends, but for the last."""
    return Table((torch.tensor(odds, dtype=torch.float64).cumsum(0) / sum(odds))[:-1])


def _stages(stages: Sequence[FlashStage | dict[str, Any]], times: int) -> list[FlashStage]:
    if not stages:
        raise ValueError("method.stages is empty: give at least one")
    built = []
    for i, stage in enumerate(stages):
        try:
            built.append(stage if isinstance(stage, FlashStage) else FlashStage(**stage))
            if len(built[-1].odds) != times:
                raise ValueError(f"odds must be {times}, one for each of method.times, got {list(built[-1].odds)}")
        except ValueError as error:
            raise ValueError(f"method.stages[{i}]: {error}") from None
    return built
