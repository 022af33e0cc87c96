"""Flash Diffusion where the right answers are known, on variance-preserving noise and on flow matching alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.guidance import guided
from distill.diffusion.matching import matching_loss
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, to_denoised
from distill.diffusion.random import Context, generator
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import make_times
from distill.diffusion.trajectory import Batch, CleanEnd, Steps
from distill.methods.base import Turn
from distill.methods.flash import Flash
from distill.methods.lightning import LightningAdversarial, LightningMSE
from distill.methods.sampling import Sampling
from tests.analytic import Mixture, exact_student, gaussian, gaussian_flow, quantile_flow, three_peaks
from tests.methods.test_lightning import Critic

SHAPE = (2, 3, 1)
VP, FLOW = NoiseSchedule.scaled_linear(), NoiseSchedule.linear(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
FOUR = (1000, 750, 500, 250)
ALL = {"iterations": 5, "odds": (1.0, 1.0, 1.0, 1.0)}


def data(schedule: NoiseSchedule, sd: float = 0.8) -> Mixture:
    return gaussian(schedule, torch.full(SHAPE, 0.3, dtype=torch.float64), sd)


def solves(schedule: NoiseSchedule, n: int = 16, guidance: float = 1.0) -> Batch:
    """(x_t, x_0) of the exact flow, at all four times."""
    teacher, t = data(schedule), torch.tensor(FOUR).repeat(n)
    random = torch.Generator().manual_seed(0)
    x_0 = teacher.sample(len(t), random)
    x_t = add_noise(schedule, x_0, torch.randn(x_0.shape, generator=random, dtype=x_0.dtype), t)
    states = torch.stack([x_t, gaussian_flow(teacher, x_t, t, 0)], 1)
    times = torch.stack([t, torch.zeros_like(t)], 1)
    return Batch(states, times, {}, {}, torch.full((len(t),), guidance), positions=tuple(range(len(t))))


def flash(schedule: NoiseSchedule = VP, *stages: dict[str, Any], **settings: Any) -> Flash:
    return Flash(schedule, [{**ALL, **stage} for stage in stages or ({},)], **settings)  # type: ignore[misc]


def context(batch: Batch, step: int = 0) -> Context:
    return Context(0, step, batch.positions)


def turn_of(method: Flash, name: str = "student", step: int = 0) -> Turn:
    (turn,) = (turn for turn in method.turns(step) if turn.updates == name)
    return turn


class Student(nn.Module):
    """The denoiser of N(mean, sd²), with both numbers in reach of gradients; it counts its calls."""

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.0, sd: float = 0.5) -> None:
        super().__init__()
        self.schedule, self.calls = schedule, 0
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        self.calls += 1
        alpha, sigma = self.schedule.alpha(t, x_t), self.schedule.sigma(t, x_t)
        off = (x_t - alpha * self.mean) / (alpha**2 * self.sd**2 + sigma**2)
        return Denoised(self.mean + alpha * self.sd**2 * off, sigma * off)


# --- what it reduces to ---


@SCHEDULES
def test_the_distance_alone_is_lightnings_first_loss_to_the_bit(schedule: NoiseSchedule) -> None:
    batch, student = solves(schedule), Student(schedule)
    ours = turn_of(flash(schedule)).loss({"student": student}, batch, context(batch)).total
    mse = LightningMSE(schedule, 1, 1, source="trajectory", times=FOUR)
    theirs = mse.loss({"student": student}, batch, context(batch)).total
    assert torch.equal(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(loss, list(student.parameters())) for loss in (ours, theirs)), strict=True):
        assert torch.equal(a, b)
    assert set(flash(schedule).reads().pairs) == set(mse.reads().pairs)  # type: ignore[attr-defined]


@SCHEDULES
@pytest.mark.parametrize("turn", ["student", "discriminator"])
def test_the_game_alone_is_lightnings_from_four_times(schedule: NoiseSchedule, turn: str) -> None:
    """Which is latent adversarial distillation on the teacher's own samples."""
    batch, losses = solves(schedule), []
    ours = flash(schedule, {"distillation": 0.0, "adversarial": 1.0}, adversarial_loss="hinge")
    theirs = LightningAdversarial(
        schedule, 1, 1, source="trajectory", times=FOUR, adversarial_loss="hinge", renoise_times=(10, 250, 500, 750)
    )
    for method in (ours, theirs):
        (found,) = (one for one in method.turns(0) if one.updates == turn)
        parties = {"student": Student(schedule), "discriminator": Critic()}
        losses.append(found.loss(parties, batch, context(batch)).total)
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)


def test_one_time_is_distillation_of_the_teachers_ends_from_their_noise() -> None:
    assert flash(VP, {"odds": (1.0,)}, times=[1000]).reads() == Steps(((1000, 0),), (1.0,))


