"""A perceptual distance of latents: LPIPS (Zhang et al. 2018, arXiv 1801.03924) with a VGG16 that reads latents.

Latents are small already, so the first three of its poolings are left out (TLCM, arXiv 2406.05768v6, section 4.3;
E-LatentLPIPS, Kang et al. 2024, arXiv 2405.05967). Weights are the user's; some published ones forbid commercial use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.rewards import load_weights

LEVELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
POOLED = 3  # the level after the only pooling that is left


class LatentPerceptual(nn.Module):
    """The distance [B] of latents a and b [B, C, h, w], differentiable in both; its own weights are frozen.

    Args:
        channels: C.
        batch_norm: whether each convolution is followed by one.
        scale: what latents are multiplied by first, if the weights expect others than the teacher's.
    """

    def __init__(self, channels: int = 4, batch_norm: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        widths = [channels, *(width for level in LEVELS for width in level)]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.convolutions = nn.ModuleList(nn.Conv2d(n, m, 3, padding=1) for n, m in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(m) if batch_norm else nn.Identity() for _, m in pairs)
        self.heads = nn.ModuleList(nn.Conv2d(level[-1], 1, 1, bias=False) for level in LEVELS)
        self.requires_grad_(False).eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """The last activations of each of the five levels, [B, width, ., .]."""
        found, layers = [], iter(zip(self.convolutions, self.norms, strict=True))
        for i, level in enumerate(LEVELS):
            x = F.max_pool2d(x, 2) if i > POOLED else x
            for _ in level:
                convolution, norm = next(layers)
                x = F.relu(norm(convolution(x)))
            found.append(x)
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared differences of unit features, weighed by the heads, averaged over places, added over levels."""
        both = self.features(self.scale * torch.cat([a, b]).float())
        distance = a.new_zeros(len(a), dtype=torch.float32)
        for found, head in zip(both, self.heads, strict=True):
            unit = found / (found.square().sum(1, keepdim=True).sqrt() + 1e-10)
            one, other = unit.chunk(2)
            distance = distance + head((one - other).square()).flatten(1).mean(1)
        return distance


def load_latent_perceptual(path: str, scale: float = 1.0) -> LatentPerceptual:
    """A `LatentPerceptual` from a state dict, whose layers are taken in the order of the numbers in their names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds more than plain tensors, or other layers than the 13 convolutions and 5 heads.
    """
    found = load_weights(path)
    weights = {name: found[name] for name in sorted(found, key=_natural)}
    convolutions = [n for n, x in weights.items() if x.ndim == 4 and x.shape[-1] == 3]
    heads = [n for n, x in weights.items() if x.ndim == 4 and x.shape[-1] == 1]
    norms = [n.removesuffix(".running_mean") for n in weights if n.endswith(".running_mean")]
    channels = weights[convolutions[0]].shape[1] if convolutions else 0
    model = LatentPerceptual(max(1, channels), bool(norms), scale)
    try:
        _take(model.convolutions, [n.removesuffix(".weight") for n in convolutions], weights)
        _take(model.heads, [n.removesuffix(".weight") for n in heads], weights)
        if norms:
            _take(model.norms, norms, weights)
    except (KeyError, RuntimeError, ValueError):
        raise ValueError(
            f"{path} is not of a VGG16 of latents: it has {len(convolutions)} convolutions of 3 x 3 and {len(heads)} "
            f"heads, wanted are {len(model.convolutions)} and {len(model.heads)} of VGG16's widths"
        ) from None
    return model


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders names by the numbers in them: a safetensors file has them by their letters."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _take(layers: nn.ModuleList, names: Sequence[str], weights: Mapping[str, Tensor]) -> None:
    """Fills layers, in their order, from the weights of these names. Raises ValueError: not as many; KeyError."""
    for layer, name in zip(layers, names, strict=True):
        own = [key for key in layer.state_dict() if key != "num_batches_tracked"]
        layer.load_state_dict({key: weights[f"{name}.{key}"] for key in own}, strict=False)
