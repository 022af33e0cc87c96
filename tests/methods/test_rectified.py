"""Rectified diffusion where the straight paths are known, on variance-preserving noise and on flow matching alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.diffusion.losses import l2
from distill.diffusion.noise import Noise
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.random import Context, generator
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import ddim_step, solve, trailing_times
from distill.diffusion.trajectory import Batch, Transition
from distill.methods.lightning import LightningMSE
from distill.methods.rectified import DISTANCES, SPACES, Rectified
from distill.methods.sampling import sample
from tests.analytic import Mixture, gaussian, quantile_flow, three_peaks

VP, FLOW = NoiseSchedule.scaled_linear(), NoiseSchedule.linear(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW], ids=["VP", "flow"])
SEGMENTS = pytest.mark.parametrize("segments", [1, 2, 4])
SHAPE = (2, 3, 1)


class At(Rectified):
    """With the time chosen by a function of the pair in the place of chance."""

    def __init__(self, *args: Any, time: Callable[[Transition], Tensor], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.time = time

    def sample_time(self, step: Transition, context: Context) -> Tensor:
        return self.time(step)


def noisiest(step: Transition) -> Tensor:
    return step.t


def data(schedule: NoiseSchedule, sd: float = 0.8) -> Mixture:
    return gaussian(schedule, torch.full(SHAPE, 0.3, dtype=torch.float64), sd)


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch_of(x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Batch:
    n = len(x_t)
    states, times = torch.stack([x_t, x_s], 1), torch.stack([t, s], 1)
    return Batch(states, times, {}, {}, torch.ones(n), positions=tuple(range(n)))


def solved(method: Rectified, teacher: Denoiser, steps: int, n: int = 12) -> Batch:
    """Pairs of each segment from the teacher's solves of so many steps."""
    times = trailing_times(1000, steps)
    states = dict(solve(teacher, method.schedule, normal(n), times, {}))
    ends = list(pairwise(reversed(method.segments.milestones)))
    x_t, x_s = (torch.cat([states[pair[i]] for pair in ends]) for i in (0, 1))
    t, s = (torch.tensor([pair[i] for pair in ends]).repeat_interleave(n) for i in (0, 1))
    return batch_of(x_t, t, x_s, s)


def context(batch: Batch, step: int = 0) -> Context:
    return Context(0, step, batch.positions)


def total(method: Any, student: Denoiser, batch: Batch) -> float:
    (turn,) = method.turns(0)
    return float(turn.loss({"student": student}, batch, context(batch)).total)


# --- the line ---


@SCHEDULES
@SEGMENTS
def test_the_line_passes_through_both_stored_states(schedule: NoiseSchedule, segments: int) -> None:
    method = Rectified(schedule, segments)
    step = solved(method, data(schedule), 8).transition()
    line = method.line(step)
    torch.testing.assert_close(ddim_step(schedule, line, step.t), step.x_t, rtol=0, atol=1e-12)
    torch.testing.assert_close(ddim_step(schedule, line, step.s), step.x_s, rtol=0, atol=1e-12)


def test_of_one_segment_the_line_joins_the_image_and_the_noise_that_x_T_holds() -> None:
    method = Rectified(VP)
    step = solved(method, data(VP), 8).transition()
    line = method.line(step)
    torch.testing.assert_close(line.x0, step.x_s)
    torch.testing.assert_close(line.eps, (step.x_t - VP.alpha(1000, step.x_t) * step.x_s) / VP.sigma(1000, step.x_t))


