"""Samplers and the spacings of their times: a record each, from which follows whatever else knows them.

Pure data, without torch: settings are checked by it, and the schedulers of exports and pipelines are made by it. A
sampler is an entry of `SAMPLERS` and the function that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distill.diffusion.registry import Registry, UnknownName, resolved

Scheduler = tuple[str, Mapping[str, Any]]
"""A class of diffusers, and its settings beside the noise's own keys."""


@dataclass(frozen=True)
class Spacing:
    """Where the times of a sampler lie.

    Args:
        name: in settings.
        title: for people.
        times: dotted name of the function (T, steps) -> falling times in 1 ... T, and the 0 that they end at.
        most_steps: the most that there are times for; None: as many as noise levels.
    """

    name: str
    title: str
    times: str
    most_steps: int | None = None


SPACINGS: Registry[Spacing] = Registry(
    "spacing",
    [
        Spacing("trailing", "evenly, from the noisiest level", "distill.diffusion.solver.trailing_times"),
        Spacing("leading", "evenly, from below the noisiest level", "distill.diffusion.solver.leading_times"),
        Spacing("lcm", "among the 50 times of latent consistency models", "distill.diffusion.solver.lcm_times", 50),
        Spacing("milestones", "among the 8 milestones of MLCM", "distill.diffusion.solver.milestone_times", 8),
    ],
)


@dataclass(frozen=True)
class Sampler:
    """How latents are generated from noise.

    Args:
        name: in settings.
        title: for people, with its paper.
        function: dotted name of what generates: (denoiser, schedule, x, times, conditioning, generators) yields
            (time, x) after each step. `times` fall to 0; `generators`, one for each sample, are for fresh noise.
        schedulers: by the spacings that go with it, the diffusers scheduler that generates the same; None where there
            is none. Where the scheduler's own times at a number of steps are others, the pipeline is given
            `timesteps` (`distill.models.schedulers.timesteps_for` says when).
        usual_spacing: where nothing is said.
        evaluations: of the network, for a number of steps without guidance.
        solves: whether it solves the ODE from any state, and so can write trajectories.
        flow: the diffusers scheduler that generates the same for flow matching, at the `sigmas` that a pipeline is
            given (`distill.models.schedulers.sigmas_for`); None where there is none.
        zero_snr: whether the scheduler agrees with it where the noisiest level holds no signal.
        even: schedulers that are better known, and as exact where the only number of steps divides that of the levels.
        stochastic: whether it takes a gamma in 0 ... 1, the share of fresh noise in each step: `function` has a keyword
            `gamma` then, and the scheduler's pipeline is called with it as `eta`.
    """

    name: str
    title: str
    function: str
    schedulers: Mapping[str, Scheduler | None]
    usual_spacing: str = "trailing"
    evaluations: Callable[[int], int] = lambda steps: steps
    solves: bool = False
    flow: Scheduler | None = None
    zero_snr: bool = False
    even: Mapping[str, Scheduler] = field(default_factory=dict)
    stochastic: bool = False

    def generate(self, gamma: float = 0.0) -> Callable[..., Any]:
        """The function, imported only now; of a stochastic sampler, with its gamma."""
        return partial(resolved(self.function), gamma=gamma) if self.stochastic else resolved(self.function)


def _lcm(solver_steps: int) -> Scheduler:
    """LCM's scheduler; with 8 `solver_steps` its 1, 2, 4 and 8 steps are at trailing times."""
    return "LCMScheduler", {"original_inference_steps": solver_steps}


def _tcd(solver_steps: int) -> Scheduler:
    """TCD's scheduler; with 40 `solver_steps` its 1, 2, 4, 5, 8 and 10 steps are at trailing times."""
    return "TCDScheduler", {"original_inference_steps": solver_steps}


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
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
_TO_CLEAN = {"set_alpha_to_one": True, "clip_sample": False}

