"""Which noise a scheduler's config stands for: decided by its class, and refused in one line where it is another."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from distill.diffusion.noise import FLOW_MATCHING, MOST_LEVELS, RESCALES, DynamicShift, FlowNoise, Noise, read_noise
from distill.diffusion.schedule import NoiseSchedule

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CLASSES = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "scaled linear": SD,
    "squared cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {**SD, "rescale_betas_zero_snr": True},
    "betas of its own": {"num_train_timesteps": 100, "trained_betas": [0.001 + 0.0001 * i for i in range(100)]},
    "sampled otherwise": {**SD, "use_karras_sigmas": True, "timestep_spacing": "linspace", "steps_offset": 3},
    "thresholded": {**SD, "thresholding": True, "sample_max_value": 2.0, "clip_sample": True},
}


def made(name: str, config: dict[str, Any]) -> Any:
    """The scheduler of a class; None for one that is not there, or that does not take the config."""
    try:
        return getattr(diffusers.schedulers, name)(**config)
    except (ImportError, TypeError):  # of an optional library, of constructors that want more or know other keys
        return None


def test_the_list_is_of_classes_that_diffusers_has() -> None:
    assert {*RESCALES, *FLOW_MATCHING} <= set(CLASSES)
    assert len(CLASSES) > 40


@pytest.mark.parametrize("name", CLASSES)
def test_every_scheduler_of_diffusers_is_understood_as_it_is_or_refused_by_name(name: str) -> None:
    """Its noise levels are ours; the rounding is that of diffusers' products in float32."""
    tried = 0
    for config in CONFIGS.values():
        scheduler = made(name, config)
        if scheduler is None:
            continue
        tried += 1
        if name in FLOW_MATCHING:
            assert isinstance(read_noise(name, scheduler.config), FlowNoise)
            continue
        if name not in RESCALES:
            with pytest.raises(ValueError, match=f"its scheduler, '{name}', is not understood; understood are: DDIM, "):
                read_noise(name, scheduler.config)
            continue
        ours = NoiseSchedule.of(read_noise(name, scheduler.config)).alphas_cumprod[1:]
        torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6)
    if name in RESCALES and not tried:
        pytest.skip(f"{name} needs an optional library")


@pytest.mark.parametrize("name", RESCALES)
def test_whether_a_class_knows_zero_terminal_snr_is_what_the_list_says(name: str) -> None:
    scheduler = made(name, {})
    if scheduler is None:
        pytest.skip(f"{name} needs an optional library")
    assert ("rescale_betas_zero_snr" in scheduler.config) == RESCALES[name]
    assert SD.keys() <= scheduler.config.keys(), "the keys that are asked for are always written"


OTHER_NOISE: dict[str, tuple[str, dict[str, Any], str]] = {
    "continuous": (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous"},
        "timestep_type 'continuous'; understood: 'd",
    ),
    "flow": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True},
        "prediction_type None; allowed: flow_prediction",
    ),
    "flow without its sigmas": (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction"},
        "'flow_prediction'; allowed: epsilon",
    ),
    "flow elsewhere": ("EulerDiscreteScheduler", {"use_flow_sigmas": True}, "has use_flow_sigmas True"),
    "shifted": ("UniPCMultistepScheduler", {"use_dynamic_shifting": True}, "has use_dynamic_shifting True"),
    "snr": ("DDIMScheduler", {"snr_shift_scale": 3.0}, "has snr_shift_scale 3.0; understood: 1"),
    "variance": ("DDPMScheduler", {"variance_type": "learned_range"}, "has variance_type 'learned_range'"),
    "flow prediction": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction"},
        "'flow_prediction'; allowed",
    ),
    "trigflow": (
        "DDIMScheduler",
        {"prediction_type": "trigflow"},
        "prediction_type 'trigflow'; allowed: epsilon, v_pred",
    ),
    "laplace": ("DDPMScheduler", {"beta_schedule": "laplace"}, "beta_schedule 'laplace'; allowed: linear, scaled_lin"),
    "exp": ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, "HeunDiscreteScheduler, has beta_schedule 'exp'"),
    "no zero snr": ("PNDMScheduler", {"rescale_betas_zero_snr": True}, "which this class ignores: name a scheduler"),
    "levels": (
        "DDIMScheduler",
        {"num_train_timesteps": 10**11},
        f"num_train_timesteps 100000000000; allowed: 1 to {MOST_LEVELS}",
    ),
    "digits": ("DDIMScheduler", {"num_train_timesteps": 10**5000}, "a int of very many digits"),
    "words": ("DDIMScheduler", {"num_train_timesteps": "1000"}, "num_train_timesteps '1000'"),
    "beta": ("DDIMScheduler", {"beta_end": 50}, "beta_end 50; it must be a number between 0 and 1"),
    "nan": ("DDIMScheduler", {"beta_start": float("nan")}, "beta_start nan"),
    "betas": (
        "DDIMScheduler",
        {"trained_betas": [0.1, 0.2]},
        "trained_betas of 2 numbers; it must be one for each of 1000",
    ),
    "null": ("DDIMScheduler", {"beta_schedule": None}, "beta_schedule None"),
    "list": (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": [1]},
        "rescale_betas_zero_snr \\[1\\]; it must be true or false",
    ),
}


