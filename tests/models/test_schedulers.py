"""The scheduler of a student: what our own sampler generates, whatever the teacher's own scheduler was set to."""

from __future__ import annotations

import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from distill.diffusion.consistency import strategic
from distill.diffusion.noise import RESCALES, DynamicShift, FlowNoise, Noise
from distill.diffusion.prediction import Prediction, predictions_of
from distill.diffusion.random import starting_noise
from distill.diffusion.samplers import SAMPLERS, SPACINGS, Sampler, check_pair, pairs, solvers
from distill.diffusion.schedule import NoiseSchedule, travel
from distill.diffusion.solver import ddim, ddim_step, make_times
from distill.evaluation.students import parse_sampler
from distill.methods.sampling import Sampling, sample
from distill.models.schedulers import (
    as_code,
    make_scheduler,
    noise_of,
    scheduler_settings,
    sigmas_for,
    timesteps_for,
)
from tests.analytic import network_of, three_peaks, velocity_of
from tests.diffusion.test_noise import made

PAIRS = sorted(pairs())
ZERO_SNR = [sampler.name for sampler in SAMPLERS.values() if sampler.zero_snr]
STEPS = (1, 2, 3, 4, 6, 8)
SHORT = {"num_train_timesteps": 96, "beta_start": 0.001, "beta_end": 0.09}
ZERO = Noise(rescale_betas_zero_snr=True, prediction_type="v_prediction")

HOSTILE: dict[str, Any] = {  # what a teacher's scheduler may have been set to, of all classes
    "use_karras_sigmas": True,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.5,
    "sample_max_value": 0.1,
    "clip_sample": True,
    "clip_sample_range": 0.1,
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 3,
    "solver_type": "heun",
    "lower_order_final": False,
    "euler_at_final": True,
    "final_sigmas_type": "sigma_min",
    "timestep_spacing": "linspace",
    "steps_offset": 7,
    "set_alpha_to_one": False,
    "interpolation_type": "log_linear",
    "sigma_min": 0.5,
    "sigma_max": 2.0,
    "original_inference_steps": 10,
    "timestep_scaling": 1.0,
    "variance_type": "fixed_large",
    "lambda_min_clipped": -1.0,
    "skip_prk_steps": True,
}
SOLVER_OF = {"DEISMultistepScheduler": "deis", "SASolverScheduler": "data_prediction"}


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def ours(noise: Noise, sampler: str, spacing: str, steps: int, gamma: float = 0.0) -> Tensor:
    schedule, g = NoiseSchedule.of(noise), generators(5)
    times = make_times(spacing, schedule.T, steps)
    return sample(three_peaks(schedule), schedule, starting_noise(g, (1, 1, 1)), times, {}, sampler, g, gamma)


def by_diffusers(
    noise: Noise, scheduler: Any, spacing: str, steps: int, gamma: float = 0.0
) -> tuple[Tensor, list[int]]:
    """What a pipeline's loop makes of the same noise, and the network indices that it visits."""
    schedule, g = NoiseSchedule.of(noise), generators(5)
    network = network_of(three_peaks(schedule), Prediction(scheduler.config.prediction_type), schedule)
    times = timesteps_for(scheduler, spacing, steps)
    scheduler.set_timesteps(steps) if times is None else scheduler.set_timesteps(timesteps=times)
    x = starting_noise(g, (1, 1, 1)) * scheduler.init_noise_sigma
    given = {"generator": g, "eta": gamma}  # which pipelines pass to the schedulers that take them
    more = {name: x for name, x in given.items() if name in inspect.signature(scheduler.step).parameters}
    for index in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, index)
        x = scheduler.step(network(seen.double(), index.long().expand(5), {}), index, x, **more).prev_sample
    return x, [int(index) for index in dict.fromkeys(scheduler.timesteps.tolist())]


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
@pytest.mark.parametrize("noise", [Noise(), Noise(**SHORT)], ids=["1000", "96"])
def test_each_pair_is_generated_by_its_scheduler_at_every_number_of_steps(pair: tuple[str, str], noise: Noise) -> None:
    for steps in STEPS:
        for prediction in predictions_of(NoiseSchedule.of(noise)):
            scheduler = make_scheduler(noise, *pair, prediction)
            theirs, visited = by_diffusers(noise, scheduler, pair[1], steps)
            assert visited == [t - 1 for t in make_times(pair[1], noise.num_train_timesteps, steps)[:-1]]
            torch.testing.assert_close(ours(noise, *pair, steps), theirs.to(torch.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] in ZERO_SNR], ids="/".join)
