from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

from distill.diffusion.segments import Segments
from distill.diffusion.solver import lcm_times, leading_times, make_times, milestone_times, trailing_times

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def times_of(scheduler: Any, steps: int) -> list[int]:
    scheduler.set_timesteps(steps)
    return [int(index) + 1 for index in scheduler.timesteps] + [0]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_trailing_equals_diffusers(scheduler: Any) -> None:
    theirs = scheduler(**SD, timestep_spacing="trailing")
    for steps in (*range(1, 48), 50, 64, 75, 100, 125, 128, 200, 250, 256, 500, 1000):
        assert trailing_times(1000, steps) == times_of(theirs, steps), steps


@pytest.mark.parametrize("steps", range(1, 1001, 7))
def test_trailing_is_exact_for_any_number_of_steps(steps: int) -> None:
    """Where T - i T/steps ends in .5, diffusers rounds the error of `np.arange`: 48 steps differ by 1, 61 are 62."""
    times = trailing_times(1000, steps)
    assert len(times) == steps + 1 and times[-1] == 0
    assert all(abs(t * steps - (1000 * steps - i * 1000)) * 2 <= steps for i, t in enumerate(times))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("offset", [0, 1])
def test_leading_equals_diffusers(scheduler: Any, offset: int) -> None:
    theirs = scheduler(**SD, timestep_spacing="leading", steps_offset=offset)
    for steps in (*range(1, 129), 200, 250, 333, 500):
        assert leading_times(1000, steps, offset) == times_of(theirs, steps), steps


@pytest.mark.parametrize("solver_steps", [10, 20, 25, 40, 50, 100])
def test_lcm_equals_diffusers(solver_steps: int) -> None:
    theirs = LCMScheduler(original_inference_steps=solver_steps)
    for steps in range(1, solver_steps + 1):
        assert lcm_times(1000, steps, solver_steps) == times_of(theirs, steps), steps


@pytest.mark.parametrize(
    ("spacing", "steps", "times"),
    [
        ("trailing", 4, [1000, 750, 500, 250, 0]),
        ("leading", 4, [752, 502, 252, 2, 0]),
        ("lcm", 4, [1000, 760, 500, 260, 0]),
        ("lcm", 8, [1000, 880, 760, 640, 500, 380, 260, 140, 0]),
        ("milestones", 2, [1000, 500, 0]),
        ("milestones", 3, [1000, 500, 125, 0]),
        ("milestones", 4, [1000, 750, 500, 125, 0]),
    ],
)
def test_by_name(spacing: str, steps: int, times: list[int]) -> None:
    assert make_times(spacing, 1000, steps) == times


@pytest.mark.parametrize("steps", range(1, 9))
def test_milestones_are_those_of_the_segments_and_diffusers_takes_them(steps: int) -> None:
    times = milestone_times(1000, steps)
    assert set(times) <= set(Segments(1000, 8).milestones) and len(times) == steps + 1
    scheduler = LCMScheduler()
    scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
    assert [int(index) + 1 for index in scheduler.timesteps] == times[:-1]


@pytest.mark.parametrize(("coarse", "fine"), [(32, 128), (8, 32), (4, 8), (2, 4), (1, 2)])
def test_grids_of_the_halving_chain_are_nested(coarse: int, fine: int) -> None:
    """A student's step is a whole number of its teacher's: the teacher visits every time of the student."""
    student, teacher = trailing_times(1000, coarse), trailing_times(1000, fine)
    assert [teacher.index(t) for t in student] == list(range(0, fine + 1, fine // coarse))


@pytest.mark.parametrize("spacing", ["trailing", "leading", "lcm"])
@pytest.mark.parametrize("steps", [1, 3, 17, 50])
def test_times_fall(spacing: str, steps: int) -> None:
    times = make_times(spacing, 1000, steps)
    assert len(times) == steps + 1 and all(t > s for t, s in pairwise(times)) and times[0] <= 1000


@pytest.mark.parametrize("spacing", ["trailing", "leading", "lcm"])
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_refuses_step_counts_that_do_not_exist(spacing: str, steps: int) -> None:
    with pytest.raises(ValueError, match=f"^steps must be within 1 ... (1000|50), got {steps}$"):
        make_times(spacing, 1000, steps)


def test_there_are_no_more_steps_than_milestones() -> None:
    with pytest.raises(ValueError, match="^steps must be within 1 ... 8, got 9$"):
        make_times("milestones", 1000, 9)


def test_refuses_an_unknown_spacing_by_name() -> None:
    with pytest.raises(
        ValueError, match="^spacing 'karras' is not known; allowed: trailing, leading, lcm, milestones$"
    ):
        make_times("karras", 1000, 4)
