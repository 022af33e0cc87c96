from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor

from distill.diffusion.consistency import multistep
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, predictions_of
from distill.diffusion.random import starting_noise
from distill.diffusion.samplers import SAMPLERS, solvers
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import lcm_times, solve, trailing_times
from distill.methods.sampling import Sampling, sample
from tests.analytic import exact_student, gaussian, network_of, three_peaks

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (1, 1, 1)


def generators(n: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


class Recorder:
    """A denoiser that remembers the states and times it was asked about."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.states: list[Tensor] = []
        self.times: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        self.states.append(x_t)
        self.times.append(int(t[0]))
        return self.denoiser(x_t, t, conditioning)


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
@pytest.mark.parametrize("times", [*(lcm_times(1000, n) for n in range(1, 9)), [1000, 3, 2, 1, 0]], ids=str)
def test_lcm_equals_the_lcm_scheduler_step_by_step(prediction: Prediction, times: list[int]) -> None:
    """The same generators draw the same pictures in a plain diffusers loop. Only next to data do c_skip, c_out show."""
    scheduler: Any = LCMScheduler(prediction_type=prediction.value)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod[1:]
    scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
    network = network_of(three_peaks(SCHEDULE), prediction, SCHEDULE)
    theirs, g = [], generators(5)
    x = starting_noise(g, SHAPE)
    for index in scheduler.timesteps:
        theirs.append(x)
        x = scheduler.step(network(x, index.expand(5), {}), index, x, generator=g).prev_sample

    ours, g = Recorder(three_peaks(SCHEDULE)), generators(5)
    end = sample(ours, SCHEDULE, starting_noise(g, SHAPE), times, {}, "lcm", g)

    torch.testing.assert_close(torch.stack([*ours.states, end]), torch.stack([*theirs, x]), rtol=0, atol=1e-5)


def test_the_number_of_steps_is_the_students_own_where_it_has_one() -> None:
    assert Sampling("ddim", "trailing", 2).times(1000, 8) == [1000, 500, 0]
    assert Sampling("ddim", "trailing").times(1000, 4) == [1000, 750, 500, 250, 0]
    assert Sampling().times(1000, 4) == lcm_times(1000, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("euler_a",), "sampler 'euler_a' is not known; allowed: lcm, tcd, euler, ddim, heun, dpmpp_2m"),
        (("ddim", "uniform"), "spacing 'uniform' is not known; allowed: trailing, leading, lcm, milestones"),
        (("euler", "leading"), "sampler 'euler' takes spacing 'trailing', got 'leading': 'ddim' takes any"),
        (("ddim", "trailing", 0), "steps must be at least 1, or None, got 0"),
        (("ddim", "milestones", 9), "steps must be within 1 ... 8 at spacing 'milestones', got 9"),
    ],
)
def test_a_way_to_draw_that_is_none_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Sampling(*given)
    assert str(error.value) == message


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_depends_on_its_own_generator_alone(sampler: str) -> None:
    teacher, times = three_peaks(SCHEDULE), lcm_times(1000, 4)

    def draw(g: list[torch.Generator]) -> Tensor:
        return sample(teacher, SCHEDULE, starting_noise(g, SHAPE), times, {}, sampler, g)

    together, again = draw(generators(6)), draw(generators(6))
    singly = torch.cat([draw(generators(1, first=i)) for i in range(6)])
    assert torch.equal(together, again)
    torch.testing.assert_close(together, singly, rtol=0, atol=1e-6)
    assert len(together.unique()) == 6


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_network_calls(sampler: str, steps: int) -> None:
    """One a step; Heun's method makes two, but for the last."""
    network, g = Recorder(three_peaks(SCHEDULE)), generators(2)
    sample(network, SCHEDULE, starting_noise(g, SHAPE), trailing_times(1000, steps), {}, sampler, g)
    assert len(network.times) == (2 * steps - 1 if sampler == "heun" else steps)
    assert network.times[0] == 1000 and min(network.times) > 0


@pytest.mark.parametrize("sampler", solvers())
def test_an_ode_sampler_is_the_end_of_the_solve(sampler: str) -> None:
    teacher, x, times = three_peaks(SCHEDULE), torch.randn(4, 1, 1, 1), trailing_times(1000, 5)
    *_, (_, end) = solve(teacher, SCHEDULE, x, times, {}, sampler)
    assert torch.equal(sample(teacher, SCHEDULE, x, times, {}, sampler), end)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_an_exact_consistency_function_samples_the_data(steps: int) -> None:
    """However often it goes back to noise; the generators differ from picture to picture, so must the noise."""
    n = 4_000
    teacher = gaussian(SCHEDULE, torch.full(SHAPE, 0.3, dtype=torch.float64), 0.8)
    data = teacher.sample(n, torch.Generator().manual_seed(99))
    x_T = add_noise(SCHEDULE, data, torch.randn_like(data), 1000)

    x = sample(exact_student(teacher), SCHEDULE, x_T, lcm_times(1000, steps), {}, "lcm", generators(n))
    assert float(x.mean()) == pytest.approx(0.3, abs=4 * 0.8 / n**0.5)
    assert float(x.std()) == pytest.approx(0.8, abs=4 * 0.8 / (2 * n) ** 0.5)


def test_starting_noise_is_the_first_draw_of_each_generator() -> None:
    noise = starting_noise(generators(3), (4, 2, 2))
    for i, g in enumerate(generators(3)):
        assert torch.equal(noise[i], torch.randn(1, 4, 2, 2, generator=g)[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_leaves_no_graph_and_no_trace_in_the_global_generator(sampler: str) -> None:
    mean = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    before, g = torch.get_rng_state(), generators(2)
    x = sample(gaussian(SCHEDULE, mean, 0.5), SCHEDULE, starting_noise(g, SHAPE), [1000, 500, 0], {}, sampler, g)
    assert not x.requires_grad and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1000, 500], "sampling times must end at 0, got [1000, 500]"),
        ([1000, 500, 500, 0], "times must fall strictly within 1000 ... 0, got [1000, 500, 500, 0]"),
        ([1020, 500, 0], "times must fall strictly within 1000 ... 0, got [1020, 500, 0]"),
    ],
)
def test_refuses_times_that_do_not_fall_to_0(sampler: str, times: list[int], message: str) -> None:
    g = generators(2)
    with pytest.raises(ValueError) as error:
        sample(three_peaks(SCHEDULE), SCHEDULE, starting_noise(g, SHAPE), times, {}, sampler, g)
    assert str(error.value) == message


def test_refuses_an_unknown_sampler_by_name() -> None:
    with pytest.raises(
        ValueError, match="^sampler 'euler_a' is not known; allowed: lcm, tcd, euler, ddim, heun, dpmpp_2m$"
    ):
        sample(three_peaks(SCHEDULE), SCHEDULE, torch.zeros(1, 1, 1, 1), [1000, 0], {}, "euler_a")


@pytest.mark.parametrize("given", [0, 1, 3])
def test_refuses_to_share_fresh_noise_between_pictures(given: int) -> None:
    x = starting_noise(generators(2), SHAPE)
    with pytest.raises(ValueError, match=f"^2 pictures need a generator each for their fresh noise, got {given}$"):
        list(multistep(three_peaks(SCHEDULE), SCHEDULE, x, [1000, 500, 0], {}, generators(given)))
    assert len(list(multistep(three_peaks(SCHEDULE), SCHEDULE, x, [1000, 0], {}, []))) == 1  # one step makes none