# --- the distance ---


@pytest.mark.parametrize("t", FOUR)
def test_on_one_dimensional_solves_the_end_itself_is_learned(t: int) -> None:
    """Solves do not cross there, so that the end is a function of the state: an exact student has no loss."""
    teacher = three_peaks(VP)
    x_t = add_noise(VP, teacher.sample(64, torch.Generator().manual_seed(0)), torch.randn(64, 1, 1, 1), t)
    x_0 = quantile_flow(teacher, x_t, t, 0)
    times = torch.tensor([[t, 0]]).expand(64, 2)
    batch = Batch(torch.stack([x_t, x_0], 1), times, {}, {}, torch.ones(64), positions=tuple(range(64)))
    loss = turn_of(flash()).loss

    def exact(x: Tensor, at: Tensor, c: Conditioning) -> Denoised:
        return Denoised(quantile_flow(teacher, x, t, 0), torch.zeros_like(x))

    assert float(loss({"student": exact}, batch, context(batch)).total) < 1e-12
    assert float(loss({"student": teacher}, batch, context(batch)).total) > 1e-3  # the mean of x_0, not x_0


@pytest.mark.parametrize("distance", ["l2", "huber", "perceptual"])
def test_an_exact_student_has_no_distance_by_any_measure(distance: str) -> None:
    batch = solves(VP)
    parties = {"student": exact_student(data(VP)), "perceptual": lambda a, b: (a - b).abs().flatten(1).amax(1)}
    method = flash(distance=distance)
    assert ("perceptual" in method.requires) == (distance == "perceptual")
    assert float(turn_of(method).loss(parties, batch, context(batch)).total) < 1e-8
    parties["student"] = exact_student(data(VP, 0.7))
    assert float(turn_of(method).loss(parties, batch, context(batch)).total) > 1e-3


@SCHEDULES
def test_the_teacher_solves_from_noised_data_at_any_of_the_times(schedule: NoiseSchedule) -> None:
    """At T from noise alone; the state and where it ends agree with a flow that is known."""
    n = 200
    clean = data(schedule).sample(n, torch.Generator().manual_seed(0))[:, None]
    batch = Batch(clean, torch.zeros(n, 1, dtype=torch.int64), {}, {}, torch.ones(n), positions=tuple(range(n)))
    method, finer = (flash(schedule, source="noised", w_min=1.0, w_max=1.0, teacher_steps=K) for K in (25, 50))
    assert method.reads() == CleanEnd() and method.requires == ("teacher",) and method.guidance == (1.0, 1.0)
    x_t, t, w = method.state(method.stages[0], batch, context(batch))
    assert set(t.tolist()) == set(FOUR) and w.unique().tolist() == [1.0]
    noise = context(batch).normal(clean[:, 0], "noise")
    assert torch.equal(x_t[t == 1000], noise[t == 1000])
    torch.testing.assert_close(x_t[t < 1000], add_noise(schedule, clean[:, 0], noise, t)[t < 1000])
    exact, parties = gaussian_flow(data(schedule), x_t, t, 0), {"teacher": data(schedule)}
    off, less = (float((m.end(parties, batch, x_t, t, w) - exact).abs().max()) for m in (method, finer))
    assert off < 0.25 and off / less == pytest.approx(2, rel=0.1)
    one = method.end({"teacher": data(schedule, 0.0)}, batch, x_t, t, w)  # of one point, exactly
    torch.testing.assert_close(one, torch.full_like(one, 0.3), rtol=0, atol=1e-12)


# --- the curriculum ---


def test_stages_follow_the_step_and_nothing_else() -> None:
    method = flash(VP, {"iterations": 2}, {"iterations": 3, "adversarial": 0.5}, {"iterations": 4, "matching": 0.5})
    assert method.starts == (0, 2, 5) and method.steps == 9
    assert [method.place(step) for step in range(11)] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    networks = [[turn.updates for turn in method.turns(step)] for step in (0, 2, 5)]
    assert networks == [["student"], ["discriminator", "student"], ["student"]]


