"""Teachers whose score is known, and the flows of their ODEs.

Data is a mixture of isotropic Gaussians over latents [C, h, w]; a single Gaussian and a single point are its special
cases. The Gaussian's flow has a closed form; in one dimension every mixture's has, for there the flow keeps quantiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, from_denoised, to_denoised
from distill.diffusion.schedule import NoiseSchedule

RawNetwork = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""What diffusers calls a model: (x_t, timestep index t - 1, conditioning) to a raw output like x_t."""


@dataclass(frozen=True)
class Mixture:
    """The exact denoiser E[x0 | x_t] of data drawn from sum_k weights[k] N(means[k], sds[k]² I).

    `means` [K, C, h, w], `sds` [K] (0 is a point mass), `weights` [K]. A conditioning with "weights" [B, K] stands for
    a prompt: it replaces the mixture's own.
    """

    schedule: NoiseSchedule
    means: Tensor
    sds: Tensor
    weights: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        alpha, sigma = (f(t, x_t)[:, None] for f in (self.schedule.alpha, self.schedule.sigma))  # [B, 1, 1, 1, 1]
        means, sds = self.means.to(alpha), self.sds.to(alpha).reshape(-1, 1, 1, 1)  # [K, C, h, w], [K, 1, 1, 1]
        weights = conditioning.get("weights", self.weights).to(alpha)  # [K] or [B, K]
        off = x_t.to(alpha)[:, None] - alpha * means  # [B, K, C, h, w]
        var = (alpha**2 * sds**2 + sigma**2).clamp(min=1e-30)  # a point at t = 0: any number will do, but a number
        log_likelihood = -(off**2 / var + var.log()).flatten(2).sum(2) / 2  # [B, K]
        share = (weights.log() + log_likelihood).softmax(1)[:, :, None, None, None]
        return Denoised((share * (means + alpha * sds**2 / var * off)).sum(1), (share * sigma / var * off).sum(1))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of the data, [n, C, h, w]."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.sds[k].reshape(-1, 1, 1, 1) * noise


def gaussian(schedule: NoiseSchedule, mean: Tensor, sd: float) -> Mixture:
    """Data N(mean, sd² I), mean [C, h, w]; sd 0 is a Dirac."""
    return Mixture(schedule, mean[None], torch.tensor([sd], dtype=torch.float64), torch.ones(1, dtype=torch.float64))


def three_peaks(schedule: NoiseSchedule) -> Mixture:
    """A lopsided one-dimensional mixture, [B, 1, 1, 1]: the smallest world with a curved flow."""
    means, sds, weights = torch.tensor([[-1.2, 0.3, 1.4], [0.4, 0.25, 0.5], [0.5, 0.2, 0.3]], dtype=torch.float64)
    return Mixture(schedule, means.reshape(3, 1, 1, 1), sds, weights)


def gaussian_flow(teacher: Mixture, x: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
    """Where the ODE of single-Gaussian data takes x from time t to s: as many standard deviations off the mean."""
    mean, sd = teacher.means[0].to(x), float(teacher.sds[0])

    def at(r: Tensor | int) -> tuple[Tensor, Tensor]:
        alpha, sigma = teacher.schedule.alpha(r, x), teacher.schedule.sigma(r, x)
        return alpha * mean, (alpha**2 * sd**2 + sigma**2).sqrt()

    (mean_t, spread_t), (mean_s, spread_s) = at(t), at(s)
    return mean_s + spread_s / spread_t * (x - mean_t)


def exact_student(teacher: Mixture) -> Denoiser:
    """What consistency distillation of single-Gaussian data strives for: its x0 is where the flow ends."""
    return lambda x, t, c: Denoised(gaussian_flow(teacher, x, t, 0), torch.full_like(x, torch.nan))  # no eps to use


def quantile_flow(teacher: Mixture, x: Tensor, t: int, s: int) -> Tensor:
    """The flow of one-dimensional data from t to s, x [B, 1, 1, 1] in float64: quantiles stay, found by bisection."""

    def cdf(x: Tensor, r: int) -> Tensor:
        alpha, sigma = teacher.schedule.alpha(r, x), teacher.schedule.sigma(r, x)
        z = (x.flatten()[:, None] - alpha * teacher.means.flatten()) / (alpha**2 * teacher.sds**2 + sigma**2).sqrt()
        return (torch.special.ndtr(z) * teacher.weights).sum(1).reshape(x.shape)

    target, low, high = cdf(x, t), torch.full_like(x, -20), torch.full_like(x, 20)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle, s) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def denoiser_of(network: RawNetwork, prediction: Prediction, schedule: NoiseSchedule) -> Denoiser:
    """A raw network behind the wall of `Denoiser`."""
    return lambda x, t, c: to_denoised(prediction, network(x, t - 1, c), x, t, schedule)


def network_of(denoiser: Denoiser, prediction: Prediction, schedule: NoiseSchedule) -> RawNetwork:
    """The raw network of this prediction type that holds `denoiser`'s beliefs."""
    return lambda x, index, c: from_denoised(prediction, denoiser(x, index + 1, c), index + 1, schedule)


def velocity_of(denoiser: Denoiser, schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """What a pipeline of flow matching calls: (x_t, told [B]) to the velocity of `denoiser`'s beliefs.

    What is told may be off by rounding: the time is the one that is told of something nearest to it.
    """
    table = schedule.told(torch.arange(schedule.T + 1)).double()

    def call(x_t: Tensor, told: Tensor) -> Tensor:
        t = (told.double()[:, None] - table).abs().argmin(1)
        return from_denoised(Prediction.FLOW, denoiser(x_t, t, {}), t, schedule)

    return call
