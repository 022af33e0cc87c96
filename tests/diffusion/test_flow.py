"""Flow matching beside diffusers and exact flows: tables, what networks are told and predict, solvers, re-noising.

`x_t = (1 - sigma) x_0 + sigma eps`; a shift says which sigma a whole-numbered time has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from torch import Tensor

from distill.diffusion.adversarial import Adversary
from distill.diffusion.consistency import inverse_jump, jump, multistep
from distill.diffusion.matching import denoising_loss, matching_loss
from distill.diffusion.noise import Noise
from distill.diffusion.prediction import (
    Denoised,
    Prediction,
    check_prediction,
    from_denoised,
    predictions_of,
    to_denoised,
)
from distill.diffusion.random import Context, starting_noise
from distill.diffusion.samplers import solvers
from distill.diffusion.schedule import NoiseSchedule, add_noise, same_snr
from distill.diffusion.segments import Segments
from distill.diffusion.solver import ddim_step, solve, trailing_times
from tests.analytic import Mixture, gaussian, gaussian_flow, quantile_flow, three_peaks, velocity_of
from tests.diffusion.test_solver import slope

SHIFTS = (1.0, 3.0, 3.1582, 9.9)
FLOW = NoiseSchedule.linear(3.0)
VP = NoiseSchedule.scaled_linear()
SCALAR = torch.zeros((), dtype=torch.float64)


def data(sd: float = 0.8, schedule: NoiseSchedule = FLOW) -> Mixture:
    return gaussian(schedule, torch.full((2, 3, 1), 0.3, dtype=torch.float64), sd)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, 2, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tables(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    times = range(schedule.T + 1)
    return torch.stack([schedule.alpha(t, SCALAR) for t in times]), torch.stack(
        [schedule.sigma(t, SCALAR) for t in times]
    )


# --- the tables ---


@pytest.mark.parametrize("shift", SHIFTS)
def test_signal_and_noise_sum_to_one_from_clean_data_to_pure_noise(shift: float) -> None:
    alpha, sigma = tables(NoiseSchedule.linear(shift))
    assert (sigma[0], sigma[-1], alpha[0], alpha[-1]) == (0, 1, 1, 0)
    torch.testing.assert_close(alpha + sigma, torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (sigma.diff() > 0).all() and (alpha.diff() < 0).all()


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_the_table_is_that_of_diffusers(shift: float, kind: Any) -> None:
    theirs, schedule = kind(shift=shift), NoiseSchedule.linear(shift)
    _, sigma = tables(schedule)
    torch.testing.assert_close(sigma[1:], theirs.sigmas.flip(0).double(), rtol=0, atol=2e-7)
    told = schedule.told(torch.arange(1, 1001))
    assert told.dtype == torch.float32
    torch.testing.assert_close(told, theirs.timesteps.flip(0), rtol=4e-7, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 50])
def test_trailing_times_are_what_pipelines_pass_where_they_divide_the_levels(steps: int) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    ours = torch.stack([FLOW.sigma(t, SCALAR) for t in trailing_times(1000, steps)])
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=0, atol=2e-7)


def test_a_shift_is_a_choice_of_times_and_no_property_of_a_network() -> None:
    """Equal sigma under two shifts: the network is shown the same state and told the same."""
    plain, x0, noise = NoiseSchedule.linear(1.0), normal(4, 1), normal(4, 2)
    t, u = torch.tensor([750, 900, 1000, 0]), torch.tensor([500, 750, 1000, 0])
    torch.testing.assert_close(plain.told(t), FLOW.told(u), rtol=1e-7, atol=0)
    assert plain.told(t).tolist() == pytest.approx([750, 900, 1000, 0])
    here, there = add_noise(plain, x0, noise, t), add_noise(FLOW, x0, noise, u)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-15)


def test_variance_preserving_networks_are_told_the_index_below() -> None:
    t = torch.tensor([0, 1, 2, 1000])
    assert VP.told(t).tolist() == [0, 0, 1, 999] and VP.told(t).dtype == torch.int64
    assert int(VP.told(500)) == 499 and float(FLOW.told(1000)) == 1000.0


def test_the_fingerprint_tells_shifts_lengths_and_kinds_apart() -> None:
    schedules = [*map(NoiseSchedule.linear, SHIFTS), NoiseSchedule.linear(3.0, T=500), VP]
    assert len({schedule.fingerprint for schedule in schedules}) == len(schedules)
    assert FLOW.fingerprint == NoiseSchedule.linear(3).fingerprint == "ab0cf29ee16a4894", "stores carry it"


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_what_is_no_shift(shift: float) -> None:
    with pytest.raises(ValueError, match="^shift must be above 0, got "):
        NoiseSchedule.linear(shift)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_noise_at_the_noisiest_time_is_noise_exactly(given: torch.dtype) -> None:
    x0, noise = torch.randn(3, 4, 2, 2).to(given), torch.randn(3, 4, 2, 2).to(given)
    noised = add_noise(FLOW, x0, noise, torch.tensor([1000, 500, 0]))
    assert torch.equal(noised[0].to(given), noise[0]) and torch.equal(noised[2].to(given), x0[2])
    assert noised.dtype == torch.promote_types(given, torch.float32)


# --- what a network predicts ---


@pytest.mark.parametrize("prediction", predictions_of(FLOW))
def test_a_prediction_is_read_and_written_alike(prediction: Prediction) -> None:
    t, x0, eps = torch.tensor([1, 20, 500, 1000]), normal(4, 1), normal(4, 2)
    x_t = add_noise(FLOW, x0, eps, t)
    back = to_denoised(prediction, from_denoised(prediction, Denoised(x0, eps), t, FLOW), x_t, t, FLOW)
    torch.testing.assert_close((back.x0, back.eps), (x0, eps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", predictions_of(FLOW))
def test_what_is_read_makes_the_state_again(prediction: Prediction) -> None:
    """alpha x0 + sigma eps = x_t for any output at all."""
    t, output, x_t = torch.tensor([1, 20, 500, 1000]), normal(4, 1), normal(4, 2)
    found = to_denoised(prediction, output, x_t, t, FLOW)
    torch.testing.assert_close(FLOW.alpha(t, x_t) * found.x0 + FLOW.sigma(t, x_t) * found.eps, x_t, rtol=0, atol=1e-14)


def test_the_velocity_is_no_variance_preserving_v() -> None:
    """At sigma = 1/2 both look plausible; on Gaussian data only one of them is the teacher's x0."""
    t, x_t = torch.full((64,), 250), normal(64, 1)
    right = data()(x_t, t, {})
    velocity = from_denoised(Prediction.FLOW, right, t, FLOW)
    read = {p: to_denoised(p, velocity, x_t, t, FLOW).x0 for p in (Prediction.FLOW, Prediction.V)}
    torch.testing.assert_close(read[Prediction.FLOW], right.x0, rtol=0, atol=1e-14)
    assert (read[Prediction.V] - right.x0).pow(2).mean().sqrt() > 0.1


