"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867), after DMD (arXiv 2311.18828).

The student's samples are noised and moved along s_real - s_fake, the difference of the teacher's score from that of a
network which learns what the student generates. That network trains in every step, the student in every fifth (the
two-time-scale rule); a discriminator on stored images may correct what the teacher itself is wrong about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from distill.diffusion.adversarial import AdversarialScalars, Adversary, Origin
from distill.diffusion.guidance import guided, with_guidance
from distill.diffusion.losses import l2
from distill.diffusion.matching import fake_score_loss, matching_loss, matching_time
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.simulation import StudentSteps, check_rhythm
from distill.diffusion.trajectory import Batch, CleanEnd, Reads, Steps
from distill.methods.base import CONSISTENCY, DISTANCE, Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling


class DMD2(Method):
    """Distribution matching on two time scales, from states that the student itself meets (DMD2, section 4).

    Args:
        schedule: the teacher's.
        student_steps: N of the student, whose times are the trailing ones.
        states: that it is trained on. `student`: those that its own sampling meets (DMD2, sec. 4.5); `noised`: stored
            clean latents with noise.
        guidance: w of the teacher, in the difference of scores.
        every: the student trains in the last of so many steps, the other networks in all of them.
        fake_warmup: how many steps at first train the others alone; a multiple of `every`.
        adversarial: the weight of the student's loss against a "discriminator", whose real samples are the stored ends
            of solves, or images; 0 trains none.
        regression: the weight of the squared error of the stored solve's end from its noise (DMD's regression
            loss, which is a perceptual distance of decoded images there); for a student of one step.
        fake_learning_rate, discriminator_learning_rate: of the other networks; None keeps the run's.
        adversarial_loss: one of `distill.diffusion.adversarial.ADVERSARIAL_LOSSES`.
        renoise_times, renoise_weights: the discriminator sees samples at one of these times, with these odds; None:
            at any time, each as likely.
        r1: weight of the discriminator's approximate R1 penalty.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    title = "Improved distribution matching distillation"
    paper = "DMD2 (Yin et al. 2024, arXiv 2405.14867), after DMD (Yin et al. 2024, arXiv 2311.18828)"
    tag = "dmd2"
    judged_by = (DISTANCE, CONSISTENCY)

    def __init__(
        self,
        schedule: NoiseSchedule,
        student_steps: int = 4,
        states: str = "student",
        guidance: float = 8.0,
        every: int = 5,
        fake_warmup: int = 0,
        adversarial: float = 0.0,
        regression: float = 0.0,
        fake_learning_rate: float | None = None,
        discriminator_learning_rate: float | None = None,
        adversarial_loss: str = "nonsaturating",
        renoise_times: Sequence[int] | None = None,
        renoise_weights: Sequence[float] | None = None,
        r1: float = 0.0,
    ) -> None:
        for key, weight in {"guidance": guidance, "adversarial": adversarial, "regression": regression}.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"method.{key} must be at least 0, got {weight}")
        check_rhythm(every, fake_warmup)
        if regression and student_steps != 1:
            raise ValueError(f"method.regression is of a student of one step, got student_steps={student_steps}")
        self.rates = {"fake_score": fake_learning_rate, "discriminator": discriminator_learning_rate}
        for name, rate in self.rates.items():
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"method.{name.partition('_')[0]}_learning_rate must be above 0, got {rate}")
        times = tuple(range(1, schedule.T + 1)) if renoise_times is None else tuple(renoise_times)
        weights = (1.0,) * len(times) if renoise_weights is None else tuple(renoise_weights)
        try:
            self.steps_of_student = StudentSteps(schedule, student_steps, states)
            self.adversary = Adversary(schedule, adversarial_loss, times, weights, r1)
        except ValueError as error:
            raise ValueError(f"method.{error}") from None
        self.schedule, self.w, self.weight, self.regression = schedule, guidance, adversarial, regression
        self.period, self.warmup = every, fake_warmup
        self.starts = (0, fake_warmup) if fake_warmup else (0,)
        self.trains = ("student", "fake_score", *["discriminator"] * (adversarial > 0))
        self.requires = ("teacher",)
        self.adversarial = AdversarialScalars() if adversarial > 0 else None
        self.guidance = (guidance, guidance)
        self.sampling = Sampling("lcm", "trailing", student_steps)

    def reads(self, step: int = 0) -> Reads:
        return Steps(((self.schedule.T, 0),)) if self.regression else CleanEnd()

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        return self.rates.get(network)

    def turns(self, step: int) -> Iterable[Turn]:
        yield Turn("fake_score", self.fake_score_loss)
        if self.weight > 0:
            yield Turn("discriminator", self.discriminator_loss)
        if step >= self.warmup and (step + 1) % self.period == 0:
            yield Turn("student", self.loss)

    def held_out(self, step: int) -> None:
        """Nothing: the student is to generate what its teacher does, and not to repeat any solve."""

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """-(s_real - s_fake) for the gradient of the student's answers; s_real is guided (DMD, eq. 7; DMD2)."""
        x_0, c = batch.states[:, -1], self.conditioning(batch)
        x_t, t = self.steps_of_student.state(networks["student"], x_0, c, context)
        answer = networks["student"](x_t, t, c).x0

        s_real, s_fake = guided(networks["teacher"], batch.unconditional, self.w), networks["fake_score"]
        at, noise = matching_time(self.schedule.T, context, x_0.device), context.normal(x_0, "noise'")
        total = matching_loss(self.schedule, s_real, s_fake, answer, at, noise, self.judged(batch)).mean()
        parts: dict[str, Tensor | float] = {"matching_loss": total.detach()}
        if self.weight > 0:
            played = self.generator_loss(networks, batch, answer, (x_t, t), context)
            total, parts = total + self.weight * played, {**parts, "adversarial_loss": played.detach()}
        if self.regression > 0:
            error = self.squared_error(networks, batch)
            total, parts = total + self.regression * error, {**parts, "regression_loss": error.detach()}
        return Losses(total, {"loss": total.detach(), **parts})

    def fake_score_loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The fake score learns to denoise the student's answers, at all times (DMD, eq. 6)."""
        fake, _ = self.steps_of_student.answer(
            networks["student"], batch.states[:, -1], self.conditioning(batch), context
        )
        loss = fake_score_loss(self.schedule, networks["fake_score"], fake, self.judged(batch), context).mean()
        return Losses(loss, {"loss": loss.detach()})

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """Real are stored clean latents, fake are the student's answers; both with one noise (DMD2, sec. 4.3)."""
        x_0 = batch.states[:, -1]
        fake, origin = self.steps_of_student.answer(networks["student"], x_0, self.conditioning(batch), context)
        D, c = networks["discriminator"], self.judged(batch)
        verdict = self.adversary.discriminator(D, x_0, fake, c, context, origin)
        loss = verdict.loss.mean()
        return Losses(loss, {"loss": loss.detach(), **verdict.accuracies()})

    def generator_loss(
        self, networks: Networks, batch: Batch, answer: Tensor, origin: Origin, context: Context
    ) -> Tensor:
        """The student's adversarial loss, a scalar: its answers are to be taken for real (DMD2, sec. 4.3)."""
        return self.adversary.generator(networks["discriminator"], answer, self.judged(batch), context, origin).mean()

    def squared_error(self, networks: Networks, batch: Batch) -> Tensor:
        """|| the student's answer at a stored x_T - the solve's end ||², a scalar (after DMD's regression loss)."""
        step = batch.transition()
        c = with_guidance(batch.conditioning, batch.guidance, step.x_t)
        return l2(networks["student"](step.x_t, step.t, c).x0, step.x_s).mean()

    def conditioning(self, batch: Batch) -> Conditioning:
        """The student's, with the w that it learns."""
        return with_guidance(batch.conditioning, self.w, batch.states)

    def judged(self, batch: Batch) -> Conditioning:
        """That of the fake score and of the discriminator: they know samples, and no guidance."""
        return with_guidance(batch.conditioning, 1.0, batch.states)
