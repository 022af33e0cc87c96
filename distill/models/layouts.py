"""Names that other programs give the weights of Stable Diffusion: the original checkpoints' and kohya-ss'.

The original code (CompVis, then Stability's `sgm`) numbers a UNet's blocks through, `input_blocks.1.0`, where diffusers
counts within levels, `down_blocks.0.resnets.0`. kohya-ss writes a LoRA's module as `lora_unet_` and its path with
underscores: diffusers' path for Stable Diffusion 1.x and 2.x, the original one for SDXL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.models.files import rounded

_BLOCK_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
_PREFIX = "lora_unet_"
_MOST_BLOCKS = 10  # diffusers finds the keys of block 1 by a text that block 10 begins with as well


def original_module(module: str, unet: Mapping[str, Any]) -> str:
    """The original path of a UNet's module, `input_blocks.1.0.in_layers.2` for `down_blocks.0.resnets.0.conv1`.

    Args:
        module: diffusers' path.
        unet: the UNet's config.

    Raises:
        ValueError: a module that the original networks do not have.
    """
    if module in _ENDS:
        return _ENDS[module]
    layers = unet["layers_per_block"]
    if not isinstance(layers, int):
        raise ValueError(f"the original layout has one number of layers in all blocks, this network has {layers}")
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module)
    if found:
        side, level, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        first = level * (layers + 1) + (side == "down")
        inner = {"resnets": "0", "attentions": "1"}
        if kind in inner:
            name = f"{first + number}.{inner[kind]}.{_BLOCK_PARTS.get(rest, rest) if kind == 'resnets' else rest}"
        elif kind == "downsamplers" and rest == "conv":
            name = f"{first + layers}.0.op"
        elif kind == "upsamplers" and rest == "conv":
            name = f"{first + layers}.{2 if _attends(unet, level) else 1}.conv"
        else:
            raise ValueError(f"the original networks have no {module}")
        return f"{'input' if side == 'down' else 'output'}_blocks.{name}"
    found = re.fullmatch(r"mid_block\.(\w+\.\d)\.(.+)", module)
    if found and found[1] in _MIDDLE:
        rest = _BLOCK_PARTS.get(found[2], found[2]) if found[1].startswith("resnets") else found[2]
        return f"middle_block.{_MIDDLE[found[1]]}.{rest}"
    raise ValueError(f"the original networks have no {module}")


def _attends(unet: Mapping[str, Any], level: int) -> bool:
    return "CrossAttn" in unet["up_block_types"][level]


# ---- LoRA files -----------------------------------------------------------------------------------------------------


def kohya_modules(modules: Iterable[str], unet: Mapping[str, Any], original_names: bool) -> dict[str, str]:
    """The key of each of a UNet's modules in a kohya-ss file.

    With `original_names`, SDXL's, they are the original paths, which alone A1111 reads to the last module, unless
    diffusers would misread them: it recognises an upsampler by its place behind an attention, and blocks by the
    beginning of their numbers.
    """
    original = original_names and _read_as_sgm(unet)
    paths = {module: original_module(module, unet) if original else module for module in modules}
    return {module: _PREFIX + path.replace(".", "_") for module, path in paths.items()}


def _read_as_sgm(unet: Mapping[str, Any]) -> bool:
    layers, levels = unet["layers_per_block"], len(unet["up_block_types"])
    upsampled = range(levels - 1)  # all but the last
    return (
        isinstance(layers, int)
        and (layers + 1) * levels <= _MOST_BLOCKS
        and all(_attends(unet, level) for level in upsampled)
    )


def kohya_state_dict(
    weights: Mapping[str, Tensor],
    alpha: float,
    unet: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    original_names: bool = False,
) -> dict[str, Tensor]:
    """A LoRA by peft's names, `<module>.lora_A.weight`, as `<key>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Readers compute `alpha / rank * up down x`. Alpha is float32 in a file of any dtype: readers take it as a number,
    and a half would round it.

    Args:
        unet: the UNet's config.
        original_names: see `kohya_modules`.

    Raises:
        ValueError: a value that the dtype cannot hold.
    """
    keys = kohya_modules({name.rsplit(".", 2)[0] for name in weights}, unet, original_names)
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, factor, _ = name.rsplit(".", 2)
        named[f"{keys[module]}.{_FACTORS[factor]}.weight"] = rounded(name, tensor, dtype)
        named[f"{keys[module]}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return named


def peft_state_dict(
    tensors: Mapping[str, Tensor], modules: Iterable[str], unet: Mapping[str, Any], original_names: bool = False
) -> dict[str, Tensor]:
    """What `kohya_state_dict` wrote, by peft's names; a key of none of the `modules` keeps its name."""
    known = {key: module for module, key in kohya_modules(modules, unet, original_names).items()}
    factors = {down: factor for factor, down in _FACTORS.items()}
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.partition(".")
        if kind != "alpha":
            factor = kind.removesuffix(".weight")
            named[f"{known.get(module, module)}.{factors.get(factor, factor)}.weight"] = tensor
    return named
