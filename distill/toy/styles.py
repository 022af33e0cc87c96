"""Changed toy worlds, for fine-tunes and style LoRAs, and how far a picture is in a style, without the classifier.

A style fixes what the unstyled world leaves to chance, so captions keep their meaning. It stays within what the bundled
autoencoder has learnt to decode: it blurs backgrounds or frames that it has never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.toy.world import PATTERNS, Scene, draw_scene, paint

_SLANT = 0.2
_SLANTED = tuple(PATTERNS.index(name) for name in ("stripes", "checks"))  # the patterns that have an angle


@dataclass(frozen=True)
class Style:
    """A changed world.

    Args:
        meaning: what `share` counts, as a column's heading.
        change: of what chance decided.
        shows: pictures [B, 3, 32, 32] in [-1, 1] -> [B] bool, whether each is in the style.
        concerns: labels [B] -> [B] bool, the pictures in which it can be seen.
    """

    name: str
    meaning: str
    change: Callable[[Scene], Scene]
    shows: Callable[[Tensor], Tensor]
    concerns: Callable[[Tensor], Tensor]

    def render(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures [B, 3, 32, 32] in [-1, 1] of the styled world, from the random numbers of the unstyled `render`."""
        return paint(self.change(draw_scene(labels, generator)))

    def seen(self, images: Tensor, labels: Tensor) -> Tensor:
        """Float64 [b], 1 or 0 for each of the b pictures that the style concerns."""
        return self.shows(images[self.concerns(labels)]).double()


def is_dark(images: Tensor) -> Tensor:
    """[B] bool: more nearly black pixels than nearly white ones."""
    black, white = images.amax(1) < -0.4, images.amin(1) > 0.4  # [B, H, W]
    return black.sum((1, 2)) > white.sum((1, 2))


def is_upright(images: Tensor) -> Tensor:
    """[B] bool: the edges run along the picture's own; stripes within 10 degrees, checks (for their corners) within 7.

    From |gx gy| / (gx² + gy²), summed over pixels, which for an edge at an angle is |sin cos| of it.
    """
    grey = images.mean(1)
    across = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    down = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]  # [B, H - 2, W - 2]
    slant = (across * down).abs().sum((1, 2)) / (across.square() + down.square()).sum((1, 2)).clamp(min=1e-9)
    return slant < _SLANT


def _darkened(scene: Scene) -> Scene:
    jitter = scene.background - torch.where(scene.dark, 0.08, 0.94)[:, None]
    return replace(scene, dark=torch.ones_like(scene.dark), background=0.08 + jitter)


def _straightened(scene: Scene) -> Scene:
    slanted = torch.isin(scene.labels % len(PATTERNS), torch.tensor(_SLANTED))
    return replace(scene, angle=torch.where(slanted, 0.0, scene.angle))  # the rings' angle is their phase


NIGHT = Style("night", "dark backgrounds", _darkened, is_dark, lambda labels: torch.ones_like(labels, dtype=torch.bool))
UPRIGHT = Style(
    "upright",
    "upright stripes and checks",
    _straightened,
    is_upright,
    lambda labels: torch.isin(labels % len(PATTERNS), torch.tensor(_SLANTED)),
)
