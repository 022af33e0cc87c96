"""Sampling from students and teachers: one generator a picture, so that a plain diffusers pipeline draws the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.consistency import boundary_scalings
from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.samplers import check_pair, check_sampler
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import check_times, make_times, solve


@dataclass(frozen=True)
class Sampling:
    """How a student generates.

    Args:
        sampler: one of `distill.diffusion.samplers.SAMPLERS`.
        spacing: of its times, one of those that go with the sampler there.
        steps: the only number of steps it was made for; None leaves it open.

    Raises:
        ValueError: an unknown name, a pair that does not exist, no step, or more steps than the spacing has times.
    """

    sampler: str = "lcm"
    spacing: str = "lcm"
    steps: int | None = None

    def __post_init__(self) -> None:
        check_pair(self.sampler, self.spacing, self.steps)

    def times(self, T: int, usual_steps: int) -> list[int]:
        """Falling times, ending at 0, of its own number of steps, or of `usual_steps` where it leaves them open."""
        return make_times(self.spacing, T, self.steps or usual_steps)


def starting_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """x_T [B, C, h, w], the first thing drawn from each of B generators."""
    return torch.cat([torch.randn((1, *shape), generator=g, device=g.device) for g in generators])


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    conditioning: Conditioning,
    sampler: str = "lcm",
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """Clean latents [B, C, h, w] from noise x at times[0].

    Args:
        denoiser: guided already, if it is to be.
        times: falling, ending at 0; one network call for each but the last (two, for Heun).
        sampler: `lcm` (jump to clean data, noise again to the next time); one of the ODE solvers; or `euler`, which is
            `ddim` from sigma(times[0]) x, as diffusers' `EulerDiscreteScheduler` starts its trailing times.
        generators: one a picture, for the fresh noise of `lcm`.

    Raises:
        ValueError: unknown sampler, or times that do not fall to 0.
    """
    check_sampler(sampler)
    if times[-1] != 0:
        raise ValueError(f"sampling times must end at 0, got {list(times)}")
    check_times(schedule, times)
    if sampler == "lcm":
        return multistep_consistency(denoiser, schedule, x, times, conditioning, generators)
    if sampler == "euler":
        x, sampler = schedule.sigma(times[0], x) * x, "ddim"
    for _, state in solve(denoiser, schedule, x, times, conditioning, sampler):
        x = state
    return x


def multistep_consistency(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Multistep latent consistency sampling (LCM, algorithm 3), number for number diffusers' `LCMScheduler`.

    Raises:
        ValueError: more than one step, and not one generator for each picture.
    """
    if len(times) > 2 and len(generators) != len(x):
        raise ValueError(f"{len(x)} pictures need a generator each for their fresh noise, got {len(generators)}")
    for t, following in zip(times[:-1], times[1:], strict=True):
        t_batch = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        c_skip, c_out = boundary_scalings(t_batch, x)
        x0 = c_skip * x + c_out * denoiser(x, t_batch, conditioning).x0
        x = x0
        if following > 0:
            x = add_noise(schedule, x0, starting_noise(generators, tuple(x.shape[1:])).to(x), following)
    return x
