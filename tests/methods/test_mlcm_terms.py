"""MLCM's last stage: distribution matching and the game with a discriminator, where the right answers are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill.diffusion.guidance import guided
from distill.diffusion.matching import matching_loss
from distill.diffusion.prediction import Conditioning, Denoised, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import add_noise
from distill.diffusion.segments import Segments
from distill.diffusion.trajectory import Batch
from distill.methods.base import Losses, Turn
from distill.methods.mlcm import MLCM
from tests.analytic import Mixture
from tests.learned import LinearCritic
from tests.methods.test_mlcm import FIRST, SCHEDULE, SECOND, SHAPE, context, data, exact, noise_batch

LAST = {**SECOND, "matching": 2.0, "adversarial": 3.0}


class Student(nn.Module):
    """m + s x0, of the x0 of the student that is right."""

    def __init__(self, mean: float = 0.0, sd: float = 1.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        x0 = self.mean + self.sd * exact(data(), Segments(1000, 1))(x_t, t, c).x0
        return to_denoised(Prediction.SAMPLE, x0, x_t, t.clamp(min=1), SCHEDULE)


class Score(nn.Module):
    """The denoiser of N(mean, sd²)."""

    def __init__(self, mean: float = 0.3, sd: float = 0.8) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        alpha, sigma = SCHEDULE.alpha(t, x_t), SCHEDULE.sigma(t, x_t)
        off = (x_t - alpha * self.mean) / (alpha**2 * self.sd**2 + sigma**2)
        return Denoised(self.mean + alpha * self.sd**2 * off, sigma * off)


def networks() -> dict[str, Any]:
    return {
        "student": Student(0.2, 0.9),
        "teacher": data(),
        "fake_score": Score(-0.1, 0.5),
        "discriminator": LinearCritic(),
    }


def method(**stage: Any) -> MLCM:
    return MLCM(SCHEDULE, [{**LAST, **stage}], guidance=1.0)


def turn_of(mlcm: MLCM, name: str, step: int = 0) -> Turn:
    (turn,) = (turn for turn in mlcm.turns(step) if turn.updates == name)
    return turn


def gradients(losses: Losses, of: dict[str, Any]) -> dict[str, list[float]]:
    """Of the trained networks that the loss reaches."""
    losses.total.backward()
    found = {}
    for name, network in of.items():
        if isinstance(network, nn.Module) and any(p.grad is not None for p in network.parameters()):
            found[name] = [0.0 if p.grad is None else float(p.grad) for p in network.parameters()]
            network.zero_grad()
    return found


# --- what the terms are ---


def test_terms_are_added_with_their_weights() -> None:
    n, parties = 16, networks()
    found = turn_of(method(), "student").loss(parties, noise_batch(n), context(n))
    bare = turn_of(method(matching=0.0, adversarial=0.0), "student").loss(parties, noise_batch(n), context(n))
    assert found.parts.keys() - bare.parts.keys() == {"matching_loss", "adversarial_loss"}
    expected = bare.total + 2 * found.parts["matching_loss"] + 3 * found.parts["adversarial_loss"]
    torch.testing.assert_close(found.total, expected)
    assert min(float(found.parts[f"{name}_loss"]) for name in ("matching", "adversarial")) > 1e-3


def test_the_students_answer_is_matched_with_the_guided_teacher() -> None:
    """At the x_t of the consistency loss, between DMD's times."""
    n, told = 32, torch.tensor([[0.9, 0.1]], dtype=torch.float64).expand(32, 2)
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, *SHAPE)
    teacher = Mixture(SCHEDULE, means, torch.tensor([0.3, 0.3]), torch.tensor([0.5, 0.5]))
    empty = {"weights": torch.full((32, 2), 0.5)}
    batch = replace(noise_batch(n), conditioning={"weights": told}, unconditional=empty)
    mlcm = MLCM(SCHEDULE, [{**LAST, "adversarial": 0.0}], guidance=3.0)
    parties = {**networks(), "teacher": teacher}
    found = turn_of(mlcm, "student").loss(parties, batch, context(n)).parts["matching_loss"]

    _, x_t, t = mlcm.own_state(mlcm.stages[0], parties["student"], batch, context(n))
    answer = parties["student"](x_t, t, {}).x0
    at, noise = context(n).integers(20, 981, "t'"), context(n).normal(answer, "noise'")
    s_real = guided(teacher, empty, 3.0)
    expected = matching_loss(SCHEDULE, s_real, parties["fake_score"], answer, at, noise, batch.conditioning)
    torch.testing.assert_close(found, expected.mean().detach())


