"""DMD2 where both scores are known: its states, its gradient, its rhythm, and that it leads to the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill.diffusion.adversarial import Origin
from distill.diffusion.consistency import where
from distill.diffusion.matching import matching_loss
from distill.diffusion.prediction import Conditioning, Denoised, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.simulation import StudentSteps
from distill.diffusion.trajectory import Batch, CleanEnd, Steps
from distill.methods.base import Losses, Turn
from distill.methods.dmd2 import DMD2
from distill.methods.mlcm import MLCM
from distill.methods.rectified import Rectified
from tests.analytic import Mixture, exact_student, gaussian
from tests.learned import LinearCritic, train

VP, FLOW = NoiseSchedule.scaled_linear(), NoiseSchedule.linear(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW], ids=["VP", "flow"])
SHAPE = (2, 3, 1)
MEAN, SD = 0.3, 0.8


def data(schedule: NoiseSchedule = VP, sd: float = SD) -> Mixture:
    return gaussian(schedule, torch.full(SHAPE, MEAN, dtype=torch.float64), sd)


class Gaussian(nn.Module):
    """Of N(mean, sd²), both of which are learned."""

    def __init__(self, mean: float, sd: float, schedule: NoiseSchedule = VP) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))
        self.schedule = schedule
        self.calls: list[tuple[Tensor, Tensor, Conditioning, bool]] = []

    def note(self, x_t: Tensor, t: Tensor, c: Conditioning) -> None:
        self.calls.append((x_t, t, c, torch.is_grad_enabled()))


class Student(Gaussian):
    """A student whose samples in any number of steps are N(mean, sd²): each state is as far off in its own spread."""

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        self.note(x_t, t, c)
        alpha, sigma = self.schedule.alpha(t, x_t), self.schedule.sigma(t, x_t)
        spread = (alpha**2 * self.sd.detach() ** 2 + sigma**2).sqrt()  # of its own samples, noised; at T there are none
        z = where(t == self.schedule.T, x_t, (x_t - alpha * self.mean.detach()) / spread)
        x0 = self.mean + self.sd * z
        return to_denoised(Prediction.SAMPLE, x0, x_t, t.clamp(min=1), self.schedule)


class Score(Gaussian):
    """The denoiser of N(mean, sd²)."""

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        self.note(x_t, t, c)
        alpha, sigma = self.schedule.alpha(t, x_t), self.schedule.sigma(t, x_t)
        off = (x_t - alpha * self.mean) / (alpha**2 * self.sd**2 + sigma**2)
        return Denoised(self.mean + alpha * self.sd**2 * off, sigma * off)


def parties(schedule: NoiseSchedule = VP, student: tuple[float, float] = (0.0, 0.9)) -> dict[str, Any]:
    return {
        "student": Student(*student, schedule),
        "teacher": data(schedule),
        "fake_score": Score(*student, schedule),
        "discriminator": LinearCritic(),
    }


def batch_of(n: int, schedule: NoiseSchedule = VP) -> Batch:
    x_0 = data(schedule).sample(n, torch.Generator().manual_seed(3))
    positions = tuple(range(n))
    return Batch(x_0[:, None], torch.zeros(n, 1, dtype=torch.int64), {}, {}, torch.ones(n), positions=positions)


def context(n: int, step: int = 0) -> Context:
    return Context(0, step, tuple(range(n)))


def turn_of(method: DMD2 | MLCM, name: str) -> Turn:
    return next(turn for turn in method.turns_of_period(0) if turn.updates == name)


def lost(method: DMD2, name: str, networks: dict[str, Any], n: int = 16, batch: Batch | None = None) -> Losses:
    return turn_of(method, name).loss(networks, batch or batch_of(n, method.schedule), context(n))


def slopes(losses: Losses, network: Gaussian) -> tuple[float, float]:
    """The loss's derivatives by mean and sd."""
    mean, sd = torch.autograd.grad(losses.total, [network.mean, network.sd])
    return float(mean), float(sd)


