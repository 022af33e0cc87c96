"""Continuous-time consistency along stored solves: sCM (Lu & Song 2024, arXiv 2410.11081), and rCM (Zheng et al. 2025,
arXiv 2510.08431), which adds distribution matching on the student's own samples.

Of both papers' derivative along the teacher's ODE the difference over one stored solver step takes the place: no
Jacobian-vector product, no teacher in memory for sCM, and no skip to find. States of the teacher's own solves, in the
place of noised pictures, are also TBCM's (arXiv 2511.20410).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from distill.diffusion.angles import angle, cosine, velocity, velocity_of_step
from distill.diffusion.consistency import where
from distill.diffusion.guidance import guided, with_guidance
from distill.diffusion.losses import l2
from distill.diffusion.matching import denoising_loss, matching_loss, matching_time
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, wide
from distill.diffusion.simulation import simulated_state
from distill.diffusion.solver import trailing_times
from distill.diffusion.tables import Table
from distill.diffusion.trajectory import Batch, Pair, Reads, Transition
from distill.methods.base import Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling


class SCM(Method):
    """The student's velocity F follows the direction in which its answer changes along the ODE (sCM, algorithm 1).

    Args:
        schedule: the teacher's. Any: states are taken as angles (`distill.diffusion.angles`).
        skip: t - s of the two states whose difference is taken, in units of time: one solver step.
        times_from: the lowest t of a pair. Near clean data a step spans so much of the angle that the difference is no
            derivative: by 8 % at t = 200 and by 20 % at 60, for a skip of 20 of Stable Diffusion's times.
        c: the tangent g becomes g / (rms(g) + c): smaller is nearer to one length for all samples (the paper's 0.1).
        tangent_warmup: steps in which the tangent turns from denoising towards the teacher to consistency (r of the
            paper rises from 0 to 1; its runs from scratch have 10,000).

    Raises:
        ValueError: a value out of its range, naming it.
    """

    title = "Continuous-time consistency"
    paper = "sCM (Lu & Song 2024, arXiv 2410.11081)"
    tag = "continuous-time-consistency"

    def __init__(
        self, schedule: NoiseSchedule, skip: int = 20, times_from: int = 1, c: float = 0.1, tangent_warmup: int = 0
    ) -> None:
        if not 1 <= skip <= schedule.T:
            raise ValueError(f"method.skip must be within 1 ... {schedule.T}, got {skip}")
        if not 1 <= times_from <= schedule.T:
            raise ValueError(f"method.times_from must be within 1 ... {schedule.T}, got {times_from}")
        if not 0 < c < math.inf:
            raise ValueError(f"method.c must be above 0, got {c}")
        if tangent_warmup < 0:
            raise ValueError(f"method.tangent_warmup must be at least 0, got {tangent_warmup}")
        self.schedule, self.c, self.tangent_warmup = schedule, c, tangent_warmup
        self.pair = Pair(skip, lowest=times_from)
        self.sampling = Sampling(schedule.usual_sampling[0], "trailing")

    def reads(self, step: int = 0) -> Reads:
        return self.pair

    def turns(self, step: int) -> Iterable[Turn]:
        return (Turn("student", self.loss),)

    def held_out(self, step: int) -> Turn | None:
        """The tangent's size: a loss whose gradient is of one length has one size as well, and measures nothing."""
        return Turn("student", self.squared_tangent)

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """|| F - sg(F) - g / (rms(g) + c) ||², whose value is nearly the same whatever the error is (sCM, eq. 8)."""
        step, F, f_s, denoised = self.answers(networks["student"], batch)
        with torch.no_grad():
            g = self.tangent(step, denoised, f_s, self.warmed(context.step))
        loss = l2(F - F.detach(), normalised(g, self.c)).mean()
        return Losses(loss, {"loss": loss.detach(), "tangent": rms(g).mean()})

    def squared_tangent(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The mean square of g, which is 0 where the student is consistent."""
        step, _, f_s, denoised = self.answers(networks["student"], batch)
        loss = rms(self.tangent(step, denoised, f_s)).pow(2).mean()
        return Losses(loss, {"loss": loss.detach()})

    def answers(self, student: Denoiser, batch: Batch) -> tuple[Transition, Tensor, Tensor, Denoised]:
        """The pair; at x_t the student's F; its x0 at x_s, without a gradient; and all that it said at x_t."""
        step, c = batch.transition(), self.conditioning(batch)
        with torch.no_grad():  # first, while no activations are held for the backward pass
            f_s = where(step.s == 0, wide(step.x_s), student(step.x_s, step.s, c).x0)
        denoised = student(step.x_t, step.t, c)
        return step, velocity(self.schedule, denoised, step.t), f_s, denoised

    def tangent(self, step: Transition, denoised: Denoised, f_s: Tensor, r: float = 1.0) -> Tensor:
        """g = cos(phi) d x0 / d phi by the difference along the pair; at r = 0 cos²(phi) (v - F) of the teacher's v.

        Between them it is their mean, which is the paper's -cos² (F - v) - r cos sin (x + dF/dphi), its eq. 6 and
        algorithm 1. [B, ...]
        """
        x0 = denoised.x0
        h = angle(self.schedule, step.t, x0) - angle(self.schedule, step.s, x0)
        cos = cosine(self.schedule, step.t, x0)
        g = cos * (x0 - f_s) / h
        if r == 1:
            return g
        v = velocity_of_step(self.schedule, step.x_t, step.t, step.x_s, step.s)
        return r * g + (1 - r) * cos.pow(2) * (v - velocity(self.schedule, denoised, step.t))

    def warmed(self, step: int) -> float:
        """r of the paper at a step."""
        return 1.0 if step >= self.tangent_warmup else step / self.tangent_warmup

    def conditioning(self, batch: Batch) -> Conditioning:
        """The student's, with the w of its trajectories."""
        return with_guidance(batch.conditioning, batch.guidance, batch.states)


class RCM(SCM):
    """sCM, and every few steps distribution matching on samples of 1 to N steps of the student's (rCM, sec. 4).

    Args (beside those of `SCM`):
        matching: weight of the matching loss beside the consistency loss, both means over elements.
        guidance: w of the teacher in the matching loss; trajectories have their own.
        every: the student trains in every so many-th step; the fake score, in all of them.
        matching_from: steps of sCM alone before that, in each of which the student trains and the fake score does not.
        simulated_steps: N: how many of its own steps a sample is from noise, at most; each number is as likely.
        fake_learning_rate: of the fake score; None keeps the run's.
    """

    title = "Score-regularised continuous-time consistency"
    paper = "rCM (Zheng et al. 2025, arXiv 2510.08431)"

    trains = ("student", "fake_score")
    requires = ("teacher",)

    def __init__(
        self,
        schedule: NoiseSchedule,
        skip: int = 20,
        times_from: int = 1,
        c: float = 0.1,
        tangent_warmup: int = 0,
        matching: float = 1.0,
        guidance: float = 6.0,
        every: int = 5,
        matching_from: int = 0,
        simulated_steps: int = 4,
        fake_learning_rate: float | None = None,
    ) -> None:
        super().__init__(schedule, skip, times_from, c, tangent_warmup)
        if not 0 < matching < math.inf:
            raise ValueError(f"method.matching must be above 0, got {matching}: without it, it is method=scm")
        if not 0 <= guidance < math.inf:
            raise ValueError(f"method.guidance must be at least 0, got {guidance}")
        if every < 1:
            raise ValueError(f"method.every must be at least 1, got {every}")
        if matching_from < 0 or matching_from % every:
            raise ValueError(f"method.matching_from must be a multiple of method.every={every}, got {matching_from}")
        if not 1 <= simulated_steps <= schedule.T:
            raise ValueError(f"method.simulated_steps must be within 1 ... {schedule.T}, got {simulated_steps}")
        if fake_learning_rate is not None and not 0 < fake_learning_rate < math.inf:
            raise ValueError(f"method.fake_learning_rate must be above 0, got {fake_learning_rate}")
        self.matching, self.w, self.matching_from, self.rate = matching, guidance, matching_from, fake_learning_rate
        self.guidance = (guidance, guidance)
        self.period = every
        self.starts = (0, matching_from) if matching_from else (0,)
        self.times = Table([_times(schedule.T, n, simulated_steps) for n in range(1, simulated_steps + 1)])

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        return self.rate if network == "fake_score" else None

    def turns(self, step: int) -> Iterable[Turn]:
        if step < self.matching_from:
            yield Turn("student", self.loss)
            return
        yield Turn("fake_score", self.fake_score_loss)
        if (step + 1) % self.period == 0:
            yield Turn("student", self.matched_loss)

    def matched_loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The consistency loss, and `matching` times that of samples against the guided teacher (rCM, eq. 11)."""
        consistency = self.loss(networks, batch, context)
        x_t, t = self.own_state(networks["student"], batch, context)
        x = networks["student"](x_t, t, self.conditioning(batch)).x0
        real, fake = guided(networks["teacher"], batch.unconditional, self.w), networks["fake_score"]
        at, noise = matching_time(self.schedule.T, context, x.device), context.normal(x, "noise'")
        c = with_guidance(batch.conditioning, 1.0, x)
        matched = matching_loss(self.schedule, real, fake, x, at, noise, c).mean()
        total = consistency.total + self.matching * matched
        terms = {"loss": total, "consistency_loss": consistency.total, "matching_loss": matched}
        return Losses(total, {**consistency.parts, **{name: term.detach() for name, term in terms.items()}})

    def fake_score_loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The fake score learns to denoise the student's samples, at all times (DMD, eq. 6)."""
        x_t, t = self.own_state(networks["student"], batch, context)
        with torch.no_grad():
            x = networks["student"](x_t, t, self.conditioning(batch)).x0
        at = context.integers(1, self.schedule.T + 1, "t of the fake score", x.device)
        noise = context.normal(x, "noise of the fake score")
        c = with_guidance(batch.conditioning, 1.0, x)
        loss = denoising_loss(self.schedule, networks["fake_score"], x, at, noise, c).mean()
        return Losses(loss, {"loss": loss.detach()})

    def own_state(self, student: Denoiser, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """The state before the last of 1 ... N steps of the student, at its trailing times, and its time [B]."""
        like = batch.states[:, 0]
        last = context.integers(0, len(self.times), "steps", like.device)  # place of the last step
        times = self.times.on(like.device)[last]
        return simulated_state(self.schedule, student, times, last, like, self.conditioning(batch), context)


def normalised(g: Tensor, c: float) -> Tensor:
    """g / (rms(g) + c), the root mean square over each sample's elements (sCM, sec. 4.2). [B, ...]"""
    return g / (rms(g).reshape(-1, *[1] * (g.ndim - 1)) + c)


def rms(g: Tensor) -> Tensor:
    """Root mean square of each sample, [B]."""
    return g.pow(2).flatten(1).mean(1).sqrt()


def _times(T: int, steps: int, width: int) -> list[int]:
    """Trailing times of a number of steps, the last one repeated up to `width`."""
    times = trailing_times(T, steps)[:-1]
    return times + times[-1:] * (width - steps)
