"""Sampling from students and teachers, with one generator per picture: stock diffusers pipelines give the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.samplers import SAMPLERS, check_gamma, check_pair
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import check_times, make_times


@dataclass(frozen=True)
class Sampling:
    """How a student generates.

    Args:
        sampler: one of `distill.diffusion.samplers.SAMPLERS`.
        spacing: of its times, one of those that go with the sampler there.
        steps: the only number of steps it was made for; None leaves it open.
        gamma: the share of fresh noise in each step, 0 ... 1, of a sampler that takes it.

    Raises:
        ValueError: an unknown name, a pair that does not exist, no step, more steps than the spacing has times, or a
            gamma that the sampler cannot have.
    """

    sampler: str = "lcm"
    spacing: str = "lcm"
    steps: int | None = None
    gamma: float = 0.0

    def __post_init__(self) -> None:
        check_pair(self.sampler, self.spacing, self.steps)
        check_gamma(self.sampler, self.gamma)

    def __str__(self) -> str:
        return "/".join([self.sampler, self.spacing, *([f"{self.gamma:g}"] if self.gamma else [])])

    def times(self, T: int, usual_steps: int) -> list[int]:
        """Falling times, ending at 0, of its own number of steps, or of `usual_steps` where it leaves them open."""
        return make_times(self.spacing, T, self.steps or usual_steps)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    conditioning: Conditioning,
    sampler: str = "lcm",
    generators: Sequence[torch.Generator] = (),
    gamma: float = 0.0,
) -> Tensor:
    """Clean latents [B, C, h, w] from noise x at times[0].

    Args:
        denoiser: guided already, if it is to be.
        times: falling, ending at 0; one network call for each but the last (two, for Heun).
        sampler: one of `distill.diffusion.samplers.SAMPLERS`.
        generators: one per picture, for samplers that add fresh noise.
        gamma: the share of that, of a sampler that takes it.

    Raises:
        ValueError: unknown sampler, or times that do not fall to 0.
    """
    generate = SAMPLERS.find(sampler).generate(gamma)
    if times[-1] != 0:
        raise ValueError(f"sampling times must end at 0, got {list(times)}")
    check_times(schedule, times)
    for _, state in generate(denoiser, schedule, x, times, conditioning, generators):
        x = state
    return x
