"""Samplers and the spacings of their times: which go together, and what diffusers scheduler generates each pair.

Pure data, without torch: settings are checked by it, and the schedulers of exports and pipelines are made by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAMPLERS = ("lcm", "euler", "ddim", "heun", "dpmpp_2m")
SPACINGS = ("trailing", "leading", "lcm", "milestones")

_LCM = "LCMScheduler"
# DPM-Solver++ of first order is DDIM's step (Lu et al. 2022, section 4). Unlike DDIMScheduler, whose step is T // steps
# long whatever its times are, it takes the times that it is given.
_FIRST_ORDER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 1,
    "final_sigmas_type": "zero",
    "timestep_spacing": "trailing",
}
_SECOND_ORDER = _FIRST_ORDER | {"solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
_DPM = "DPMSolverMultistepScheduler"
# With leading times these two begin with the noise as it is; with trailing ones Euler's begins with sigma times it.
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
_TO_CLEAN = {"set_alpha_to_one": True, "clip_sample": False}
_HEUN = "HeunDiscreteScheduler"

SCHEDULERS: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {
    ("lcm", "lcm"): (_LCM, {"original_inference_steps": 50}),
    ("lcm", "trailing"): (_LCM, {"original_inference_steps": 8}),  # whose 1, 2, 4 and 8 steps are trailing ones
    ("lcm", "leading"): (_LCM, {"original_inference_steps": 50}),
    ("lcm", "milestones"): (_LCM, {"original_inference_steps": 8}),
    ("euler", "trailing"): ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}),
    ("ddim", "trailing"): (_DPM, _FIRST_ORDER),
    ("ddim", "leading"): ("DDIMScheduler", _LEADING | _TO_CLEAN),
    ("ddim", "lcm"): (_DPM, _FIRST_ORDER),
    ("ddim", "milestones"): (_DPM, _FIRST_ORDER),
    ("heun", "trailing"): (_HEUN, _LEADING),
    ("heun", "leading"): (_HEUN, _LEADING),
    ("heun", "lcm"): (_HEUN, _LEADING),
    ("heun", "milestones"): (_HEUN, _LEADING),
    ("dpmpp_2m", "trailing"): (_DPM, _SECOND_ORDER),
    ("dpmpp_2m", "leading"): (_DPM, _SECOND_ORDER),
    ("dpmpp_2m", "lcm"): (_DPM, _SECOND_ORDER),
    ("dpmpp_2m", "milestones"): (_DPM, _SECOND_ORDER),
}
"""For each pair of sampler and spacing that exists: the class, and its settings beside the noise's own keys.

Where the scheduler's own times at a number of steps are others, the pipeline is given `timesteps`
(`distill.models.schedulers.timesteps_for` says when).
"""
EVEN: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {
    ("ddim", "trailing"): ("DDIMScheduler", {"timestep_spacing": "trailing"} | _TO_CLEAN),
}
"""Schedulers that are better known, and exact as well where the only number of steps divides that of noise levels."""
ZERO_SNR = ("lcm", "euler", "ddim")
"""The samplers whose scheduler in diffusers agrees with ours where the noisiest level holds no signal."""
MOST_STEPS = {"lcm": 50, "milestones": 8}
"""The most steps of a spacing; of others it is the number of noise levels."""


def check_sampler(name: str) -> None:
    """Raises ValueError for a name that is not one of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not known; allowed: {', '.join(SAMPLERS)}")


def check_spacing(name: str) -> None:
    """Raises ValueError for a name that is not one of `SPACINGS`."""
    if name not in SPACINGS:
        raise ValueError(f"spacing {name!r} is not known; allowed: {', '.join(SPACINGS)}")


def check_pair(sampler: str, spacing: str, steps: int | None = None) -> None:
    """Raises ValueError for names that are not known or do not go together, or for more steps than there are times."""
    check_sampler(sampler)
    check_spacing(spacing)
    if (sampler, spacing) not in SCHEDULERS:
        those = ", ".join(repr(other) for one, other in SCHEDULERS if one == sampler)
        raise ValueError(f"sampler {sampler!r} takes spacing {those}, got {spacing!r}: 'ddim' takes any")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, or None, got {steps}")
    if steps is not None and steps > MOST_STEPS.get(spacing, steps):
        raise ValueError(f"steps must be within 1 ... {MOST_STEPS[spacing]} at spacing {spacing!r}, got {steps}")


def usual_spacing(sampler: str) -> str:
    """Where nothing is said: LCM's own, or trailing times."""
    return "lcm" if sampler == "lcm" else "trailing"