@pytest.mark.parametrize(
    ("prediction", "schedule", "allowed"),
    [
        (Prediction.FLOW, VP, "a network on variance-preserving noise cannot predict flow_prediction: allowed is e"),
        (Prediction.V, FLOW, "a network on flow-matching noise cannot predict v_prediction: allowed is flow_predi"),
        (Prediction.EPSILON, FLOW, "cannot predict epsilon: allowed is flow_prediction or sample"),
    ],
)
def test_a_prediction_on_the_wrong_noise_names_the_setting(
    prediction: Prediction, schedule: NoiseSchedule, allowed: str
) -> None:
    with pytest.raises(ValueError, match=allowed) as caught:
        check_prediction(prediction, schedule)
    assert "student.prediction" in str(caught.value)


def test_rounding_costs_less_of_x0_than_on_variance_preserving_noise() -> None:
    """A velocity in bf16, read in float32: .3 % of x0 at pure noise, where an eps prediction loses 3 %."""
    x0, eps = torch.randn(2, 4, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.full((4,), 1000)
    found = to_denoised(Prediction.FLOW, (eps - x0).bfloat16(), add_noise(FLOW, x0, eps, t), t, FLOW).x0
    assert found.dtype == torch.float32
    assert float((found - x0).pow(2).mean().sqrt() / x0.pow(2).mean().sqrt()) == pytest.approx(0.0027, rel=0.2)


# --- solvers ---


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_ddim_step_is_eulers_of_diffusers(shift: float, steps: int) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    schedule, times = NoiseSchedule.linear(shift), trailing_times(1000, steps)
    for i, told in enumerate(scheduler.timesteps):
        velocity, x = torch.randn(2, 5, 2, 3, 1, generator=torch.Generator().manual_seed(i))
        belief = to_denoised(Prediction.FLOW, velocity, x, torch.full((5,), times[i]), schedule)
        theirs = scheduler.step(velocity, told, x).prev_sample
        torch.testing.assert_close(ddim_step(schedule, belief, times[i + 1]), theirs, rtol=0, atol=2e-6)


def of_sigmas(sigmas: Tensor, shift: float) -> NoiseSchedule:
    """A schedule whose times are the places of these falling sigmas, from the last one to the first."""
    sigma = sigmas.double().flip(0)
    return NoiseSchedule(1 - sigma, sigma, (1000 * sigma).float(), shift)


def test_a_heun_step_is_the_two_calls_of_diffusers() -> None:
    """From pure noise on; of their own grid, for they take no other, which ends at a sigma of nearly 0."""
    scheduler: Any = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    schedule = of_sigmas(torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]), 3.0)
    assert schedule.T == 6 and float(schedule.sigma(6, SCALAR)) == 1
    teacher = data(schedule=schedule)
    velocity, x = velocity_of(teacher, schedule), normal(5, 1).float()
    theirs = [x]
    for told in scheduler.timesteps:
        x = scheduler.step(velocity(x, told.expand(len(x))), told, x).prev_sample
        theirs.append(x)
    whole = torch.stack(theirs[0::2] + theirs[-1:])  # after each second call, and the last, which is Euler's
    ours = torch.stack([x for _, x in solve(teacher, schedule, theirs[0], list(range(6, -1, -1)), {}, "heun")])
    torch.testing.assert_close(ours, whole.to(ours.dtype), rtol=0, atol=2e-6)


