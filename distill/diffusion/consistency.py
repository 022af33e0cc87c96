"""Consistency functions: f(x_t, t, s) jumps from x_t to where its ODE path passes time s, in one network call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.random import starting_noise
from distill.diffusion.schedule import NoiseSchedule, add_noise, travel, wide
from distill.diffusion.solver import ddim_step


def multistep(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
) -> Iterator[tuple[int, Tensor]]:
    """Multistep latent consistency sampling (LCM, algorithm 3), number for number diffusers' `LCMScheduler` (for flow
    matching, `FlowMatchLCMScheduler`): jumps to clean data, and noises it again to the next time.

    Raises:
        ValueError: more than one step, and not one generator for each sample.
    """
    if len(times) > 2 and len(generators) != len(x):
        raise ValueError(f"{len(x)} pictures need a generator each for their fresh noise, got {len(generators)}")
    for t, following in pairwise(times):
        t_batch = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        x0 = x = schedule.clean(denoiser(x, t_batch, conditioning).x0, x, t_batch)
        if following > 0:
            x = add_noise(schedule, x0, starting_noise(generators, tuple(x.shape[1:])).to(x), following)
        yield following, x


def strategic(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    gamma: float = 0.0,
) -> Iterator[tuple[int, Tensor]]:
    """Strategic stochastic sampling (TCD, Zheng et al. 2024, arXiv 2402.19159), number for number
    diffusers' `TCDScheduler`: jumps past the next time, the further the greater `gamma`, and noises up to it again.

    It ends at time 1, the cleanest noise level, as that scheduler does. With gamma 0 it is DDIM without fresh noise.

    Raises:
        ValueError: more than one step with a gamma, and not one generator for each sample.
    """
    if gamma > 0 and len(times) > 2 and len(generators) != len(x):
        raise ValueError(f"{len(x)} pictures need a generator each for their fresh noise, got {len(generators)}")
    for t, following in pairwise(times):
        arrives = torch.full((len(x),), max(following, 1), dtype=torch.int64, device=x.device)
        share = (1 - gamma) * (arrives - 1).float()  # in float32, as the scheduler has it
        s = 1 + share.floor().to(torch.int64)
        t_batch = torch.full_like(s, t)
        x = landing(schedule, denoiser, x, t_batch, s, conditioning)
        if gamma > 0 and following > 0:
            x = travel(schedule, x, s, starting_noise(generators, tuple(x.shape[1:])).to(x), arrives)
        yield following, x


def jump(schedule: NoiseSchedule, denoised: Denoised, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """f(x_t, t, s) without boundary scalings: the DDIM jump to s, and x_t itself where t = s. [B, ...]

    A single DDIM step reaches any s, so boundary conditions hold by construction (Heek et al. 2024, alg. 1).
    """
    return where(t == s, wide(x_t), ddim_step(schedule, denoised, s))


def landing(schedule: NoiseSchedule, network: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, c: Conditioning) -> Tensor:
    """Where a network's `jump` from x_t at t lands at s, in one call. [B, ...]"""
    return jump(schedule, network(x_t, t, c), x_t, t, s)


def inverse_jump(schedule: NoiseSchedule, x_s: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0 whose DDIM jump takes x_t to x_s, for s < t (Heek et al. 2024, eq. 6). [B, ...]"""
    x_s, x_t = wide(x_s), wide(x_t)
    shrink = schedule.sigma(s, x_t) / schedule.sigma(t, x_t)
    return (x_s - shrink * x_t) / (schedule.alpha(s, x_t) - schedule.alpha(t, x_t) * shrink)


def where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Chooses whole samples: mask [B], a and b [B, ...]."""
    return torch.where(mask.to(a.device).reshape(-1, *[1] * (a.ndim - 1)), a, b)
