from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor

from distill.diffusion.noise import read_noise
from distill.diffusion.schedule import NoiseSchedule, add_noise, travel, wide

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "scaled_linear": SD,
    "linear": {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.03},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"num_train_timesteps": 100, "trained_betas": [0.001 + 0.0001 * i for i in range(100)]},
    "zero_snr": {**SD, "rescale_betas_zero_snr": True},
    "short": {**SD, "num_train_timesteps": 128},
}


def schedule_of(config: dict[str, Any]) -> NoiseSchedule:
    """Of DDIM's scheduler with this config, and its defaults for the rest."""
    scheduler: Any = DDIMScheduler(**config)
    return NoiseSchedule.of(read_noise("DDIMScheduler", scheduler.config))


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [(s, name) for s in (DDIMScheduler, EulerDiscreteScheduler) for name in CONFIGS]
    + [(PNDMScheduler, "scaled_linear")],
)
def test_equals_the_alphas_of_diffusers(scheduler: Any, name: str) -> None:
    """Diffusers multiplies in float32, and under zero SNR Euler's last ᾱ is 2**-24: hence the tolerances."""
    theirs = scheduler(**CONFIGS[name])
    ours = NoiseSchedule.of(read_noise(type(theirs).__name__, theirs.config))
    atol = 1e-7 if name == "zero_snr" else 1e-12
    torch.testing.assert_close(ours.alphas_cumprod[1:], theirs.alphas_cumprod.double(), rtol=2e-5, atol=atol)


@pytest.mark.parametrize("name", CONFIGS)
def test_variance_is_preserved_and_time_0_is_clean(name: str) -> None:
    schedule = schedule_of(CONFIGS[name])
    like = torch.zeros((), dtype=torch.float64)
    alpha, sigma = (torch.stack([f(t, like) for t in range(schedule.T + 1)]) for f in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()


def test_known_numbers_of_stable_diffusion() -> None:
    """ᾱ of network index 0 and 999, and sigma/alpha at quarters, as published for SDXL."""
    schedule, like = NoiseSchedule.scaled_linear(), torch.zeros((), dtype=torch.float64)
    assert schedule.alphas_cumprod[[1, 1000]].tolist() == pytest.approx([0.99915, 0.004660], abs=5e-7)
    ratio = [float(schedule.sigma(t, like) / schedule.alpha(t, like)) for t in (1000, 750, 500, 250)]
    assert ratio == pytest.approx([14.6146, 4.0817, 1.6129, 0.6932], abs=5e-5)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_coefficients_are_float32_or_wider_and_shaped_to_multiply(given: torch.dtype, wanted: torch.dtype) -> None:
    schedule, x = NoiseSchedule.scaled_linear(), torch.zeros(3, 4, 2, 2, dtype=given)
    for f in (schedule.alpha, schedule.sigma):
        batched, single = f(torch.tensor([0, 500, 1000]), x), f(500, x)
        assert batched.shape == (3, 1, 1, 1) and single.shape == ()
        assert batched.dtype == single.dtype == wide(x).dtype == wanted
        assert batched[1, 0, 0, 0] == single
    assert schedule.alphas_cumprod.dtype == torch.float64


def test_noising_is_the_forward_process() -> None:
    schedule = NoiseSchedule.scaled_linear()
    x0, noise = torch.randn(3, 4, 2, 2).bfloat16(), torch.randn(3, 4, 2, 2)
    scheduler: Any = DDIMScheduler(**SD)
    theirs = scheduler.add_noise(x0.float(), noise, torch.tensor([0, 499, 999]))
    torch.testing.assert_close(add_noise(schedule, x0, noise, torch.tensor([1, 500, 1000])), theirs, rtol=0, atol=1e-5)
    assert torch.equal(add_noise(schedule, x0, noise, 0), x0.float())


TRAVELLED = {"vp": NoiseSchedule.scaled_linear(), "flow": NoiseSchedule.linear(shift=3.0)}


@pytest.mark.parametrize("name", TRAVELLED)
def test_travelling_on_from_s_has_the_law_of_noising_to_t(name: str) -> None:
    """In two strides as in one: the shares of the data and the variance of the noise are those of t."""
    schedule, like = TRAVELLED[name], torch.zeros(1, 1, dtype=torch.float64)
    for s, t in ((1, 2), (500, 700), (20, 999), (999, 1000)):
        unit, zero = torch.ones_like(like), torch.zeros_like(like)
        at = torch.tensor([s]), torch.tensor([t])
        r = travel(schedule, unit, at[0], zero, at[1])
        further = travel(schedule, zero, at[0], unit, at[1])
        torch.testing.assert_close(r * schedule.alpha(s, like), schedule.alpha(t, like).expand(1, 1))
        variance = (r * schedule.sigma(s, like)) ** 2 + further**2
        torch.testing.assert_close(variance, (schedule.sigma(t, like) ** 2).expand(1, 1))
        if name == "vp":
            torch.testing.assert_close(further, (1 - r**2).sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TRAVELLED)
def test_travelling_from_clean_data_is_noising_and_to_the_same_time_is_nothing(name: str) -> None:
    schedule, g = TRAVELLED[name], torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 2, 4, 4, generator=g) for _ in range(2))
    t, zero = torch.tensor([1, 500, 1000]), torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(travel(schedule, x, zero, noise, t), add_noise(schedule, x, noise, t))
    assert torch.equal(travel(schedule, x, t, noise, t), x)  # at T of flow matching too, where nothing is left of data


def test_fingerprint_survives_rewriting_the_config() -> None:
    fingerprint = NoiseSchedule.scaled_linear().fingerprint
    betas = (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).tolist()
    scheduler: Any = DDIMScheduler(**SD, steps_offset=1, prediction_type="v_prediction")
    rewritten: list[dict[str, Any]] = [
        json.loads(json.dumps(SD)),
        {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
        {**SD, "beta_start": 8.5e-4, "num_train_timesteps": 1000, "trained_betas": None},
        {**SD, "trained_betas": [float(f"{beta:.12g}") for beta in betas]},
    ]
    assert {schedule_of(c).fingerprint for c in rewritten} == {fingerprint}
    assert fingerprint == "35387325cb55cf0a", "stores written by earlier versions carry this one"


def test_fingerprint_tells_schedules_apart() -> None:
    prints = [schedule_of(c).fingerprint for c in CONFIGS.values()]
    prints += [schedule_of({**SD, "beta_end": 0.01201}).fingerprint]
    prints += [schedule_of({**SD, "num_train_timesteps": 999}).fingerprint]
    table = NoiseSchedule.scaled_linear().alphas_cumprod[1:]
    prints += [NoiseSchedule.vp(table + 2e-6 * (torch.arange(1000) == 400)).fingerprint]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([0.9, 0.95]),
        torch.tensor([0.9, 0.9]),
        torch.tensor([1.0, 0.5]),
        torch.tensor([0.5, -0.1]),
        torch.tensor([0.9, float("nan")]),
        torch.tensor([]),
        torch.tensor(0.5),
        torch.tensor([[0.9, 0.5]]),
    ],
    ids=["rising", "level", "clean", "negative", "nan", "empty", "scalar", "matrix"],
)
def test_refuses_what_is_no_schedule(table: Tensor) -> None:
    with pytest.raises(ValueError, match="^alphas_cumprod must"):
        NoiseSchedule.vp(table)
