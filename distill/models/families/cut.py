"""A network that ends in its middle, for a critic."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
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


LEVELS = 4
"""Depths at which heads of a critic may read a transformer."""


def earlier_levels(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The last of each quarter of the blocks that a critic keeps, but for the last quarter; fewer of few blocks."""
    ends = sorted({-(-len(blocks) * i // LEVELS) - 1 for i in range(1, LEVELS + 1)})
    return [blocks[i] for i in ends[:-1]]


def map_of(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens [B, h w, width], row by row, as a map [B, width, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, size)


def image_map(output: Any, size: tuple[int, int]) -> Tensor:
    """The image's tokens as a map of `size` (h, w), in the output of a block in which text comes first.

    One of two streams puts out the text's tokens and the image's; one of a single stream, all in a row.
    """
    tokens = output[1] if isinstance(output, tuple) else output
    return map_of(tokens[:, -size[0] * size[1] :], size)
