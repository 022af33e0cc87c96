from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from distill.diffusion.noise import Noise
from distill.diffusion.prediction import Conditioning, Denoised, Prediction, predictions_of, to_denoised
from distill.diffusion.samplers import solvers
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import ddim_step, leading_times, solve, trailing_times
from tests.analytic import Mixture, gaussian, gaussian_flow, network_of, quantile_flow, three_peaks

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.scaled_linear()
FINE = NoiseSchedule.scaled_linear(0.00085 / 16, 0.012 / 16, 16_000)  # the same curve, sixteen times finer


def noise(n: int = 6) -> Tensor:
    return torch.randn(n, 1, 1, 1, dtype=torch.float64)


def states(teacher: Mixture, x: Tensor, times: list[int], solver: str) -> Tensor:
    return torch.stack([x for _, x in solve(teacher, teacher.schedule, x, times, {}, solver)])  # [n + 1, B, ...]


# --- equal to diffusers, step by step ---


def stepped(scheduler: Any, prediction: Prediction, x: Tensor, steps: int) -> Tensor:
    """The states of diffusers' own loop, its float32 table of ᾱ replaced by the float64 one."""
    network = network_of(three_peaks(SCHEDULE), prediction, SCHEDULE)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod[1:]
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    visited = [x]
    for index in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, index)
        output = network(model_input, torch.full((len(x),), int(index)), {})
        x = scheduler.step(output, index, x).prev_sample
        visited.append(x)
    return torch.stack(visited)


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
@pytest.mark.parametrize("steps", [1, 4, 8, 50])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_equals_diffusers(prediction: Prediction, steps: int, spacing: str) -> None:
    """At step counts that divide 1000: elsewhere their DDIM ends a step beside the time at which the next begins."""
    settings = {
        "clip_sample": False,
        "timestep_spacing": spacing,
        "steps_offset": 1,
        "prediction_type": prediction.value,
    }
    x, times = noise(), {"trailing": trailing_times, "leading": leading_times}[spacing](1000, steps)
    ours = states(three_peaks(SCHEDULE), x, times, "ddim")
    torch.testing.assert_close(stepped(DDIMScheduler(**SD, **settings), prediction, x, steps), ours, rtol=0, atol=1e-11)

    noisy_end = stepped(DDIMScheduler(**SD, **settings, set_alpha_to_one=False), prediction, x, steps)
    torch.testing.assert_close(noisy_end[:-1], ours[:-1], rtol=0, atol=1e-11)
    assert (noisy_end[-1] - ours[-1]).abs().max() > 1e-3, "theirs ends at network index 0, ours at clean data"


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V, Prediction.SAMPLE])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 30])
def test_ddim_is_euler_of_diffusers(prediction: Prediction, steps: int) -> None:
    """Theirs works in float32 on x/alpha, where the step is Euler's."""
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="trailing", prediction_type=prediction.value)
    theirs = stepped(scheduler, prediction, noise(), steps)
    times = trailing_times(1000, steps)
    alpha = torch.stack([SCHEDULE.alpha(t, theirs) for t in times]).reshape(-1, 1, 1, 1, 1)
    ours = states(three_peaks(SCHEDULE), alpha[0] * theirs[0], times, "ddim")
    torch.testing.assert_close(alpha * theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_dpmpp_2m_equals_diffusers(prediction: Prediction, steps: int) -> None:
    """Theirs rounds sigmas and states to float32."""
    scheduler = DPMSolverMultistepScheduler(
        **SD, timestep_spacing="trailing", final_sigmas_type="zero", prediction_type=prediction.value
    )
    x = noise()
    ours = states(three_peaks(SCHEDULE), x, trailing_times(1000, steps), "dpmpp_2m")
    torch.testing.assert_close(stepped(scheduler, prediction, x, steps), ours, rtol=0, atol=1e-5)


# --- what a DDIM step is ---


@pytest.mark.parametrize("t", [1, 300, 1000])
@pytest.mark.parametrize("s", [0, 1, 299, 999, 1000])
def test_knowing_the_noise_the_step_stays_on_its_line(t: int, s: int) -> None:
    x0, eps = torch.randn(2, 4, 4, 2, 2, dtype=torch.float64)
    belief = to_denoised(Prediction.EPSILON, eps, add_noise(SCHEDULE, x0, eps, t), torch.full((4,), t), SCHEDULE)
    torch.testing.assert_close(ddim_step(SCHEDULE, belief, s), add_noise(SCHEDULE, x0, eps, s), rtol=0, atol=1e-13)


def test_steps_with_one_noise_compose() -> None:
    x0, eps = torch.randn(2, 4, 4, 2, 2, dtype=torch.float64)

    def move(x: Tensor, t: int, s: int) -> Tensor:
        return ddim_step(SCHEDULE, to_denoised(Prediction.EPSILON, eps, x, torch.full((4,), t), SCHEDULE), s)

    x = add_noise(SCHEDULE, x0, torch.randn_like(x0), 1000)  # not made with this eps
    torch.testing.assert_close(move(move(x, 1000, 400), 400, 30), move(x, 1000, 30), rtol=0, atol=1e-12)


def test_each_sample_may_go_to_its_own_time() -> None:
    belief, s = Denoised(*torch.randn(2, 3, 4, 2, 2)), torch.tensor([0, 20, 980])
    singly = [ddim_step(SCHEDULE, Denoised(belief.x0[i : i + 1], belief.eps[i : i + 1]), int(s[i])) for i in range(3)]
    assert torch.equal(ddim_step(SCHEDULE, belief, s), torch.cat(singly))


# --- on ODEs whose solution is known ---


def test_unit_variance_data_turns_by_an_angle() -> None:
    """A step from t to s multiplies by cos(phi_t - phi_s), phi = atan(sigma/alpha); the flow itself is the identity."""
    teacher, x = gaussian(SCHEDULE, torch.zeros(1, 1, 1, dtype=torch.float64), 1.0), noise()
    phi = torch.atan2((1 - SCHEDULE.alphas_cumprod).sqrt(), SCHEDULE.alphas_cumprod.sqrt())
    times = torch.tensor([1000, 700, 333, 20, 0])
    shrink = torch.cat([torch.ones(1, dtype=torch.float64), (phi[times[:-1]] - phi[times[1:]]).cos().cumprod(0)])
    expected = shrink.reshape(-1, 1, 1, 1, 1) * x
    torch.testing.assert_close(states(teacher, x, times.tolist(), "ddim"), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", solvers())
@pytest.mark.parametrize("times", [[1000, 0], [1000, 999, 500, 1, 0], [730, 20, 10, 0]], ids=str)
def test_a_single_point_is_found_exactly_by_any_step(solver: str, times: list[int]) -> None:
    point = torch.randn(4, 2, 2, dtype=torch.float64)
    x = torch.randn(5, 4, 2, 2, dtype=torch.float64)
    end = states(gaussian(SCHEDULE, point, 0.0), x, times, solver)[-1]
    torch.testing.assert_close(end, point.expand_as(x), rtol=0, atol=1e-12)


def gaussian_case() -> tuple[Mixture, Callable[..., Tensor], Tensor]:
    return (
        gaussian(FINE, torch.full((2, 1, 1), 0.3, dtype=torch.float64), 0.8),
        gaussian_flow,
        noise(128).reshape(-1, 2, 1, 1),
    )


def mixture_case() -> tuple[Mixture, Callable[..., Tensor], Tensor]:
    return three_peaks(FINE), quantile_flow, noise(128)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("case", [gaussian_case, mixture_case])
def test_order_of_convergence(case: Callable[[], Any], solver: str, order: int) -> None:
    """The error's slope over the number of steps, against the exact flow.

    To a time above 0: near clean data sigma is like sqrt(t), and the last step's error alone is of first order.
    """
    teacher, flow, x = case()
    start, end, counts = 16_000, 4_000, (20, 40, 80, 160)
    exact = flow(teacher, x, start, end)
    errors = []
    for n in counts:
        times = [round(start - i * (start - end) / n) for i in range(n + 1)]
        errors.append(float((states(teacher, x, times, solver)[-1] - exact).pow(2).mean().sqrt()))
    assert -slope(counts, errors) == pytest.approx(order, abs=0.1)


def slope(x: tuple[int, ...], y: list[float]) -> float:
    """Least-squares slope of log y over log x."""
    u, v = torch.tensor(x).double().log(), torch.tensor(y).double().log()
    return float(((u - u.mean()) * (v - v.mean())).sum() / ((u - u.mean()) ** 2).sum())


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m"])
def test_second_order_pays_on_the_way_to_data_too(solver: str) -> None:
    teacher, x, times = three_peaks(SCHEDULE), noise(64), trailing_times(1000, 20)
    exact = quantile_flow(teacher, x, 1000, 0)
    error = {name: (states(teacher, x, times, name)[-1] - exact).pow(2).mean().sqrt() for name in (solver, "ddim")}
    assert error[solver] < 0.7 * error["ddim"]


@pytest.mark.parametrize("solver", solvers())
def test_pure_noise_is_a_place_to_start_from(solver: str) -> None:
    """Zero terminal SNR: alpha(T) = 0, where sigma/alpha is infinite."""
    schedule = NoiseSchedule.of(Noise(rescale_betas_zero_snr=True))
    teacher, x = three_peaks(schedule), noise(64)
    ours = states(teacher, x, trailing_times(1000, 100), solver)[-1]
    torch.testing.assert_close(ours, quantile_flow(teacher, x, 1000, 0), rtol=0, atol=0.1)


# --- how `solve` behaves ---


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 4), ("dpmpp_2m", 4), ("heun", 7)])
def test_yields_every_state_and_counts_its_calls(solver: str, calls: int) -> None:
    teacher, asked = three_peaks(SCHEDULE), []

    def counting(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        asked.append(t.tolist())
        return teacher(x_t, t, conditioning)

    x, times = noise(2), [1000, 750, 500, 250, 0]
    visited = list(solve(counting, SCHEDULE, x, times, {}, solver))
    assert [t for t, _ in visited] == times and torch.equal(visited[0][1], x)
    assert len(asked) == calls and all(0 < t <= 1000 and t == u for t, u in asked), "a network knows no time 0"


def test_half_precision_noise_is_solved_in_float32() -> None:
    visited = solve(three_peaks(SCHEDULE), SCHEDULE, noise().half(), [1000, 500, 0], {}, "ddim")
    assert [x.dtype for _, x in visited] == [torch.float32] * 3


@pytest.mark.parametrize("times", [[1000, 500, 500, 0], [0, 500, 1000], [1001, 0], [1000, -1]], ids=str)
def test_refuses_times_that_do_not_fall_within_the_schedule(times: list[int]) -> None:
    with pytest.raises(ValueError, match="^times must fall strictly within 1000 ... 0, got "):
        states(three_peaks(SCHEDULE), noise(), times, "ddim")


def test_refuses_an_unknown_solver_by_name() -> None:
    with pytest.raises(ValueError, match="^solver 'rk45' is not known; allowed: ddim, heun, dpmpp_2m$"):
        states(three_peaks(SCHEDULE), noise(), [1000, 0], "rk45")