def test_a_student_whose_fakes_are_scored_as_the_data_is_left_alone() -> None:
    n, parties = 16, networks()
    parties["fake_score"] = parties["teacher"]
    mlcm = method(adversarial=0.0)
    with_matching = gradients(turn_of(mlcm, "student").loss(parties, noise_batch(n), context(n)), parties)
    bare = turn_of(method(matching=0.0, adversarial=0.0), "student").loss(parties, noise_batch(n), context(n))
    assert with_matching["student"] == pytest.approx(gradients(bare, parties)["student"], rel=1e-12)


def test_real_are_the_students_samples_and_fake_its_answers_near_them() -> None:
    n, parties = 20, networks()
    mlcm = method()
    turn_of(mlcm, "discriminator").loss(parties, noise_batch(n), context(n))
    turn_of(mlcm, "student").loss(parties, noise_batch(n), context(n))
    ((real, fake), t, origin), ((answer,), u, same_origin) = parties["discriminator"].shown

    student = parties["student"]
    x_0 = mlcm.student_sample(mlcm.stages[0], student, noise_batch(n), context(n))
    at = mlcm.sample_time(mlcm.stages[0], context(n), x_0.device)
    x_t = add_noise(SCHEDULE, x_0, context(n).normal(x_0, "noise"), at)
    noise = context(n).normal(x_0, "noise*")
    torch.testing.assert_close(real, add_noise(SCHEDULE, x_0, noise, t))
    torch.testing.assert_close(fake, add_noise(SCHEDULE, student(x_t, at, {}).x0, noise, t).detach())
    assert set(t.tolist()) <= {10, 250, 500, 750} and len(set(t.tolist())) > 1
    assert torch.equal(t, u) and torch.equal(answer.detach(), fake)
    for x, when in (origin, same_origin):
        assert torch.equal(x, x_t) and torch.equal(when, at)


def test_the_games_losses_are_those_of_its_definition() -> None:
    n, parties = 12, networks()
    mlcm = method(matching=0.0)
    judged = turn_of(mlcm, "discriminator").loss(parties, noise_batch(n), context(n))
    played = turn_of(mlcm, "student").loss(parties, noise_batch(n), context(n))
    (real, fake), _, _ = parties["discriminator"].shown[0]
    r, f = (0.7 * x.flatten(1).sum(1) for x in (real, fake))
    torch.testing.assert_close(judged.total.detach(), (softplus(-r) + softplus(f)).mean())
    torch.testing.assert_close(played.parts["adversarial_loss"], softplus(-f).mean())
    shares = {"real_accuracy": (r > 0).float().mean(), "fake_accuracy": (f < 0).float().mean()}
    assert {k: judged.parts[k] for k in shares} == shares


def test_settings_reach_the_game() -> None:
    n, parties = 12, networks()
    mlcm = MLCM(SCHEDULE, [LAST], adversarial_loss="hinge", renoise_times=[3, 4], renoise_weights=[0.0, 1.0], r1=5.0)
    judged = turn_of(mlcm, "discriminator").loss(parties, noise_batch(n), context(n))
    (real, fake, near), t, _ = parties["discriminator"].shown[0]
    r, f, p = (0.7 * x.flatten(1).sum(1) for x in (real, fake, near))
    assert set(t.tolist()) == {4}
    expected = (1 - r).clamp(min=0) + (1 + f).clamp(min=0) + 5 * (r - p).pow(2)
    torch.testing.assert_close(judged.total.detach(), expected.mean())


def test_the_best_fake_score_is_that_of_the_students_answers() -> None:
    """A student that is right draws the data: so its denoiser is the data's, whatever the milestones."""
    n, mlcm = 3000, method()

    def loss(score: Score) -> float:
        parties = {**networks(), "student": Student(), "fake_score": score}
        return float(turn_of(mlcm, "fake_score").loss(parties, noise_batch(n), context(n)).total.detach())

    best = loss(Score(0.3, 0.8))
    assert best < min(loss(Score(0.5, 0.8)), loss(Score(0.1, 0.8)), loss(Score(0.3, 1.0)), loss(Score(0.3, 0.6)))


# --- whose turn it is ---


def test_each_turn_reaches_its_own_network() -> None:
    n, mlcm = 8, method()
    for name in ("discriminator", "fake_score"):
        parties = networks()
        reached = gradients(turn_of(mlcm, name).loss(parties, noise_batch(n), context(n)), parties)
        assert reached.keys() == {name} and all(reached[name])
    parties = networks()
    reached = gradients(turn_of(mlcm, "student").loss(parties, noise_batch(n), context(n)), parties)
    assert all(reached["student"]) and "fake_score" not in reached  # D is frozen by then, and passes gradients on