def test_re_noising_is_diffusers_to_the_bit() -> None:
    """Its sigmas in our table: the same generators draw the same numbers in the same order."""
    scheduler: Any = FlowMatchLCMScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    schedule = of_sigmas(scheduler.sigmas, 3.0)
    mean = torch.full((2, 3, 1), 0.3)
    teacher = Mixture(schedule, mean[None], torch.tensor([0.8]), torch.ones(1))
    velocity = velocity_of(teacher, schedule)

    def network(x: Tensor, t: Tensor, c: Any) -> Denoised:
        return to_denoised(Prediction.FLOW, velocity(x, schedule.told(t)), x, t, schedule)

    g = [torch.Generator().manual_seed(i) for i in range(5)]
    x = start = starting_noise(g, (2, 3, 1))
    theirs = []
    for told in scheduler.timesteps:
        x = scheduler.step(velocity(x, told.expand(len(x))), told, x, generator=g).prev_sample
        theirs.append(x)
    g = [torch.Generator().manual_seed(i) for i in range(5)]
    assert torch.equal(starting_noise(g, (2, 3, 1)), start)
    ours = [x for _, x in multistep(network, schedule, start, [4, 3, 2, 1, 0], {}, g)]
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


@pytest.mark.parametrize("solver", solvers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_is_a_place_to_start_from(solver: str, dtype: torch.dtype) -> None:
    teacher, x = three_peaks(FLOW), torch.randn(64, 1, 1, 1, dtype=dtype)
    states = torch.stack([x for _, x in solve(teacher, FLOW, x, trailing_times(1000, 100), {}, solver)])
    assert states.isfinite().all()
    torch.testing.assert_close(states[-1].double(), quantile_flow(teacher, x.double(), 1000, 0), rtol=0, atol=0.1)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    """The error's slope over the number of steps, from a state on the way, against the exact flow."""
    fine = NoiseSchedule.linear(3.0, T=16_000)
    teacher, x = three_peaks(fine), torch.randn(128, 1, 1, 1, dtype=torch.float64)
    start, end, counts = 12_800, 3_200, (20, 40, 80, 160)
    exact = quantile_flow(teacher, x, start, end)
    errors = []
    for n in counts:
        times = [round(start - i * (start - end) / n) for i in range(n + 1)]
        *_, (_, reached) = solve(teacher, fine, x, times, {}, solver)
        errors.append(float((reached - exact).pow(2).mean().sqrt()))
    assert -slope(counts, errors) == pytest.approx(order, abs=0.15)


def test_from_pure_noise_to_data_a_halved_step_halves_eulers_error_and_quarters_heuns() -> None:
    teacher, x = three_peaks(FLOW), torch.randn(256, 1, 1, 1, dtype=torch.float64)
    exact = quantile_flow(teacher, x, 1000, 0)

    def error(solver: str, steps: int) -> float:
        *_, (_, end) = solve(teacher, FLOW, x, trailing_times(1000, steps), {}, solver)
        return float((end - exact).pow(2).mean().sqrt())

    assert error("ddim", 20) / error("ddim", 40) == pytest.approx(2, rel=0.15)
    assert error("heun", 20) / error("heun", 40) == pytest.approx(4, rel=0.35)


@pytest.mark.parametrize("solver", solvers())
@pytest.mark.parametrize("times", [[1000, 0], [1000, 999, 500, 1, 0], [730, 20, 10, 0]], ids=str)
def test_a_single_point_is_found_exactly_by_any_step(solver: str, times: list[int]) -> None:
    *_, (_, end) = solve(data(sd=0.0), FLOW, normal(5, 1), times, {}, solver)
    torch.testing.assert_close(end, torch.full_like(end, 0.3), rtol=0, atol=1e-12)


# --- consistency ---


@pytest.mark.parametrize("answer", [0.0, 1e30, float("nan")])
def test_at_clean_data_the_consistency_function_is_the_identity_whatever_a_network_answers(answer: float) -> None:
    x = torch.randn(3, 2, 3, 1)
    f = FLOW.clean(torch.full_like(x, answer), x, torch.tensor([0, 1, 1000]))
    assert torch.equal(f[0], x[0])
    torch.testing.assert_close(f[1:], torch.full_like(x[1:], answer), equal_nan=True)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_inverse_jump_undoes_the_jump(count: int) -> None:
    t = torch.arange(1, 1001)
    s = Segments(1000, count).start(t)
    x, x0 = normal(1000, 1), normal(1000, 2)
    there = jump(FLOW, to_denoised(Prediction.SAMPLE, x0, x, t, FLOW), x, t, s)
    back = inverse_jump(FLOW, there, x, t, s)
    torch.testing.assert_close(back, x0, rtol=0, atol=3e-12)  # at t = s + 1 rounding is amplified the most
    torch.testing.assert_close(back[-1], x0[-1], rtol=0, atol=1e-12)


def test_the_gaussian_flow_is_as_many_deviations_off_the_mean() -> None:
    """x_s = (1 - sigma_s) mu + (r_s / r_t) (x_t - (1 - sigma_t) mu), r² = (1 - sigma)² sd² + sigma²."""
    x = normal(5, 1)
    for t, s in ((1000, 0), (750, 250), (20, 1000)):
        (a, b), (c, d) = ((1 - float(FLOW.sigma(r, SCALAR)), float(FLOW.sigma(r, SCALAR))) for r in (t, s))
        r_t, r_s = (a**2 * 0.64 + b**2) ** 0.5, (c**2 * 0.64 + d**2) ** 0.5
        torch.testing.assert_close(gaussian_flow(data(), x, t, s), c * 0.3 + r_s / r_t * (x - a * 0.3))


# --- distribution matching, and what a discriminator is shown ---


def test_the_fake_scores_loss_has_a_gradient_at_pure_noise() -> None:
    """There its noise is x_T whatever it predicts, so that a loss of the noise would teach it nothing."""
    velocity = torch.zeros(2, 3, 1, dtype=torch.float64, requires_grad=True)
    x, noise, t = normal(64, 1), normal(64, 2), torch.full((64,), 1000)

    def network(x_t: Tensor, t: Tensor, c: Any) -> Denoised:
        return to_denoised(Prediction.FLOW, velocity.expand_as(x_t), x_t, t, FLOW)

    (of_noise,) = torch.autograd.grad(network(add_noise(FLOW, x, noise, t), t, {}).eps.sum(), velocity)
    assert (of_noise == 0).all()
    loss = denoising_loss(FLOW, network, x, t, noise, {})
    torch.testing.assert_close(loss, (noise - x).pow(2).flatten(1).mean(1))
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    torch.testing.assert_close(gradient, -2 * (noise - x).mean(0) * 64 / 6)


@pytest.mark.parametrize("t", [20, 500, 980, 1000])
def test_the_best_denoiser_of_samples_is_their_own(t: int) -> None:
    """Its loss is the variance of the velocity given x_t, sd² / (alpha² sd² + sigma²), and others' is greater."""
    n = 20_000
    x, noise, at = 0.3 + 0.8 * normal(n, 1), normal(n, 2), torch.full((n,), t)
    alpha, sigma = float(FLOW.alpha(t, x)), float(FLOW.sigma(t, x))
    found, *others = (
        denoising_loss(FLOW, network, x, at, noise, {}).mean().item() for network in (data(), data(0.5), data(1.2))
    )
    assert found == pytest.approx(0.64 / (alpha**2 * 0.64 + sigma**2), rel=0.02)
    off = gaussian(FLOW, torch.full((2, 3, 1), 0.8, dtype=torch.float64), 0.8)
    assert found < denoising_loss(FLOW, off, x, at, noise, {}).mean().item()
    assert t == 1000 or found < min(others), "at pure noise the mean is all that counts"


def test_matching_pulls_along_the_difference_of_the_scores() -> None:
    n, t, noise = 64, torch.arange(20, 980, 15), normal(64, 2)
    x = normal(n, 1).requires_grad_()
    real, fake = data(), gaussian(FLOW, torch.full((2, 3, 1), -0.5, dtype=torch.float64), 0.4)
    matching_loss(FLOW, real, fake, x, t, noise, {}).sum().backward()
    alpha, sigma = FLOW.alpha(t, noise), FLOW.sigma(t, noise)
    x_t = add_noise(FLOW, x.detach(), noise, t)
    s_real, s_fake = (-(x_t - alpha * m) / (alpha**2 * sd**2 + sigma**2) for m, sd in ((0.3, 0.8), (-0.5, 0.4)))
    x0_real = (x_t + sigma**2 * s_real) / alpha  # Tweedie
    weight = sigma**2 / alpha / (x.detach() - x0_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x.grad, -weight * (s_real - s_fake) / 6)


def test_times_of_equal_snr() -> None:
    """Lightning's, of SDXL: sigma = .086, .409, .617, .803, and back."""
    there = [same_snr(VP, t, FLOW) for t in (10, 250, 500, 750)]
    assert there == [30, 188, 350, 576]
    assert [float(FLOW.sigma(t, SCALAR)) for t in there] == pytest.approx([0.086, 0.409, 0.617, 0.803], abs=2e-3)
    assert [same_snr(FLOW, t, VP) for t in there] == pytest.approx([10, 250, 500, 750], abs=2)
    assert [same_snr(VP, t, NoiseSchedule.scaled_linear()) for t in (1, 333, 1000)] == [1, 333, 1000]
    assert same_snr(NoiseSchedule.linear(1.0), 1000, FLOW) == 1000
    assert same_snr(NoiseSchedule.of(Noise(rescale_betas_zero_snr=True)), 1000, FLOW) == 1000
    with pytest.raises(ValueError, match="^a time must be within 1 ... 1000, got 0$"):
        same_snr(VP, 0, FLOW)


def test_a_discriminator_is_shown_the_noise_of_stable_diffusions_times() -> None:
    """One setting for all teachers: the paper's times, by their signal-to-noise ratio."""
    context = Context(0, 0, tuple(range(200)))
    shown = {
        name: sorted(set(Adversary(schedule).sample_time(context, torch.device("cpu")).tolist()))
        for name, schedule in (("vp", VP), ("flow", FLOW), ("plain", NoiseSchedule.linear(1.0)))
    }
    assert shown == {"vp": [10, 250, 500, 750], "flow": [30, 188, 350, 576], "plain": [86, 409, 617, 803]}
    with pytest.raises(ValueError, match=r"renoise_times must be within 1 ... 1000, got \[0\]"):
        Adversary(FLOW, times=(0,), weights=(1.0,))
