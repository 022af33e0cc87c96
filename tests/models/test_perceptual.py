"""The perceptual distance of latents against torchvision's VGG16 and LPIPS's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16, vgg16_bn

from distill.models.perceptual import LatentPerceptual, load_latent_perceptual

CHANNELS = 5


def published(batch_norm: bool) -> dict[str, torch.Tensor]:
    """Random weights under other names: torchvision's, and those of LPIPS for its heads."""
    torch.manual_seed(0)
    features = (vgg16_bn if batch_norm else vgg16)().features
    features[0] = nn.Conv2d(CHANNELS, 64, 3, padding=1)
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    state = {f"net.{name}": x.clone() for name, x in features.state_dict().items()}
    for i, width in enumerate((64, 128, 256, 512, 512)):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return state


def by_hand(state: dict[str, torch.Tensor], batch_norm: bool, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """LPIPS over torchvision's own layers: no pooling but the fourth, taps before the next convolution's level."""
    features = (vgg16_bn if batch_norm else vgg16)().features.eval()
    features[0] = nn.Conv2d(CHANNELS, 64, 3, padding=1)
    features.load_state_dict({n.removeprefix("net."): x for n, x in state.items() if n.startswith("net.")})
    total, pools = torch.zeros(len(a)), 0
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]
            squared = (unit[0] - unit[1]) ** 2
            total += (state[f"lin{pools}.model.1.weight"] * squared).sum(1).mean((1, 2))
            pools += 1
            if pools != 4:
                continue
        a, b = layer(a), layer(b)
    return total


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@torch.no_grad()
def test_weights_of_other_names_give_lpips(batch_norm: bool, ending: str, tmp_path: Path) -> None:
    state, path = published(batch_norm), tmp_path / f"weights.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    distance = load_latent_perceptual(str(path), scale=2.0)
    a, b = torch.randn(2, 3, CHANNELS, 8, 8)
    torch.testing.assert_close(distance(a, b), by_hand(state, batch_norm, 2 * a, 2 * b), rtol=1e-4, atol=1e-6)
    assert (distance(a, b) > 1e-3).all() and torch.equal(distance(a, a), torch.zeros(3))


def test_it_is_differentiable_and_itself_frozen() -> None:
    torch.manual_seed(0)
    distance, a = LatentPerceptual(CHANNELS), torch.randn(2, CHANNELS, 4, 4, requires_grad=True)
    distance(a, torch.randn(2, CHANNELS, 4, 4)).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.any()
    assert not any(p.requires_grad for p in distance.parameters())


def test_a_distance_of_a_sample_is_its_own() -> None:
    torch.manual_seed(0)
    distance = LatentPerceptual(CHANNELS)
    a, b = torch.randn(2, 3, CHANNELS, 8, 8)
    torch.testing.assert_close(distance(a, b)[1:2], distance(a[1:2], b[1:2]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {n: x for n, x in state.items() if "lin3" not in n},
        lambda state: {n: x for n, x in state.items() if "net.28" not in n},
        lambda state: state | {"net.2.weight": torch.zeros(64, 32, 3, 3)},
        lambda state: {"w": torch.zeros(3)},
    ],
)
def test_other_networks_are_refused_in_a_line(spoil, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_file(spoil(published(False)), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w.safetensors is not of a VGG16 of latents: it has \d+ convolutions"):
        load_latent_perceptual(str(tmp_path / "w.safetensors"))