def test_in_segments_it_is_the_published_targets_of_both_papers() -> None:
    """Rectified Diffusion's eps of the noise-to-signal ratios; PeRFlow's of lambda = alpha_s / alpha_e."""
    method = Rectified(VP, 4)
    step = solved(method, data(VP), 8).transition()
    last = step.s > 0  # at clean data both formulas hold too, but the ratio of noise is 0
    alpha_e, alpha_s, sigma_e, sigma_s = (f(r, step.x_t) for f in (VP.alpha, VP.sigma) for r in (step.t, step.s))
    rectified = (step.x_s / alpha_s - step.x_t / alpha_e) / (sigma_s / alpha_s - sigma_e / alpha_e)
    ratio = alpha_s / alpha_e
    perflow = (step.x_s - ratio * step.x_t) / (sigma_s - ratio * sigma_e)
    found = method.line(step).eps
    torch.testing.assert_close(found[last], rectified[last], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, perflow, rtol=1e-10, atol=1e-10)


def test_the_papers_ends_miss_the_stored_noise_and_agree_where_the_noisiest_level_holds_no_signal() -> None:
    zero = NoiseSchedule.of(Noise(num_train_timesteps=1000, rescale_betas_zero_snr=True))
    off = {}
    for name, schedule in {"VP": VP, "zero": zero, "flow": FLOW}.items():
        batch = solved(Rectified(schedule), data(schedule), 8)
        step = batch.transition()
        exact, paper = (Rectified(schedule, ends=ends).line(step) for ends in ("exact", "paper"))
        off[name] = float((ddim_step(schedule, paper, 1000) - step.x_t).abs().max())
        losses = [total(Rectified(schedule, ends=e), data(schedule, 0.7), batch) for e in ("exact", "paper")]
        assert (abs(losses[0] - losses[1]) < 1e-12) == (name != "VP")
        assert torch.equal(exact.x0, paper.x0)
    assert off["zero"] < 1e-12 and off["flow"] == 0 and off["VP"] > 0.03


# --- its times ---


