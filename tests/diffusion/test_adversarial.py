"""The game's losses against their definitions, what a discriminator is shown, and where its gradient leads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from distill.diffusion.adversarial import (
    ADVERSARIAL_LOSSES,
    Adversary,
    Origin,
    discriminator_loss,
    generator_loss,
)
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (3, 2, 2)


class Shown:
    """A discriminator that is a function of (x, t), and notes what it is shown."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.f, self.calls = f, []

    def __call__(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        self.calls.append((list(samples), t, conditioning, origin))
        return [self.f(x, t) for x in samples]


def total(x: Tensor, t: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def context(n: int, step: int = 0) -> Context:
    return Context(0, step, tuple(range(n)))


def samples(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- losses of logits ---


def test_the_nonsaturating_losses_are_cross_entropies() -> None:
    real, fake = 5 * samples(7)[:, 0, 0, 0], 5 * samples(7, seed=1)[:, 0, 0, 0]
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    judged = cross_entropy(real, one, reduction="none") + cross_entropy(fake, zero, reduction="none")
    torch.testing.assert_close(discriminator_loss(real, fake), judged)
    torch.testing.assert_close(generator_loss(fake), cross_entropy(fake, one, reduction="none"))


def test_a_guess_costs_ln_4_and_being_guessed_at_ln_2() -> None:
    nothing = torch.zeros(4)
    assert discriminator_loss(nothing, nothing).tolist() == pytest.approx([2 * math.log(2)] * 4)
    assert generator_loss(nothing).tolist() == pytest.approx([math.log(2)] * 4)
    assert generator_loss(torch.tensor([-500.0])).tolist() == [500.0]  # where -log(sigmoid) would be infinite


def test_the_hinge_asks_for_a_margin_of_1_and_no_more() -> None:
    real, fake = torch.tensor([2.0, 0.25, -1.0, 1.0]), torch.tensor([-3.0, -0.5, 2.0, -1.0])
    assert discriminator_loss(real, fake, "hinge").tolist() == [0.0, 1.25, 5.0, 0.0]
    assert generator_loss(fake, "hinge").tolist() == [3.0, 0.5, -2.0, 1.0]


def test_the_clipped_hinge_is_content_with_a_logit_of_1() -> None:
    """PCM's generator: relu(1 - D); the discriminator's loss is the hinge's."""
    real, fake = torch.tensor([2.0, 0.25, -1.0, 1.0]), torch.tensor([-3.0, -0.5, 2.0, 1.0])
    assert generator_loss(fake, "hinge_clipped").tolist() == [4.0, 1.5, 0.0, 0.0]
    assert torch.equal(discriminator_loss(real, fake, "hinge_clipped"), discriminator_loss(real, fake, "hinge"))


def test_least_squares_are_of_sigmoids() -> None:
    """Flash's: (1 - p)² for the generator, half of (1 - p_real)² + p_fake² for the discriminator."""
    real, fake = torch.tensor([0.0, 60.0]), torch.tensor([0.0, -60.0])
    assert discriminator_loss(real, fake, "least_squares").tolist() == [0.25, 0.0]
    assert generator_loss(fake, "least_squares").tolist() == pytest.approx([0.25, 1.0])


@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
def test_logits_of_many_places_cost_their_mean(loss: str) -> None:
    """[B, n]: the loss of each place, and of a sample the mean over its places; the penalty likewise."""
    real, fake = samples(5).flatten(1), samples(5, seed=1).flatten(1)  # [5, 12]
    each = [discriminator_loss(r, f, loss) for r, f in zip(real.T, fake.T, strict=True)]
    torch.testing.assert_close(discriminator_loss(real, fake, loss), torch.stack(each).mean(0))
    torch.testing.assert_close(
        generator_loss(fake, loss), torch.stack([generator_loss(f, loss) for f in fake.T]).mean(0)
    )
    places = Shown(lambda x, t: x.flatten(1))
    verdict = Adversary(SCHEDULE, loss, r1=2.0).discriminator(places, samples(5), samples(5, seed=1), {}, context(5))
    assert verdict.loss.shape == (5,) and verdict.real.shape == (5, 12)
    ((_, _, near), *_), *_ = places.calls
    plain = discriminator_loss(verdict.real, verdict.fake, loss)
    torch.testing.assert_close(verdict.loss - plain, 2 * (verdict.real - near.flatten(1)).pow(2).mean(1))
    assert 0 < verdict.accuracies()["real_accuracy"] < 1


@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
def test_logits_of_half_precision_are_compared_in_float32(loss: str) -> None:
    real, fake = torch.full((2,), 0.3).bfloat16(), torch.full((2,), 0.7).bfloat16()
    assert discriminator_loss(real, fake, loss).dtype == generator_loss(fake, loss).dtype == torch.float32


# --- what the discriminator is shown ---


def test_real_and_fake_are_shown_at_one_time_with_one_noise_and_in_one_call() -> None:
    judge, real, fake = Shown(total), samples(50), samples(50, seed=1)
    c, origin = {"text": torch.ones(50)}, (samples(50, seed=2), torch.full((50,), 1000))
    verdict = Adversary(SCHEDULE).discriminator(judge, real, fake, c, context(50), origin)
    (((r, f), t, told, given),) = judge.calls
    alpha, sigma = SCHEDULE.alpha(t, real), SCHEDULE.sigma(t, real)
    torch.testing.assert_close(r - f, alpha * (real - fake))
    noise = (r - alpha * real) / sigma
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.1)
    assert told is c and given is origin
    assert torch.equal(verdict.real, total(r, t)) and torch.equal(verdict.fake, total(f, t))


def test_the_generators_fakes_are_shown_as_the_discriminators() -> None:
    judge, fake, origin = Shown(total), samples(9), (samples(9, seed=2), torch.full((9,), 1000))
    Adversary(SCHEDULE).discriminator(judge, samples(9, seed=1), fake, {}, context(9), origin)
    Adversary(SCHEDULE).generator(judge, fake, {}, context(9), origin)
    ((_, f), t, _, _), ((g,), u, _, given) = judge.calls
    assert torch.equal(f, g) and torch.equal(t, u) and given is origin


def test_times_are_drawn_by_their_odds() -> None:
    game = Adversary(SCHEDULE, times=(10, 250, 500, 750), weights=(5, 1, 1, 1))
    t = game.sample_time(context(4000), torch.device("cpu"))
    shares = [(t == time).double().mean().item() for time in game.times]
    assert sum(shares) == 1 and shares == pytest.approx([5 / 8, 1 / 8, 1 / 8, 1 / 8], abs=0.025)
    never = Adversary(SCHEDULE, times=(1, 2, 3), weights=(0, 1, 0)).sample_time(context(500), torch.device("cpu"))
    assert set(never.tolist()) == {2}


def test_a_draw_belongs_to_its_sample() -> None:
    """However the batch is cut; and the next step draws anew."""
    game, fake = Adversary(SCHEDULE), samples(8)
    whole = game.generator(Shown(total), fake, {}, context(8))
    half = game.generator(Shown(total), fake[4:], {}, Context(0, 0, (4, 5, 6, 7)))
    torch.testing.assert_close(whole[4:], half)
    assert not torch.allclose(whole, game.generator(Shown(total), fake, {}, context(8, step=1)))


@pytest.mark.parametrize("t", [10, 250, 500, 750])
def test_the_gradient_comes_through_the_noise_by_alpha(t: int) -> None:
    """Of a linear discriminator, -sigmoid(-logit) alpha; so the student hears of every t*."""
    judge, fake = Shown(total), (0.01 * samples(3)).requires_grad_()
    Adversary(SCHEDULE, times=(t,), weights=(1,)).generator(judge, fake, {}, context(3)).sum().backward()
    assert fake.grad is not None
    logit = total(judge.calls[0][0][0], torch.tensor(t)).detach()
    slope = -torch.sigmoid(-logit) * SCHEDULE.alpha(t, fake)
    torch.testing.assert_close(fake.grad, slope[:, None, None, None].expand_as(fake))
    assert (fake.grad != 0).all()


def test_accuracies_tell_real_and_fake_apart() -> None:
    verdict = Adversary(SCHEDULE, times=(1,), weights=(1,)).discriminator(
        Shown(lambda x, t: x[:, 0, 0, 0]), samples(4).abs() + 1, 1 - samples(4).abs().clamp(max=0.5), {}, context(4)
    )
    assert {k: float(v) for k, v in verdict.accuracies().items()} == {"real_accuracy": 1.0, "fake_accuracy": 0.0}


# --- approximate R1 ---


def test_the_penalty_is_the_squared_gradient_of_a_linear_discriminator() -> None:
    """|grad D|² times sigma² in the mean, at what the discriminator sees (Lin et al. 2025, arXiv 2501.08316)."""
    weight, n, sigma = samples(1, seed=3), 4000, 0.1
    judge = Shown(lambda x, t: (x * weight).flatten(1).sum(1))
    real, fake = samples(n), samples(n, seed=1)
    plain, punished = (
        Adversary(SCHEDULE, r1=r1, r1_sigma=sigma).discriminator(judge, real, fake, {}, context(n)) for r1 in (0.0, 7.0)
    )
    penalty = (punished.loss - plain.loss).mean().item()
    assert penalty == pytest.approx(7 * sigma**2 * weight.pow(2).sum().item(), rel=0.1)
    assert torch.equal(punished.real, plain.real) and torch.equal(punished.fake, plain.fake)
    shown, _, _, _ = judge.calls[1]
    assert len(judge.calls[0][0]) == 2 and len(shown) == 3
    assert (shown[2] - shown[0]).std().item() == pytest.approx(sigma, rel=0.05)


# --- the game ---


@pytest.mark.parametrize("start", [-2.0, 3.0])
def test_against_the_best_discriminator_a_generator_finds_the_mean_of_the_data(start: float) -> None:
    """Data N(.5, 1) and fakes N(m, 1): the best logit is the log ratio of the two, and m goes to .5."""
    game, m = Adversary(SCHEDULE), torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([m], 0.1)
    for step in range(200):
        now = m.detach().clone()

        def best(x: Tensor, t: Tensor, now: Tensor = now) -> Tensor:
            off = [(x - SCHEDULE.alpha(t, x) * mean).pow(2).flatten(1).sum(1) / 2 for mean in (now, 0.5)]
            return off[0] - off[1]  # alpha² + sigma² = 1 is the variance of both

        fake = m + samples(64, seed=step)
        optimizer.zero_grad()
        game.generator(Shown(best), fake, {}, context(64, step)).mean().backward()
        optimizer.step()
    assert m.item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": "wgan"},
            "adversarial_loss must be one of nonsaturating, hinge, hinge_clipped, least_squares, got 'wgan'",
        ),
        ({"times": (0, 250, 500, 750)}, "renoise_times must be within 1 ... 1000, got [0, 250, 500, 750]"),
        ({"weights": (1.0,)}, "renoise_weights must be 4 as the times are, got [1.0]"),
        ({"weights": (0, 0, 0, 0)}, "renoise_weights must not be negative, nor all 0, got [0, 0, 0, 0]"),
        ({"weights": (2, -1, 1, 1)}, "renoise_weights must not be negative, nor all 0, got [2, -1, 1, 1]"),
        ({"r1": -1.0}, "r1 must be at least 0, got -1.0"),
        ({"r1_sigma": 0.0}, "r1_sigma must be above 0, got 0.0"),
    ],
    ids=str,
)
def test_refuses_what_makes_no_game(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Adversary(SCHEDULE, **settings)
    assert str(error.value) == message


def test_without_times_to_noise_to_samples_are_shown_as_they_are() -> None:
    """No t* used to be refused; SDXL-Lightning's stages of 8 and 4 steps noise nothing again."""
    x, s = samples(4), torch.tensor([0, 125, 500, 0])
    critic = Shown(total)
    Adversary(SCHEDULE, times=()).generator(critic, x, {}, context(4), None, s)
    (shown,), t, _, _ = critic.calls[0]
    assert torch.equal(shown, x) and torch.equal(t, s)
