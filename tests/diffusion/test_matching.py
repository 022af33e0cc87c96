"""Distribution matching where both scores are known: its gradient is their difference, and it leads to the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.matching import denoising_loss, matching_loss, matching_time
from distill.diffusion.prediction import Conditioning, Denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from tests.analytic import Mixture, gaussian

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (2, 3, 1)


def data(mean: float = 0.3, sd: float = 0.8) -> Mixture:
    return gaussian(SCHEDULE, torch.full(SHAPE, mean, dtype=torch.float64), sd)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times(n: int, step: int = 0) -> Tensor:
    return matching_time(1000, Context(0, step, tuple(range(n))), torch.device("cpu"))


def gradient_of(real: Mixture, fake: Mixture, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    matching_loss(SCHEDULE, real, fake, x, t, noise, {}).sum().backward()
    assert x.grad is not None
    return x.grad


def test_the_gradient_is_the_difference_of_the_scores() -> None:
    """Of N(alpha mean, alpha² sd² + sigma²), whose score is -(x - alpha mean) / variance; in DMD's measure of size."""
    n, real, fake = 64, (0.3, 0.8), (-0.5, 0.4)
    x, t, noise = normal(n, 1), times(n), normal(n, 2)
    found = gradient_of(data(*real), data(*fake), x, t, noise)

    alpha, sigma = SCHEDULE.alpha(t, x), SCHEDULE.sigma(t, x)
    x_t = add_noise(SCHEDULE, x, noise, t)
    s_real, s_fake = (-(x_t - alpha * mean) / (alpha**2 * sd**2 + sigma**2) for mean, sd in (real, fake))
    x0_real = (x_t + sigma**2 * s_real) / alpha  # Tweedie
    weight = sigma**2 / alpha / (x - x0_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, -weight * (s_real - s_fake) / 6)  # 6 elements a sample


def test_the_value_is_half_the_mean_square_of_what_is_matched() -> None:
    x, t, noise = normal(5, 1), times(5), normal(5, 2)
    gradient = 6 * gradient_of(data(), data(-1.0), x, t, noise)
    loss = matching_loss(SCHEDULE, data(), data(-1.0), x, t, noise, {})
    torch.testing.assert_close(loss, gradient.pow(2).flatten(1).mean(1) / 2)


def test_a_sample_is_normalised_by_itself() -> None:
    x, t, noise = normal(8, 1), times(8), normal(8, 2)
    whole = gradient_of(data(), data(-1.0), x, t, noise)
    torch.testing.assert_close(whole[3:4], gradient_of(data(), data(-1.0), x[3:4], t[3:4], noise[3:4]))


@pytest.mark.parametrize("sd", [0.8, 0.0])
def test_nothing_is_left_where_both_distributions_are_one(sd: float) -> None:
    """Of a single point too, where the sample is what the teacher says it is: 0 / 0."""
    x = 0.3 + sd * normal(16, 1)
    assert (gradient_of(data(sd=sd), data(sd=sd), x, times(16), normal(16, 2)) == 0).all()


def test_no_gradient_goes_through_either_score() -> None:
    asked = []

    def watched(x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        asked.append(x_t.requires_grad or torch.is_grad_enabled())
        return data()(x_t, t, c)

    x = normal(4, 1).requires_grad_()
    matching_loss(SCHEDULE, watched, watched, x, times(4), normal(4, 2), {}).sum().backward()
    assert asked == [False, False]


@pytest.mark.parametrize("low, high", [(0.02, 0.98), (0.0, 1.0), (0.5, 0.5)])
def test_times_fill_their_range(low: float, high: float) -> None:
    t = matching_time(1000, Context(0, 0, tuple(range(3000))), torch.device("cpu"), low, high)
    first, last = max(1, 1000 * low), 1000 * high
    assert first <= t.min() <= first + 10 and last - 10 <= t.max() <= last
    assert t.double().mean().item() == pytest.approx((first + last) / 2, abs=20)


# --- it matches ---


class Generator(nn.Module):
    """m + s z, of noise z."""

    def __init__(self, mean: float, sd: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return self.mean + self.sd * z

    def now(self) -> Mixture:
        """The denoiser of what it draws."""
        return data(self.mean.item(), self.sd.item())


class Score(Generator):
    """The denoiser of N(mean, sd²), both of which are learnt."""

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:  # type: ignore[override]
        alpha, sigma = SCHEDULE.alpha(t, x_t), SCHEDULE.sigma(t, x_t)
        off = (x_t - alpha * self.mean) / (alpha**2 * self.sd**2 + sigma**2)
        return Denoised(self.mean + alpha * self.sd**2 * off, sigma * off)


@pytest.mark.parametrize("mean, sd", [(-1.5, 0.2), (2.0, 1.5)])
def test_a_generator_becomes_the_data(mean: float, sd: float) -> None:
    """From N(-1.5, .2²) and N(2, 1.5²) to N(.3, .8²), by the scores of what it draws at each step."""
    generator, teacher = Generator(mean, sd), data()
    optimizer = torch.optim.Adam(generator.parameters(), 0.05)
    for step in range(300):
        z, noise, t = normal(64, 2 * step), normal(64, 2 * step + 1), times(64, step)
        optimizer.zero_grad()
        matching_loss(SCHEDULE, teacher, generator.now(), generator(z), t, noise, {}).mean().backward()
        optimizer.step()
    assert generator.mean.item() == pytest.approx(0.3, abs=0.01)
    assert generator.sd.abs().item() == pytest.approx(0.8, abs=0.01)


def test_a_generator_becomes_the_data_by_a_score_that_is_learnt_beside_it() -> None:
    """Turn and turn about, as a run has it: the fake score follows the generator, and both end at the data."""
    generator, score, teacher = Generator(-1.0, 0.3), Score(0.3, 0.8), data()
    drawing = torch.optim.Adam(generator.parameters(), 0.01)
    scoring = torch.optim.Adam(score.parameters(), 0.05)
    for step in range(600):
        z, noise, t = normal(64, 3 * step), normal(64, 3 * step + 1), times(64, step)
        scoring.zero_grad()
        denoising_loss(SCHEDULE, score, generator(z).detach(), t, noise, {}).mean().backward()
        scoring.step()
        drawing.zero_grad()
        matching_loss(SCHEDULE, teacher, score, generator(z), t, noise, {}).mean().backward()
        drawing.step()
    for network in (generator, score):
        assert network.mean.item() == pytest.approx(0.3, abs=0.05)
        assert network.sd.abs().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("t", [20, 500, 980])
def test_the_best_denoiser_of_samples_is_their_own(t: int) -> None:
    """Its loss is the variance of the noise given x_t, alpha² sd² / (alpha² sd² + sigma²), and others' is greater."""
    n = 20_000
    x, noise, at = 0.3 + 0.8 * normal(n, 1), normal(n, 2), torch.full((n,), t)
    alpha, sigma = float(SCHEDULE.alpha(t, x)), float(SCHEDULE.sigma(t, x))
    found, *others = (
        denoising_loss(SCHEDULE, network, x, at, noise, {}).mean().item()
        for network in (data(), data(mean=0.8), data(sd=0.5), data(sd=1.2))
    )
    assert found == pytest.approx(alpha**2 * 0.64 / (alpha**2 * 0.64 + sigma**2), rel=0.02)
    assert found < min(others)
