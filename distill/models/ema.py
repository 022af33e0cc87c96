"""Exponential moving averages of weights: shadow <- decay shadow + (1 - decay) weight, in float32 or wider."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from distill.diffusion.schedule import wide


@torch.no_grad()
def average_(shadows: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """One update, in place, of shadows that lie on the devices of their values."""
    torch._foreach_lerp_(list(shadows), [v.to(s.dtype) for s, v in zip(shadows, values, strict=True)], 1 - decay)


class EMA:
    """The moving average of named tensors. Call `update` after each optimizer step that was really taken.

    Args:
        tensors: what to follow; the average starts at their values.
        decay: share of the old average that an update keeps, in [0, 1).
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.shadows = {name: wide(tensor.detach()).clone() for name, tensor in tensors.items()}

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Moves the average towards `tensors`, which must have the names it was made with."""
        _same_names(self.shadows, tensors)
        average_(list(self.shadows.values()), [tensors[name] for name in self.shadows], self.decay)

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, `tensors` (the live parameters) hold the average; afterwards their own values again."""
        _same_names(self.shadows, tensors)
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        _copy(self.shadows, tensors)
        try:
            yield
        finally:
            _copy(kept, tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """The average itself, not a copy."""
        return dict(self.shadows)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the values of an average of the same names."""
        _same_names(self.shadows, state)
        _copy(state, self.shadows)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _same_names(shadows: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(shadows.keys() ^ tensors.keys()):
        raise ValueError(f"EMA: {name!r} is {'missing' if name in shadows else 'not among the averaged tensors'}")
