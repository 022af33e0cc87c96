"""Phased consistency (PCM, Wang et al. 2024, arXiv 2405.18407): consistency within each phase of the path, and an
adversarial loss on where the student lands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from distill.diffusion.adversarial import (
    ADVERSARIAL_LOSSES,
    AdversarialScalars,
    Verdict,
    discriminator_loss,
    generator_loss,
)
from distill.diffusion.consistency import landing
from distill.diffusion.guidance import with_guidance
from distill.diffusion.losses import pseudo_huber
from distill.diffusion.prediction import Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, travel
from distill.diffusion.segments import Segments
from distill.diffusion.trajectory import Batch, Pair, Reads
from distill.methods.base import Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling


class PCM(Method):
    """The student jumps from t to the start of t's phase, is its own target there, and is judged on its way back up.

    Args:
        schedule: the teacher's.
        segments: M, the number of phases, and of the steps in which the student is sampled.
        skip: k = t - s of a pair, which ends at the phase's start if that is nearer.
        huber_c: constant of the pseudo-Huber distance between the two landings.
        adversarial: the weight of the student's loss against a "discriminator"; at 0 there is none.
        adversarial_loss: one of `ADVERSARIAL_LOSSES`.
        discriminator_learning_rate: None keeps the run's.
        shared_noise: both landings are sent back up with one noise, in the place of one each.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    title = "Phased consistency distillation"
    paper = "PCM (Wang et al. 2024, arXiv 2405.18407)"
    tag = "pcm"

    def __init__(
        self,
        schedule: NoiseSchedule,
        segments: int = 4,
        skip: int = 25,
        huber_c: float = 0.001,
        adversarial: float = 0.1,
        adversarial_loss: str = "hinge_clipped",
        discriminator_learning_rate: float | None = None,
        shared_noise: bool = False,
    ) -> None:
        if not 1 <= segments <= schedule.T:
            raise ValueError(f"method.segments must be within 1 ... {schedule.T}, got {segments}")
        if not 1 <= skip <= schedule.T:
            raise ValueError(f"method.skip must be within 1 ... {schedule.T}, got {skip}")
        if not 0 < huber_c < math.inf:
            raise ValueError(f"method.huber_c must be above 0, got {huber_c}")
        if not 0 <= adversarial < math.inf:
            raise ValueError(f"method.adversarial must be at least 0, got {adversarial}")
        if adversarial_loss not in ADVERSARIAL_LOSSES:
            allowed = ", ".join(ADVERSARIAL_LOSSES)
            raise ValueError(f"method.adversarial_loss must be one of {allowed}, got {adversarial_loss!r}")
        rate = discriminator_learning_rate
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"method.discriminator_learning_rate must be above 0, got {rate}")
        self.schedule, self.skip, self.huber_c, self.weight = schedule, skip, huber_c, adversarial
        self.adversarial_loss, self.rate, self.shared_noise = adversarial_loss, rate, shared_noise
        self.segments = Segments(schedule.T, segments)
        self.trains = ("student", "discriminator") if adversarial > 0 else ("student",)
        self.adversarial = AdversarialScalars() if adversarial > 0 else None
        self.sampling = Sampling("ddim", "trailing", segments)

    def reads(self, step: int = 0) -> Reads:
        return Pair(self.skip, self.segments)

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        return self.rate if network == "discriminator" else None

    def turns(self, step: int) -> Iterable[Turn]:
        if self.weight > 0:
            yield Turn("discriminator", self.discriminator_loss)
        yield Turn("student", partial(self.loss, self.weight))

    def held_out(self, step: int) -> Turn:
        """The consistency alone: the adversarial loss measures no distance."""
        return Turn("student", partial(self.loss, 0.0))

    def loss(self, weight: float, networks: Networks, batch: Batch, context: Context) -> Losses:
        """|| a - b || + weight G(D(a sent back up)): a, b where jumps from x_t and x_s land."""
        step, start = batch.transition(), self.start(batch)
        b = self.target(networks["student"], batch, start)
        a = self.lands(networks["student"], batch, start)

        d = pseudo_huber(a, b, self.huber_c)  # [B]
        total, inside, count = d.mean(), self.segments.index(step.t), self.segments.count
        parts: dict[str, Tensor | float] = {"loss": total.detach()}
        for i in range(count):
            parts[f"segment_{i + 1}"] = count * (d * (inside == i).to(d)).mean().detach()
        if weight > 0:
            time = self.shown_time(batch, context)
            shown = travel(self.schedule, a, start, self.noise(a, "fake", context), time)
            c = with_guidance(batch.conditioning, 1.0, a)
            (logits,) = networks["discriminator"]([shown], time, c, (step.x_t, step.t))
            against = generator_loss(logits, self.adversarial_loss).mean()
            total, parts["adversarial_loss"] = total + weight * against, against.detach()
        return Losses(total, parts)

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """Real is the target's landing, fake the student's, both sent back up to one time of the phase."""
        step, start = batch.transition(), self.start(batch)
        b = self.target(networks["student"], batch, start)
        with torch.no_grad():
            a = self.lands(networks["student"], batch, start)
        time = self.shown_time(batch, context)
        real, fake = (
            travel(self.schedule, x, start, self.noise(x, whose, context), time)
            for x, whose in ((b, "real"), (a, "fake"))
        )
        c = with_guidance(batch.conditioning, 1.0, a)
        r, f = networks["discriminator"]([real, fake], time, c, (step.x_t, step.t))
        verdict = Verdict(discriminator_loss(r, f, self.adversarial_loss), r, f)
        loss = verdict.loss.mean()
        return Losses(loss, {"loss": loss.detach(), **verdict.accuracies()})

    def start(self, batch: Batch) -> Tensor:
        """Where t's phase starts, [B]."""
        return self.segments.start(batch.times[:, 0])

    def lands(self, student: Denoiser, batch: Batch, start: Tensor) -> Tensor:
        """a: where the student's jump from x_t lands at `start` [B]. [B, C, h, w]"""
        step, c = batch.transition(), with_guidance(batch.conditioning, batch.guidance, batch.states)
        return landing(self.schedule, student, step.x_t, step.t, start, c)

    @torch.no_grad()
    def target(self, student: Denoiser, batch: Batch, start: Tensor) -> Tensor:
        """b: where its jump from x_s lands, and x_s itself where that is at `start` [B] already. [B, C, h, w]"""
        step, c = batch.transition(), with_guidance(batch.conditioning, batch.guidance, batch.states)
        return landing(self.schedule, student, step.x_s, step.s, start, c)

    def shown_time(self, batch: Batch, context: Context) -> Tensor:
        """t' [B], uniform from the start of t's phase to its end, both of them among it."""
        t, start = batch.times[:, 0], self.start(batch)
        u = context.uniform(0, 1, "t'", t.device).double()
        return start + (u * (self.segments.end(t) - start + 1)).to(torch.int64)

    def noise(self, x: Tensor, whose: str, context: Context) -> Tensor:
        """With which a landing is sent back up, of the same sample in both turns the same. [B, C, h, w]"""
        return context.normal(x, "noise'" if self.shared_noise else f"noise' of the {whose}")
