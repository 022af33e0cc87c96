"""States that a student meets while it samples: those of its sampler, by as many calls whichever is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.diffusion.consistency import multistep
from distill.diffusion.prediction import Conditioning, Denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.simulation import simulated_state
from tests.analytic import exact_student, gaussian

SHAPE = (2, 3, 1)
TIMES = [1000, 750, 500, 250]
VP, FLOW = NoiseSchedule.scaled_linear(), NoiseSchedule.linear(3.0)


class Counted:
    """The exact student of a Gaussian, which counts its calls."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.answer = exact_student(gaussian(schedule, torch.full(SHAPE, 0.3, dtype=torch.float64), 0.8))
        self.times: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        self.times.append(t.tolist())
        assert not torch.is_grad_enabled()
        return self.answer(x, t, c)


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_it_is_the_state_that_the_sampler_has_before_that_step(
    schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 8
    like, place = torch.zeros(n, *SHAPE, dtype=torch.float64), torch.arange(n) % len(TIMES)
    context, student = Context(0, 0, tuple(range(n))), Counted(schedule)
    x, t = simulated_state(schedule, student, torch.tensor([TIMES] * n), place, like, {}, context)
    assert t.tolist() == [TIMES[i] for i in place.tolist()]

    noises = iter([context.normal(like, f"student {i}") for i in range(1, len(TIMES))])
    monkeypatch.setattr("distill.diffusion.consistency.starting_noise", lambda generators, shape: next(noises))
    start = context.normal(like, "student 0")
    with torch.no_grad():
        met = [start, *(s for _, s in multistep(student, schedule, start, [*TIMES, 0], {}, [torch.Generator()] * n))]
    # LCM's scalings at the boundary, which variance-preserving sampling has, are off by 4e-8 at 250
    torch.testing.assert_close(x, torch.stack([met[k][i] for i, k in enumerate(place.tolist())]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", [0, 3])
def test_it_calls_the_student_equally_often_wherever_the_state_is(place: int) -> None:
    student = Counted(VP)
    like = torch.zeros(2, *SHAPE, dtype=torch.float64)
    times = torch.tensor([TIMES, [1000, 500, 500, 500]])
    simulated_state(VP, student, times, torch.tensor([place, 0]), like, {}, Context(0, 0, (0, 1)))
    assert student.times == [[1000, 1000], [750, 500], [500, 500]]


def test_a_sampler_of_one_step_meets_noise_alone() -> None:
    like = torch.zeros(2, *SHAPE)
    context, none = Context(0, 0, (0, 1)), torch.zeros(2, dtype=torch.int64)
    x, t = simulated_state(VP, Counted(VP), torch.full((2, 1), 1000), none, like, {}, context)
    assert torch.equal(x, context.normal(like, "student 0")) and t.tolist() == [1000, 1000]
