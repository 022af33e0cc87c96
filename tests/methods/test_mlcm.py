"""MLCM against exact flows: what its loss is, where its pairs come from, and that it distils."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.diffusion.consistency import inverse_jump, jump
from distill.diffusion.guidance import guided
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.segments import Segments
from distill.diffusion.solver import ddim_step, solve, trailing_times
from distill.diffusion.trajectory import Batch, CleanEnd, Pair
from distill.methods.lcm import LCM
from distill.methods.mlcm import MLCM, Stage
from distill.methods.sampling import sample
from tests.analytic import Mixture, gaussian, gaussian_flow, quantile_flow, three_peaks
from tests.methods.test_lcm import Student as Correction

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (2, 1, 1)
COUNTS = [1, 2, 4, 8]
SPACES = ["z_end", "x0", "v"]
FIRST = {"segments": 4, "skip": 25, "iterations": 10}
SECOND = {"segments": 1, "grid": 8, "skip": 125, "source": "student", "substeps": 3, "iterations": 5}


def data(sd: float = 0.8) -> Mixture:
    return gaussian(SCHEDULE, torch.full(SHAPE, 0.3, dtype=torch.float64), sd)


def exact(teacher: Mixture, segments: Segments) -> Denoiser:
    """The student whose jump to its segment's start is the exact flow."""

    def call(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        s = segments.start(t.clamp(min=1))
        x0 = inverse_jump(SCHEDULE, gaussian_flow(teacher, x_t, t, s), x_t, t, s)
        return to_denoised(Prediction.SAMPLE, torch.where(x0.isfinite(), x0, 0.0), x_t, t, SCHEDULE)

    return call


def method(**stage: Any) -> tuple[MLCM, Stage]:
    mlcm = MLCM(SCHEDULE, [Stage(**{"iterations": 1, **stage})], guidance=1.0)
    return mlcm, mlcm.stages[0]


def pairs(teacher: Mixture, segments: Segments, skip: int, exact_steps: bool, n: int = 64) -> Batch:
    """(x_t, x_s) at every time of the solver's grid, s no further than the segment's start."""
    t = torch.arange(skip, 1001, skip).repeat_interleave(n)
    x_0 = teacher.sample(n, torch.Generator().manual_seed(0)).repeat(1000 // skip, 1, 1, 1)
    x_t = add_noise(SCHEDULE, x_0, torch.randn_like(x_0), t)
    s = torch.maximum(t - skip, segments.start(t))
    x_s = gaussian_flow(teacher, x_t, t, s) if exact_steps else ddim_step(SCHEDULE, teacher(x_t, t, {}), s)
    return batch_of(torch.stack([x_t, x_s], 1), torch.stack([t, s], 1))


def batch_of(states: Tensor, times: Tensor) -> Batch:
    n = len(states)
    return Batch(states, times, {}, {}, torch.ones(n), positions=tuple(range(n)))


def noise_batch(n: int) -> Batch:
    """What a stage without stored pairs reads."""
    return batch_of(torch.zeros(n, 1, *SHAPE, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.int64))


def context(n: int) -> Context:
    return Context(0, 0, tuple(range(n)))


# --- what the loss is ---


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_the_exact_solution_has_no_loss_under_exact_steps(count: int, space: str, distance: str) -> None:
    mlcm, stage = method(segments=count, skip=25, loss_space=space, distance=distance)
    segments = Segments(1000, count)
    batch = pairs(data(), segments, 25, exact_steps=True)
    losses = mlcm.loss(stage, {"student": exact(data(), segments)}, batch, context(0))
    assert losses.total < 1e-20


def test_what_a_ddim_teacher_leaves_is_as_measured() -> None:
    """Independent figures for M = 4 (2,000 draws of N(.3, .8²), times within the segments, float64)."""
    segments, measured = Segments(1000, 4), {5: 3.4e-8, 10: 1.3e-7, 20: 1.5e-6, 40: 1.4e-5, 80: 1.1e-4, 125: 4.5e-4}
    for skip, expected in measured.items():
        mlcm, stage = method(segments=4, skip=skip)
        g = torch.Generator().manual_seed(skip)
        t = torch.randint(1, 1001, (4000,), generator=g)
        x_0 = data().sample(4000, g)
        x_t = add_noise(SCHEDULE, x_0, torch.randn(x_0.shape, generator=g, dtype=x_0.dtype), t)
        s = torch.maximum(t - skip, segments.start(t))
        x_s = ddim_step(SCHEDULE, data()(x_t, t, {}), s)
        batch = batch_of(torch.stack([x_t, x_s], 1), torch.stack([t, s], 1))
        loss = float(mlcm.loss(stage, {"student": exact(data(), segments)}, batch, context(0)).total)
        assert expected / 3 < loss < 3 * expected, skip


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("space", SPACES)
def test_a_single_point_leaves_nothing_to_learn(count: int, space: str) -> None:
    """Dirac data: DDIM is exact at any step, so the teacher is the student."""
    teacher, segments = data(sd=0.0), Segments(1000, count)
    mlcm, stage = method(segments=count, skip=125, loss_space=space)
    assert mlcm.loss(stage, {"student": teacher}, pairs(teacher, segments, 125, False), context(0)).total < 1e-20


@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_one_segment_is_lcm_without_boundary_scalings(distance: str) -> None:
    """They are (0, 1) to 7e-6 from t = 20 on, and (1, 0) at clean data, where the jump is the identity too."""
    mlcm, stage = method(segments=1, skip=20, distance=distance, huber_c=0.01)
    batch = pairs(data(), Segments(1000, 1), 20, False)
    batch = replace(batch, states=batch.states + 0.1 * torch.randn_like(batch.states))  # off the solution
    student = exact(data(sd=0.5), Segments(1000, 1))
    ours = mlcm.loss(stage, {"student": student}, batch, context(0)).total
    lcm = LCM(SCHEDULE, skip=20, loss=distance, huber_c=0.01).loss({"student": student}, batch, context(0)).total
    assert float(ours) == pytest.approx(float(lcm), rel=1e-4) and ours > 1e-4


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_whole_segments_skip_is_regression_on_the_teachers_x0(count: int) -> None:
    """Where both ends are milestones nothing is asked of the student at x_s: c² || f - x0 ||²."""
    length = 1000 // count
    mlcm, stage = method(segments=count, skip=length, grid=count)
    teacher, student = data(), exact(data(sd=0.3), Segments(1000, count))
    batch = pairs(teacher, Segments(1000, count), length, False)
    t, s, x_t = batch.times[:, 0], batch.times[:, 1], batch.states[:, 0]
    shrink = SCHEDULE.sigma(s, x_t) / SCHEDULE.sigma(t, x_t)
    c = SCHEDULE.alpha(s, x_t) - SCHEDULE.alpha(t, x_t) * shrink
    expected = l2(c * student(x_t, t, {}).x0, c * teacher(x_t, t, {}).x0).mean()
    assert float(mlcm.loss(stage, {"student": student}, batch, context(0)).total) == pytest.approx(float(expected))


def test_the_spaces_are_one_distance_in_other_units() -> None:
    """Of one sample: z_end is c² times x0's, and v is (SNR + 1) times x0's."""
    segments = Segments(1000, 4)
    whole = pairs(data(), segments, 25, False, n=1)
    student = exact(data(sd=0.3), segments)
    for i in (0, 9, 10, 39):
        batch = batch_of(whole.states[i : i + 1], whole.times[i : i + 1])
        t, s = batch.times[0].tolist()
        end = int(segments.start(torch.tensor([t])))
        found = {}
        for space in SPACES:
            mlcm, stage = method(segments=4, skip=25, loss_space=space)
            found[space] = float(mlcm.loss(stage, {"student": student}, batch, context(0)).total)
        alpha, sigma = (
            float(f(t, batch.states)) for f in (lambda r, x: SCHEDULE.alpha(r, x), lambda r, x: SCHEDULE.sigma(r, x))
        )
        shrink = float(SCHEDULE.sigma(end, batch.states)) / sigma
        c = float(SCHEDULE.alpha(end, batch.states)) - alpha * shrink
        assert found["z_end"] == pytest.approx(c**2 * found["x0"], rel=1e-9)
        assert found["v"] == pytest.approx((alpha**2 / sigma**2 + 1) * found["x0"], rel=1e-9)
        assert found["x0"] > 1e-6 or s == end


def test_at_the_segments_start_the_target_is_the_state_itself() -> None:
    """To the bit, and whatever the student would say there."""
    mlcm, stage = method(segments=4, skip=25)
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    t = torch.tensor([250, 0, 750])

    def anything(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        return Denoised(torch.full_like(x, 9.0), torch.full_like(x, torch.nan))

    assert torch.equal(mlcm.g(anything, x, t, t, {}), x)


def test_no_gradient_goes_through_the_target() -> None:
    mlcm, stage = method(segments=4, skip=25)
    batch = pairs(data(), Segments(1000, 4), 25, False, n=1)
    batch.states.requires_grad_()
    mlcm.loss(stage, {"student": data(sd=0.4)}, batch, context(0)).total.backward()
    assert batch.states.grad is not None
    assert (batch.states.grad[:, 0] != 0).all() and (batch.states.grad[:, 1] == 0).all()


def test_losses_of_the_segments_make_up_the_loss() -> None:
    mlcm, stage = method(segments=4, skip=25)
    batch = pairs(data(), Segments(1000, 4), 25, False)
    student = data(sd=0.4)
    losses = mlcm.loss(stage, {"student": student}, batch, context(0))
    parts = [losses.parts[f"segment_{i}"] for i in (1, 2, 3, 4)]
    torch.testing.assert_close(sum(parts) / 4, losses.total)
    for i, part in enumerate(parts):  # as many samples in each: the mean over the segment's own
        own = Segments(1000, 4).index(batch.times[:, 0]) == i
        alone = mlcm.loss(stage, {"student": student}, batch_of(batch.states[own], batch.times[own]), context(0)).total
        torch.testing.assert_close(part, alone)


def test_a_perceptual_distance_is_asked_of_the_two_landings() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, b))
        return 3 * l2(a, b)

    batch = pairs(data(), Segments(1000, 4), 25, False)
    networks = {"student": data(sd=0.4), "perceptual": distance}
    plain, plain_stage = method(segments=4, skip=25)
    mlcm, stage = method(segments=4, skip=25, distance="perceptual")
    loss = mlcm.loss(stage, networks, batch, context(0)).total
    torch.testing.assert_close(loss, 3 * plain.loss(plain_stage, networks, batch, context(0)).total)
    assert (mlcm.requires, plain.requires) == (("perceptual",), ()) and len(seen) == 1


# --- where the pairs come from ---


class Calls:
    """A denoiser that notes the times it is asked at."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.times = denoiser, []

    def __call__(self, x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        self.times.append(t)
        return self.denoiser(x, t, c)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_rollout_goes_from_noise_to_t_in_as_many_steps_as_there_are_noisier_segments(count: int) -> None:
    mlcm, stage = method(segments=count, skip=20, source="rollout")
    teacher, n = Calls(data()), 200
    step = mlcm.rollout(stage, teacher, noise_batch(n), context(n))
    noise = context(n).normal(torch.zeros(n, *SHAPE, dtype=torch.float64), "x_T")
    segments = Segments(1000, count)
    assert step.t.min() >= 1 and step.t.max() <= 1000 and len(set(step.t.tolist())) > 100
    assert torch.equal(step.s, torch.maximum(step.t - 20, segments.start(step.t)))
    for b in range(0, n, 7):
        t, L = int(step.t[b]), count - int(segments.index(step.t[b]))
        times = [1000 - (1000 - t) * j // L for j in range(L + 1)]
        times = list(dict.fromkeys(times))  # from T to T there is no step
        *_, (end, expected) = solve(data(), SCHEDULE, noise[b : b + 1], times, {})
        assert end == t
        torch.testing.assert_close(step.x_t[b : b + 1], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            step.x_s[b : b + 1], ddim_step(SCHEDULE, data()(expected, step.t[b : b + 1], {}), step.s[b : b + 1])
        )
    assert all((later <= earlier).all() for earlier, later in zip(teacher.times, teacher.times[1:], strict=False))


def test_more_steps_come_closer_to_the_flow() -> None:
    """In the cleanest of 8 segments by 8 steps against 1; in the noisiest there is one step either way."""
    n = 500
    noise = context(n).normal(torch.zeros(n, *SHAPE, dtype=torch.float64), "x_T")
    errors = {}
    for count in (1, 8):
        mlcm, stage = method(segments=count, skip=20, source="rollout")
        step = mlcm.rollout(stage, data(), noise_batch(n), context(n))
        off = (step.x_t - gaussian_flow(data(), noise, torch.full((n,), 1000), step.t)).pow(2).flatten(1).mean(1)
        errors[count] = [float(off[Segments(1000, 8).index(step.t) == i].mean().sqrt()) for i in (0, 4, 7)]
    assert errors[8][0] < errors[1][0] / 4 and errors[8][1] < errors[1][1] / 2
    assert errors[8][2] == pytest.approx(errors[1][2], rel=1e-6)


def test_stored_states_and_those_made_on_the_fly_give_one_loss() -> None:
    """From the same noise, prompt and time: the store's solver visits the rollout's times."""
    n = 40
    live, rolled = method(segments=4, skip=25, source="rollout")
    cached, stored = method(segments=4, skip=25)
    networks = {"student": data(sd=0.4), "teacher": data()}
    step = live.pair(rolled, networks, noise_batch(n), context(n))
    noise = context(n).normal(torch.zeros(n, *SHAPE, dtype=torch.float64), "x_T")
    states = []
    for b in range(n):
        t, s, L = int(step.t[b]), int(step.s[b]), 4 - int(Segments(1000, 4).index(step.t[b]))
        times = list(dict.fromkeys([1000 - (1000 - t) * j // L for j in range(L + 1)] + [s]))
        solved = dict(solve(data(), SCHEDULE, noise[b : b + 1], times, {}))
        states.append(torch.cat([solved[t], solved[s]]))
    batch = batch_of(torch.stack(states), torch.stack([step.t, step.s], 1))
    torch.testing.assert_close(
        cached.loss(stored, {"student": networks["student"]}, batch, context(n)).total,
        live.loss(rolled, networks, noise_batch(n), context(n)).total,
    )


def test_the_second_stage_stands_at_milestones_with_the_teacher_in_between() -> None:
    mlcm, stage = method(**{**SECOND, "student_steps": 4})
    student, teacher, n = Calls(exact(data(), Segments(1000, 1))), Calls(data()), 400
    step = mlcm.from_student(stage, teacher, student, noise_batch(n), context(n))
    milestones = set(Segments(1000, 8).milestones)
    assert set(step.t.tolist()) == milestones - {0}
    assert torch.equal(step.s, step.t - 125)
    assert [int(t[0]) for t in student.times] == [1000, 750, 500, 250]
    thirds = [step.t - 125 * j // 3 for j in range(3)]
    assert all(torch.equal(seen, wanted) for seen, wanted in zip(teacher.times, thirds, strict=True))
    x_0 = mlcm.student_sample(stage, exact(data(), Segments(1000, 1)), noise_batch(n), context(n))
    assert float(x_0.mean()) == pytest.approx(0.3, abs=0.1) and float(x_0.std()) == pytest.approx(0.8, abs=0.1)
    torch.testing.assert_close(step.x_t, add_noise(SCHEDULE, x_0, context(n).normal(x_0, "noise"), step.t))


def test_substeps_of_the_teacher_come_closer_to_the_flow() -> None:
    n, errors = 400, []
    for substeps in (1, 2, 3, 4):
        mlcm, stage = method(**{**SECOND, "substeps": substeps})
        step = mlcm.from_student(stage, data(), exact(data(), Segments(1000, 1)), noise_batch(n), context(n))
        errors.append(float((step.x_s - gaussian_flow(data(), step.x_t, step.t, step.s)).pow(2).mean().sqrt()))
    assert errors == sorted(errors, reverse=True) and errors[3] < errors[0] / 2.5


def test_nothing_is_differentiated_but_the_students_answer() -> None:
    """Not its own sampling, nor the teacher's steps."""
    mlcm, stage = method(**SECOND)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    with_gradient: list[bool] = []

    def student(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        out = data(sd=0.5)(x, t, c)
        x0 = out.x0 * weight
        with_gradient.append(x0.requires_grad)
        return Denoised(x0, (x - SCHEDULE.alpha(t, x) * x0) / SCHEDULE.sigma(t, x).clamp(min=1e-9))

    losses = mlcm.loss(stage, {"student": student, "teacher": data()}, noise_batch(16), context(16))
    losses.total.backward()
    assert with_gradient == [False] * 5 + [True]  # four jumps of the sample, the target, the answer
    assert weight.grad is not None and weight.grad.abs() > 0


def test_the_teacher_follows_the_methods_guidance() -> None:
    mlcm = MLCM(SCHEDULE, [{**SECOND}], guidance=3.0)
    told = torch.tensor([[0.9, 0.1]], dtype=torch.float64).expand(32, 2)
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, *SHAPE)
    teacher = Mixture(SCHEDULE, means, torch.tensor([0.3, 0.3]), torch.tensor([0.5, 0.5]))
    batch = replace(
        noise_batch(32), conditioning={"weights": told}, unconditional={"weights": torch.full((32, 2), 0.5)}
    )
    step = mlcm.pair(mlcm.stages[0], {"student": teacher, "teacher": teacher}, batch, context(32))
    by_hand = guided(teacher, batch.unconditional, 3.0)
    x = step.x_t
    for j in range(3):
        here, there = (step.t - 125 * i // 3 for i in (j, j + 1))
        x = ddim_step(SCHEDULE, by_hand(x, here, batch.conditioning), there)
    torch.testing.assert_close(step.x_s, x)


# --- what a method is ---


def test_stages_follow_one_another() -> None:
    mlcm = MLCM(
        SCHEDULE,
        [{**FIRST, "learning_rate": 1e-4}, {**SECOND, "learning_rate": 1e-5, "fresh_optimizer": True}, FIRST],
    )
    assert (mlcm.starts, mlcm.steps) == ((0, 10, 15), 25)
    assert [mlcm.place(step) for step in (0, 9, 10, 14, 15, 99)] == [0, 0, 1, 1, 2, 2]
    assert [mlcm.learning_rate(step) for step in (9, 10, 15)] == [1e-4, 1e-5, None]
    assert [step for step in range(30) if mlcm.resets(step)] == [10]
    assert mlcm.reads(0) == Pair(25, Segments(1000, 4), None)
    assert mlcm.reads(12) == CleanEnd()
    assert mlcm.requires == ("teacher",)
    assert MLCM(SCHEDULE, [FIRST]).requires == ()
    (turn,) = mlcm.turns(12)
    parts = turn.loss({"student": data(), "teacher": data()}, noise_batch(4), context(4)).parts
    assert turn.updates == "student" and parts["stage"] == 2


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "method.stages is empty: give at least one"),
        ([{**FIRST, "segments": 0}], "method.stages[0]: a stage's segments must be at least 1, got 0"),
        ([FIRST, {**FIRST, "skip": 0}], "method.stages[1]: a stage's skip must be at least 1, got 0"),
        ([{**FIRST, "skip": 1001}], "method.stages[0]: a stage's skip must be within 1 ... 1000, got 1001"),
        ([{**FIRST, "source": "images"}], "method.stages[0]: a stage's source must be one of trajectory, rollout, "),
        ([{**FIRST, "loss_space": "eps"}], "method.stages[0]: a stage's loss_space must be one of z_end, x0, v, got"),
        ([{**FIRST, "distance": "l1"}], "method.stages[0]: a stage's distance must be one of l2, huber, perceptual, "),
        ([{**FIRST, "learning_rate": 0.0}], "method.stages[0]: a stage's learning_rate must be above 0, got 0.0"),
        ([{**FIRST, "grid": 6}], "method.stages[0]: a stage's grid must be a multiple of its 4 segments, got 6"),
        ([{**SECOND, "grid": 7}], "method.stages[0]: a stage's grid must divide the schedule's 1000 times, got 7"),
        ([{**SECOND, "segments": 8}], "method.stages[0]: a stage from student samples goes down to clean data: segm"),
        ([{**SECOND, "grid": None}], "method.stages[0]: a stage from student samples stands at milestones: set grid"),
    ],
    ids=str,
)
def test_refuses_a_bad_value_in_one_line_that_names_its_stage(stages: list[Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        MLCM(SCHEDULE, stages)
    assert str(error.value).startswith(message)


# --- it distils ---


class Student(Correction):
    """With the eps that goes with its x0, as every network behind the wall has it."""

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        x0 = super().forward(x_t, t, conditioning).x0
        return to_denoised(Prediction.SAMPLE, x0, x_t, t.clamp(min=1), SCHEDULE)


def distil(mlcm: MLCM, teacher: Mixture, batch_size: int = 256) -> list[Student]:
    """The student after each stage, by a training loop of a few lines over trajectories solved beforehand."""
    times, g = trailing_times(1000, 40), torch.Generator().manual_seed(0)
    noise = torch.randn(4096, 1, 1, 1, generator=g)
    states = torch.stack([x for _, x in solve(teacher, SCHEDULE, noise, times, {})], 1)
    torch.manual_seed(0)
    student, after = Student(teacher, 1), []
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.5, 0.99))
    for step in range(mlcm.steps):
        optimizer.param_groups[0]["lr"] = mlcm.learning_rate(step)
        row = torch.randint(len(states), (batch_size, 1), generator=g)
        picks = torch.tensor([mlcm.reads(step).pick(times, g) for _ in range(batch_size)])
        batch = Batch(states[row, picks], torch.tensor(times)[picks], {}, {}, torch.ones(batch_size))
        (turn,) = mlcm.turns(step)
        optimizer.zero_grad()
        positions = tuple(range(step * batch_size, (step + 1) * batch_size))
        turn.loss({"student": student, "teacher": teacher}, batch, Context(0, step, positions)).total.backward()
        optimizer.step()
        if step + 1 in (*mlcm.starts, mlcm.steps):
            after.append(copy.deepcopy(student))
    return after


