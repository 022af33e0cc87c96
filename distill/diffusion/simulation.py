"""States that a few-step student meets while it samples, made by the student itself."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.diffusion.consistency import where
from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise


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
