"""A network that ends in its middle, for a critic."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from distill.models.shared import on_the_weights_of


def cut_off(
    network: Any, replaced: Mapping[nn.Module, nn.Module], dropped: Iterable[nn.Module], on_its_weights: bool
) -> Any:
    """`network` with other modules in the place of some: on its weights, or a copy whose weights require a gradient.

    Args:
        replaced: by the modules of `network`.
        dropped: blocks that are not wanted, and not copied: there is nothing in their place, and the caller takes them
            out of their list.
    """
    others: dict[int, Any] = {id(old): new for old, new in replaced.items()}
    others |= {id(block): nn.Identity() for block in dropped}
    if on_its_weights:
        return on_the_weights_of(network, others)
    return copy.deepcopy(network, others).requires_grad_(True)


class FirstInput(nn.Module):
    """Gives back its first input: in the place of a normalisation that is told a time beside it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x, as it is."""
        return x