def test_turns_and_rates_follow_the_stages() -> None:
    stages = [{**FIRST, "learning_rate": 1e-4}, {**SECOND, "adversarial": 1.0, "learning_rate": 1e-5}, {**LAST}]
    mlcm = MLCM(SCHEDULE, stages, discriminator_learning_rate=1e-3, fake_learning_rate=2e-3)
    assert mlcm.trains == ("student", "discriminator", "fake_score")
    order = {step: [turn.updates for turn in mlcm.turns(step)] for step in (9, 10, 15)}
    assert order == {
        9: ["student"],
        10: ["discriminator", "student"],
        15: ["discriminator", "fake_score", "student"],
    }
    assert [mlcm.learning_rate(10, name) for name in mlcm.trains] == [1e-5, 1e-3, 2e-3]
    assert MLCM(SCHEDULE, stages[1:2]).learning_rate(0, "discriminator") is None
    assert MLCM(SCHEDULE, [FIRST]).trains == MLCM(SCHEDULE, [SECOND]).trains == ("student",)
    assert MLCM(SCHEDULE, [{**SECOND, "matching": 1.0}]).trains == ("student", "fake_score")


@pytest.mark.parametrize("name", ["discriminator", "fake_score", "student"])
def test_a_turns_loss_is_a_mean_over_samples_however_they_are_grouped(name: str) -> None:
    before = torch.get_rng_state()

    def loss(positions: tuple[int, ...]) -> float:
        batch = replace(noise_batch(len(positions)), positions=positions)
        return float(turn_of(method(), name).loss(networks(), batch, Context(5, 3, positions)).total.detach())

    halves = loss((8, 9)), loss((10, 11))
    assert loss((8, 9, 10, 11)) == pytest.approx(sum(halves) / 2, rel=1e-9)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)
    assert torch.equal(before, torch.get_rng_state())


# --- it matches ---


def trained(mlcm: MLCM, steps: int = 100, n: int = 64) -> Student:
    """A student that starts off the data, in a training loop of a few lines."""
    parties = {**networks(), "student": Student(-0.8, 0.6), "fake_score": Score()}
    rates = {"student": 0.02, "fake_score": 0.1}
    optimizers = {name: torch.optim.Adam(parties[name].parameters(), rate) for name, rate in rates.items()}
    for step in range(steps):
        positions = tuple(range(n * step, n * (step + 1)))
        batch: Batch = replace(noise_batch(n), positions=positions)
        for turn in mlcm.turns(step):
            optimizers[turn.updates].zero_grad()
            turn.loss(parties, batch, Context(0, step, positions)).total.backward()
            optimizers[turn.updates].step()
    return parties["student"]


def test_matching_brings_a_students_answers_to_the_data() -> None:
    """Pairs so close together say only that all answers are to be alike; without matching they become one point."""
    found = {w: trained(method(matching=w, adversarial=0.0, skip=1, substeps=1)) for w in (0.0, 1.0)}
    assert (found[1.0].mean.item(), found[1.0].sd.item()) == pytest.approx((0.0, 1.0), abs=0.1)
    assert found[0.0].sd.item() < 0.1


# --- what is refused ---


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ({"matching": -1.0}, {}, "method.stages[0]: a stage's matching must be at least 0, got -1.0"),
        ({"adversarial": -1.0}, {}, "method.stages[0]: a stage's adversarial must be at least 0, got -1.0"),
        (
            {**FIRST, "source": "trajectory"},
            {},
            "method.stages[0]: matching and adversarial are of a stage with source=student, got 'trajectory'",
        ),
        ({}, {"discriminator_learning_rate": 0.0}, "method.discriminator_learning_rate must be above 0, got 0.0"),
        ({}, {"fake_learning_rate": -1.0}, "method.fake_learning_rate must be above 0, got -1.0"),
        (
            {},
            {"adversarial_loss": "wgan"},
            "method.adversarial_loss must be one of nonsaturating, hinge, hinge_clipped, least_squares, got 'wgan'",
        ),
        ({}, {"renoise_times": [2000]}, "method.renoise_times must be within 1 ... 1000, got [2000]"),
    ],
    ids=str,
)
def test_refuses_a_bad_value_in_one_line(stage: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        MLCM(SCHEDULE, [{**LAST, **stage}], **settings)
    assert str(error.value) == message
