"""Which noise a scheduler's config stands for: decided by its class, and refused in one line where it is another."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from distill.diffusion.noise import MOST_LEVELS, RESCALES, Noise, read_noise
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
    assert set(RESCALES) <= set(CLASSES)
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
    "flow": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True; understood: False"),
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


def test_the_settings_are_the_noise_again() -> None:
    for noise in (
        Noise(),
        Noise(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        Noise(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
    ):
        scheduler: Any = diffusers.DDIMScheduler(**noise.settings())
        assert read_noise("DDIMScheduler", scheduler.config) == noise
