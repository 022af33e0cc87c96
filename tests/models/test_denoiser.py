"""The wall: whatever a UNet predicts, a NetworkDenoiser answers with the formulas written out here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.diffusion.prediction import Prediction, predictions_of
from distill.diffusion.schedule import NoiseSchedule
from distill.models.denoiser import NetworkDenoiser, bare
from distill.models.lora import add_lora
from tests.tiny import CHANNELS, FAMILIES, tiny_conditioning, tiny_unet

SCHEDULE = NoiseSchedule.scaled_linear()
T = torch.tensor([1, 20, 577, 1000])


def _noisy(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(len(T), CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def _raw(unet: nn.Module, x: Tensor, index: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    added = {key: conditioning[key] for key in ("text_embeds", "time_ids") if key in conditioning}
    return unet(x, index, conditioning["encoder_hidden_states"], added_cond_kwargs=added or None).sample


def _abar(index: Tensor) -> Tensor:
    """Stable Diffusion's cumulative products, from the definition."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0)[index].view(-1, 1, 1, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
@torch.no_grad()
def test_outputs_are_read_by_the_textbook(prediction, family):
    unet, c, x = tiny_unet(family), tiny_conditioning(family, len(T)), _noisy()
    got = NetworkDenoiser(unet, SCHEDULE, prediction)(x, T, c)

    output = _raw(unet, x, T - 1, c).double()
    alpha, sigma = _abar(T - 1).sqrt(), (1 - _abar(T - 1)).sqrt()
    x0, eps = {
        Prediction.EPSILON: lambda: ((x - sigma * output) / alpha, output),
        Prediction.V: lambda: (alpha * x - sigma * output, alpha * output + sigma * x),
        Prediction.SAMPLE: lambda: (output, (x - alpha * output) / sigma),
    }[prediction]()
    torch.testing.assert_close(got.x0.double(), x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.eps.double(), eps, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_clean_sample_is_shown_as_index_0():
    unet, c, x = tiny_unet(), tiny_conditioning("sd15", len(T)), _noisy()
    seen = []
    unet.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    denoised = NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON)(x, torch.tensor([0, 1, 2, 1000]), c)
    assert seen == [[0, 0, 1, 999]]
    assert torch.equal(denoised.x0[0], x[0])


@torch.no_grad()
def test_a_bfloat16_network_meets_float32_arithmetic():
    unet, c = tiny_unet("sdxl").to(torch.bfloat16), tiny_conditioning("sdxl", len(T))
    add_lora(unet, rank=2, alpha=2)  # float32 adapters on a bfloat16 base
    x = _noisy()
    got = NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON)(x, T, c)

    half = {key: tensor.to(torch.bfloat16) for key, tensor in c.items()}
    eps = _raw(unet, x.to(torch.bfloat16), T - 1, half).float()
    assert got.eps.dtype == got.x0.dtype == torch.float32
    assert torch.equal(got.eps, eps)
    alpha, sigma = _abar(T - 1).sqrt().float(), (1 - _abar(T - 1)).sqrt().float()
    torch.testing.assert_close(got.x0, (x - sigma * eps) / alpha, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_picture_sizes_are_not_rounded_to_bfloat16():
    unet, c = tiny_unet("sdxl").to(torch.bfloat16), tiny_conditioning("sdxl", 1)
    c["time_ids"] = torch.tensor([[1023.0, 1023, 0, 0, 1023, 1023]])
    seen = []
    unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON)(_noisy()[:1], T[:1], c)
    assert seen == [[1023, 1023, 0, 0, 1023, 1023]]


@torch.no_grad()
def test_a_guidance_embedding_reaches_the_time_embedding():
    """As the features that diffusers' own pipelines make of `guidance_scale`, less one."""
    unet, w = tiny_unet(time_cond_proj_dim=6), torch.linspace(1, 8, len(T))
    c = tiny_conditioning("sd15", len(T))
    got = NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON)(_noisy(), T, c | {"guidance": w})
    features = StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=6)
    expected = unet(_noisy(), T - 1, c["encoder_hidden_states"], timestep_cond=features).sample
    torch.testing.assert_close(got.eps, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(got.eps, _raw(unet, _noisy(), T - 1, c), atol=1e-3)


@torch.no_grad()
def test_guidance_is_nothing_to_a_network_without_an_embedding_of_it():
    denoiser, c = NetworkDenoiser(tiny_unet(), SCHEDULE, Prediction.EPSILON), tiny_conditioning("sd15", len(T))
    assert torch.equal(denoiser(_noisy(), T, c).eps, denoiser(_noisy(), T, c | {"guidance": torch.ones(len(T))}).eps)


def test_a_network_with_a_guidance_embedding_wants_the_guidance():
    denoiser = NetworkDenoiser(tiny_unet(time_cond_proj_dim=6), SCHEDULE, Prediction.EPSILON)
    with pytest.raises(ValueError, match="the conditioning lacks 'guidance'; it has"):
        denoiser(_noisy(), T, tiny_conditioning("sd15", len(T)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c | {"prompt": T},
            "'prompt' is not known; allowed: encoder_hidden_states, text_embeds, time_ids",
        ),
        (lambda c: {}, "lacks 'encoder_hidden_states'"),
    ],
)
def test_wrong_conditioning_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        denoiser = NetworkDenoiser(tiny_unet(), SCHEDULE, Prediction.EPSILON)
        denoiser(_noisy(), T, change(tiny_conditioning("sd15", len(T))))


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_wrapped_network_is_the_same_denoiser(one_process_group):
    """Also: with adapters off, the wrapped student is still the teacher, and gradients still reach its adapters."""
    unet, c, x = tiny_unet().requires_grad_(False), tiny_conditioning("sd15", len(T)), _noisy()
    teacher = NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON)(x, T, c)
    trained = add_lora(unet, rank=2, alpha=3)
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1)
    student = NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON)
    wrapped = replace(student, module=DistributedDataParallel(unet))

    assert bare(wrapped.module) is unet
    assert wrapped.dtype == torch.float32
    out = wrapped(x, T, c)
    assert torch.equal(out.x0, student(x, T, c).x0)
    assert not torch.equal(out.x0, teacher.x0)
    with torch.no_grad():
        assert torch.equal(replace(wrapped, adapter=None)(x, T, c).x0, teacher.x0)
    out.x0.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_a_denoiser_made_before_the_lora_still_switches_it_off():
    unet, c, x = tiny_unet().requires_grad_(False), tiny_conditioning("sd15", len(T)), _noisy()
    teacher = NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON, adapter=None)
    with torch.no_grad():
        before = teacher(x, T, c).x0
        for parameter in add_lora(unet, rank=2, alpha=3):
            nn.init.normal_(parameter)
        assert torch.equal(teacher(x, T, c).x0, before)
