"""The published networks at full size, with random weights: for what can be measured without a download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from distill.diffusion.random import generator
from distill.models.families.base import Family
from distill.models.families.registry import published


def network_config(name: str) -> dict[str, Any]:
    """The config of a published network: `sd15` (860 M parameters), `sdxl` (2.6 B), `ssd1b` (1.3 B), ...

    Raises:
        ValueError: a name that is not known.
    """
    return dict(published(name)[1].network)


def published_name(family: Family, config: Mapping[str, Any]) -> str | None:
    """Which of a family's has the sizes of a network's config; None for another one.

    A fine-tune has those of its base.
    """
    for name, known in family.full_size.items():
        sizes = {key: value for key, value in known.network.items() if key != "sample_size"}
        if all(_plain(config.get(key)) == _plain(value) for key, value in sizes.items()):
            return name
    return None


def _plain(value: Any) -> Any:
    """Lists in the place of tuples, however deep."""
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def build_unet(
    config: Mapping[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> UNet2DConditionModel:
    """A UNet with random weights; see `build_network`."""
    return build_network("UNet2DConditionModel", config, device, dtype, seed)


def build_network(
    kind: str,
    config: Mapping[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """A network with random weights, for checks of memory, speed and shapes; on `meta` it holds none at all.

    Far faster than the constructor: one block of normal numbers, repeated and scaled by 1/sqrt(fan-in).

    Args:
        kind: its class in diffusers.
    """
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**config)
        nn.Module.to(network, dtype)  # diffusers' own `to` warns of nothing
    if torch.device(device).type == "meta":
        return network
    network.to_empty(device=device)
    block = torch.randn(1_000_003, generator=generator("unet", seed)).to(device, dtype)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            _tile(parameter.data, block, scale=parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)  # norms and biases
    for buffer in network.buffers():  # tables that their constructors would have filled
        if buffer.is_floating_point():
            _tile(buffer, block, scale=1.0)
    return network


def _tile(target: Tensor, block: Tensor, scale: float) -> None:
    for piece in target.view(-1).split(len(block)):
        torch.mul(block[: len(piece)], scale, out=piece)


unet_config = network_config
"""Its earlier name."""
