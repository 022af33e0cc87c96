"""Exponential moving averages of weights: average <- decay average + (1 - decay) weight, in float32 or wider."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def average_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """One update, in place, of averages that lie on the devices of their values."""
    torch._foreach_lerp_(list(averages), [v.to(a.dtype) for a, v in zip(averages, values, strict=True)], 1 - decay)
