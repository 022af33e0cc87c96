"""States that a few-step student meets while it samples, made by the student itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distill.diffusion.adversarial import Origin
from distill.diffusion.consistency import where
from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import trailing_times
from distill.diffusion.tables import Table

STATES = ("student", "noised")


@torch.no_grad()
def simulated_state(
    schedule: NoiseSchedule,
    student: Denoiser,
    times: Tensor,
    place: Tensor,
    like: Tensor,
    c: Conditioning,
    context: Context,
    stream: str = "student",
) -> tuple[Tensor, Tensor]:
    """The input x_t [B, C, h, w] of step number `place` of multistep sampling from noise, and its time t [B].

    All steps but the last of `times` are taken whatever `place` is: every rank calls the student equally often.

    Args:
        times: [B, N], each sample's falling times, the first of them the noisiest. Those after its place are not used.
        place: [B], 0 ... N - 1.
        like: [B, C, h, w], of which there is to be noise.
        stream: step i starts at the context's noise of the name "STREAM i", which at step 0 is the state itself.
    """
    x = context.normal(like, f"{stream} 0")
    for i in range(times.shape[1] - 1):
        x0 = student(x, times[:, i], c).x0
        following = add_noise(schedule, x0, context.normal(like, f"{stream} {i + 1}"), times[:, i + 1])
        x = where(place > i, following, x)
    return x, times.gather(1, place[:, None])[:, 0]


@dataclass(frozen=True)
class StudentSteps:
    """A student of N steps at trailing times, and the states that it is trained on.

    Args:
        schedule: the teacher's.
        count: N.
        states: `student`, those that it meets while it samples (DMD2, Yin et al. 2024, arXiv 2405.14867, section 4.5);
            or `noised`, clean latents with noise, and noise alone in the first step.

    Raises:
        ValueError: a value out of its range.
    """

    schedule: NoiseSchedule
    count: int
    states: str = "student"

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.schedule.T:
            raise ValueError(f"student_steps must be within 1 ... {self.schedule.T}, got {self.count}")
        if self.states not in STATES:
            raise ValueError(f"states must be one of {', '.join(STATES)}, got {self.states!r}")

    @cached_property
    def times(self) -> Table:
        """Its falling times, [N]."""
        return Table(trailing_times(self.schedule.T, self.count)[:-1])

    def state(self, student: Denoiser, x_0: Tensor, c: Conditioning, context: Context) -> Origin:
        """The input x_t [B, C, h, w] of one of its steps, each as likely, and its time [B]; without gradient.

        x_0 [B, C, h, w] are clean latents, of which `student` states have the shape alone.
        """
        place = context.integers(0, self.count, "place", x_0.device)
        times = self.times.on(x_0.device)
        if self.states == "student":
            return simulated_state(self.schedule, student, times.expand(len(x_0), -1), place, x_0, c, context)
        noise, t = context.normal(x_0, "student 0"), times[place]
        return where(place == 0, noise, add_noise(self.schedule, x_0, noise, t)), t

    @torch.no_grad()
    def answer(self, student: Denoiser, x_0: Tensor, c: Conditioning, context: Context) -> tuple[Tensor, Origin]:
        """What the student makes of `state` in one step, [B, C, h, w] without gradient, and that state."""
        x_t, t = self.state(student, x_0, c, context)
        return student(x_t, t, c).x0, (x_t, t)


def check_rhythm(every: int, fake_warmup: int) -> None:
    """Raises ValueError for a student that is never trained, or whose first turn does not end a period of turns."""
    if every < 1:
        raise ValueError(f"method.every must be at least 1, got {every}")
    if fake_warmup < 0 or fake_warmup % every:
        raise ValueError(f"method.fake_warmup must be 0 or a multiple of every={every}, got {fake_warmup}")
