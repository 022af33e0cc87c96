"""Distances between latents. Each returns one number a sample, [B], in float32 or wider: the mean over its elements."""

from __future__ import annotations

from torch import Tensor

from distill.diffusion.schedule import wide


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of [B, ...]."""
    return (wide(a) - wide(b)).pow(2).flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """sqrt(d² + c²) - c of each element's difference d, as in the LCM scripts: |d| far from 0, d²/2c near it."""
    return ((wide(a) - wide(b)).pow(2) + c**2).sqrt().sub(c).flatten(1).mean(1)
