"""The perceptual distance of latents against torchvision's VGG16 and LPIPS's formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16, vgg16_bn

from distill.config.loading import ConfigError, load
from distill.config.settings import LatentLPIPSSettings
from distill.diffusion.losses import l2
from distill.diffusion.random import generator
from distill.models.families.loading import load_teacher
from distill.models.perceptual import LatentPerceptual, load_latent_perceptual
from distill.studies import latent_lpips
from distill.toy.teacher import teacher_folder

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


def settings(tmp_path: Path, *more: str) -> LatentLPIPSSettings:
    given = [f"output_dir={tmp_path / 'out'}", "steps=2", "batch_size=3", "pictures=4", *more]
    return load("latent_lpips", LatentLPIPSSettings, given)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_published_weights_are_converted_and_mean_the_same(batch_norm: bool, tmp_path: Path) -> None:
    save_file(published(batch_norm), tmp_path / "weights.safetensors")
    latent_lpips.main(settings(tmp_path, f"weights={tmp_path}/weights.safetensors"))
    before = load_latent_perceptual(str(tmp_path / "weights.safetensors"))
    after = load_latent_perceptual(str(tmp_path / "out" / latent_lpips.FILE))
    a, b = torch.randn(2, 3, CHANNELS, 8, 8)
    assert torch.equal(before(a, b), after(a, b)) and before(a, b).any()


def test_a_pickle_is_not_converted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only .safetensors files are converted, for a pickle may hold code"):
        latent_lpips.main(settings(tmp_path, f"weights={tmp_path}/weights.pth"))


def test_weights_are_trained_on_the_toy_world_and_can_be_used(tmp_path: Path) -> None:
    """Two steps: the loss of the very triplets that a step learns from is smaller after it."""
    cfg = settings(tmp_path, "learning_rate=1e-4")
    teacher = load_teacher(teacher_folder(), parts=("vae",))
    latent_lpips.main(cfg)
    after = load_latent_perceptual(str(tmp_path / "out" / latent_lpips.FILE))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 <= report["right"] <= 1 and report["triplets"] == 4
    assert all((head.weight >= 0).all() for head in after.heads)
    original, near, far = latent_lpips.triplets(teacher, 3, generator("latent lpips", cfg.seed, 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        before = LatentPerceptual(4)
        latent_lpips.start(before)
    with torch.no_grad():
        apart = [float((model(original, near) - model(original, far)).mean()) for model in (before, after)]
    assert apart[1] < apart[0]


def test_what_is_further_away_is_so_and_triplets_depend_on_their_draw_alone() -> None:
    teacher = load_teacher(teacher_folder(), parts=("vae",))
    original, near, far = latent_lpips.triplets(teacher, 60, generator("triplets"))
    again = latent_lpips.triplets(teacher, 60, generator("triplets"))
    assert all(torch.equal(a, b) for a, b in zip((original, near, far), again, strict=True))
    assert float((l2(original, near) < l2(original, far)).double().mean()) > 0.6