@pytest.mark.parametrize("odds", [(0.0, 0.0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (4.0, 2.0, 2.0, 2.0)])
@pytest.mark.parametrize("source", ["trajectory", "noised"])
def test_times_are_visited_with_the_odds_of_the_stage(odds: tuple[float, ...], source: str) -> None:
    n, method = 600, flash(VP, {"odds": odds}, source=source)
    if source == "trajectory":
        reads = method.reads()
        counts = Counter(FOUR[reads.pick([*FOUR, 0], generator("odds", i))[0]] for i in range(n))
    else:
        states = torch.zeros(n, 1, 1, 1, 1)
        batch = Batch(states, torch.zeros(n, 1, dtype=torch.int64), {}, {}, torch.ones(n), positions=tuple(range(n)))
        counts = Counter(method.state(method.stages[0], batch, context(batch))[1].tolist())
    expected = {t: n * odd / sum(odds) for t, odd in zip(FOUR, odds, strict=True)}
    assert all(counts[t] == 0 for t in FOUR if not expected[t])
    chi2 = sum((counts[t] - e) ** 2 / e for t, e in expected.items() if e)
    assert chi2 < 16.3  # of 3 degrees of freedom: one in a thousand is above


def test_a_store_needs_the_times_that_are_visited_and_no_others() -> None:
    flash(VP, {"odds": (0.0, 0.0, 1.0, 1.0)}).reads().check([500, 250, 0])
    with pytest.raises(ValueError, match=r"^the store does not keep the times \[750, 1000\]"):
        flash(VP).reads().check([500, 250, 0])


# --- matching, in which the student is its own fake score ---


class OwnScore(nn.Module):
    """m + s times the exact answer at its times, and the exact score of such samples anywhere else."""

    def __init__(self, schedule: NoiseSchedule, mean: float, sd: float) -> None:
        super().__init__()
        self.schedule, self.exact = schedule, exact_student(data(schedule))
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))

    def score(self) -> Denoiser:
        """Of its samples, N(mean + sd 0.3, (0.8 sd)²)."""
        mean = torch.full(SHAPE, float(self.mean.detach()) + 0.3 * float(self.sd.detach()), dtype=torch.float64)
        return gaussian(self.schedule, mean, 0.8 * float(self.sd.detach()))

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        if bool(torch.isin(t, torch.tensor(FOUR)).all()):
            x0 = self.mean + self.sd * self.exact(x_t, t, c).x0
            return to_denoised(Prediction.SAMPLE, x0, x_t, t, self.schedule)
        return self.score()(x_t, t, c)


@SCHEDULES
def test_a_student_that_knows_its_own_score_is_matched_as_with_a_fake_score(schedule: NoiseSchedule) -> None:
    batch = solves(schedule)
    for mean, sd, still in ((0.0, 1.0, True), (0.2, 0.8, False)):
        student = OwnScore(schedule, mean, sd)
        method = flash(schedule, {"distillation": 0.0, "matching": 1.0})
        assert method.requires == ("teacher",)
        parties = {"student": student, "teacher": data(schedule)}
        ours = turn_of(method).loss(parties, batch, context(batch)).total
        x = student(batch.states[:, 0], batch.times[:, 0], {}).x0
        at, noise = context(batch).integers(20, 981, "t'"), context(batch).normal(x, "noise'")
        dmd = matching_loss(schedule, parties["teacher"], student.score(), x, at, noise, {}).mean()
        torch.testing.assert_close(ours, dmd, rtol=1e-12, atol=1e-20)
        assert (float(ours.detach()) < 1e-20) is still


def test_no_gradient_passes_through_either_score() -> None:
    """Only through the student's first answer: as if its call at t' had been another network's."""
    batch, student = solves(VP), Student(VP)
    teacher = Student(VP, 0.3, 0.8)
    method = flash(VP, {"distillation": 0.0, "matching": 1.0})
    parties = {"student": student, "teacher": teacher}
    ours = torch.autograd.grad(
        turn_of(method).loss(parties, batch, context(batch)).total, list(student.parameters()), retain_graph=True
    )
    x = student(batch.states[:, 0], batch.times[:, 0], {}).x0
    at, noise = context(batch).integers(20, 981, "t'"), context(batch).normal(x, "noise'")
    other = Student(VP)
    loss = matching_loss(VP, teacher, other, x, at, noise, {}).mean()
    loss.backward()
    assert all(p.grad is None for network in (other, teacher) for p in network.parameters())
    for a, p in zip(ours, student.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=0)


def test_the_teacher_is_guided_as_the_solves_were() -> None:
    """By the w that is stored with each; the student's own score is not."""
    batch = replace(
        solves(VP, guidance=3.0),
        conditioning={"weights": torch.tensor([[0.9, 0.1]], dtype=torch.float64).expand(64, 2)},
        unconditional={"weights": torch.full((64, 2), 0.5, dtype=torch.float64)},
    )
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, *SHAPE)
    teacher = Mixture(VP, means, torch.tensor([0.3, 0.3]), torch.tensor([0.5, 0.5]))
    method = flash(VP, {"distillation": 0.0, "matching": 1.0})
    student = Student(VP)
    ours = turn_of(method).loss({"student": student, "teacher": teacher}, batch, context(batch)).total
    x = student(batch.states[:, 0], batch.times[:, 0], {}).x0
    at, noise = context(batch).integers(20, 981, "t'"), context(batch).normal(x, "noise'")
    real = guided(teacher, batch.unconditional, 3.0)
    expected = matching_loss(VP, real, student, x, at, noise, batch.conditioning).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


