"""Frozen weights in 8 and 4 bits: how far off, how small, and gradients that go through them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import distill
from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings
from distill.models.lora import add_lora
from distill.models.quantized import BLOCK, KINDS, QuantizedConv2d, QuantizedLinear, is_quantized, quantize
from distill.training.assembly import train_run
from distill.training.fitting import check_quantized
from tests.tiny import CHANNELS, tiny_conditioning, tiny_unet

BITS = {"int8": 8, "nf4": 4}


def quantized(layer: nn.Module, kind: str) -> nn.Module:
    """A layer as `quantize` leaves it: in the place of one in a UNet's blocks."""
    unet = tiny_unet()
    unet.down_blocks[0].resnets[0].conv1 = layer
    quantize(unet, kind)
    return unet.down_blocks[0].resnets[0].conv1


LAYERS = {
    "linear": (nn.Linear(96, 40), torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(0))),
    "convolution": (
        nn.Conv2d(12, 8, 3, stride=2, padding=1),
        torch.randn(3, 12, 9, 9, generator=torch.Generator().manual_seed(0)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_and_differentiates_with_its_rounded_weights(name: str, kind: str) -> None:
    plain, x = LAYERS[name]
    layer = quantized(copy.deepcopy(plain), kind)
    assert isinstance(layer, (QuantizedLinear, QuantizedConv2d))
    rounded = copy.deepcopy(plain)
    rounded.weight.data = layer.unpacked(torch.float32)
    error = (rounded.weight - plain.weight).norm() / plain.weight.norm()
    assert error < {"int8": 0.01, "nf4": 0.12}[kind]
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(layer(found), rounded(wanted))
    layer(found).square().sum().backward(), rounded(wanted).square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_to_bfloat16_loses_nothing_of_codes_and_units(kind: str) -> None:
    layer = quantized(nn.Linear(100, 30), kind)
    before = layer.unpacked(torch.float32)
    assert torch.equal(layer.bfloat16().unpacked(torch.float32), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_weights_is_finite(kind: str) -> None:
    layer = quantized(nn.Linear(BLOCK, 4), kind)
    zero = nn.Linear(BLOCK, 4)
    nn.init.zeros_(zero.weight)
    layer.pack(zero.weight, kind)
    assert not layer.unpacked(torch.float32).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_lora_learns_beside_quantized_weights_that_keep_their_bits(family: str, kind: str) -> None:
    """Through every layer a gradient comes, and what is kept for it is no expanded weight."""
    unet, c = tiny_unet(family).requires_grad_(False), tiny_conditioning(family, 2)
    added = {"added_cond_kwargs": {k: c[k] for k in ("text_embeds", "time_ids")}} if family == "sdxl" else {}
    x = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    call = (x, torch.tensor([5, 900]), c["encoder_hidden_states"])
    exact = unet(*call, **added)[0]
    sizes = {tuple(layer.weight.shape) for layer in unet.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    blocks = [p for n, p in unet.named_parameters() if "_block" in n and p.ndim > 1]
    quantize(unet, kind)
    packed = sum(p.nbytes for p in unet.parameters() if not p.is_floating_point())
    assert is_quantized(unet) and packed == pytest.approx(sum(p.numel() for p in blocks) * BITS[kind] / 8, rel=0.05)

    add_lora(unet, 2, 2)
    off = (unet(*call, **added)[0] - exact).norm() / exact.norm()  # the adapters are of no effect yet
    assert off < {"int8": 0.02, "nf4": 0.3}[kind]
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = unet(*call, **added)[0].square().sum()
    loss.backward()
    missing = [n for n, p in unet.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    assert [n for n in missing if "to_q" not in n and "to_k" not in n] == []  # one key: attention has no gradient
    ends = {tuple(layer.weight.shape) for layer in (unet.conv_in, unet.conv_out)}
    assert not {tuple(shape) for shape in kept if len(shape) == 4} & (sizes - ends)


def settings(*given: str) -> TrainSettings:
    return load("train", TrainSettings, ("experiment=quickstart", "data.store=S", "quantize=int8", *given))


@pytest.mark.parametrize(
    ("given", "trained", "line"),
    [
        (["student=full"], ["student"], "the student is fully trained: set student=lora$"),
        (
            ["networks=critics"],
            ["student", "discriminator"],
            "the discriminator is fully trained: set networks.discriminator.rank, or networks=adapters$",
        ),
        (["networks=critics"], ["student"], ""),  # where no method trains the critics
        (["networks=adapters"], ["student", "discriminator", "fake_score"], ""),
    ],
)
def test_a_network_that_is_fully_trained_beside_quantized_weights_is_one_line(
    given: list[str], trained: list[str], line: str
) -> None:
    cfg = settings(*given)
    if not line:
        return check_quantized(cfg, trained)
    with pytest.raises(ConfigError, match=f"^quantize=int8 is for frozen weights, and {line}"):
        check_quantized(cfg, trained)


def test_zero3_and_quantized_weights_are_one_line_with_the_engine_that_takes_them(tmp_path: Path) -> None:
    """Of the whole command, which has opened its store and its networks by then."""
    store = tmp_path / "store"
    written = ["experiment=quickstart", "engine=single", "data.num_samples=4", "data.solver_steps=5"]
    distill.trajectories(*written, f"data.store={store}", "data.batch_size=4")
    cfg = settings(f"data.store={store}", "data.solver_steps=5", f"output_dir={tmp_path}/run", "engine=zero3")
    with pytest.raises(ConfigError, match="^engine=zero3 does not shard quantized weights, .* student .*: use zero2$"):
        train_run(cfg)


def test_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="quantize must be one of int8, nf4, or null, got 'int3'"):
        quantize(tiny_unet(), "int3")
