"""SDXL-Lightning: progressive adversarial distillation (Lin, Wang, Yang 2024, arXiv 2402.13929).

A chain of runs, each of which halves or quarters the steps: the first by mean squared error (`LightningMSE`), the
others by adversarial training (`LightningAdversarial`). Before the last one, the network learns to predict clean
data (`LightningConvert`). The teacher of a run is the student of an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.diffusion.adversarial import AdversarialScalars, Adversary
from distill.diffusion.consistency import landing
from distill.diffusion.guidance import guided, with_guidance
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import ddim_step, trailing_times
from distill.diffusion.tables import Table
from distill.diffusion.trajectory import Batch, CleanEnd, Reads, Steps
from distill.methods.base import Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling

SOURCES = ("noised", "trajectory")
NOISIEST = ("noise", "scaled")


class Progressive(Method):
    """What Lightning's runs share: the student's times, x_t at one of them, and where the teacher takes it.

    Args:
        schedule: the teacher's.
        student_steps: N of the student; its times are the trailing ones.
        teacher_steps: N of the teacher, which takes the steps of its own trailing times from t to the student's next.
        source: of x_t. `noised`: noised clean data, from which the teacher continues (the paper, sec. 2.3).
            `trajectory`: two states of the teacher's own stored solve, and no teacher in memory.
        guidance: w of the teacher where it is called; stored trajectories have their own.
        times: from which t is sampled instead; the student steps from each by its stride, to clean data at most.
            The paper takes 250, 500, 750 and 1000 for students of one and two steps (sec. 3.7).
        x_T: the network's input at t = T: `noise` (the paper, eq. 24) or `scaled`, sigma_T times that, which is what
            diffusers' EulerDiscreteScheduler shows it.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    title = "Progressive adversarial distillation"
    paper = "SDXL-Lightning (Lin, Wang, Yang 2024, arXiv 2402.13929)"
    tag = "lightning"

    def __init__(
        self,
        schedule: NoiseSchedule,
        student_steps: int,
        teacher_steps: int,
        source: str = "noised",
        guidance: float = 1.0,
        times: Sequence[int] | None = None,
        x_T: str = "noise",
    ) -> None:
        T = schedule.T
        for name, steps in {"student_steps": student_steps, "teacher_steps": teacher_steps}.items():
            if not 1 <= steps <= T:
                raise ValueError(f"method.{name} must be within 1 ... {T}, got {steps}")
        if source not in SOURCES:
            raise ValueError(f"method.source must be one of {', '.join(SOURCES)}, got {source!r}")
        if x_T not in NOISIEST:
            raise ValueError(f"method.x_T must be one of {', '.join(NOISIEST)}, got {x_T!r}")
        if x_T == "scaled" and source == "trajectory":
            raise ValueError("method.x_T=scaled needs method.source=noised: stored solves start at unscaled noise")
        if x_T == "scaled":
            schedule.check_scaled_start("method.x_T=scaled", "method.x_T=noise")
        if not 0 <= guidance < math.inf:
            raise ValueError(f"method.guidance must be at least 0, got {guidance}")
        self.schedule, self.source, self.w, self.x_T = schedule, source, guidance, x_T
        self.guidance = (guidance, guidance) if source == "noised" else None
        self.ends = _ends(T, student_steps, times)
        self.paths = Table(_paths(T, self.ends, trailing_times(T, teacher_steps)))
        self.times = Table(list(self.ends))
        self.requires = ("teacher",) if source == "noised" else ()
        self.sampling = Sampling("ddim" if x_T == "noise" else "euler", "trailing", student_steps)

    def reads(self, step: int = 0) -> Reads:
        return CleanEnd() if self.source == "noised" else Steps(tuple(self.ends.items()))

    def state(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """x_t [B, C, h, w], t and the student's next time, [B] each."""
        if self.source == "trajectory":
            step = batch.transition()
            return step.x_t, step.t, step.s
        x_0 = batch.states[:, 0]
        t = self.sample_time(context, x_0.device)
        return self.noised(x_0, context.normal(x_0, "noise"), t), t, self.next_time(t)

    def conditioning(self, batch: Batch) -> Conditioning:
        """The student's, with the w that it learns: its trajectories', or the teacher's where that one is called."""
        w = batch.guidance if self.source == "trajectory" else self.w
        return with_guidance(batch.conditioning, w, batch.states)

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The forward process, and at T no data at all (Lightning, eq. 24). [B, C, h, w]"""
        pure = noise if self.x_T == "noise" else self.schedule.sigma(self.schedule.T, noise) * noise
        last = (t == self.schedule.T).reshape(-1, *[1] * (noise.ndim - 1))
        return torch.where(last, pure, add_noise(self.schedule, x_0, noise, t))

    def teacher_target(self, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        """Where the teacher takes x_t by the student's next time, in its own steps (eq. 9-12). [B, C, h, w]"""
        if self.source == "trajectory":
            return batch.transition().x_s
        teacher, x = guided(networks["teacher"], batch.unconditional, self.w), x_t
        with torch.no_grad():
            for here, there in pairwise(self.paths.on(t.device)[t].unbind(1)):
                x = landing(self.schedule, teacher, x, here, there, batch.conditioning)
        return x

    def squared_error(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """|| x_fake - x_real ||², both at the student's next time (Lightning, eq. 16)."""
        x_t, t, s = self.state(batch, context)
        x_real = self.teacher_target(networks, batch, x_t, t)
        x_fake = ddim_step(self.schedule, networks["student"](x_t, t, self.conditioning(batch)), s)
        loss = l2(x_fake, x_real).mean()
        return Losses(loss, {"loss": loss.detach()})

    def next_time(self, t: Tensor) -> Tensor:
        """max(t - ns, 0), [B] (Lightning, sec. 2.3)."""
        return self.paths.on(t.device)[t, -1]

    def sample_time(self, context: Context, device: torch.device) -> Tensor:
        """t [B], uniform over the student's times."""
        return self.times.on(device)[context.integers(0, len(self.times), "t", device)]


class LightningMSE(Progressive):
    """The first run of the chain (Lightning, sec. 3.6: 128 -> 32 steps at guidance 6, which is built in here)."""

    def turns(self, step: int) -> Iterable[Turn]:
        return (Turn("student", self.loss),)

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """Where a step of the student leads, against where the teacher's steps do (Lightning, eq. 16)."""
        return self.squared_error(networks, batch, context)


class LightningAdversarial(Progressive):
    """The other runs: an adversarial loss on where the step ends, nothing else (Lightning, sec. 3.2 to 3.4 and 3.7).

    Whether the discriminator also sees x_t is a matter of the network (`conditional`): the same losses serve both.

    Args (beside those of `Progressive`):
        discriminator_learning_rate: None keeps the run's.
        discriminator_warmup: how many steps at first train the discriminator alone; with as many as the run has, it
            shows whether it can distinguish the student from the teacher at all.
        adversarial_loss: `nonsaturating` (eq. 18-21) or `hinge`.
        renoise_times: the discriminator sees clean samples noised to one of these times (eq. 25-26), which for flow
            matching are Stable Diffusion's, taken by their signal-to-noise ratio; none of them, and it sees them as
            they are, as it does the samples of every other time.
        renoise_weights: the odds of these times.
        later_weights, later_from: the odds from that step on; the paper goes from 1:1:1:1 to 5:1:1:1.
        r1: weight of the discriminator's approximate R1 penalty; the paper has none.
    """

    trains = ("student", "discriminator")
    adversarial = AdversarialScalars(student_loss="loss")

    def __init__(
        self,
        schedule: NoiseSchedule,
        student_steps: int,
        teacher_steps: int,
        source: str = "noised",
        guidance: float = 1.0,
        times: Sequence[int] | None = None,
        x_T: str = "noise",
        discriminator_learning_rate: float | None = None,
        discriminator_warmup: int = 0,
        adversarial_loss: str = "nonsaturating",
        renoise_times: Sequence[int] = (10, 250, 500, 750),
        renoise_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        later_weights: Sequence[float] | None = None,
        later_from: int | None = None,
        r1: float = 0.0,
    ) -> None:
        super().__init__(schedule, student_steps, teacher_steps, source, guidance, times, x_T)
        if discriminator_learning_rate is not None and not 0 < discriminator_learning_rate < math.inf:
            raise ValueError(f"method.discriminator_learning_rate must be above 0, got {discriminator_learning_rate}")
        if discriminator_warmup < 0:
            raise ValueError(f"method.discriminator_warmup must be at least 0, got {discriminator_warmup}")
        if (later_weights is None) != (later_from is None):
            raise ValueError("method.later_weights and method.later_from are set together, or not at all")
        self.rate, self.warmup, self.later_from = discriminator_learning_rate, discriminator_warmup, later_from
        try:
            self.adversaries = [
                Adversary(schedule, adversarial_loss, tuple(renoise_times), tuple(weights), r1)
                for weights in (renoise_weights, renoise_weights if later_weights is None else later_weights)
            ]
        except ValueError as error:
            raise ValueError(f"method.{error}") from None

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        return self.rate if network == "discriminator" else None

    def turns(self, step: int) -> Iterable[Turn]:
        yield Turn("discriminator", self.discriminator_loss)
        if step >= self.warmup:
            yield Turn("student", self.loss)

    def held_out(self, step: int) -> Turn:
        """How far the student's step ends from the teacher's: the adversarial loss itself measures no distance."""
        return Turn("student", self.squared_error)

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """-log D(x_t, x_fake) (Lightning, eq. 19)."""
        x_t, t, s = self.state(batch, context)
        x_fake = ddim_step(self.schedule, networks["student"](x_t, t, self.conditioning(batch)), s)
        adversary, D, c = self.adversary(context.step), networks["discriminator"], self.judged(batch)
        loss = adversary.generator(D, x_fake, c, context, (x_t, t), s).mean()
        return Losses(loss, {"loss": loss.detach()})

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """-log D(x_t, x_real) - log(1 - D(x_t, x_fake)); real is what the teacher made (Lightning, eq. 18)."""
        x_t, t, s = self.state(batch, context)
        x_real = self.teacher_target(networks, batch, x_t, t)
        with torch.no_grad():
            x_fake = ddim_step(self.schedule, networks["student"](x_t, t, self.conditioning(batch)), s)
        adversary, D, c = self.adversary(context.step), networks["discriminator"], self.judged(batch)
        verdict = adversary.discriminator(D, x_real, x_fake, c, context, (x_t, t), s)
        loss = verdict.loss.mean()
        return Losses(loss, {"loss": loss.detach(), **verdict.accuracies()})

    def judged(self, batch: Batch) -> Conditioning:
        """The discriminator's: it knows samples, and no guidance."""
        return with_guidance(batch.conditioning, 1.0, batch.states)

    def adversary(self, step: int) -> Adversary:
        """The adversarial losses of a step."""
        return self.adversaries[self.later_from is not None and step >= self.later_from]


class LightningConvert(Progressive):
    """Before the one-step run: a network that predicts clean data learns what the old one said of it (sec. 3.7).

    The student's network predicts "sample" (`student.prediction`), the teacher is the network that it starts from.
    """

    def __init__(
        self, schedule: NoiseSchedule, student_steps: int = 1, times: Sequence[int] | None = None, x_T: str = "noise"
    ) -> None:
        super().__init__(schedule, student_steps, student_steps, times=times, x_T=x_T)

    def turns(self, step: int) -> Iterable[Turn]:
        return (Turn("student", self.loss),)

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """|| x_0 of the student - x_0 of the teacher ||² (Lightning, sec. 3.7.3)."""
        x_t, t, _ = self.state(batch, context)
        c = with_guidance(batch.conditioning, batch.guidance, x_t)  # what both learned before
        with torch.no_grad():
            x_0 = networks["teacher"](x_t, t, c).x0
        loss = l2(networks["student"](x_t, t, c).x0, x_0).mean()
        return Losses(loss, {"loss": loss.detach()})


def _ends(T: int, steps: int, times: Sequence[int] | None) -> dict[int, int]:
    """Where the student's step from each of its times ends; off its own grid, T/steps later or at clean data."""
    grid = trailing_times(T, steps)
    following = dict(pairwise(grid))
    if times is None:
        return following
    if not times or not all(1 <= t <= T for t in times):
        raise ValueError(f"method.times must be within 1 ... {T}, got {list(times)}")
    if T % steps and (off := sorted(set(times) - set(grid))):
        raise ValueError(f"method.times: {off} are off the student's {steps} times, whose stride is not a whole number")
    return {t: following.get(t, max(t - T // steps, 0)) for t in sorted(times, reverse=True)}


def _paths(T: int, ends: Mapping[int, int], grid: Sequence[int]) -> Tensor:
    """[T + 1, n]: for a time t of `ends` the teacher's times from t to its end, which stands in all further places."""
    paths = {t: [t, *(g for g in grid if end < g < t), end] for t, end in ends.items()}
    table = torch.full((T + 1, max(map(len, paths.values()))), -1)
    for t, path in paths.items():
        table[t] = path[-1]
        table[t, : len(path)] = torch.tensor(path)
    return table