@pytest.mark.parametrize(("name", "changes", "message"), OTHER_NOISE.values(), ids=OTHER_NOISE.keys())
def test_options_that_change_the_noise_are_one_line_with_the_class(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_noise(name, SD | changes)
    assert f"its scheduler, {name}, " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", SD)
def test_what_a_class_always_writes_has_no_default(missing: str) -> None:
    config = {key: value for key, value in SD.items() if key != missing}
    with pytest.raises(
        ValueError, match=f"its scheduler, PNDMScheduler, lacks {missing}, which every such config holds"
    ):
        read_noise("PNDMScheduler", config)


@pytest.mark.parametrize("name", [None, ["DDIMScheduler"], {"a": 1}, "x" * 10_000, "FlaxDDIMScheduler", "Noise"])
def test_what_is_no_class_that_is_understood_is_short_and_one_line(name: object) -> None:
    with pytest.raises(ValueError, match="is not understood; understood are: DDIM") as caught:
        read_noise(name, SD)
    assert len(str(caught.value)) < 500


# ---- flow matching --------------------------------------------------------------------------------------------------

EULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}
FLUX = EULER | {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SANA = SD | {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def test_a_fixed_shift_is_read_from_every_class_that_has_one() -> None:
    made_by: list[tuple[str, dict[str, Any]]] = [
        *((name, {"shift": 3.0}) for name in FLOW_MATCHING),
        ("DPMSolverMultistepScheduler", SANA),
    ]
    for name, config in made_by:
        scheduler: Any = getattr(diffusers, name)(**config)
        assert read_noise(name, scheduler.config) == FlowNoise(1000, 3.0), name


def test_a_flow_matching_config_is_never_read_as_betas() -> None:
    """Also with betas beside it, and by a class that knows both."""
    for name, config in (("FlowMatchEulerDiscreteScheduler", SD | EULER), ("DPMSolverMultistepScheduler", SANA)):
        schedule = NoiseSchedule.of(read_noise(name, config))
        assert schedule.is_linear and schedule.shift == 3.0
        with pytest.raises(ValueError, match="flow-matching schedule has none"):
            _ = schedule.alphas_cumprod


@pytest.mark.parametrize(("tokens", "shift"), [(256, 1.6487), (1024, 1.8776), (4096, 3.1582)])
def test_the_shift_of_flux_grows_with_the_picture(tokens: int, shift: float) -> None:
    noise = read_noise("FlowMatchEulerDiscreteScheduler", FLUX)
    assert NoiseSchedule.of(noise, tokens=tokens).shift == pytest.approx(shift, abs=5e-5)
    assert NoiseSchedule.of(noise, tokens=tokens, shift=2.5).shift == 2.5


def test_linear_time_shifts_take_mu_itself() -> None:
    noise = read_noise("FlowMatchEulerDiscreteScheduler", FLUX | {"time_shift_type": "linear"})
    assert NoiseSchedule.of(noise, tokens=4096).shift == pytest.approx(1.15)
    falling = FLUX | {"time_shift_type": "linear", "base_shift": 0.1, "max_shift": -3.0}
    with pytest.raises(ValueError, match="^shift must be above 0, and the scheduler's config makes it -3.0 at 4096"):
        read_noise("FlowMatchEulerDiscreteScheduler", falling).at(4096)


@pytest.mark.parametrize("tokens", [256, 1000, 4096, 6400])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_picture_of_that_size_is_drawn_at_the_noise_levels_of_diffusers(tokens: int, kind: str) -> None:
    """Theirs are of a pipeline that passes mu and 1, 1 - 1/N ... to a scheduler of dynamic shift; float32."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**FLUX | {"time_shift_type": kind})
    slope = (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)], mu=0.5 + slope * (tokens - 256))
    schedule = NoiseSchedule.of(read_noise(type(scheduler).__name__, scheduler.config), tokens)
    like = torch.zeros((), dtype=torch.float64)
    ours = torch.stack([schedule.sigma(1000 - 125 * i, like) for i in range(9)])
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=0, atol=2e-7)


def test_a_shift_that_depends_on_the_picture_needs_one() -> None:
    noise = read_noise("FlowMatchEulerDiscreteScheduler", FLUX)
    with pytest.raises(ValueError, match="^the shift of its scheduler depends on the picture's size"):
        NoiseSchedule.of(noise)
    settled = noise.at(1024)
    assert NoiseSchedule.of(settled).fingerprint == NoiseSchedule.of(noise, 1024).fingerprint
    assert settled.at(4096) == noise.at(4096), "another size has another shift"
    assert noise.at(shift=3.0).at(4096) == FlowNoise(1000, 3.0), "one that was set stays"


def test_a_shift_is_for_flow_matching_alone() -> None:
    with pytest.raises(ValueError, match="^shift 3.0 is for flow-matching teachers, .*: leave it null$"):
        NoiseSchedule.of(Noise(), shift=3.0)
    with pytest.raises(ValueError, match="^shift must be above 0, got -1"):
        NoiseSchedule.of(FlowNoise(), shift=-1)
    assert Noise().at(tokens=4096) == Noise()


OTHER_FLOW: dict[str, tuple[dict[str, Any], str]] = {
    **{
        key: ({key: True}, f"has {key} True; understood: none \\(set it to null\\)")
        for key in ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    },
    "stochastic": ({"stochastic_sampling": True}, "has stochastic_sampling True"),
    "scales": ({"scale_factors": [0.5, 1.0]}, "has scale_factors \\[0.5, 1.0\\]"),
    "no shift": ({"shift": None}, "has shift None; it must be a number"),
    "shift": ({"shift": 0}, "has shift 0; it must be above 0"),
    "digits": ({"shift": 10**5000}, "has shift a int of very many digits; it must be a number"),
    "nan": ({"shift": float("nan")}, "has shift nan; it must be a number"),
    "words": ({"use_dynamic_shifting": "yes"}, "has use_dynamic_shifting 'yes'; it must be true or false"),
    "levels": ({"num_train_timesteps": 0}, "has num_train_timesteps 0; allowed: 1 to "),
    "no base": ({"use_dynamic_shifting": True}, "lacks base_shift, max_shift, base_image_seq_len, max_image_seq_len"),
    "lengths": (FLUX | {"base_image_seq_len": 4096}, "has base_image_seq_len 4096; it must be below 4096"),
    "kind": (FLUX | {"time_shift_type": "cubic"}, "has time_shift_type 'cubic'; allowed: exponential, linear"),
    "overflow": (FLUX | {"max_shift": 2e9}, "has max_shift 2000000000.0; it must be a number"),
    "bases": (FLUX | {"base_shift": None}, "has base_shift None; it must be a number"),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_FLOW.values(), ids=OTHER_FLOW.keys())
def test_flow_matching_options_of_other_noise_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_noise("FlowMatchEulerDiscreteScheduler", EULER | changes)
    assert "its scheduler, FlowMatchEulerDiscreteScheduler, " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FLOW_MATCHING)
def test_what_a_flow_matching_class_always_writes_has_no_default(name: str) -> None:
    for missing in ("num_train_timesteps", "shift"):
        config = {key: value for key, value in EULER.items() if key != missing}
        with pytest.raises(ValueError, match=f"its scheduler, {name}, lacks {missing}, which every such config holds"):
            read_noise(name, config)
    assert read_noise(name, {"num_train_timesteps": 1000, "shift": 3.0}) == FlowNoise(1000, 3.0), "of early versions"


def test_dpm_solver_of_flow_matching_has_a_fixed_shift() -> None:
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler, has use_dynamic_shifting True; understood: Fal"):
        read_noise("DPMSolverMultistepScheduler", SANA | {"use_dynamic_shifting": True})
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler, lacks flow_shift"):
        read_noise("DPMSolverMultistepScheduler", {key: SANA[key] for key in SANA if key != "flow_shift"})


def test_a_terminal_shift_is_left_aside_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    config = EULER | {"shift_terminal": 0.0203}
    found = [read_noise("FlowMatchEulerDiscreteScheduler", config) for _ in range(3)]
    assert found == [FlowNoise(1000, 3.0)] * 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("shift_terminal 0.0203 of FlowMatchEulerDiscreteScheduler is left aside") and "once" in line


def test_the_settings_of_flow_matching_fix_its_shift_whatever_a_pipeline_says() -> None:
    noise = FlowNoise(1000, None, DynamicShift()).at(4096)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**noise.settings())
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=17.0)
    s = 3.15819
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.5 * s / (0.5 + 0.5 * s), 0.0]), rtol=0, atol=1e-5)
    again = read_noise(type(scheduler).__name__, scheduler.config)
    assert isinstance(again, FlowNoise) and again.dynamic is None and again.shift == pytest.approx(s, abs=1e-5)


def test_the_settings_are_the_noise_again() -> None:
    for noise in (
        Noise(),
        Noise(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        Noise(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
    ):
        scheduler: Any = diffusers.DDIMScheduler(**noise.settings())
        assert read_noise("DDIMScheduler", scheduler.config) == noise
