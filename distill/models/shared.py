"""Networks on the weights of another one: modules of their own around the very same tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def on_the_weights_of(module: M, replaced: Mapping[int, Any] | None = None) -> M:
    """A network that computes with the parameters and buffers of `module`: the same objects, in memory once.

    Its modules are its own. So adapters that are added to it, gradient checkpointing and train or eval mode are unknown
    to the other network, and a backward pass recomputes with the adapters that the forward pass had.

    Args:
        replaced: parts that it has something else for, by the `id` of the part in `module`.
    """
    tensors = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, {**tensors, **(replaced or {})})


def part_from(module: nn.Module, others: Iterable[nn.Module]) -> None:
    """Gives `module` frozen copies of its own of the weights that it shares with one of `others`."""
    theirs = {id(p) for other in others if other is not module for p in other.parameters()}
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if id(p) in theirs:
                part.register_parameter(name, nn.Parameter(p.detach().clone(), requires_grad=False))