SAMPLERS: Registry[Sampler] = Registry(
    "sampler",
    [
        Sampler(
            name="lcm",
            title="multistep consistency sampling, with fresh noise at each step (Luo et al. 2023)",
            function="distill.diffusion.consistency.multistep",
            schedulers={"lcm": _lcm(50), "trailing": _lcm(8), "leading": _lcm(50), "milestones": _lcm(8)},
            usual_spacing="lcm",
            flow=("FlowMatchLCMScheduler", {}),
            zero_snr=True,
        ),
        Sampler(
            name="tcd",
            title="strategic stochastic sampling, with a share gamma of fresh noise (TCD, Zheng et al. 2024)",
            function="distill.diffusion.consistency.strategic",
            schedulers={"lcm": _tcd(50), "trailing": _tcd(40), "leading": _tcd(50), "milestones": _tcd(40)},
            usual_spacing="lcm",
            zero_snr=True,
            stochastic=True,
        ),
        Sampler(
            name="euler",
            title="Euler's method, as diffusers' scheduler starts it",
            function="distill.diffusion.solver.euler",
            schedulers={
                "trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "zero"})
            },
            zero_snr=True,
        ),
        Sampler(
            name="ddim",
            title="DDIM without noise (Song et al. 2021)",
            function="distill.diffusion.solver.ddim",
            schedulers={
                "trailing": (_DPM, _FIRST_ORDER),
                "leading": ("DDIMScheduler", _LEADING | _TO_CLEAN),
                "lcm": (_DPM, _FIRST_ORDER),
                "milestones": (_DPM, _FIRST_ORDER),
            },
            solves=True,
            flow=("FlowMatchEulerDiscreteScheduler", {}),
            zero_snr=True,
            even={"trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"} | _TO_CLEAN)},
        ),
        Sampler(
            name="heun",
            title="Heun's method (Karras et al. 2022)",
            function="distill.diffusion.solver.heun",
            # With leading times it begins with the noise as it is; with trailing ones with sigma times it.
            schedulers=dict.fromkeys(SPACINGS, ("HeunDiscreteScheduler", _LEADING)),
            evaluations=lambda steps: 2 * steps - 1,  # the last is Euler's
            solves=True,
        ),
        Sampler(
            name="dpmpp_2m",
            title="DPM-Solver++(2M) (Lu et al. 2022)",
            function="distill.diffusion.solver.dpmpp_2m",
            schedulers=dict.fromkeys(SPACINGS, (_DPM, _SECOND_ORDER)),
            solves=True,
        ),
    ],
)


def pairs() -> list[tuple[str, str]]:
    """The names of samplers and spacings that go together."""
    return [(sampler.name, spacing) for sampler in SAMPLERS.values() for spacing in sampler.schedulers]


def solvers() -> list[str]:
    """The names of the samplers that can write trajectories."""
    return [sampler.name for sampler in SAMPLERS.values() if sampler.solves]


def check_sampler(name: str) -> None:
    """Raises ValueError for a name that is not one of `SAMPLERS`."""
    SAMPLERS.find(name)


def check_spacing(name: str) -> None:
    """Raises ValueError for a name that is not one of `SPACINGS`."""
    SPACINGS.find(name)


def find_solver(name: str) -> Sampler:
    """Raises ValueError for a name that is not one of `solvers`."""
    try:
        found = SAMPLERS.find(name)
    except UnknownName:
        found = None
    if found is None or not found.solves:
        raise ValueError(f"solver {name!r} is not known; allowed: {', '.join(solvers())}")
    return found


def check_solver(name: str) -> None:
    """Raises ValueError for a name that is not one of `solvers`."""
    find_solver(name)


def check_pair(sampler: str, spacing: str, steps: int | None = None) -> None:
    """Raises ValueError for names that are not known or do not go together, or for more steps than there are times."""
    found, times = SAMPLERS.find(sampler), SPACINGS.find(spacing)
    if spacing not in found.schedulers:
        those = ", ".join(map(repr, found.schedulers))
        free = next((s.name for s in SAMPLERS.values() if s.solves and s.schedulers.keys() >= SPACINGS.keys()), None)
        hint = f": {free!r} takes any" if free else ""
        raise ValueError(f"sampler {sampler!r} takes spacing {those}, got {spacing!r}{hint}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, or None, got {steps}")
    if steps is not None and times.most_steps is not None and steps > times.most_steps:
        raise ValueError(f"steps must be within 1 ... {times.most_steps} at spacing {spacing!r}, got {steps}")


def read_sampling(text: str) -> tuple[str, str | None, float | None]:
    """Sampler, spacing and gamma of `SAMPLER`, `SAMPLER/SPACING` or `SAMPLER/SPACING/GAMMA`; None: it is left out.

    Raises ValueError: another form, names that are not known or do not go together, or a gamma that the sampler cannot
    have.
    """
    sampler, *more = text.split("/")
    spacing = more[0] if more else None
    check_pair(sampler, usual_spacing(sampler) if spacing is None else spacing)
    if len(more) < 2:
        return sampler, spacing, None
    try:
        (gamma,) = map(float, more[1:])
    except ValueError:
        raise ValueError(
            f"{text!r} must be SAMPLER, SAMPLER/SPACING or SAMPLER/SPACING/GAMMA, GAMMA a number"
        ) from None
    check_gamma(sampler, gamma)
    return sampler, spacing, gamma


def check_gamma(sampler: str, gamma: float) -> None:
    """Raises ValueError for a gamma outside 0 ... 1, or one of a sampler that takes none."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be within 0 ... 1, got {gamma}")
    if gamma and not SAMPLERS.find(sampler).stochastic:
        those = ", ".join(one.name for one in SAMPLERS.values() if one.stochastic)
        raise ValueError(f"sampler {sampler!r} takes no gamma, got {gamma:g}: {those} does")


def usual_spacing(sampler: str) -> str:
    """The spacing of a sampler's times where none is set."""
    return SAMPLERS.find(sampler).usual_spacing
