"""TCD against exact flows: which jumps are compared, what the best student answers, and how it is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.consistency import inverse_jump, strategic
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Conditioning, Denoised, Prediction, to_denoised
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.segments import Segments
from distill.diffusion.solver import ddim_step, trailing_times
from distill.diffusion.trajectory import Batch, Pair
from distill.methods.lcm import LCM
from distill.methods.mlcm import MLCM
from distill.methods.sampling import Sampling, sample
from distill.methods.tcd import TCD, TCDStage
from tests.analytic import Mixture, gaussian, gaussian_flow
from tests.methods.test_mlcm import SCHEDULE, SHAPE, batch_of, context, data, exact, pairs

FLOW = NoiseSchedule.linear(3.0)


class Off(nn.Module):
    """The exact denoiser, off by a scale and a shift that can be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full(SHAPE, 0.9, dtype=torch.float64))
        self.shift = nn.Parameter(torch.full(SHAPE, 0.1, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        x0 = self.scale * data()(x_t, t, conditioning).x0 + self.shift
        return to_denoised(Prediction.SAMPLE, x0, x_t, t.clamp(min=1), SCHEDULE)


def method(**settings: Any) -> tuple[TCD, TCDStage]:
    tcd = TCD(SCHEDULE, **{"skip": 25, **settings})
    return tcd, tcd.stages[0]


def of_all_pairs(count: int, n: int, k: int = 25) -> Batch:
    """(x_t, x_s) of an exact solve at every time of the grid, n of each."""
    return pairs(data(), Segments(1000, count), k, exact_steps=True, n=n)


# --- which jumps ---


@pytest.mark.parametrize("ends", ["uniform", "start", "inference"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_jump_ends_on_the_grid_between_the_segments_start_and_s(ends: str, count: int) -> None:
    tcd, stage = method(segments=count, ends=ends)
    batch = of_all_pairs(count, n=40)
    step = batch.transition()
    end, start = tcd.end(stage, batch, context(len(batch))), Segments(1000, count).start(step.t)
    assert ((start <= end) & (end <= step.s)).all() and (end % 25 == 0).all()
    if ends == "uniform":  # all of them come, each as often
        assert {(int(t), int(e)) for t, e in zip(step.t, end, strict=True)} >= {
            (int(t), int(e)) for t, s0 in {(int(t), int(s)) for t, s in zip(step.t, start, strict=True)}
            for e in range(s0, t, 25) if t - s0 <= 125
        }  # fmt: skip
        share = (end - start) / (step.s - start).clamp(min=1)
        assert float(share[step.s > start].double().mean()) == pytest.approx(0.5, abs=0.03)
    if ends == "start":
        assert torch.equal(end, start)


def test_a_cut_pair_off_the_grid_ends_at_s_or_on_the_grid_below_it() -> None:
    """Of 3 segments a skip of 20 does not divide 333: the last pair of a segment is shorter."""
    tcd, stage = TCD(SCHEDULE, segments=3), TCDStage(3, 1)
    t, s = torch.tensor([360, 340, 667]), torch.tensor([340, 333, 647])
    for u, wanted in ((0.0, [333, 333, 333]), (0.999, [340, 333, 647])):
        assert tcd.end_at(stage, t, s, torch.full((3,), u, dtype=torch.float64)).tolist() == wanted


def test_inference_ends_are_the_next_times_of_its_samplers() -> None:
    tcd, stage = method(ends="inference", inference_steps=[4, 5])
    t = torch.tensor([1000, 1000, 775, 775])
    ends = tcd.end_at(stage, t, t - 25, torch.tensor([0.0, 0.6, 0.0, 0.6], dtype=torch.float64))
    assert ends.tolist() == [750, 800, 750, 600]


def test_where_it_ends_at_s_the_target_is_the_stored_state_itself() -> None:
    """To the bit, whatever the student answers; and no gradient leads through a target."""
    tcd, _ = method()
    batch = of_all_pairs(1, n=2)
    student = Off()
    target = tcd.target(student, batch, batch.transition().s)
    assert torch.equal(target, batch.transition().x_s) and not target.requires_grad
    assert tcd.lands(student, batch, batch.transition().s).requires_grad


# --- what it is elsewhere ---


@pytest.mark.parametrize("count", [1, 4])
def test_with_ends_at_the_start_it_is_mlcms_stage_bit_for_bit(count: int) -> None:
    tcd, stage = method(segments=count, ends="start")
    mlcm = MLCM(SCHEDULE, [{"segments": count, "skip": 25, "iterations": 1, "loss_space": "z_end"}])  # type: ignore[list-item]
    batch, found = of_all_pairs(count, n=3), []
    for loss in (lambda *a: tcd.loss(stage, *a), lambda *a: mlcm.loss(mlcm.stages[0], *a)):
        student = Off()
        total = loss({"student": student}, batch, context(len(batch))).total
        total.backward()
        found.append([total.detach(), *(p.grad for p in student.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0] > 0


def test_down_to_clean_data_it_is_lcm_without_boundary_scalings() -> None:
    tcd, stage = method(ends="start")
    lcm, batch, student = LCM(SCHEDULE, skip=25, loss="l2"), of_all_pairs(1, n=3), Off()
    step = batch.transition()
    found = tcd.loss(stage, {"student": student}, batch, context(len(batch))).total
    is_clean = (step.s == 0).reshape(-1, 1, 1, 1)
    target = torch.where(is_clean, step.x_s, student(step.x_s, step.s, {}).x0)
    torch.testing.assert_close(found, l2(student(step.x_t, step.t, {}).x0, target).mean())
    scaled = lcm.loss({"student": student}, batch, context(len(batch))).total
    assert found != scaled and float(found.detach()) == pytest.approx(float(scaled.detach()), rel=0.05)


def test_a_pair_that_spans_its_segment_is_a_ddim_regression() -> None:
    tcd, stage = TCD(SCHEDULE, skip=250, segments=4), TCDStage(4, 1)
    batch, student = of_all_pairs(4, n=5, k=250), Off()
    step = batch.transition()
    found = tcd.loss(stage, {"student": student}, batch, context(len(batch))).total
    torch.testing.assert_close(found, l2(ddim_step(SCHEDULE, student(step.x_t, step.t, {}), step.s), step.x_s).mean())


# --- who has no loss ---


class Told:
    """A student that is told where the jump ends, as an oracle: its answer leads to where the exact flow is there."""

    def __init__(self, teacher: Mixture, end: Tensor) -> None:
        self.teacher, self.end = teacher, end

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        there = torch.minimum(self.end, (t - 1).clamp(min=0))  # where t = e its answer is not used
        x0 = inverse_jump(SCHEDULE, gaussian_flow(self.teacher, x, t, there), x, t, there)
        return to_denoised(Prediction.SAMPLE, torch.where(x0.isfinite(), x0, 0.0), x, t.clamp(min=1), SCHEDULE)


@pytest.mark.parametrize("count", [1, 4])
def test_an_oracle_that_is_told_the_end_has_no_loss_and_lcms_student_has_one(count: int) -> None:
    tcd, stage = method(segments=count)
    batch = of_all_pairs(count, n=8)
    end = tcd.end(stage, batch, context(len(batch)))
    loss = tcd.loss(stage, {"student": Told(data(), end)}, batch, context(len(batch))).total
    assert float(loss) < 1e-20
    assert (
        float(tcd.loss(stage, {"student": exact(data(), Segments(1000, count))}, batch, context(len(batch))).total)
        > 1e-6
    )


@pytest.mark.parametrize("ends", ["uniform", "inference"])
def test_of_a_single_point_the_teacher_has_no_loss_for_any_end(ends: str) -> None:
    point = data(sd=0.0)
    tcd, stage = method(ends=ends)
    batch = pairs(point, Segments(1000, 1), 25, exact_steps=True, n=8)
    assert float(tcd.loss(stage, {"student": point}, batch, context(len(batch))).total) < 1e-20


# --- what the best student answers ---


class Gains:
    """A tabular student of centred data: at time t its x0 is gains[t] x_t."""

    def __init__(self) -> None:
        self.gains = torch.zeros(1001, dtype=torch.float64, requires_grad=True)

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        return to_denoised(Prediction.SAMPLE, self.gains[t].reshape(-1, 1, 1, 1) * x, x, t.clamp(min=1), SCHEDULE)


def fixed_point(tcd: TCD, stage: TCDStage, sd: float, k: int = 25) -> Gains:
    """The student with no gradient at any time of the grid, where the loss is over all ends.

    It is quadratic in each gain: a Newton step a time, from the cleanest on.
    """
    student, centred = Gains(), gaussian(SCHEDULE, torch.zeros(1, 1, 1, dtype=torch.float64), sd)
    segments = tcd.segments[stage.segments]
    for time in range(k, 1001, k):
        start = int(segments.start(torch.tensor([time])))
        count = len(tcd.nexts.values[0]) if tcd.ends == "inference" else (time - k - start) // k + 1
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        t, x = torch.full((count,), time), torch.ones(count, 1, 1, 1, dtype=torch.float64)
        s = t - k
        batch = batch_of(torch.stack([x, gaussian_flow(centred, x, t, s)], 1), torch.stack([t, s], 1))
        end = segments.start(t) if tcd.ends == "start" else tcd.end_at(stage, t, s, u)
        loss = l2(tcd.lands(student, batch, end), tcd.target(student, batch, end)).mean()
        (slope,) = torch.autograd.grad(loss, student.gains, create_graph=True)
        (curvature,) = torch.autograd.grad(slope[time], student.gains)
        with torch.no_grad():
            student.gains[time] -= slope[time] / curvature[time]
    return student


# Data N(0, .8²), exact solves 25 apart. By ends and segments: the gain of x0 at T, and the sd of samples in 1, 2, 4 and
# 8 steps of DDIM at trailing times. Exact is .801.
BIAS = {
    ("start", 1): (0.801, [0.801, 1.035, 1.233, 1.358]),
    ("uniform", 1): (0.510, [0.510, 0.761, 0.969, 1.100]),
    ("inference", 1): (0.114, [0.114, 0.489, 0.792, 0.911]),
    ("start", 4): (0.099, [0.099, 0.473, 0.801, 0.876]),
    ("uniform", 4): (0.089, [0.089, 0.444, 0.736, 0.829]),
}


@pytest.mark.parametrize(("ends", "count"), BIAS)
def test_one_answer_for_all_ends_is_a_mean_of_theirs_whose_bias_is_known(ends: str, count: int) -> None:
    """The x0 that jumps right to e differs with e. Too little contrast where jumps are short, too much where they are
    long: LCM's student is right in one step, PCM's of four phases in four, and one of TCD in none."""
    tcd, stage = method(segments=count, ends=ends)
    student = fixed_point(tcd, stage, 0.8)
    gain, spreads = BIAS[ends, count]
    assert float(student.gains[1000]) == pytest.approx(gain, abs=1e-3)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    found = [float(sample(student, SCHEDULE, x, trailing_times(1000, n), {}, "ddim")) for n in (1, 2, 4, 8)]
    assert found == pytest.approx(spreads, abs=1e-3)


def test_fresh_noise_makes_up_for_a_spread_that_is_too_wide() -> None:
    """LCM's student in four steps by its share: too wide without, right with nothing else."""
    student, n, found = fixed_point(*method(ends="start"), 0.8), 4000, []
    for gamma in (0.0, 0.3, 1.0):
        x = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        made = sample(student, SCHEDULE, x, trailing_times(1000, 4), {}, "tcd", generators, gamma)
        found.append(float(made.std()))
    assert found == pytest.approx([1.25, 1.08, 0.82], abs=0.04)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_samples_of_the_oracle_have_the_law_of_every_time_for_any_gamma(gamma: float) -> None:
    """Told where each jump ends, it keeps mean and sd of x_t at each step, whatever is noised again."""
    teacher, n, times = data(), 3000, trailing_times(1000, 4)
    noise = torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = add_noise(SCHEDULE, teacher.sample(n, torch.Generator().manual_seed(0)), noise, 1000)

    def oracle(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        following = max(int(t[0]) - 250, 1)
        there = 1 + int(((1 - gamma) * torch.tensor(following - 1).float()).floor())
        return Told(teacher, torch.full_like(t, there))(x, t, c)

    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    for time, state in strategic(oracle, SCHEDULE, x, times, {}, generators, gamma):
        alpha, sigma = (float(f(max(time, 1), state.new_zeros(()))) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        assert float(state.mean()) == pytest.approx(alpha * 0.3, abs=0.04)
        assert float(state.std()) == pytest.approx((alpha**2 * 0.64 + sigma**2) ** 0.5, rel=0.03)


# --- stages, settings ---


def test_stages_are_a_pure_function_of_the_step_and_ends_stay_in_their_segments() -> None:
    later = {"segments": 2, "iterations": 2, "adversarial": 0.1, "learning_rate": 5e-5, "fresh_optimizer": True}
    tcd = TCD(SCHEDULE, 25, stages=[{"segments": 8, "iterations": 3}, later])  # type: ignore[list-item]
    assert (tcd.starts, tcd.steps, tcd.trains) == ((0, 3), 5, ("student", "discriminator"))
    assert [[turn.updates for turn in tcd.turns(i)] for i in (0, 2, 3, 9)] == [["student"]] * 2 + [
        ["discriminator", "student"]
    ] * 2
    assert [tcd.reads(i) for i in (2, 3)] == [Pair(25, Segments(1000, 8)), Pair(25, Segments(1000, 2))]
    assert [tcd.learning_rate(i) for i in (0, 4)] == [None, 5e-5] and [tcd.resets(i) for i in (0, 3, 4)] == [
        False,
        True,
        False,
    ]
    batch = of_all_pairs(8, n=2)
    losses = tcd.loss(tcd.stages[0], {"student": data()}, batch, context(len(batch)))
    inside = [float(losses.parts[f"segment_{i + 1}"]) for i in range(8)]
    assert sum(inside) / 8 == pytest.approx(float(losses.total)) and losses.parts["stage"] == 1


def test_the_game_shows_both_landings_at_their_time_with_what_is_clean_noised() -> None:
    tcd, _ = method(stages=[{"segments": 4, "iterations": 1, "adversarial": 0.5}])
    stage, batch, seen = tcd.stages[0], of_all_pairs(4, n=4), []

    def critic(samples: Any, t: Tensor, c: Conditioning, origin: Any = None) -> list[Tensor]:
        seen.append((list(samples), t))
        return [x.flatten(1).mean(1) for x in samples]

    networks: dict[str, Any] = {"student": Off(), "discriminator": critic}
    of_student = tcd.loss(stage, networks, batch, context(len(batch)))
    judged = tcd.discriminator_loss(stage, networks, batch, context(len(batch)))
    end = tcd.end(stage, batch, context(len(batch)))
    ((fake,), t), ((real, again), u) = seen
    assert torch.equal(fake, again) and torch.equal(t, u)
    late = end > 0
    assert torch.equal(t[late], end[late]) and set(t[~late].tolist()) <= {10, 250, 500, 750}
    torch.testing.assert_close(real[late], tcd.target(networks["student"], batch, end)[late])
    assert {"loss", "real_accuracy", "fake_accuracy"} <= judged.parts.keys()
    alone = tcd.loss(TCDStage(4, 1), networks, batch, context(len(batch))).total
    torch.testing.assert_close(of_student.total, alone + 0.5 * of_student.parts["adversarial_loss"])


def test_students_are_sampled_as_their_ends_were() -> None:
    assert TCD(SCHEDULE).sampling == Sampling("tcd", "lcm", gamma=0.3)
    assert TCD(SCHEDULE, gamma=0.0).sampling == Sampling("tcd", "lcm")
    assert TCD(SCHEDULE, segments=4, skip=25).sampling == Sampling("ddim", "trailing")
    assert TCD(FLOW).sampling == TCD(FLOW, gamma=0).sampling == Sampling("ddim", "trailing")
    assert TCD(FLOW, gamma=1.0).sampling == Sampling("lcm", "trailing")


@pytest.mark.parametrize(
    ("noise", "settings", "message"),
    [
        ("vp", {"skip": 30}, "method.skip must divide the schedule's 1000 times, got 30"),
        ("vp", {"ends": "end"}, "method.ends must be one of uniform, start, inference, got 'end'"),
        ("vp", {"loss": "l1"}, "method.loss must be one of l2, huber, got 'l1'"),
        ("vp", {"inference_steps": [0]}, "method.inference_steps must be within 1 ... 1000, got [0]"),
        ("vp", {"segments": 0}, "method.segments must be within 1 ... 1000, got 0"),
        ("vp", {"stages": []}, "method.stages is empty: give at least one, or null"),
        (
            "vp",
            {"segments": 2, "stages": [{"segments": 2, "iterations": 1}]},
            "method.segments is each stage's own",
        ),
        ("vp", {"segments": 2, "gamma": 0.3}, "method.gamma is of students of one segment"),
        ("vp", {"gamma": 2.0}, "gamma must be within 0 ... 1, got 2.0"),
        ("flow", {"gamma": 0.3}, "method.gamma=0.3: diffusers has no such sampler for flow matching"),
        ("vp", {"adversarial_loss": "wgan"}, "method.adversarial_loss must be one of nonsaturating, hinge, "),
        (
            "vp",
            {"stages": [{"segments": 2, "iterations": 0}]},
            "method.stages[0]: a stage's iterations must be at ",
        ),
    ],
    ids=str,
)
def test_refuses_what_cannot_be(noise: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        TCD({"vp": SCHEDULE, "flow": FLOW}[noise], **settings)
    assert str(raised.value).startswith(message)