# --- weights, calls and turns ---


def test_terms_are_added_with_their_weights_and_a_weight_of_none_calls_nothing() -> None:
    batch = solves(VP)
    weights = {"distillation": 0.5, "matching": 0.7, "adversarial": 0.3}
    parties: dict[str, Any] = {"student": Student(VP), "teacher": data(VP), "discriminator": Critic()}
    whole = turn_of(flash(VP, weights)).loss(parties, batch, context(batch))
    expected = sum(weight * whole.parts[f"{name}_loss"] for name, weight in weights.items())
    torch.testing.assert_close(whole.total.detach(), torch.as_tensor(expected), rtol=1e-12, atol=0)
    for name in weights:
        alone = flash(VP, {**dict.fromkeys(weights, 0.0), name: 1.0})
        needed = {"distillation": set(), "matching": {"teacher"}, "adversarial": {"discriminator"}}[name]
        assert set(alone.requires) | (set(alone.trains) - {"student"}) == needed
        given = {"student": Student(VP), **{key: parties[key] for key in needed}}  # any other call is a KeyError
        found = turn_of(alone).loss(given, batch, context(batch))
        torch.testing.assert_close(found.total.detach(), whole.parts[f"{name}_loss"], rtol=1e-12, atol=0)
        assert given["student"].calls == (2 if name == "matching" else 1)


@SCHEDULES
def test_each_turn_leaves_the_other_network_alone_and_shows_one_noise(schedule: NoiseSchedule) -> None:
    batch, method = solves(schedule), flash(schedule, {"adversarial": 1.0})
    student, critic = Student(schedule), Critic()
    parties = {"student": student, "discriminator": critic}
    turn_of(method, "discriminator").loss(parties, batch, context(batch)).total.backward()
    assert all(p.grad is None for p in student.parameters()) and critic.weight.grad is not None
    (real, fake), t, _ = critic.shown[0]
    x = student(batch.states[:, 0], batch.times[:, 0], {}).x0
    alpha = schedule.alpha(t, x)
    torch.testing.assert_close(real - fake, alpha * (batch.states[:, 1] - x), rtol=1e-9, atol=1e-12)
    turn_of(method).loss(parties, batch, context(batch)).total.backward()
    assert torch.equal(critic.shown[1][0][0], fake) or torch.allclose(critic.shown[1][0][0], fake)
    assert all(p.grad is not None for p in student.parameters())


def test_students_are_sampled_at_the_times_that_they_learn() -> None:
    assert flash(VP).sampling == Sampling("lcm", "trailing") and flash(FLOW).sampling == Sampling("ddim", "trailing")
    times = [make_times("trailing", 1000, steps)[:-1] for steps in (1, 2, 4)]
    assert all(set(some) <= set(flash(VP).times) for some in times)


def test_what_is_held_out_is_the_distance_alone() -> None:
    batch = solves(VP)
    method = flash(VP, {"distillation": 0.0, "matching": 1.0, "adversarial": 1.0})
    exact = method.held_out(0).loss({"student": exact_student(data(VP))}, batch, context(batch))
    assert float(exact.total) < 1e-20 and set(exact.parts) == {"loss", "distillation_loss"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flash(VP, []), r"^method.stages is empty: give at least one$"),
        (lambda: flash(VP, {"odds": (1.0,)}), r"^method.stages\[0\]: odds must be 4, one for each of method.times"),
        (lambda: flash(VP, {}, {"odds": (0.0,) * 4}), r"^method.stages\[1\]: odds must not be negative, nor all 0"),
        (lambda: flash(VP, {"iterations": 0}), r"^method.stages\[0\]: iterations must be at least 1, got 0$"),
        (lambda: flash(VP, {"matching": -1.0}), r"^method.stages\[0\]: matching must be at least 0, got -1.0$"),
        (lambda: flash(VP, {"distillation": 0.0}), r"^method.stages\[0\]: distillation, matching and adversarial are"),
        (lambda: flash(times=[250, 500]), r"^method.times must fall within 1000 ... 1, got \[250, 500\]$"),
        (lambda: flash(source="data"), r"^method.source must be one of trajectory, noised, got 'data'$"),
        (lambda: flash(distance="l1"), r"^method.distance must be one of l2, huber, perceptual, got 'l1'$"),
        (lambda: flash(teacher_steps=0), r"^method.teacher_steps must be within 1 ... 1000, got 0$"),
        (lambda: flash(w_min=5.0, w_max=3.0), r"^method.w_min and w_max must satisfy"),
        (lambda: flash(huber_c=0.0), r"^method.huber_c must be above 0, got 0.0$"),
        (lambda: flash(adversarial_loss="w"), r"^method.adversarial_loss must be one of "),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
