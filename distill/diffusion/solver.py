"""Solvers of the probability-flow ODE, and the times they visit.

DDIM (Song et al. 2021, eq. 12 with eta 0), Euler's method on sigma/alpha (for flow matching on sigma), and `move` of
SDXL-Lightning are one and the same step. Heun's method (Karras et al. 2022, alg. 1 without churn) and
DPM-Solver++(2M) (Lu et al. 2022, alg. 2) are of second order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.registry import resolved
from distill.diffusion.samplers import SPACINGS, find_solver
from distill.diffusion.schedule import NoiseSchedule, wide


def ddim_step(schedule: NoiseSchedule, denoised: Denoised, s: Tensor | int) -> Tensor:
    """Moves to time s along the straight line that `denoised` names: alpha(s) x0 + sigma(s) eps, [B, ...]."""
    return schedule.alpha(s, denoised.x0) * denoised.x0 + schedule.sigma(s, denoised.x0) * denoised.eps


def solve(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    conditioning: Conditioning,
    solver: str = "ddim",
) -> Iterator[tuple[int, Tensor]]:
    """Solves the ODE from x at times[0] through all of `times`, yielding (t, x_t) at each, the first included.

    Args:
        x: [B, C, h, w] at times[0].
        times: strictly falling, within 0 ... T.
        solver: one of `distill.diffusion.samplers.solvers`.

    Raises:
        ValueError: unknown solver, or times that do not fall or leave the schedule.
    """
    found = find_solver(solver)
    check_times(schedule, times)
    yield times[0], wide(x)
    yield from found.generate()(denoiser, schedule, x, times, conditioning, ())


def ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    c: Conditioning,
    generators: Sequence[torch.Generator] = (),
) -> Iterator[tuple[int, Tensor]]:
    """Song et al. 2021, eq. 12 with eta 0."""
    x = wide(x)
    for t, s in pairwise(times):
        x = ddim_step(schedule, denoiser(x, _batch(t, x), c), s)
        yield s, x


def heun(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    c: Conditioning,
    generators: Sequence[torch.Generator] = (),
) -> Iterator[tuple[int, Tensor]]:
    """Trapezoidal rule in u = sigma/alpha, where d(x/alpha)/du = eps; for flow matching in sigma, where dx/dsigma is
    the velocity eps - x0.

    Euler's step to clean data, and from the pure noise (u infinite) in which a zero-terminal-SNR schedule ends.
    """
    x = wide(x)
    for t, s in pairwise(times):
        here = denoiser(x, _batch(t, x), c)
        x_s = ddim_step(schedule, here, s)
        if s > 0 and (schedule.is_linear or schedule.alphas_cumprod[t] > 0):
            x_s = _trapezoid(schedule, x, t, s, here, denoiser(x_s, _batch(s, x), c))
        x = x_s
        yield s, x


def _trapezoid(schedule: NoiseSchedule, x: Tensor, t: int, s: int, here: Denoised, there: Denoised) -> Tensor:
    """From x at t to s by the mean of two slopes: `here` at x, `there` where Euler's step ended."""
    if schedule.is_linear:
        slopes = (here.eps - here.x0) + (there.eps - there.x0)
        return x + (schedule.sigma(s, x) - schedule.sigma(t, x)) * slopes / 2
    u_t, u_s = (schedule.sigma(r, x) / schedule.alpha(r, x) for r in (t, s))
    return schedule.alpha(s, x) * (x / schedule.alpha(t, x) + (u_s - u_t) * (here.eps + there.eps) / 2)


def dpmpp_2m(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    c: Conditioning,
    generators: Sequence[torch.Generator] = (),
) -> Iterator[tuple[int, Tensor]]:
    """Multistep in lambda = log(alpha/sigma), x0 extrapolated from the last two; first and last steps are DDIM's."""
    x = wide(x)
    lam = [(schedule.alpha(t, x) / schedule.sigma(t, x)).log() for t in times]  # infinite at t = 0
    before = None
    for i, (t, s) in enumerate(pairwise(times)):
        x0 = denoiser(x, _batch(t, x), c).x0
        d = x0
        if before is not None and s > 0:
            ratio = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            d = x0 + (x0 - before) / (2 * ratio)
        before = x0
        shrink = schedule.sigma(s, x) / schedule.sigma(t, x)
        x = shrink * x + (schedule.alpha(s, x) - schedule.alpha(t, x) * shrink) * d
        yield s, x


def euler(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    c: Conditioning,
    generators: Sequence[torch.Generator] = (),
) -> Iterator[tuple[int, Tensor]]:
    """DDIM from sigma(times[0]) x, as diffusers' `EulerDiscreteScheduler` starts its trailing times.

    Raises:
        ValueError: a flow-matching schedule, where that is DDIM itself.
    """
    schedule.check_scaled_start("sampler=euler", "sampler=ddim")
    return ddim(denoiser, schedule, schedule.sigma(times[0], x) * x, times, c)


def trailing_times(T: int, steps: int) -> list[int]:
    """`steps` times from T down, as diffusers' `timestep_spacing="trailing"`, and the 0 they end at."""
    _check_steps(T, steps)
    return [round(T - i * T / steps) for i in range(steps)] + [0]


def leading_times(T: int, steps: int, offset: int = 1) -> list[int]:
    """As diffusers' `timestep_spacing="leading"` (never starts at T), and 0; `offset` is its `steps_offset`."""
    _check_steps(T, steps)
    return [i * (T // steps) + offset + 1 for i in reversed(range(steps))] + [0]


def lcm_times(T: int, steps: int, solver_steps: int = 50) -> list[int]:
    """The times of diffusers' `LCMScheduler` with `original_inference_steps=solver_steps`, and 0.

    The distilled times are T/solver_steps apart; `steps` of them are taken at even places, the noisiest first.
    """
    _check_steps(solver_steps, steps)
    k = T // solver_steps
    return [(solver_steps - i * solver_steps // steps) * k for i in range(steps)] + [0]


def milestone_times(T: int, steps: int) -> list[int]:
    """Those of MLCM's eight milestones that its published inference visits in so many steps, and 0."""
    _check_steps(len(MLCM_MILESTONES), steps)
    return [round(i * T / len(MLCM_MILESTONES)) for i in MLCM_MILESTONES[steps]] + [0]


MLCM_MILESTONES = {  # in eighths of T
    1: (8,),
    2: (8, 4),
    3: (8, 4, 1),
    4: (8, 6, 4, 1),
    5: (8, 6, 4, 2, 1),
    6: (8, 6, 4, 3, 2, 1),
    7: (8, 6, 5, 4, 3, 2, 1),
    8: (8, 7, 6, 5, 4, 3, 2, 1),
}


def make_times(spacing: str, T: int, steps: int) -> list[int]:
    """Falling times of a named spacing, ending at 0.

    Raises:
        ValueError: unknown spacing, or more steps than times.
    """
    return resolved(SPACINGS.find(spacing).times)(T, steps)


def check_times(schedule: NoiseSchedule, times: Sequence[int]) -> None:
    """Raises ValueError for times that do not fall strictly, or that leave the schedule."""
    if any(t <= s for t, s in pairwise(times)) or times[0] > schedule.T or times[-1] < 0:
        raise ValueError(f"times must fall strictly within {schedule.T} ... 0, got {list(times)}")


def _check_steps(available: int, steps: int) -> None:
    if not 1 <= steps <= available:
        raise ValueError(f"steps must be within 1 ... {available}, got {steps}")


def _batch(t: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)  # [B]