@SEGMENTS
def test_only_milestones_are_read_and_each_pair_as_often(segments: int) -> None:
    reads, times = Rectified(VP, segments).reads(), trailing_times(1000, 40)
    reads.check(times)
    found = [reads.pick(times, generator("pick", i)) for i in range(200)]
    assert {len(pick) for pick in found} == {2}
    edges = [1000 * i // segments for i in range(segments, -1, -1)]
    assert {(times[a], times[b]) for a, b in found} == set(pairwise(edges))


def test_a_store_of_noise_and_images_is_enough_for_one_segment_and_too_little_for_more() -> None:
    Rectified(VP).reads().check([1000, 0])
    with pytest.raises(ValueError, match=r"the store does not keep the times \[250, 500, 750\]: it has \[1000, 0\]"):
        Rectified(VP, 4).reads().check([1000, 0])


def test_all_times_of_a_segment_are_trained_and_none_more_than_others() -> None:
    method = Rectified(VP, 100)
    e = 10 * torch.arange(1, 101).repeat_interleave(40)  # 4,000 times in segments of 10
    x = torch.zeros(len(e), 1, 1, 1)
    batch = batch_of(x, e, x, e - 10)
    t = method.sample_time(batch.transition(), context(batch))
    assert bool((t > e - 10).all()) and bool((t <= e).all())
    counts = torch.bincount((t - 1) % 10, minlength=10).double()
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # chi-squared of 9 degrees, .1 %
    whole = Rectified(VP)
    wide = replace(batch, times=torch.tensor([[1000, 0]]).expand(len(e), 2))
    t = whole.sample_time(wide.transition(), context(wide))
    assert 1 <= int(t.min()) <= 5 and 996 <= int(t.max()) <= 1000
    assert float(t.double().mean()) == pytest.approx(500.5, abs=20)


# --- whom it leaves alone ---


@SCHEDULES
@SEGMENTS
@pytest.mark.parametrize("loss", DISTANCES)
@pytest.mark.parametrize("space", SPACES)
def test_a_single_point_leaves_nothing_to_learn(schedule: NoiseSchedule, segments: int, loss: str, space: str) -> None:
    """Dirac data: the teacher's paths are straight already, at every time."""
    method = Rectified(schedule, segments, loss=loss, loss_space=space)
    batch = solved(method, data(schedule, 0.0), 8)
    assert total(method, data(schedule, 0.0), batch) < 1e-12
    assert total(method, data(schedule, 0.3), batch) > 1e-9


class Straight:
    """Of one-dimensional data the student that has straightened the exact flow, by interpolation between its lines."""

    def __init__(self, teacher: Mixture, n: int = 801) -> None:
        self.schedule = teacher.schedule
        self.x_T = torch.linspace(-4, 4, n, dtype=torch.float64).reshape(n, 1, 1, 1)
        self.x_0 = quantile_flow(teacher, self.x_T, 1000, 0)
        alpha, sigma = (f(1000, self.x_T) for f in (self.schedule.alpha, self.schedule.sigma))
        self.eps = (self.x_T - alpha * self.x_0) / sigma

    def at(self, t: int) -> Tensor:
        """Where the lines are at t, in the order of their ends."""
        return ddim_step(self.schedule, Denoised(self.x_0, self.eps), t).flatten()

    def __call__(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        found = [self._one(x, int(when)) for x, when in zip(x_t.flatten(), t, strict=True)]
        x0, eps = torch.tensor(found, dtype=torch.float64).T
        return Denoised(x0.reshape(x_t.shape), eps.reshape(x_t.shape))

    def _one(self, x: Tensor, t: int) -> tuple[float, float]:
        points = self.at(t)
        right = int(torch.searchsorted(points, x).clamp(1, len(points) - 1))
        share = float((x - points[right - 1]) / (points[right] - points[right - 1]))
        both = (torch.lerp(v.flatten()[right - 1], v.flatten()[right], share) for v in (self.x_0, self.eps))
        x0, eps = both
        return float(x0), float(eps)


@SCHEDULES
def test_in_one_dimension_the_lines_never_cross_and_the_straight_student_has_no_loss(schedule: NoiseSchedule) -> None:
    teacher = three_peaks(schedule)
    student = Straight(teacher)
    for t in range(1, 1001):
        assert bool((student.at(t).diff() > 0).all())
    some = slice(5, -5, 20)
    x_T, x_0 = student.x_T[some], student.x_0[some]
    T = torch.full((len(x_T),), 1000)
    batch = batch_of(x_T, T, x_0, torch.zeros_like(T))
    assert total(Rectified(schedule, loss="l2"), student, batch) < 1e-18
    assert total(Rectified(schedule, loss="l2"), teacher, batch) > 1e-4
    for steps in (1, 2, 8):  # all of them land on one point
        found = sample(student, schedule, x_T, trailing_times(1000, steps), {}, "ddim")
        torch.testing.assert_close(found, x_0, rtol=0, atol=1e-9)


def test_where_two_lines_cross_the_best_answer_is_their_mean_and_its_loss_their_variance() -> None:
    ratio = float(VP.sigma(500, torch.zeros(1).double()) / VP.alpha(500, torch.zeros(1).double()))
    eps = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64).reshape(2, 1, 2, 1)
    x_0 = torch.tensor([[-ratio, 0.3], [ratio, 0.3]], dtype=torch.float64).reshape(2, 1, 2, 1)
    T = torch.full((2,), 1000)
    x_T = VP.alpha(1000, x_0) * x_0 + VP.sigma(1000, x_0) * eps
    batch = batch_of(x_T, T, x_0, torch.zeros_like(T))
    method = At(VP, loss="l2", time=lambda step: torch.full_like(step.t, 500))

    def loss(first: float, second: float) -> float:
        answer = torch.tensor([first, second], dtype=torch.float64).reshape(1, 1, 2, 1).expand(2, 1, 2, 1)
        return total(method, lambda x, t, c: Denoised(answer, torch.zeros_like(x)), batch)

    assert loss(0.0, 0.3) == pytest.approx(ratio**2 / 2, rel=1e-12)
    assert min(loss(0.1, 0.3), loss(-0.1, 0.3), loss(0.0, 0.4), loss(0.0, 0.2)) > loss(0.0, 0.3)


# --- where answers are compared ---


@SCHEDULES
@SEGMENTS
def test_the_spaces_differ_by_the_weights_of_times_alone(schedule: NoiseSchedule, segments: int) -> None:
    method = Rectified(schedule, segments)
    step = solved(method, data(schedule), 8).transition()
    line, t = method.line(step), method.sample_time(step, Context(0, 0, tuple(range(len(step.t)))))
    x_t = ddim_step(schedule, line, t)
    answer = data(schedule, 0.5)(x_t, t, {})
    z, x0, v = (Rectified(schedule, segments, "l2", loss_space=s).d(answer, line, t, step.s) for s in SPACES)
    alpha_t, sigma_t, alpha_s, sigma_s = (
        f(r, line.x0).flatten() for r in (t, step.s) for f in (schedule.alpha, schedule.sigma)
    )
    torch.testing.assert_close(z, (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x0)
    torch.testing.assert_close(v, x0 / sigma_t**2)


# --- what it becomes elsewhere ---


@SCHEDULES
@SEGMENTS
def test_at_the_noisy_ends_alone_it_is_the_regression_of_lightnings_first_run(
    schedule: NoiseSchedule, segments: int
) -> None:
    method = At(schedule, segments, "l2", time=noisiest)
    other = LightningMSE(schedule, segments, 8, "trajectory")
    assert method.reads() == other.reads()
    batch, student = solved(method, data(schedule), 8), data(schedule, 0.6)
    assert total(method, student, batch) == pytest.approx(total(other, student, batch), rel=1e-12)
    assert total(method, student, batch) > 1e-6


@SCHEDULES
def test_of_the_solvers_own_steps_the_teacher_has_nothing_to_learn(schedule: NoiseSchedule) -> None:
    method = At(schedule, 8, "l2", time=noisiest)
    assert total(method, data(schedule), solved(method, data(schedule), 8)) < 1e-24
    assert total(method, data(schedule), solved(method, data(schedule), 16)) > 1e-8


@SCHEDULES
def test_at_the_noise_alone_it_is_one_step_regression(schedule: NoiseSchedule) -> None:
    method = At(schedule, loss="l2", time=noisiest)
    batch, student = solved(method, data(schedule), 8), data(schedule, 0.6)
    step = batch.transition()
    expected = l2(student(step.x_t, step.t, {}).x0, step.x_s).mean()
    assert total(method, student, batch) == pytest.approx(float(expected), rel=1e-12)


# --- what it says and refuses ---


def test_segments_are_logged_each_for_itself() -> None:
    method = Rectified(VP, 4, loss="l2")
    batch = solved(method, data(VP), 8)
    (turn,) = method.turns(0)
    parts = turn.loss({"student": data(VP, 0.6)}, batch, context(batch)).parts
    assert list(parts) == ["loss", "segment_1", "segment_2", "segment_3", "segment_4"]
    assert sum(float(parts[f"segment_{i}"]) for i in range(1, 5)) / 4 == pytest.approx(float(parts["loss"]))
    one = solved(Rectified(VP), data(VP), 8)
    (turn,) = Rectified(VP).turns(0)
    assert list(turn.loss({"student": data(VP)}, one, context(one)).parts) == ["loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "l1"}, "method.loss must be one of huber, l2, got 'l1'"),
        ({"loss_space": "eps"}, "method.loss_space must be one of z_end, x0, v, got 'eps'"),
        ({"ends": "both"}, "method.ends must be one of exact, paper, got 'both'"),
        ({"huber_c": 0.0}, "method.huber_c must be above 0, got 0.0"),
        ({"segments": 0}, "method.segments must be within 1 ... 1000, got 0"),
        (
            {"segments": 4, "ends": "paper"},
            "method.ends=paper is of one segment, got segments=4: set method.ends=exact",
        ),
    ],
    ids=str,
)
def test_refuses_a_bad_value_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Rectified(VP, **settings)
    assert str(error.value) == message
