"""Trajectory consistency: TCD (Zheng et al. 2024, arXiv 2402.19159), and in segments that merge TSCD, of Hyper-SD (Ren
et al. 2024, arXiv 2404.13686). With the ends of inference alone it is target-driven distillation (arXiv 2409.01347).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.diffusion.adversarial import AdversarialScalars, Adversary
from distill.diffusion.consistency import landing
from distill.diffusion.guidance import with_guidance
from distill.diffusion.losses import l2, pseudo_huber
from distill.diffusion.prediction import Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.segments import Segments
from distill.diffusion.solver import trailing_times
from distill.diffusion.tables import Table
from distill.diffusion.trajectory import Batch, Pair, Reads
from distill.methods.base import Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling

ENDS = ("uniform", "start", "inference")
DISTANCES = ("l2", "huber")


@dataclass(frozen=True)
class TCDStage:
    """A part of the run, of which the run takes `iterations` steps.

    Args:
        segments: M; a jump of the student stays within its segment. 1 is all of the path.
        adversarial: the weight of the student's loss against a "discriminator".
        learning_rate: the student's; None keeps the run's.
        fresh_optimizer: forgets the optimizer's state when the stage begins.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    segments: int
    iterations: int
    adversarial: float = 0.0
    learning_rate: float | None = None
    fresh_optimizer: bool = False

    def __post_init__(self) -> None:
        for key in ("segments", "iterations"):
            if getattr(self, key) < 1:
                raise ValueError(f"a stage's {key} must be at least 1, got {getattr(self, key)}")
        if not 0 <= self.adversarial < math.inf:
            raise ValueError(f"a stage's adversarial must be at least 0, got {self.adversarial}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"a stage's learning_rate must be above 0, got {self.learning_rate}")


class TCD(Method):
    """The student's one answer at x_t has to serve jumps to every later time e, the student its own target.

    Args:
        schedule: the teacher's.
        skip: k = t - s of a pair, which ends at the segment's start if that is nearer.
        segments: M of the whole run, 1 where nothing is said; with `stages` each has its own.
        stages: `TCDStage`s, or their arguments; segments that merge are TSCD. The last one lasts as long as the run.
        ends: where e comes from. `uniform`: the times start, start + k, ... s, each as likely (TCD, TSCD). `start`: the
            segment's start alone (LCM, PCM). `inference`: the next time, on the grid of k, of a sampler with one of
            `inference_steps` steps (target-driven distillation).
        inference_steps: those numbers of steps, each as likely.
        loss: `l2` (TCD) or `huber`, with constant `huber_c`.
        gamma: the share of fresh noise with which students are sampled, .3 where nothing is said.
        discriminator_learning_rate: None keeps the run's.
        adversarial_loss: one of `ADVERSARIAL_LOSSES`.
        renoise_times, renoise_weights: the discriminator sees clean samples at one of these times, with these odds, and
            samples of other times as they are.

    Raises:
        ValueError: a value out of its range, naming it, and the stage it is of.
    """

    title = "Trajectory consistency distillation"
    paper = "TCD (Zheng et al. 2024, arXiv 2402.19159) and Hyper-SD (Ren et al. 2024, arXiv 2404.13686)"
    tag = "tcd"

    def __init__(
        self,
        schedule: NoiseSchedule,
        skip: int = 20,
        segments: int | None = None,
        stages: list[TCDStage] | None = None,
        ends: str = "uniform",
        inference_steps: Sequence[int] = (4, 5, 6, 7, 8),
        loss: str = "l2",
        huber_c: float = 0.001,
        gamma: float | None = None,
        discriminator_learning_rate: float | None = None,
        adversarial_loss: str = "nonsaturating",
        renoise_times: Sequence[int] = (10, 250, 500, 750),
        renoise_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    ) -> None:
        self.schedule, self.skip, self.ends, self.distance, self.huber_c = schedule, skip, ends, loss, huber_c
        self.rate = discriminator_learning_rate
        self._check(inference_steps)
        if stages is not None and segments is not None:
            raise ValueError("method.segments is each stage's own where there are method.stages: leave it null")
        if stages is not None and not stages:
            raise ValueError("method.stages is empty: give at least one, or null")
        if segments is not None and not 1 <= segments <= schedule.T:
            raise ValueError(f"method.segments must be within 1 ... {schedule.T}, got {segments}")
        given = [TCDStage(segments or 1, 1)] if stages is None else stages
        self.stages = [_stage(i, stage, schedule) for i, stage in enumerate(given)]
        self.segments = {stage.segments: Segments(schedule.T, stage.segments) for stage in self.stages}
        lengths = [stage.iterations for stage in self.stages]
        self.starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        self.steps = None if stages is None else sum(lengths)
        self.nexts = Table(_nexts(schedule.T, skip, inference_steps))
        self.sampling = self._sampling(gamma)
        adversarial = any(stage.adversarial > 0 for stage in self.stages)
        self.trains = ("student", *["discriminator"] * adversarial)
        self.adversarial = AdversarialScalars() if adversarial else None
        try:
            self.adversary = Adversary(schedule, adversarial_loss, tuple(renoise_times), tuple(renoise_weights))
        except ValueError as error:
            raise ValueError(f"method.{error}") from None

    def _check(self, inference_steps: Sequence[int]) -> None:
        T = self.schedule.T
        if not 1 <= self.skip <= T or T % self.skip:
            raise ValueError(f"method.skip must divide the schedule's {T} times, got {self.skip}")
        if self.ends not in ENDS:
            raise ValueError(f"method.ends must be one of {', '.join(ENDS)}, got {self.ends!r}")
        if self.distance not in DISTANCES:
            raise ValueError(f"method.loss must be one of {', '.join(DISTANCES)}, got {self.distance!r}")
        if not 0 < self.huber_c < math.inf:
            raise ValueError(f"method.huber_c must be above 0, got {self.huber_c}")
        if not inference_steps or not all(1 <= n <= T for n in inference_steps):
            raise ValueError(f"method.inference_steps must be within 1 ... {T}, got {[*inference_steps]}")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"method.discriminator_learning_rate must be above 0, got {self.rate}")

    def _sampling(self, gamma: float | None) -> Sampling:
        """Of a student of segments, without noise from milestone to milestone, or on to those of fewer segments."""
        if len(self.stages) == 1 and self.stages[0].segments == 1:
            sampler, spacing, share = self.schedule.stochastic_sampling(gamma, "method.gamma")
            return Sampling(sampler, spacing, gamma=share)
        if gamma is not None:
            raise ValueError(
                "method.gamma is of students of one segment, and those of several are sampled without noise"
            )
        return Sampling("ddim", "trailing")

    def place(self, step: int) -> int:
        """Which stage a step is in."""
        return sum(step >= start for start in self.starts) - 1

    def reads(self, step: int = 0) -> Reads:
        return Pair(self.skip, self.segments[self.stages[self.place(step)].segments])

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        return self.stages[self.place(step)].learning_rate if network == "student" else self.rate

    def resets(self, step: int) -> bool:
        return step in self.starts[1:] and self.stages[self.place(step)].fresh_optimizer

    def turns(self, step: int) -> Iterable[Turn]:
        stage = self.stages[self.place(step)]
        if stage.adversarial > 0:
            yield Turn("discriminator", partial(self.discriminator_loss, stage))
        yield Turn("student", partial(self.loss, stage))

    def held_out(self, step: int) -> Turn:
        """The consistency alone: the adversarial loss measures no distance."""
        stage = replace(self.stages[self.place(step)], adversarial=0.0)
        return Turn("student", partial(self.loss, stage))

    def loss(self, stage: TCDStage, networks: Networks, batch: Batch, context: Context) -> Losses:
        """|| jump(x_t, t -> e) - jump⁻(x_s, s -> e) ||, e a time within t's segment (TCD, algorithm 2)."""
        step, end = batch.transition(), self.end(stage, batch, context)
        b = self.target(networks["student"], batch, end)
        a = self.lands(networks["student"], batch, end)

        d = l2(a, b) if self.distance == "l2" else pseudo_huber(a, b, self.huber_c)  # [B]
        total = d.mean()
        parts: dict[str, Tensor | float] = {"loss": total.detach()}
        if len(self.stages) > 1:
            parts["stage"] = float(self.stages.index(stage) + 1) if stage in self.stages else 0.0
        if stage.segments > 1:
            inside = self.segments[stage.segments].index(step.t)
            for i in range(stage.segments):
                parts[f"segment_{i + 1}"] = stage.segments * (d * (inside == i).to(d)).mean().detach()
        if stage.adversarial > 0:
            D, c = networks["discriminator"], with_guidance(batch.conditioning, 1.0, a)
            against = self.adversary.generator(D, a, c, context, (step.x_t, step.t), end).mean()
            total, parts["adversarial_loss"] = total + stage.adversarial * against, against.detach()
        return Losses(total, parts)

    def discriminator_loss(self, stage: TCDStage, networks: Networks, batch: Batch, context: Context) -> Losses:
        """Real is where the target lands, fake where the student does, both at e (Hyper-SD, section 3.1)."""
        step, end = batch.transition(), self.end(stage, batch, context)
        real = self.target(networks["student"], batch, end)
        with torch.no_grad():
            fake = self.lands(networks["student"], batch, end)
        D, c = networks["discriminator"], with_guidance(batch.conditioning, 1.0, fake)
        verdict = self.adversary.discriminator(D, real, fake, c, context, (step.x_t, step.t), end)
        loss = verdict.loss.mean()
        return Losses(loss, {"loss": loss.detach(), **verdict.accuracies()})

    def lands(self, student: Denoiser, batch: Batch, end: Tensor) -> Tensor:
        """Where the student's jump from x_t lands at `end` [B]. [B, C, h, w]"""
        step, c = batch.transition(), with_guidance(batch.conditioning, batch.guidance, batch.states)
        return landing(self.schedule, student, step.x_t, step.t, end, c)

    @torch.no_grad()
    def target(self, student: Denoiser, batch: Batch, end: Tensor) -> Tensor:
        """Where its jump from x_s lands, and x_s itself where that is at `end` [B] already. [B, C, h, w]"""
        step, c = batch.transition(), with_guidance(batch.conditioning, batch.guidance, batch.states)
        return landing(self.schedule, student, step.x_s, step.s, end, c)

    def end(self, stage: TCDStage, batch: Batch, context: Context) -> Tensor:
        """e [B], at random for each sample."""
        step = batch.transition()
        if self.ends == "start":
            return self.segments[stage.segments].start(step.t)
        return self.end_at(stage, step.t, step.s, context.uniform(0, 1, "e", step.t.device).double())

    def end_at(self, stage: TCDStage, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """The end that stands at the share u [B] in [0, 1) of those that a pair (t, s) [B] may have. [B]"""
        start = self.segments[stage.segments].start(t)
        if self.ends == "inference":
            nexts = self.nexts.on(t.device)  # [T + 1, n]
            place = (u * nexts.shape[1]).to(torch.int64)
            return torch.maximum(nexts[s, place], start)
        count = 1 + (s - start + self.skip - 1) // self.skip  # a pair that is cut at the start may lie off the grid
        return torch.minimum(start + self.skip * (u * count).to(torch.int64), s)


def _stage(i: int, stage: TCDStage | dict[str, Any], schedule: NoiseSchedule) -> TCDStage:
    try:
        stage = stage if isinstance(stage, TCDStage) else TCDStage(**stage)
        Segments(schedule.T, stage.segments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"method.stages[{i}]: {error}") from None
    return stage


def _nexts(T: int, skip: int, numbers: Sequence[int]) -> Tensor:
    """[T + 1, n]: at or below each time, the noisiest trailing time of each number of steps, on the grid of `skip`."""
    table = torch.zeros(T + 1, len(numbers), dtype=torch.int64)
    for column, steps in enumerate(numbers):
        grid = sorted({round(t / skip) * skip for t in trailing_times(T, steps)})
        for s in range(T + 1):
            table[s, column] = max(t for t in grid if t <= s)
    return table