# --- the states ---


@SCHEDULES
def test_a_student_is_trained_on_states_that_it_meets_itself_each_of_its_times_as_often(
    schedule: NoiseSchedule,
) -> None:
    n, networks = 240, parties(schedule)
    lost(DMD2(schedule, 4, guidance=1.0), "student", networks, n)
    *met, (x_t, t, _, graded) = networks["student"].calls
    assert [call[1].unique().tolist() for call in met] == [[1000], [750], [500]]
    assert [call[3] for call in met] == [False, False, False] and graded and not x_t.requires_grad
    counts = torch.bincount(t // 250, minlength=5)[1:]
    assert int(counts.sum()) == n and float(((counts - 60.0) ** 2 / 60).sum()) < 16.3  # chi-squared of 3 degrees, .1 %
    for when in (1000, 750, 500, 250):  # what it generates has the law of its samples, noised
        found = x_t[t == when]
        alpha, sigma = float(schedule.alpha(when, found)), float(schedule.sigma(when, found))
        expected = (0.0, 1.0) if when == 1000 else (0.0, (alpha**2 * 0.9**2 + sigma**2) ** 0.5)
        assert (float(found.mean()), float(found.std())) == pytest.approx(expected, abs=0.15)


def test_of_one_step_the_state_is_noise_alone() -> None:
    networks = parties()
    lost(DMD2(VP, 1, guidance=1.0), "student", networks, 5)
    ((x_t, t, _, _),) = networks["student"].calls
    assert torch.equal(x_t, context(5).normal(x_t, "student 0")) and t.tolist() == [1000] * 5


def test_noised_states_are_stored_latents_with_noise_and_noise_alone_in_the_first_step() -> None:
    networks, batch = parties(), batch_of(64)
    lost(DMD2(VP, 4, "noised", guidance=1.0), "student", networks, 64)
    ((x_t, t, _, _),) = networks["student"].calls
    noise = context(64).normal(x_t, "student 0")
    expected = where(t == 1000, noise, add_noise(VP, batch.states[:, 0], noise, t))
    assert torch.equal(x_t, expected) and set(t.tolist()) == {250, 500, 750, 1000}


@pytest.mark.parametrize("name", ["student", "fake_score", "discriminator"])
def test_networks_are_called_equally_often_whatever_state_is_kept(name: str) -> None:
    """Ranks that hold other samples have to call a sharded network as often."""
    method, found = DMD2(VP, 4, guidance=1.0, adversarial=1.0), set()
    for step in range(6):
        networks = parties()
        turn_of(method, name).loss(networks, batch_of(1), Context(0, step, (0,)))
        found.add((len(networks["student"].calls), len(networks["fake_score"].calls)))
    assert found == {(4, 0 if name == "discriminator" else 1)}


# --- the gradient ---


@SCHEDULES
def test_a_student_whose_samples_are_scored_as_the_teachers_is_left_alone(schedule: NoiseSchedule) -> None:
    networks = parties(schedule)
    networks["fake_score"] = networks["teacher"]
    losses = lost(DMD2(schedule, 2, guidance=1.0), "student", networks)
    assert slopes(losses, networks["student"]) == (0.0, 0.0)
    networks["fake_score"] = Score(0.0, 0.9, schedule)
    assert all(slopes(lost(DMD2(schedule, 2, guidance=1.0), "student", networks), networks["student"]))


@SCHEDULES
def test_its_gradient_leads_to_the_data_by_an_exact_fake_score_and_astray_by_one_that_lags(
    schedule: NoiseSchedule,
) -> None:
    method, n = DMD2(schedule, 1, guidance=1.0), 150

    def slope(student: tuple[float, float], fake: tuple[float, float]) -> tuple[float, float]:
        networks = {**parties(schedule, student), "fake_score": Score(*fake, schedule)}
        return slopes(lost(method, "student", networks, n), networks["student"])

    assert slope((MEAN, SD), (MEAN, SD)) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert slope((MEAN, 0.5), (MEAN, 0.5))[1] < -0.1 < 0.05 < slope((MEAN, 1.1), (MEAN, 1.1))[1]
    assert slope((-0.3, SD), (-0.3, SD))[0] < -0.1 < 0.1 < slope((0.6, SD), (0.6, SD))[0]
    assert slope((MEAN, SD), (MEAN, 0.5))[1] < -0.1  # a right student, of which the fake score knows a narrower one


def test_a_student_that_trains_as_often_as_its_fake_score_circles_and_one_of_every_fifth_step_settles() -> None:
    """The fake score follows by a twentieth of the way a step; the student steps by a twentieth of its gradient."""
    n = 64
    z, noise = (torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    t = torch.linspace(20, 980, n).long()

    def spread(every: int) -> float:
        student, fake, seen = Student(MEAN, 0.5), Score(MEAN, SD), []
        for step in range(200 * every):
            fake.sd.data.lerp_(student.sd.data, 0.05)
            if (step + 1) % every == 0:
                loss = matching_loss(VP, data(), fake, student.mean + student.sd * z, t, noise, {}).mean()
                (slope,) = torch.autograd.grad(loss, student.sd)
                student.sd.data.sub_(0.05 * 6 * slope)  # of the sum over a sample's six elements
                seen.append(student.sd.item())
        return float(torch.tensor(seen[100:]).std())

    assert spread(5) < spread(1) / 5


# --- what it is elsewhere ---


class GivenState:
    """States of another method, in the place of the student's steps."""

    def __init__(self, state: tuple[Tensor, Tensor]) -> None:
        self.given = state

    def state(self, student: Any, x_0: Tensor, c: Conditioning, context: Context) -> Origin:
        return self.given


def test_of_given_states_its_loss_is_mlcms_distribution_matching_to_the_bit() -> None:
    stage = {"segments": 1, "grid": 4, "skip": 250, "source": "student", "iterations": 1, "matching": 1.0}
    mlcm, method = MLCM(VP, [stage], guidance=3.0), DMD2(VP, 4, guidance=3.0, every=1)
    networks, n = {**parties(), "fake_score": Score(-0.1, 0.5)}, 16
    batch = batch_of(n)
    theirs = turn_of(mlcm, "student").loss(networks, batch, context(n)).parts["matching_loss"]
    with torch.no_grad():
        _, x_t, t = mlcm.own_state(mlcm.stages[0], networks["student"], batch, context(n))
    method.steps_of_student = GivenState((x_t, t))  # type: ignore[assignment]
    ours = lost(method, "student", networks, n)
    assert torch.equal(ours.total.detach(), theirs) and float(theirs) > 1e-3


@SCHEDULES
def test_its_regression_is_that_of_rectified_diffusion_at_the_noise(schedule: NoiseSchedule) -> None:
    n = 8
    x_T = torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_0 = exact_student(data(schedule))(x_T, torch.full((n,), 1000), {}).x0
    times = torch.tensor([[1000, 0]]).expand(n, 2)
    batch = replace(batch_of(n), states=torch.stack([x_T, x_0], 1), times=times)
    method = DMD2(schedule, 1, guidance=1.0, regression=0.25)
    assert method.reads() == Rectified(schedule).reads() == Steps(((1000, 0),))
    networks = parties(schedule)
    with_it, bare = (lost(m, "student", networks, n, batch) for m in (method, DMD2(schedule, 1, guidance=1.0)))

    class AtNoise(Rectified):
        def sample_time(self, step: Any, context: Context) -> Tensor:
            return step.t

    expected = AtNoise(schedule, loss="l2").loss(networks, batch, context(n)).total
    torch.testing.assert_close(with_it.parts["regression_loss"], expected.detach())
    torch.testing.assert_close(with_it.total - bare.total, 0.25 * expected)
    assert method.guidance_learned((4.0, 4.0)) == (1.0, 4.0)  # of both teachers' solves


# --- the other networks ---


@SCHEDULES
def test_the_best_fake_score_is_that_of_the_students_samples(schedule: NoiseSchedule) -> None:
    n, method = 800, DMD2(schedule, 1, guidance=1.0)

    def loss(mean: float, sd: float) -> tuple[float, float]:
        networks = {**parties(schedule), "fake_score": Score(mean, sd, schedule)}
        losses = lost(method, "fake_score", networks, n)
        return float(losses.total.detach()), slopes(losses, networks["fake_score"])[1]

    best, slope = loss(0.0, 0.9)
    assert best < min(loss(0.2, 0.9)[0], loss(-0.2, 0.9)[0], loss(0.0, 1.1)[0], loss(0.0, 0.7)[0])
    assert 3 * abs(slope) < min(loss(0.0, 1.1)[1], -loss(0.0, 0.7)[1])


def test_the_discriminator_sees_stored_images_and_the_students_answers_with_one_noise_at_any_time() -> None:
    n, networks = 64, parties()
    method = DMD2(VP, 2, guidance=1.0, adversarial=0.5)
    judged = lost(method, "discriminator", networks, n)
    played = lost(method, "student", networks, n)
    ((real, fake), t, _), ((answer,), u, _) = networks["discriminator"].shown
    torch.testing.assert_close(real, add_noise(VP, batch_of(n).states[:, 0], context(n).normal(real, "noise*"), t))
    assert torch.equal(answer.detach(), fake) and torch.equal(t, u)  # the same that its own turn is judged by
    assert int(t.min()) < 60 and int(t.max()) > 940 and len(t.unique()) > 50
    r, f = (0.7 * x.flatten(1).sum(1) for x in (real, fake))
    torch.testing.assert_close(judged.total.detach(), (softplus(-r) + softplus(f)).mean())
    torch.testing.assert_close(played.parts["adversarial_loss"], softplus(-f).mean())
    expected = played.parts["matching_loss"] + 0.5 * played.parts["adversarial_loss"]
    torch.testing.assert_close(played.total.detach(), expected)


def test_times_and_odds_of_the_discriminator_can_be_set() -> None:
    networks = parties()
    settings: dict[str, Any] = {"renoise_times": [3, 4], "renoise_weights": [0.0, 1.0], "adversarial_loss": "hinge"}
    judged = lost(DMD2(VP, 2, guidance=1.0, adversarial=1.0, r1=5.0, **settings), "discriminator", networks)
    (real, fake, near), t, _ = networks["discriminator"].shown[0]
    r, f, p = (0.7 * x.flatten(1).sum(1) for x in (real, fake, near))
    assert set(t.tolist()) == {4}
    expected = (1 - r).clamp(min=0) + (1 + f).clamp(min=0) + 5 * (r - p).pow(2)
    torch.testing.assert_close(judged.total.detach(), expected.mean())


@pytest.mark.parametrize("name", ["fake_score", "discriminator"])
def test_a_turn_of_another_network_leaves_the_student_alone(name: str) -> None:
    networks = parties()
    lost(DMD2(VP, 2, guidance=1.0, adversarial=1.0), name, networks).total.backward()
    reached = {key for key, n in networks.items() if isinstance(n, nn.Module) and next(n.parameters()).grad is not None}
    assert reached == {name} and not any(call[3] for call in networks["student"].calls)


def test_guidance_is_of_the_teachers_score_alone() -> None:
    n = 6
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, *SHAPE)
    teacher = Mixture(VP, means, torch.tensor([0.3, 0.3]), torch.tensor([0.5, 0.5]))
    told, empty = ({"weights": torch.tensor([w], dtype=torch.float64).expand(n, 2)} for w in ([0.9, 0.1], [0.5, 0.5]))
    batch = replace(batch_of(n), conditioning=told, unconditional=empty)
    rows, found = [], {}

    def watched(x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        rows.append(len(x_t))
        return teacher(x_t, t, c)

    for w in (1.0, 3.0):
        networks = {**parties(), "teacher": watched}
        lost(DMD2(VP, 2, guidance=w), "fake_score", networks, n, batch)
        found[w] = lost(DMD2(VP, 2, guidance=w), "student", networks, n, batch).total
        for network in ("student", "fake_score"):
            assert {len(call[0]) for call in networks[network].calls} == {n}
            assert {float(v) for call in networks[network].calls for v in call[2]["guidance"]} == (
                {w} if network == "student" else {1.0}
            )
    assert rows == [n, 2 * n] and found[1.0] != found[3.0]


# --- its rhythm ---


def test_a_period_is_as_many_turns_of_the_others_and_one_of_the_student_which_is_last() -> None:
    method = DMD2(VP, 4, every=3, fake_warmup=6, adversarial=1.0, fake_learning_rate=1e-3)
    rows = [[turn.updates for turn in method.turns(step)] for step in range(12)]
    others = ["fake_score", "discriminator"]
    assert rows == [others] * 8 + [[*others, "student"]] + [others] * 2 + [[*others, "student"]]
    assert (method.period, method.starts) == (3, (0, 6))
    assert [method.learning_rate(0, name) for name in method.trains] == [None, 1e-3, None]
    assert DMD2(VP).trains == ("student", "fake_score") and DMD2(VP).starts == (0,)


def test_it_is_sampled_by_its_own_number_of_steps_and_measured_on_no_solve() -> None:
    method = DMD2(VP, 2, guidance=8.0)
    assert (method.sampling.sampler, method.sampling.spacing, method.sampling.steps) == ("lcm", "trailing", 2)
    assert method.reads() == CleanEnd() and method.held_out(4) is None  # type: ignore[func-returns-value]
    assert method.guidance_learned((3.0, 5.0)) == (8.0, 8.0)


def test_it_brings_a_student_of_two_steps_to_the_data_of_a_flow_matching_teacher() -> None:
    n, networks = 32, parties(FLOW, (-0.6, 0.5))
    method = DMD2(FLOW, 2, guidance=1.0, every=3, fake_warmup=9)
    train(method, networks, batch_of(n, FLOW), {"student": 0.04, "fake_score": 0.1}, steps=150)
    student = networks["student"]
    assert (student.mean.item(), student.sd.item()) == pytest.approx((MEAN, SD), abs=0.12)


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_steps": 0}, "method.student_steps must be within 1 ... 1000, got 0"),
        ({"states": "data"}, "method.states must be one of student, noised, got 'data'"),
        ({"guidance": -1.0}, "method.guidance must be at least 0, got -1.0"),
        ({"adversarial": -1.0}, "method.adversarial must be at least 0, got -1.0"),
        ({"every": 0}, "method.every must be at least 1, got 0"),
        ({"fake_warmup": 7}, "method.fake_warmup must be 0 or a multiple of every=5, got 7"),
        ({"regression": 1.0}, "method.regression is of a student of one step, got student_steps=4"),
        ({"fake_learning_rate": 0.0}, "method.fake_learning_rate must be above 0, got 0.0"),
        ({"discriminator_learning_rate": -1.0}, "method.discriminator_learning_rate must be above 0, got -1.0"),
        ({"renoise_times": [2000]}, "method.renoise_times must be within 1 ... 1000, got [2000]"),
    ],
    ids=str,
)
def test_refuses_a_bad_value_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        DMD2(VP, **settings)
    assert str(error.value) == message


def test_times_of_the_students_steps_are_the_trailing_ones() -> None:
    assert StudentSteps(VP, 4).times.values.tolist() == [1000, 750, 500, 250]
