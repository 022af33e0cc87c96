from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor

from distill.diffusion.consistency import inverse_jump, jump, where
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, to_denoised
from distill.diffusion.schedule import NoiseSchedule, add_noise, boundary_scalings
from distill.diffusion.segments import Segments
from distill.diffusion.solver import ddim_step
from tests.analytic import Mixture, gaussian, gaussian_flow

SCHEDULE = NoiseSchedule.scaled_linear()


def data(sd: float = 0.8) -> Mixture:
    return gaussian(SCHEDULE, torch.full((2, 1, 1), 0.3, dtype=torch.float64), sd)


def exact(teacher: Mixture, segments: Segments) -> Denoiser:
    """The student that multistep consistency strives for: its jump to the segment's start is the exact flow."""

    def call(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        s = segments.start(t)
        x0 = inverse_jump(SCHEDULE, gaussian_flow(teacher, x_t, t, s), x_t, t, s)
        return to_denoised(Prediction.SAMPLE, x0, x_t, t, SCHEDULE)

    return call


# --- LCM's boundary scalings ---


def test_scalings_equal_those_of_the_lcm_scheduler() -> None:
    scheduler: Any = LCMScheduler()
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(index) for index in range(1000)]
    skip, out = boundary_scalings(torch.arange(1, 1001), torch.zeros(1000, 1, dtype=torch.float64))
    torch.testing.assert_close(torch.cat([skip, out], 1), torch.tensor(theirs).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("index", "skip", "out"), [(0, 1, 0), (19, 6.9e-6, 0.9999965), (999, 2.5e-9, 1)])
def test_scalings_have_the_published_values(index: int, skip: float, out: float) -> None:
    x = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    ours = [float(c) for c in boundary_scalings(torch.tensor([index + 1]), x)]
    assert ours == [pytest.approx(skip, rel=0.01), pytest.approx(out, abs=5e-8)]


def test_the_scaled_function_is_the_identity_at_clean_data() -> None:
    x, x0 = torch.randn(2, 3, 4, 2, 2)
    c_skip, c_out = boundary_scalings(torch.zeros(3, dtype=torch.int64), x)
    assert torch.equal(c_skip * x + c_out * x0, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scalings_are_float32_or_wider(dtype: torch.dtype) -> None:
    """The square of 10 (t - 1) overflows float16 from t = 27 on."""
    for c in boundary_scalings(torch.tensor([1, 1000]), torch.zeros(2, 4, 2, 2, dtype=dtype)):
        assert c.dtype == torch.float32 and c.shape == (2, 1, 1, 1) and c.isfinite().all()


# --- the jump ---


@pytest.mark.parametrize("t", [0, 1, 125, 500, 1000])
def test_a_jump_to_where_it_stands_is_the_identity(t: int) -> None:
    """For any belief at all, even one that is no number, as is an x0 prediction's noise at t = 0."""
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64)
    for belief in (torch.randn(4, 2, 2, 2, dtype=torch.float64), torch.full_like(x, torch.nan)):
        at = torch.full((4,), t)
        assert torch.equal(jump(SCHEDULE, Denoised(belief, belief), x, at, at), x)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_inverse_jump_undoes_the_jump(count: int) -> None:
    t = torch.arange(1, 1001)
    s = Segments(1000, count).start(t)
    x, x0 = torch.randn(2, 1000, 2, 2, 2, dtype=torch.float64)
    there = jump(SCHEDULE, to_denoised(Prediction.SAMPLE, x0, x, t, SCHEDULE), x, t, s)
    back = inverse_jump(SCHEDULE, there, x, t, s)
    torch.testing.assert_close(back, x0, rtol=0, atol=3e-12)  # at t = s + 1 rounding is amplified the most
    torch.testing.assert_close(back[124::125], x0[124::125], rtol=0, atol=3e-13)


def test_a_jump_weighs_x0_as_mlcm_measured() -> None:
    """From milestone to milestone an error of x0 counts c²: the reason why the loss may be taken of x0 instead."""
    t = torch.tensor(Segments(1000, 8).milestones[1:])
    s = Segments(1000, 8).start(t)
    x, x0, error = torch.randn(3, 8, 2, 2, 2, dtype=torch.float64)
    one, other = (jump(SCHEDULE, to_denoised(Prediction.SAMPLE, y, x, t, SCHEDULE), x, t, s) for y in (x0, x0 + error))
    c2 = ((other - one) / error).pow(2)
    torch.testing.assert_close(c2, c2[:, :1, :1, :1].expand_as(c2))
    assert c2[:, 0, 0, 0].tolist() == pytest.approx([1, 0.157, 0.0835, 0.0531, 0.0346, 0.021, 0.011, 0.0046], rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_chain_of_exact_jumps_is_the_flow(count: int) -> None:
    """Every number of segments draws the same sample."""
    teacher, segments = data(), Segments(1000, count)
    x = start = torch.randn(16, 2, 1, 1, dtype=torch.float64)
    for milestone in reversed(segments.milestones[1:]):
        t = torch.full((16,), milestone)
        x = jump(SCHEDULE, exact(teacher, segments)(x, t, {}), x, t, segments.start(t))
    torch.testing.assert_close(x, gaussian_flow(teacher, start, 1000, 0), rtol=0, atol=1e-13)


# --- the consistency loss at its exact solution ---


def gap(teacher: Mixture, student: Denoiser, segments: Segments, skip: int, exact_steps: bool = False) -> float:
    """L2 between the jumps from x_t and from the teacher's x_s, where they land, over all the solver's times."""
    t = torch.arange(skip, 1001, skip).repeat_interleave(64)
    x_0 = teacher.sample(64, torch.Generator().manual_seed(0)).repeat(1000 // skip, 1, 1, 1)
    x_t = add_noise(SCHEDULE, x_0, torch.randn_like(x_0), t)

    end = segments.start(t)
    s = torch.maximum(t - skip, end)
    x_s = gaussian_flow(teacher, x_t, t, s) if exact_steps else ddim_step(SCHEDULE, teacher(x_t, t, {}), s)
    from_t = jump(SCHEDULE, student(x_t, t, {}), x_t, t, end)
    from_s = jump(SCHEDULE, student(x_s, s.clamp(min=1), {}), x_s, s, end)
    return float(l2(from_t, where(s == end, x_s, from_s)).mean())


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("skip", [5, 20, 25, 125])
def test_the_exact_solution_has_no_loss_under_exact_steps(count: int, skip: int) -> None:
    segments = Segments(1000, count)
    assert gap(data(), exact(data(), segments), segments, skip, exact_steps=True) < 1e-26


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("skip", [5, 20, 25, 125])
def test_a_single_point_leaves_nothing_to_learn(count: int, skip: int) -> None:
    """Dirac data: DDIM is exact at any step, so the teacher is the student."""
    teacher = data(sd=0.0)
    assert gap(teacher, teacher, Segments(1000, count), skip) < 1e-26


@pytest.mark.parametrize("count", [1, 4])
def test_what_a_ddim_teacher_leaves_falls_with_the_skip(count: int) -> None:
    """By 8 a halving: DDIM's error of one step is of second order, 16 in l2, but of first next to clean data."""
    segments = Segments(1000, count)
    left = [gap(data(), exact(data(), segments), segments, skip) for skip in (40, 20, 10, 5)]
    assert [a / b for a, b in zip(left, left[1:], strict=False)] == pytest.approx([8, 8, 8], rel=0.25)
