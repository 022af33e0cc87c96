from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from distill.diffusion.prediction import Denoised, Prediction, from_denoised, predictions_of, to_denoised
from distill.diffusion.samplers import solvers
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import solve
from tests.analytic import denoiser_of, network_of, three_peaks

SCHEDULE = NoiseSchedule.scaled_linear()
TIMES = torch.tensor([1, 20, 500, 1000])


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
def test_round_trip(prediction: Prediction) -> None:
    x0, eps = torch.randn(2, 4, 4, 2, 2, dtype=torch.float64)
    x_t = add_noise(SCHEDULE, x0, eps, TIMES)
    output = from_denoised(prediction, Denoised(x0, eps), TIMES, SCHEDULE)
    back = to_denoised(prediction, output, x_t, TIMES, SCHEDULE)
    torch.testing.assert_close((back.x0, back.eps), (x0, eps), rtol=0, atol=1e-13)


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
@pytest.mark.parametrize("index", [0, 19, 499, 999])
def test_equals_the_conversions_of_diffusers(prediction: Prediction, index: int) -> None:
    scheduler: Any = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction.value,
    )
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod[
        1:
    ]  # the same table in float64, so that only the formulas differ
    scheduler.set_timesteps(1000)
    output, x_t = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    theirs = scheduler.step(output, index, x_t)
    ours = to_denoised(prediction, output, x_t, torch.full((3,), index + 1), SCHEDULE)
    torch.testing.assert_close(ours.x0, theirs.pred_original_sample, rtol=1e-12, atol=1e-12)
    prev = SCHEDULE.alpha(index, x_t) * ours.x0 + SCHEDULE.sigma(index, x_t) * ours.eps
    if index > 0:  # what their step then does with eps
        torch.testing.assert_close(prev, theirs.prev_sample, rtol=1e-11, atol=1e-11)


def test_velocity_is_that_of_diffusers() -> None:
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, eps = torch.randn(2, 4, 4, 2, 2)
    theirs = scheduler.get_velocity(x0, eps, TIMES - 1)
    torch.testing.assert_close(
        from_denoised(Prediction.V, Denoised(x0, eps), TIMES, SCHEDULE), theirs, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("solver", solvers())
def test_nothing_above_the_wall_asks_what_a_network_predicts(solver: str) -> None:
    """One field behind three kinds of network: the same solve."""
    field, x = three_peaks(SCHEDULE), torch.randn(8, 1, 1, 1, dtype=torch.float64)
    ends = []
    for prediction in predictions_of(SCHEDULE):
        network = denoiser_of(network_of(field, prediction, SCHEDULE), prediction, SCHEDULE)
        ends.append(torch.stack([x for _, x in solve(network, SCHEDULE, x, [1000, 640, 200, 20, 0], {}, solver)]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-11)


def test_bf16_output_loses_3_percent_of_x0_at_the_noisy_end_and_bf16_arithmetic_7() -> None:
    """The reason for `wide`: at t = T an error of eps is multiplied by sigma/alpha = 14.6."""
    x0, eps = torch.randn(2, 4, 4, 32, 32)
    x_t = add_noise(SCHEDULE, x0, eps, SCHEDULE.T)
    t = torch.full((4,), SCHEDULE.T)

    def error(estimate: torch.Tensor) -> float:
        return float((estimate.float() - x0).pow(2).mean().sqrt() / x0.pow(2).mean().sqrt())

    ours = to_denoised(Prediction.EPSILON, eps.bfloat16(), x_t, t, SCHEDULE)
    alpha, sigma = (f(SCHEDULE.T, x_t).bfloat16() for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    assert ours.x0.dtype == ours.eps.dtype == torch.float32
    assert error(ours.x0) < 0.03
    assert error((x_t.bfloat16() - sigma * eps.bfloat16()) / alpha) > 0.05
