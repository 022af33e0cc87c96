"""Score identity distillation: SiD (Zhou et al. 2024, arXiv 2404.04057), guided as SiD-LSG (arXiv 2406.01561).

As in distribution matching, a network learns the score of what the student generates. The student descends an estimate
of the Fisher divergence between that and its teacher's distribution, whose gradient goes through both frozen networks.
No data is read and no discriminator trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from distill.diffusion.guidance import guided, with_guidance
from distill.diffusion.matching import fake_score_loss, identity_loss, matching_time
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.simulation import StudentSteps, check_rhythm
from distill.diffusion.trajectory import Batch, CleanEnd, Reads
from distill.methods.base import CONSISTENCY, DISTANCE, Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling


class SiD(Method):
    """Score identity distillation with long and short guidance.

    Args:
        schedule: the teacher's.
        student_steps: N of the student, whose times are the trailing ones; its states are those that it meets itself.
        guidance: w of the teacher.
        fake_guidance: w of the fake score, where it is compared and while it learns (SiD-LSG's kappa).
        alpha: how much of the squared difference of scores is taken off; 1 is SiD-LSG's, 1.2 SiD's.
        every: the student trains in the last of so many steps, the fake score in all of them.
        fake_warmup: how many steps at first train the fake score alone; a multiple of `every`.
        fake_learning_rate: of the fake score; None keeps the run's.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    title = "Score identity distillation"
    paper = "SiD (Zhou et al. 2024, arXiv 2404.04057), guided as SiD-LSG (arXiv 2406.01561)"
    tag = "score-identity-distillation"
    judged_by = (DISTANCE, CONSISTENCY)
    trains = ("student", "fake_score")
    requires = ("teacher",)

    def __init__(
        self,
        schedule: NoiseSchedule,
        student_steps: int = 1,
        guidance: float = 2.0,
        fake_guidance: float = 2.0,
        alpha: float = 1.0,
        every: int = 1,
        fake_warmup: int = 0,
        fake_learning_rate: float | None = None,
    ) -> None:
        for key, value in {"guidance": guidance, "fake_guidance": fake_guidance, "alpha": alpha}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"method.{key} must be at least 0, got {value}")
        check_rhythm(every, fake_warmup)
        if fake_learning_rate is not None and not 0 < fake_learning_rate < math.inf:
            raise ValueError(f"method.fake_learning_rate must be above 0, got {fake_learning_rate}")
        try:
            self.steps_of_student = StudentSteps(schedule, student_steps)
        except ValueError as error:
            raise ValueError(f"method.{error}") from None
        self.schedule, self.w, self.fake_w, self.alpha = schedule, guidance, fake_guidance, alpha
        self.fake_rate = fake_learning_rate
        self.period, self.warmup = every, fake_warmup
        self.starts = (0, fake_warmup) if fake_warmup else (0,)
        self.guidance = (guidance, guidance)
        self.sampling = Sampling("lcm", "trailing", student_steps)

    def reads(self, step: int = 0) -> Reads:
        return CleanEnd()  # for its shape and its prompt alone

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        return self.fake_rate if network == "fake_score" else None

    def turns(self, step: int) -> Iterable[Turn]:
        yield Turn("fake_score", self.fake_score_loss)
        if step >= self.warmup and (step + 1) % self.period == 0:
            yield Turn("student", self.loss)

    def held_out(self, step: int) -> None:
        """Nothing: the student is to generate what its teacher does, and not to repeat any solve."""

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The score identity's loss of the student's answers; it may be negative, and guides by its gradient alone."""
        x_0, c = batch.states[:, -1], self.conditioning(batch)
        x_t, t = self.steps_of_student.state(networks["student"], x_0, c, context)
        answer = networks["student"](x_t, t, c).x0

        real = guided(networks["teacher"], batch.unconditional, self.w)
        fake = guided(networks["fake_score"], batch.unconditional, self.fake_w)
        at, noise = matching_time(self.schedule.T, context, x_0.device), context.normal(x_0, "noise'")
        loss = identity_loss(self.schedule, real, fake, answer, at, noise, self.judged(batch), self.alpha).mean()
        return Losses(loss, {"loss": loss.detach()})

    def fake_score_loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The fake score, guided, learns to denoise the student's answers (SiD-LSG)."""
        fake, _ = self.steps_of_student.answer(
            networks["student"], batch.states[:, -1], self.conditioning(batch), context
        )
        learner = guided(networks["fake_score"], batch.unconditional, self.fake_w)
        loss = fake_score_loss(self.schedule, learner, fake, self.judged(batch), context).mean()
        return Losses(loss, {"loss": loss.detach()})

    def conditioning(self, batch: Batch) -> Conditioning:
        """The student's, with the w that it learns."""
        return with_guidance(batch.conditioning, self.w, batch.states)

    def judged(self, batch: Batch) -> Conditioning:
        """That of both scores, which have w beside it."""
        return with_guidance(batch.conditioning, 1.0, batch.states)
