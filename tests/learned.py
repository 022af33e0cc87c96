"""For tests of methods with several networks: a discriminator of one weight, and steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.diffusion.adversarial import Origin
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import Context
from distill.diffusion.trajectory import Batch
from distill.methods.base import Method


class LinearCritic(nn.Module):
    """A discriminator of one weight; notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.shown: list[Any] = []

    def forward(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        self.shown.append((list(samples), t, origin))
        return [self.weight * x.flatten(1).sum(1) for x in samples]


def train(method: Method, networks: Mapping[str, Any], batch: Batch, rates: Mapping[str, float], steps: int) -> None:
    """Steps of Adam on every turn of a method, each step at positions of its own with the states of one batch."""
    n = len(batch)
    optimizers = {name: torch.optim.Adam(networks[name].parameters(), rate) for name, rate in rates.items()}
    for step in range(steps):
        positions = tuple(range(n * step, n * (step + 1)))
        placed = replace(batch, positions=positions)
        for turn in method.turns(step):
            optimizers[turn.updates].zero_grad()
            turn.loss(networks, placed, Context(0, step, positions)).total.backward()
            optimizers[turn.updates].step()