def test_without_signal_at_the_noisy_end_it_agrees_as_far_as_diffusers_goes(pair: tuple[str, str]) -> None:
    """Its schedulers in sigmas end at a ratio of 4096 to 1, which leaves 2.4e-4 of the noise."""
    for steps in STEPS:
        theirs, _ = by_diffusers(ZERO, make_scheduler(ZERO, *pair), pair[1], steps)
        torch.testing.assert_close(ours(ZERO, *pair, steps), theirs.to(torch.float32), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", sorted({*SAMPLERS} - {*ZERO_SNR}))
def test_a_sampler_that_diffusers_lacks_for_this_noise_is_one_line(sampler: str) -> None:
    with pytest.raises(
        ValueError, match=f"^sampler '{sampler}' has no scheduler in diffusers.*allowed: lcm, tcd, euler, ddim$"
    ):
        scheduler_settings(ZERO, sampler, "trailing")


@pytest.mark.parametrize("spacing", SAMPLERS["tcd"].schedulers)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_is_its_scheduler_called_with_gamma_as_eta(spacing: str, gamma: float) -> None:
    for steps in STEPS:
        scheduler = make_scheduler(Noise(), "tcd", spacing)
        theirs, _ = by_diffusers(Noise(), scheduler, spacing, steps, gamma)
        found = ours(Noise(), "tcd", spacing, steps, gamma)
        torch.testing.assert_close(found, theirs.to(torch.float32), rtol=0, atol=2e-5)
        if steps == 1:  # with nowhere to noise to, it is one jump
            assert torch.equal(found, ours(Noise(), "tcd", spacing, 1))
        elif gamma:
            assert not torch.allclose(found, ours(Noise(), "tcd", spacing, steps), atol=1e-2)


def test_tcd_without_noise_is_ddim_that_ends_at_the_cleanest_level() -> None:
    """And with gamma 1 it is multistep sampling without LCM's scalings: each step starts from x0 and fresh noise."""
    schedule, g = NoiseSchedule.of(Noise()), generators(5)
    times, exact = make_times("trailing", schedule.T, 4), three_peaks(schedule)
    *states, (_, end) = strategic(exact, schedule, starting_noise(g, (1, 1, 1)), times, {}, g)
    wanted = [x for _, x in ddim(exact, schedule, starting_noise(generators(5), (1, 1, 1)), times[:-1] + [1], {})]
    torch.testing.assert_close(torch.stack([x for _, x in states] + [end]), torch.stack(wanted))
    x = starting_noise(g := generators(5), (1, 1, 1))
    for t, s in pairwise(times):
        found = exact(x, torch.full((5,), t), {})
        x = ddim_step(schedule, found, 1)
        if s > 0:
            x = travel(schedule, x, torch.full((5,), 1), starting_noise(g, (1, 1, 1)), torch.full((5,), s))
    torch.testing.assert_close(ours(Noise(), "tcd", "trailing", 4, 1.0), x)


def test_tcd_at_trailing_times_needs_nothing_but_its_steps_at_1_2_4_and_8() -> None:
    for steps in (1, 2, 4, 5, 8, 10):
        assert timesteps_for(make_scheduler(Noise(), "tcd", "trailing"), "trailing", steps) is None
    assert timesteps_for(make_scheduler(Noise(), "tcd", "trailing"), "trailing", 3) == [999, 666, 332]


@pytest.mark.parametrize(
    ("sampler", "gamma", "message"),
    [
        ("lcm", 0.3, "sampler 'lcm' takes no gamma, got 0.3: tcd does"),
        ("tcd", 1.5, "gamma must be within 0 ... 1, got 1.5"),
        ("tcd", -0.1, "gamma must be within 0 ... 1, got -0.1"),
    ],
)
def test_a_gamma_that_cannot_be_is_one_line(sampler: str, gamma: float, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Sampling(sampler, "lcm", gamma=gamma)
    assert str(raised.value) == message


@pytest.mark.parametrize("text", ["tcd", "tcd/trailing", "tcd/lcm/0.3"])
def test_a_sampler_is_written_with_its_spacing_and_its_gamma(text: str) -> None:
    sampler, *more = text.split("/")
    wanted = Sampling(sampler, more[0] if more else "lcm", gamma=float(more[1]) if len(more) > 1 else 0.0)
    assert parse_sampler(text, Sampling()) == wanted
    assert parse_sampler("tcd", wanted) == wanted and str(Sampling("tcd", "lcm", gamma=0.3)) == "tcd/lcm/0.3"
    with pytest.raises(ValueError, match="must be SAMPLER, SAMPLER/SPACING or SAMPLER/SPACING/GAMMA"):
        parse_sampler("tcd/lcm/much", Sampling())


def hostile(name: str) -> Any:
    """A scheduler of the class with all of the hostile options that it takes."""
    cls = getattr(diffusers, name)
    settings = HOSTILE | ({"algorithm_type": SOLVER_OF[name]} if name in SOLVER_OF else {})
    known = inspect.signature(cls.__init__).parameters
    return cls(**Noise().settings() | {key: value for key, value in settings.items() if key in known})


@pytest.mark.parametrize("name", RESCALES)
def test_nothing_of_a_teachers_scheduler_but_its_noise_survives(name: str) -> None:
    if made(name, {}) is None:
        pytest.skip(f"{name} needs an optional library")
    teachers = hostile(name)
    assert noise_of(teachers) == Noise()
    for pair in PAIRS:
        scheduler, wanted = make_scheduler(noise_of(teachers), *pair), make_scheduler(Noise(), *pair)
        assert dict(scheduler.config) == dict(wanted.config)
    theirs, _ = by_diffusers(Noise(), make_scheduler(noise_of(teachers), "lcm", "lcm"), "lcm", 4)
    torch.testing.assert_close(ours(Noise(), "lcm", "lcm", 4), theirs.to(torch.float32), rtol=0, atol=1e-4)


def test_the_hostile_options_would_have_shown() -> None:
    """By `from_config` of the teacher's scheduler, as one writes it by hand, other pictures come out."""
    cls, settings = scheduler_settings(Noise(), "dpmpp_2m", "trailing")
    inherited = cls.from_config(hostile("DPMSolverMultistepScheduler").config, timestep_spacing="trailing")
    inherited.set_timesteps(4)
    made_anew = cls(**settings)
    made_anew.set_timesteps(4)
    assert not torch.equal(inherited.timesteps, made_anew.timesteps)


def test_a_student_that_predicts_something_else_has_a_scheduler_that_says_so() -> None:
    assert make_scheduler(Noise(), "ddim", "trailing").config.prediction_type == "epsilon"
    assert make_scheduler(Noise(), "ddim", "trailing", Prediction.SAMPLE).config.prediction_type == "sample"


@pytest.mark.parametrize("noise", [Noise(), ZERO, Noise(num_train_timesteps=2, trained_betas=(0.1, 0.2))])
def test_the_code_on_a_card_makes_the_scheduler(noise: Noise) -> None:
    for pair in (("lcm", "lcm"), ("ddim", "trailing"), ("euler", "trailing")):
        code = as_code(*scheduler_settings(noise, *pair))
        assert "\n" not in code
        again = eval(code, vars(diffusers))
        assert dict(again.config) == dict(make_scheduler(noise, *pair).config)


def test_lcm_at_trailing_times_needs_nothing_but_its_steps_at_1_2_4_and_8() -> None:
    scheduler = make_scheduler(Noise(), "lcm", "trailing")
    assert [timesteps_for(scheduler, "trailing", steps) for steps in (1, 2, 4, 8)] == [None] * 4
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert timesteps_for(scheduler, "trailing", 3) == [999, 666, 332]


def test_asking_for_times_leaves_the_scheduler_as_it_is() -> None:
    scheduler = make_scheduler(Noise(), "lcm", "trailing")
    scheduler.set_timesteps(8)
    timesteps_for(scheduler, "trailing", 3)
    assert len(scheduler.timesteps) == 8


def test_the_table_is_of_the_samplers_and_spacings_that_there_are() -> None:
    assert {sampler for sampler, _ in PAIRS} == {*SAMPLERS} and {spacing for _, spacing in PAIRS} == {*SPACINGS}
    assert all(callable(sampler.generate()) for sampler in SAMPLERS.values())
    for spacing in SPACINGS.values():
        most = spacing.most_steps or 1000
        assert len(make_times(spacing.name, 1000, most)) == most + 1
        with pytest.raises(ValueError, match=f"steps must be within 1 ... {most}"):
            make_times(spacing.name, 1000, most + 1)


def test_the_comments_of_the_settings_name_the_solvers_and_the_samplers() -> None:
    configs = Path(__file__).parents[2] / "configs"
    (line,) = re.findall(r"^solver: .*# (.*)", (configs / "data/trajectories.yaml").read_text(), re.MULTILINE)
    assert re.split(r", | or ", line) == solvers()
    text = (configs / "sample.yaml").read_text()
    for key, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        (line,) = re.findall(rf"^{key}: .*# (.*?);", text, re.MULTILINE)
        assert re.split(r", | or ", line) == list(known)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="^there is a sampler 'ddim' already: register it under another name$"):
        SAMPLERS.register(Sampler("ddim", "another", "distill.diffusion.solver.ddim", {}))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_pair_is_valid_or_an_error_when_it_is_set(sampler: str, spacing: str) -> None:
    if (sampler, spacing) in PAIRS:
        check_pair(sampler, spacing)
        assert Sampling(sampler, spacing, 2).times(1000, 50)[-1] == 0
    else:
        with pytest.raises(ValueError, match=f"sampler '{sampler}' takes spacing .* got '{spacing}'"):
            Sampling(sampler, spacing)


# ---- flow matching --------------------------------------------------------------------------------------------------

FLOW_PAIRS = [pair for pair in PAIRS if SAMPLERS[pair[0]].flow]


@pytest.mark.parametrize("pair", FLOW_PAIRS, ids="/".join)
@pytest.mark.parametrize("noise", [FlowNoise(1000, 3.0), FlowNoise(96, 1.5)], ids=["1000", "96"])
def test_each_pair_of_flow_matching_is_generated_by_its_scheduler(pair: tuple[str, str], noise: FlowNoise) -> None:
    """At the sigmas that it is handed, which it shifts: our times to the level, at every number of steps."""
    sampler, spacing = pair
    schedule = NoiseSchedule.of(noise)
    velocity = velocity_of(three_peaks(schedule), schedule)
    for steps in STEPS:
        scheduler, g = make_scheduler(noise, sampler, spacing, Prediction.FLOW, steps), generators(5)
        assert timesteps_for(scheduler, spacing, steps) is None
        scheduler.set_timesteps(sigmas=sigmas_for(scheduler, spacing, steps))
        times = make_times(spacing, schedule.T, steps)
        told = schedule.told(torch.tensor(times[:-1]))
        torch.testing.assert_close(scheduler.timesteps, told, rtol=1e-6, atol=0)

        x = start = starting_noise(g, (1, 1, 1))
        for now in scheduler.timesteps:
            x = scheduler.step(velocity(x, now.expand(5)), now, x, generator=g).prev_sample
        g = generators(5)
        assert torch.equal(starting_noise(g, (1, 1, 1)), start)
        ours = sample(three_peaks(schedule), schedule, start, times, {}, sampler, g)
        torch.testing.assert_close(ours, x.to(ours.dtype), rtol=0, atol=1e-5)


def test_the_sigmas_of_trailing_times_are_those_that_pipelines_pass_themselves() -> None:
    scheduler = make_scheduler(FlowNoise(1000, 3.0), "ddim", "trailing")
    for steps in (1, 2, 4, 5, 8):
        theirs = [1 - i / steps for i in range(steps)]
        assert sigmas_for(scheduler, "trailing", steps) == pytest.approx(theirs, abs=1e-15)
    assert sigmas_for(scheduler, "trailing", 3) == [1.0, 0.667, 0.333], "times are whole numbers"
    assert sigmas_for(make_scheduler(Noise(), "ddim", "trailing"), "trailing", 4) is None


def test_a_grid_left_to_the_scheduler_is_shifted_twice_and_ends_at_no_noise() -> None:
    """Why sigmas are handed over: four steps of a pipeline that does not, which spends one on almost clean data."""
    scheduler = make_scheduler(FlowNoise(1000, 3.0), "ddim", "trailing")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.858, 0.602, 0.0089, 0], abs=1e-3)
    scheduler.set_timesteps(sigmas=sigmas_for(scheduler, "trailing", 4))
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_nothing_of_a_teachers_flow_matching_scheduler_but_its_noise_survives() -> None:
    teachers = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1, base_shift=7.0)
    for sampler in ("ddim", "lcm"):
        scheduler = make_scheduler(noise_of(teachers), sampler, "trailing")
        assert dict(scheduler.config) == dict(make_scheduler(FlowNoise(1000, 3.0), sampler, "trailing").config)
        assert scheduler.config.shift_terminal is None and not scheduler.config.use_dynamic_shifting


