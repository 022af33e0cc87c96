"""sCM and rCM where the right answers are known, on variance-preserving noise and on flow matching alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.angles import angle, cosine, on_circle, velocity, velocity_of_step
from distill.diffusion.losses import l2
from distill.diffusion.matching import matching_loss
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.trajectory import Batch, Transition
from distill.methods.base import Turn
from distill.methods.rcm import RCM, SCM, rms
from distill.methods.sampling import Sampling
from tests.analytic import Mixture, denoiser_of, exact_student, gaussian, gaussian_flow, network_of, quantile_flow
from tests.analytic import three_peaks as three

SHAPE = (2, 3, 1)
VP, FLOW = NoiseSchedule.scaled_linear(), NoiseSchedule.linear(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
GRID = torch.arange(20, 1001, 20)


def data(schedule: NoiseSchedule, sd: float = 0.8, mean: float = 0.3) -> Mixture:
    return gaussian(schedule, torch.full(SHAPE, mean, dtype=torch.float64), sd)


def pairs(teacher: Mixture, t: Tensor = GRID, skip: int = 20) -> Batch:
    """(x_t, x_s) on the exact flow, a pair for each t."""
    x_0 = teacher.sample(len(t), torch.Generator().manual_seed(0))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=x_0.dtype)
    x_t, s = add_noise(teacher.schedule, x_0, noise, t), (t - skip).clamp(min=0)
    x_s = gaussian_flow(teacher, x_t, t, s)
    states, positions = torch.stack([x_t, x_s], 1), tuple(range(len(t)))
    return Batch(states, torch.stack([t, s], 1), {}, {}, torch.ones(len(t)), positions=positions)


def context(batch: Batch, step: int = 0) -> Context:
    return Context(0, step, batch.positions)


def tangent(method: SCM, student: Denoiser, batch: Batch, r: float = 1.0) -> Tensor:
    step, _, f_s, denoised = method.answers(student, batch)
    return method.tangent(step, denoised, f_s, r)


class Student(nn.Module):
    """A denoiser of N(mean, sd²), or m + s times its x0, with everything in reach of gradients."""

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.3, sd: float = 0.8) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        self.calls.append(tuple(t.tolist()))
        alpha, sigma = self.schedule.alpha(t, x_t), self.schedule.sigma(t, x_t)
        off = (x_t - alpha * self.mean) / (alpha**2 * self.sd**2 + sigma**2).clamp(min=1e-30)
        return Denoised(self.mean + alpha * self.sd**2 * off, sigma * off)


def of_data(x0: Denoiser, schedule: NoiseSchedule) -> Denoiser:
    """A network that predicts clean data as `x0` does, with the noise that goes with it."""
    return lambda x, t, c: to_denoised(Prediction.SAMPLE, x0(x, t, c).x0, x, t.clamp(min=1), schedule)


# --- the tangent ---


@SCHEDULES
def test_a_consistent_student_has_no_tangent(schedule: NoiseSchedule) -> None:
    batch = pairs(data(schedule))
    assert tangent(SCM(schedule), exact_student(data(schedule)), batch).abs().max() < 1e-12
    wrong = rms(tangent(SCM(schedule), exact_student(data(schedule, 0.7)), batch))
    assert wrong[GRID < 1000].min() > 1e-6 and (wrong[-1] == 0) == (float(cosine(schedule, 1000, wrong)) == 0)


@SCHEDULES
def test_the_tangent_is_known_for_data_of_one_point_and_of_unit_variance(schedule: NoiseSchedule) -> None:
    """Unit variance keeps the flow at one point of the circle, at which the teacher's x0 is cos(phi) times it."""
    point, unit = data(schedule, 0.0), data(schedule, 1.0, 0.0)
    assert tangent(SCM(schedule), point, pairs(point)).abs().max() < 1e-10
    batch = pairs(unit)
    step = batch.transition()
    cos_t, cos_s = (cosine(schedule, r, step.x_t) for r in (step.t, step.s))
    h = angle(schedule, step.t, step.x_t) - angle(schedule, step.s, step.x_t)
    expected = cos_t * (cos_t - cos_s) / h * on_circle(schedule, step.x_t, step.t)
    expected[step.s == 0] = (cos_t * (cos_t - 1) / h * on_circle(schedule, step.x_t, step.t))[step.s == 0]
    torch.testing.assert_close(tangent(SCM(schedule), unit, batch), expected, rtol=1e-9, atol=1e-12)