def test_the_first_stage_follows_the_ode_in_its_steps_and_the_second_learns_the_long_jumps() -> None:
    teacher = three_peaks(SCHEDULE)
    x = torch.randn(1000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    end = quantile_flow(teacher, x.double(), 1000, 0)
    first = {"segments": 4, "skip": 25}
    stages = [
        {**first, "iterations": 300, "learning_rate": 3e-3},
        {**first, "iterations": 100, "learning_rate": 3e-4},
        {**SECOND, "iterations": 200, "learning_rate": 1e-3},
    ]
    _, before, after = distil(MLCM(SCHEDULE, stages, guidance=1.0), teacher)

    def drawn(denoiser: Denoiser, times: list[int], sampler: str) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
        return sample(denoiser, SCHEDULE, x, times, {}, sampler, generators)

    def off_the_ode(denoiser: Denoiser, steps: int) -> float:
        return float((drawn(denoiser, trailing_times(1000, steps), "ddim") - end).pow(2).mean().sqrt())

    def off_the_data(denoiser: Denoiser) -> float:
        """Wasserstein-1 distance of what the re-noising sampler draws in two steps."""
        two = drawn(denoiser, [1000, 500, 0], "lcm")
        return float((two.flatten().sort().values - end.flatten().sort().values).abs().mean())

    assert off_the_ode(teacher, 4) > 0.25 and off_the_ode(before, 4) < 0.1
    assert off_the_ode(before, 1) > 0.8 and off_the_ode(after, 1) < 0.2
    assert off_the_data(teacher) > 0.5 and off_the_data(before) > 0.35 and off_the_data(after) < 0.2


def test_jumps_are_those_of_floor_0() -> None:
    mlcm, stage = method(segments=2, skip=25)
    x, t = torch.randn(4, *SHAPE, dtype=torch.float64), torch.tensor([1, 500, 501, 1000])
    end = Segments(1000, 2).start(t)
    assert torch.equal(mlcm.g(data(), x, t, end, {}), jump(SCHEDULE, data()(x, t, {}), x, t, end))