def test_a_shift_that_depends_on_the_picture_is_fixed_and_a_pipelines_mu_ignored() -> None:
    noise = FlowNoise(1000, None, DynamicShift())
    with pytest.raises(ValueError, match="^the shift of its scheduler depends on the picture's size"):
        make_scheduler(noise, "ddim", "trailing")
    scheduler = make_scheduler(noise.at(shift=3.0), "ddim", "trailing")
    scheduler.set_timesteps(sigmas=sigmas_for(scheduler, "trailing", 4), mu=1.9)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_the_code_on_a_card_of_flow_matching_makes_the_scheduler() -> None:
    noise = FlowNoise(1000, 3.1582)
    code = as_code(*scheduler_settings(noise, "ddim", "trailing"))
    assert code == (
        "FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.1582, use_dynamic_shifting=False, "
        "shift_terminal=None)"
    )
    assert dict(eval(code, vars(diffusers)).config) == dict(make_scheduler(noise, "ddim", "trailing").config)


@pytest.mark.parametrize("sampler", sorted({sampler for sampler, _ in PAIRS} - {sampler for sampler, _ in FLOW_PAIRS}))
def test_a_sampler_that_diffusers_lacks_for_flow_matching_is_one_line(sampler: str) -> None:
    with pytest.raises(ValueError, match=f"^sampler '{sampler}' has no scheduler in diffusers for flow .*: lcm, ddim$"):
        scheduler_settings(FlowNoise(), sampler, "trailing")


def test_a_flow_matching_student_of_clean_data_has_no_scheduler() -> None:
    with pytest.raises(ValueError, match="^diffusers has no flow-matching scheduler for a student that predicts sam"):
        scheduler_settings(FlowNoise(), "ddim", "trailing", Prediction.SAMPLE)