@SCHEDULES
def test_the_difference_becomes_the_derivative_as_steps_are_halved(schedule: NoiseSchedule) -> None:
    """Of the teacher itself on three peaks, against a pair one time apart."""
    teacher, t = three(schedule), 400
    x_t = add_noise(schedule, teacher.sample(200, torch.Generator().manual_seed(0)), torch.randn(200, 1, 1, 1), t)

    def at(skip: int) -> Tensor:
        x_s = quantile_flow(teacher, x_t, t, t - skip)
        times = torch.tensor([[t, t - skip]]).expand(200, 2)
        batch = Batch(torch.stack([x_t, x_s], 1), times, {}, {}, torch.ones(200))
        return tangent(SCM(schedule), teacher, batch).flatten()

    errors = [float((at(skip) - at(1)).norm() / at(1).norm()) for skip in (40, 20, 10)]
    assert [a / b for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx([2, 2], rel=0.12)
    assert errors[1] < 0.05


@SCHEDULES
def test_it_is_the_tangent_of_the_paper_by_another_arrangement(schedule: NoiseSchedule) -> None:
    """-cos² (F - dx/dphi) - r cos sin (x + dF/dphi), to first order in the step; at r = 0 to the last bit."""
    teacher, student = data(schedule), data(schedule, 0.5, 0.0)
    for r, expected in ((1.0, [2.0, 2.0]), (0.4, [2.0, 2.0])):
        errors = []
        for skip in (40, 20, 10):
            batch = pairs(teacher, torch.arange(200, 1000, 40), skip)
            step = batch.transition()
            F, F_s = (velocity(schedule, student(x, t, {}), t) for x, t in ((step.x_t, step.t), (step.x_s, step.s)))
            h = angle(schedule, step.t, F) - angle(schedule, step.s, F)
            v, cos = velocity_of_step(schedule, *_pair(step)), cosine(schedule, step.t, F)
            sin = (1 - cos**2).sqrt()
            printed = -(cos**2) * (F - v) - r * cos * sin * (on_circle(schedule, step.x_t, step.t) + (F - F_s) / h)
            errors.append(float((printed - tangent(SCM(schedule), student, batch, r)).norm() / printed.norm()))
        assert [a / b for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx(expected, rel=0.15)
        assert errors[1] < 0.04


def _pair(step: Transition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return step.x_t, step.t, step.x_s, step.s


@SCHEDULES
def test_a_warm_up_begins_by_denoising_towards_the_teachers_step(schedule: NoiseSchedule) -> None:
    method, batch = SCM(schedule, tangent_warmup=10), pairs(data(schedule))
    assert [method.warmed(step) for step in (0, 4, 10, 11)] == [0, 0.4, 1, 1]
    step = batch.transition()
    v = velocity_of_step(schedule, *_pair(step))

    def knows(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        """A student whose velocity is that of the stored step."""
        cos = cosine(schedule, t, x)
        x_hat = on_circle(schedule, x, t)
        sin = (1 - cos**2).sqrt()
        return Denoised(cos * x_hat - sin * v, sin * x_hat + cos * v)

    assert tangent(method, knows, batch, 0.0).abs().max() < 1e-12
    assert tangent(method, exact_student(data(schedule)), batch, 1.0).abs().max() < 1e-12
    losses = [float(method.loss({"student": knows}, batch, context(batch, step)).total) for step in (0, 5, 10)]
    assert losses[0] < 1e-20 < losses[1] < losses[2]


def test_from_the_last_stored_state_on_data_are_their_own_answer() -> None:
    """At s = 0 the network has no say, whatever it answers there."""
    batch = pairs(data(VP), torch.tensor([20, 400]))

    def student(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        zero = (t == 0).reshape(-1, 1, 1, 1)
        return Denoised(torch.where(zero, 7.0, data(VP)(x, t, c).x0), torch.zeros_like(x))

    step, _, f_s, _ = SCM(VP).answers(student, batch)
    assert torch.equal(f_s[0], step.x_s[0]) and not torch.equal(f_s[1], step.x_s[1])
    assert float(angle(VP, torch.tensor([0]), step.x_s[:1])) == 0


# --- the loss ---


@SCHEDULES
def test_weighed_by_the_step_and_not_normalised_its_gradient_is_lcms(schedule: NoiseSchedule) -> None:
    batch = pairs(data(schedule), GRID[:-1])  # at T of a flow cos(phi) is 0
    step, student = batch.transition(), Student(schedule, 0.0, 0.5)
    method = SCM(schedule)
    _, F, f_s, denoised = method.answers(student, batch)
    h = angle(schedule, step.t, F) - angle(schedule, step.s, F)
    cos = cosine(schedule, step.t, F)
    weight = ((1 - cos**2).sqrt() * h / cos).flatten()
    ours = (weight * _gradient_of(F, method.tangent(step, denoised, f_s).detach())).mean()
    lcm = l2(denoised.x0, f_s).mean()
    found = torch.autograd.grad(ours, list(student.parameters()), retain_graph=True)
    expected = torch.autograd.grad(lcm, list(student.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def _gradient_of(F: Tensor, g: Tensor) -> Tensor:
    """|| F - sg(F) - g ||² of each sample, [B], up to its value."""
    return l2(F - F.detach(), g)


@SCHEDULES
@pytest.mark.parametrize("error", [1e-3, 1.0, 1e3])
def test_a_samples_gradient_is_of_one_length_whatever_the_error(schedule: NoiseSchedule, error: float) -> None:
    batch = pairs(data(schedule))
    off = torch.zeros(len(batch), *SHAPE, dtype=torch.float64, requires_grad=True)

    def student(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        F = error * torch.sin(7 * t).reshape(-1, 1, 1, 1) + (off if len(x) == len(off) else 0)
        cos, x_hat = cosine(schedule, t, x), on_circle(schedule, x, t)
        sin = (1 - cos**2).sqrt()
        return Denoised(cos * x_hat - sin * F, sin * x_hat + cos * F)

    losses = SCM(schedule).loss({"student": student}, batch, context(batch))
    (gradient,) = torch.autograd.grad(losses.total, off)
    lengths = len(batch) * gradient.flatten(1).norm(dim=1)
    assert lengths.max() <= 2 / 6**0.5  # of D = 6 elements
    g = rms(tangent(SCM(schedule), student, batch).detach())
    assert float(losses.total.detach()) == pytest.approx(float((g / (g + 0.1)).pow(2).mean()))
    assert float(losses.parts["tangent"]) == pytest.approx(float(g.mean()))


def test_networks_of_one_belief_have_one_loss_whatever_they_predict() -> None:
    batch, belief = pairs(data(VP)), data(VP, 0.5)
    losses = []
    for prediction in (Prediction.EPSILON, Prediction.V, Prediction.SAMPLE):
        network = network_of(lambda x, t, c: belief(x, t.clamp(min=1), c), prediction, VP)
        student = denoiser_of(lambda x, i, c, network=network: network(x, i.clamp(min=0), c), prediction, VP)
        safe = lambda x, t, c, student=student: student(x, t.clamp(min=1), c)  # noqa: E731
        losses.append(float(SCM(VP).loss({"student": safe}, batch, context(batch)).total))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-10)


@SCHEDULES
def test_what_is_held_out_is_the_size_of_the_tangent(schedule: NoiseSchedule) -> None:
    batch, method = pairs(data(schedule)), SCM(schedule)
    turn = method.held_out(0)
    assert turn is not None
    assert float(turn.loss({"student": exact_student(data(schedule))}, batch, context(batch)).total) < 1e-20
    wrong = turn.loss({"student": exact_student(data(schedule, 0.7))}, batch, context(batch)).total
    assert float(wrong) == pytest.approx(
        float(tangent(method, exact_student(data(schedule, 0.7)), batch).pow(2).mean()), rel=1e-9
    )


def test_a_network_that_starts_as_the_teacher_becomes_consistent() -> None:
    """Gaussian data, and a network of one number at each time: the answer is that times x_t."""
    teacher, one = data(VP, 0.8, 0.0), torch.ones(50, 1, 1, 1, dtype=torch.float64)
    gains = teacher(one, GRID, {}).x0[:, 0, 0, 0].clone().requires_grad_(True)
    exact = gaussian_flow(data(VP, 0.8, 0.0), one.expand(50, *SHAPE), GRID, 0)[:, 0, 0, 0]

    def student(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        gain = gains[(t.clamp(min=20) // 20) - 1].reshape(-1, 1, 1, 1)
        return to_denoised(Prediction.SAMPLE, gain * x, x, t.clamp(min=1), VP)

    batch, method = pairs(teacher, GRID), SCM(VP)
    start = float((gains.detach() - exact).abs().max())
    optimizer = torch.optim.SGD([gains], 0.2)  # of one number at each time; with momentum they swing
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 600)
        optimizer.zero_grad()
        method.loss({"student": student}, batch, context(batch, step)).total.backward()
        optimizer.step()
    left = (gains.detach() - exact).abs()
    assert start > 0.5 and float(left.max()) < 1e-4


def test_students_are_sampled_at_the_times_of_their_own_steps() -> None:
    """With fresh noise; of flow matching, for which pipelines take no generator there, without."""
    for make in (SCM, RCM):
        assert make(VP).sampling == Sampling("lcm", "trailing") and make(FLOW).sampling == Sampling("ddim", "trailing")


# --- matching, in rCM ---


def networks(schedule: NoiseSchedule, fake: tuple[float, float] = (0.3, 0.8)) -> dict[str, Any]:
    return {"student": Student(schedule, 0.1, 0.6), "teacher": data(schedule), "fake_score": Student(schedule, *fake)}


def turn_of(method: RCM, name: str, step: int = 4) -> Turn:
    (turn,) = (turn for turn in method.turns(step) if turn.updates == name)
    return turn


def test_the_student_trains_last_in_a_period_and_the_fake_score_in_all_of_it() -> None:
    method = RCM(VP, every=5, matching_from=10)
    named = [[turn.updates for turn in method.turns(step)] for step in range(20)]
    assert named == [["student"]] * 10 + ([["fake_score"]] * 4 + [["fake_score", "student"]]) * 2
    assert method.period == 5 and method.starts == (0, 10)


@SCHEDULES
def test_without_its_matching_term_rcms_loss_is_scms(schedule: NoiseSchedule) -> None:
    batch, parties = pairs(data(schedule)), networks(schedule)
    both = turn_of(RCM(schedule, matching=0.7, guidance=1.0), "student").loss(parties, batch, context(batch))
    alone = SCM(schedule).loss(parties, batch, context(batch))
    assert torch.equal(both.parts["consistency_loss"], alone.total.detach())
    torch.testing.assert_close(both.total - 0.7 * both.parts["matching_loss"], alone.total, rtol=1e-12, atol=0)
    assert torch.equal(both.parts["tangent"], alone.parts["tangent"])


@SCHEDULES
def test_the_matching_term_is_that_of_a_sample_of_one_to_four_steps(schedule: NoiseSchedule) -> None:
    """Without the consistency term: DMD2, whose state is of as many steps as are sampled."""
    batch, parties = pairs(data(schedule), GRID.repeat(8)), networks(schedule, (-0.1, 0.5))
    method = RCM(schedule, guidance=1.0)
    found = turn_of(method, "student").loss(parties, batch, context(batch)).parts["matching_loss"]
    x_t, t = method.own_state(parties["student"], batch, context(batch))
    x = parties["student"](x_t, t, {}).x0
    at, noise = context(batch).integers(20, 981, "t'"), context(batch).normal(x, "noise'")
    expected = matching_loss(schedule, parties["teacher"], parties["fake_score"], x, at, noise, {}).mean()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    counts = Counter(t.tolist())  # last times of 1, 2, 3 and 4 steps
    assert counts.keys() == {1000, 500, 333, 250} and all(abs(n - 100) < 40 for n in counts.values())


def test_matching_leaves_a_right_student_alone_once_the_fake_score_is_right() -> None:
    batch = pairs(data(VP), GRID.repeat(4))
    for fake, still in (((0.3, 0.8), True), ((0.3, 0.5), False)):
        parties = networks(VP, fake)
        loss = turn_of(RCM(VP, guidance=1.0), "student").loss(parties, batch, context(batch)).parts["matching_loss"]
        assert (float(loss) < 1e-20) is still


def test_each_turn_reaches_its_own_network_alone() -> None:
    batch, parties = pairs(data(VP)), {**networks(VP, (0.0, 0.5)), "teacher": Student(VP)}
    for name in ("fake_score", "student"):
        turn_of(RCM(VP, guidance=1.0), name).loss(parties, batch, context(batch)).total.backward()
        for other, network in parties.items():
            reached = [p.grad is not None for p in network.parameters()]
            assert all(reached) if other == name else not any(reached)
            network.zero_grad(set_to_none=True)


def test_the_calls_of_a_step_do_not_depend_on_how_many_steps_a_sample_takes() -> None:
    batch, counts = pairs(data(VP)), set()
    for step in range(4, 60, 5):
        student = Student(VP)
        parties = {**networks(VP), "student": student}
        turn_of(RCM(VP, guidance=1.0), "student").loss(parties, batch, context(batch, step))
        counts.add(len(student.calls))
    assert counts == {2 + 3 + 1}  # the pair; three steps whichever is kept; the sample


def test_guidance_is_the_teachers_alone() -> None:
    batch = pairs(data(VP), GRID.repeat(2))
    parts = []
    for w in (1.0, 3.0):
        told: dict[str, list[Tensor]] = {"teacher": [], "fake_score": []}

        def noted(name: str, of: Denoiser, told: dict[str, list[Tensor]] = told) -> Denoiser:
            def call(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
                told[name].append(c["guidance"])
                return of(x, t, c)

            return call

        parties = networks(VP, (0.0, 0.5))
        parties |= {name: noted(name, parties[name]) for name in told}
        parts.append(turn_of(RCM(VP, guidance=w), "student").loss(parties, batch, context(batch)).parts)
        assert {float(g) for g in told["teacher"][0]} == {w} and {float(g) for g in told["fake_score"][0]} == {1.0}
    assert torch.equal(parts[0]["consistency_loss"], parts[1]["consistency_loss"])


@SCHEDULES
def test_the_fake_score_has_nothing_to_learn_at_the_score_of_the_students_samples(schedule: NoiseSchedule) -> None:
    """A student that generates N(.3, .8²) in any number of steps."""
    n, shape = 200, (2, 16, 16)
    drawn = gaussian(schedule, torch.full(shape, 0.3, dtype=torch.float64), 0.8)
    batch = replace(pairs(drawn, torch.full((n,), 20)), states=torch.zeros(n, 2, *shape, dtype=torch.float64))
    gradients = []
    for mean, sd in ((0.3, 0.8), (0.0, 0.8), (0.3, 0.5)):
        fake = Student(schedule, mean, sd)
        parties = {"student": of_data(exact_student(drawn), schedule), "fake_score": fake}
        turn_of(RCM(schedule, guidance=1.0), "fake_score").loss(parties, batch, context(batch)).total.backward()
        gradients.append([float(p.grad) for p in fake.parameters() if p.grad is not None])
    right, too_low, too_narrow = gradients
    assert max(map(abs, right)) < 0.03 < 0.08 < -too_low[0] and -too_narrow[1] > 0.08


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SCM(VP, skip=0), r"^method.skip must be within 1 ... 1000, got 0$"),
        (lambda: SCM(VP, times_from=0), r"^method.times_from must be within 1 ... 1000, got 0$"),
        (lambda: SCM(VP, c=0.0), r"^method.c must be above 0, got 0.0$"),
        (lambda: SCM(VP, tangent_warmup=-1), r"^method.tangent_warmup must be at least 0, got -1$"),
        (lambda: RCM(VP, matching=0.0), r"^method.matching must be above 0, got 0.0: without it, it is method=scm$"),
        (lambda: RCM(VP, guidance=-1.0), r"^method.guidance must be at least 0, got -1.0$"),
        (lambda: RCM(VP, every=0), r"^method.every must be at least 1, got 0$"),
        (lambda: RCM(VP, matching_from=7), r"^method.matching_from must be a multiple of method.every=5, got 7$"),
        (lambda: RCM(VP, simulated_steps=0), r"^method.simulated_steps must be within 1 ... 1000, got 0$"),
        (lambda: RCM(VP, fake_learning_rate=0.0), r"^method.fake_learning_rate must be above 0, got 0.0$"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
