"""The ruler itself: the analytic teachers against automatic differentiation, quadrature and each other."""

from __future__ import annotations

import torch

from distill.diffusion.schedule import NoiseSchedule, add_noise
from tests.analytic import Mixture, gaussian, gaussian_flow, quantile_flow, three_peaks

SCHEDULE = NoiseSchedule.scaled_linear()


def test_noise_prediction_is_the_score_of_the_noised_density() -> None:
    teacher = Mixture(
        SCHEDULE,
        means=torch.randn(3, 2, 2, 1, dtype=torch.float64),
        sds=torch.tensor([0.5, 0.8, 0.2], dtype=torch.float64),
        weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
    )
    t = torch.tensor([1, 200, 500, 1000])
    x = torch.randn(4, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    alpha, sigma = SCHEDULE.alpha(t, x), SCHEDULE.sigma(t, x)
    sd = ((alpha.flatten()[:, None] * teacher.sds) ** 2 + sigma.flatten()[:, None] ** 2).sqrt()[..., None, None, None]
    normal = torch.distributions.Normal(alpha[:, None] * teacher.means, sd)  # [B, K, C, h, w]
    log_density = (normal.log_prob(x[:, None]).flatten(2).sum(2) + teacher.weights.log()).logsumexp(1)

    (score,) = torch.autograd.grad(log_density.sum(), x)
    belief = teacher(x.detach(), t, {})

    torch.testing.assert_close(belief.eps, -sigma * score, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(alpha * belief.x0 + sigma * belief.eps, x.detach(), rtol=0, atol=1e-12)


def test_x0_is_the_posterior_mean() -> None:
    """Weighted by likelihood, a million draws of the data average to the belief."""
    teacher, x, t = three_peaks(SCHEDULE), 0.35, 400
    x0 = teacher.sample(1_000_000, torch.Generator().manual_seed(1)).flatten()
    alpha, sigma = SCHEDULE.alpha(t, x0), SCHEDULE.sigma(t, x0)
    weight = (-((x - alpha * x0) ** 2) / (2 * sigma**2)).exp()
    belief = teacher(torch.full((1, 1, 1, 1), x, dtype=torch.float64), torch.tensor([t]), {}).x0
    assert abs((weight * x0).sum() / weight.sum() - belief).item() < 3e-3


def test_the_two_flows_agree_on_what_both_know() -> None:
    teacher = gaussian(SCHEDULE, torch.full((1, 1, 1), 0.3, dtype=torch.float64), 0.8)
    x = torch.randn(32, 1, 1, 1, dtype=torch.float64)
    for t, s in ((1000, 0), (700, 20), (20, 900)):
        torch.testing.assert_close(quantile_flow(teacher, x, t, s), gaussian_flow(teacher, x, t, s), rtol=0, atol=1e-9)


def test_the_flow_carries_the_noised_density_to_the_data() -> None:
    g = torch.Generator().manual_seed(2)
    teacher = three_peaks(SCHEDULE)
    x_0 = teacher.sample(20_000, g)
    x_t = add_noise(SCHEDULE, x_0, torch.randn(x_0.shape, generator=g, dtype=x_0.dtype), 1000)
    q = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    landed, data = quantile_flow(teacher, x_t, 1000, 0).flatten(), teacher.sample(20_000, g).flatten()
    torch.testing.assert_close(landed.quantile(q), data.quantile(q), rtol=0, atol=0.06)


def test_a_prompt_is_another_mixture() -> None:
    teacher, one = three_peaks(SCHEDULE), torch.eye(3, dtype=torch.float64)
    peak = gaussian(SCHEDULE, teacher.means[2], float(teacher.sds[2]))
    x, t = torch.randn(5, 1, 1, 1, dtype=torch.float64), torch.full((5,), 600)
    told = teacher(x, t, {"weights": one[2].expand(5, 3)})
    torch.testing.assert_close(told.x0, peak(x, t, {}).x0)
