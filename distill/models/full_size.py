"""The published UNets at full size, with random weights: for what can be measured without a download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from distill.diffusion.random import generator

_SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,  # heads, in spite of the name
    "cross_attention_dim": 768,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SSD1B: dict[str, Any] = _SDXL | {
    "mid_block_type": "UNetMidBlock2D",  # one residual block
    "transformer_layers_per_block": [0, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
_UNETS = {"sd15": _SD15, "sdxl": _SDXL, "ssd1b": _SSD1B}


def unet_config(name: str) -> dict[str, Any]:
    """The config of a published UNet: `sd15` (860 M parameters), `sdxl` (2.6 B) or `ssd1b` (1.3 B)."""
    if name not in _UNETS:
        raise ValueError(f"UNet {name!r} is not known; allowed: {', '.join(_UNETS)}")
    return dict(_UNETS[name])


def published_name(config: Mapping[str, Any]) -> str | None:
    """Which of them has the sizes of a UNet's config; None for another network. A fine-tune has those of its base."""
    for name, known in _UNETS.items():
        if all(_plain(config.get(key)) == _plain(value) for key, value in known.items() if key != "sample_size"):
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
    """A UNet with random weights, for checks of memory, speed and shapes; on `meta` it holds none at all.

    Far faster than the constructor: one block of normal numbers, repeated and scaled by 1/sqrt(fan-in).
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        nn.Module.to(unet, dtype)  # diffusers' own `to` warns of nothing
    if torch.device(device).type == "meta":
        return unet
    unet.to_empty(device=device)
    block = torch.randn(1_000_003, generator=generator("unet", seed)).to(device, dtype)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            _tile(parameter.data, block, scale=parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)  # norms and biases
    return unet


def _tile(target: Tensor, block: Tensor, scale: float) -> None:
    for piece in target.view(-1).split(len(block)):
        torch.mul(block[: len(piece)], scale, out=piece)
