"""Distribution matching: DMD (Yin et al. 2024, arXiv 2311.18828), DMD2 (arXiv 2405.14867) and SiD (arXiv 2404.04057).

The divergence of a generator's distribution from the data's has, once both are noised, the difference of their scores
for its gradient. The data's is the teacher's; the generator's is that of a network which learns to denoise its samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.diffusion.losses import l2
from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise, wide


def matching_time(
    T: int, context: Context, device: torch.device, low: float = 0.02, high: float = 0.98, stream: str = "t'"
) -> Tensor:
    """t' [B], uniform in low T ... high T, both of them among it (DMD leaves out the ends, where scores say little)."""
    return context.integers(max(1, round(low * T)), round(high * T) + 1, stream, device)


def matching_loss(
    schedule: NoiseSchedule, real: Denoiser, fake: Denoiser, x: Tensor, t: Tensor, noise: Tensor, c: Conditioning
) -> Tensor:
    """A loss [B] whose gradient with respect to samples x [B, C, h, w] is the divergence's: -(s_real - s_fake).

    Its value is half that gradient's mean square, and means nothing more. Of both denoisers' x0 at x_t, `noise` [B, C,
    h, w] added to x at t [B], the gradient is (x0_fake - x0_real) / mean |x - x0_real| over the number of a sample's
    elements: the difference of scores with DMD's weight, which is one size at all times (DMD, eq. 7 and 8).
    """
    with torch.no_grad():
        x_t = add_noise(schedule, x, noise, t)
        x0_real, x0_fake = real(x_t, t, c).x0, fake(x_t, t, c).x0
        size = (wide(x) - x0_real).abs().mean(tuple(range(1, x.ndim)), keepdim=True)
        gradient = (x0_fake - x0_real) / size.clamp(min=1e-6)  # or 0 / 0 where the teacher knows x already
    return l2(x, wide(x).detach() - gradient) / 2


def denoising_loss(
    schedule: NoiseSchedule, network: Denoiser, x: Tensor, t: Tensor, noise: Tensor, c: Conditioning
) -> Tensor:
    """|| eps(x_t) - noise ||² [B] at times t >= 1: from it a network learns the score of samples x [B, C, h, w].

    For flow matching it is || v(x_t) - (noise - x) ||², of what such networks predict: at T the noise is x_T itself, so
    that the loss would be 0 and have no gradient where a student starts.
    """
    found = network(add_noise(schedule, x, noise, t), t, c)
    if schedule.is_linear:
        return l2(found.eps - found.x0, wide(noise) - wide(x))
    return l2(found.eps, noise)


def fake_score_loss(schedule: NoiseSchedule, fake: Denoiser, x: Tensor, c: Conditioning, context: Context) -> Tensor:
    """`denoising_loss` [B] of a fake score for a generator's samples x [B, C, h, w], at all times (DMD, eq. 6)."""
    t = context.integers(1, schedule.T + 1, "t of the fake score", x.device)
    return denoising_loss(schedule, fake, x, t, context.normal(x, "noise of the fake score"), c)


def identity_loss(
    schedule: NoiseSchedule,
    real: Denoiser,
    fake: Denoiser,
    x: Tensor,
    t: Tensor,
    noise: Tensor,
    c: Conditioning,
    alpha: float = 1.0,
) -> Tensor:
    """Score identity distillation's loss [B] of samples x [B, C, h, w] (Zhou et al. 2024, SiD and SiD-LSG).

    Of both denoisers' x0 at x_t, `noise` added to x at t [B], it is the mean over a sample's elements of (x0_real -
    x0_fake) ((x0_real - x) - alpha (x0_real - x0_fake)) / mean |x - x0_real|, an estimate of the Fisher divergence that
    may be negative. It is differentiated through both denoisers with respect to x alone: no gradient reaches their
    weights, and their activations are gone when it returns.
    """
    leaf = wide(x).detach().requires_grad_()
    with torch.enable_grad():
        x_t = add_noise(schedule, leaf, noise, t)
        x0_real, x0_fake = real(x_t, t, c).x0, fake(x_t, t, c).x0
        size = (leaf - x0_real).detach().abs().mean(tuple(range(1, x.ndim)), keepdim=True).clamp(min=1e-6)
        off = x0_real - x0_fake
        sums = (off * ((x0_real - leaf) - alpha * off) / size).flatten(1).sum(1)  # [B]
        (gradient,) = torch.autograd.grad(sums.sum(), leaf)
    n = leaf[0].numel()
    return sums.detach() / n + ((wide(x) - leaf.detach()) * gradient).flatten(1).mean(1)
