"""The original code's layouts of what diffusers and transformers name otherwise: networks, autoencoders, text encoders.

What is told here is names, layers that read the same and are one there, and matrices that are transposed there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.models.folder import read_json, stored_tensors, weight_files

NETWORK, VAE = "model.diffusion_model.", "first_stage_model."
"""How the names of a network's and an autoencoder's weights begin in a file of several parts."""
_VAE_BLOCK_PARTS = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_EARLIER = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # names of diffusers before 0.17
_CLIP_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}

Layers = Mapping[str, tuple[str, ...]]
"""The layers of a block there, each with the modules here that it is made of, whose outputs follow each other. A name
that ends in `.scale` is that of a weight."""


@dataclass(frozen=True)
class OriginalNames:
    """What the original code of a transformer calls its weights.

    Args:
        blocks: for each list of blocks here its name there, and its layers.
        ends: names there by those here, of modules outside of the blocks, and of weights that belong to no module.
        others: whether a module that is named nowhere has the same name there; else there is no such module.
        swapped: modules of which the first half of the outputs is the second half there.
    """

    blocks: Mapping[str, tuple[str, Layers]]
    ends: Mapping[str, str]
    others: bool = False
    swapped: tuple[str, ...] = ()

    def tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """A network's weights under the original names.

        Raises:
            ValueError: a weight that the original network does not have, or lacks a part of.
        """
        fused: dict[str, dict[int, Tensor]] = {}
        parts: dict[str, int] = {}
        for name, tensor in state.items():
            module, _, kind = name.rpartition(".")
            tensor = tensor if module not in self.swapped else torch.cat(tensor.chunk(2)[::-1])
            key, place, parts_of = self._place(name, module, kind)
            if parts_of == 1:
                yield key, tensor
                continue
            parts[key] = parts_of
            found = fused.setdefault(key, {})
            found[place] = tensor
            if len(found) == parts_of:
                yield key, torch.cat([found[i] for i in range(parts_of)])
                del fused[key]
        for key, found in fused.items():
            raise ValueError(f"{key} of the original network is made of {parts[key]} layers, {len(found)} are there")

    def _place(self, name: str, module: str, kind: str) -> tuple[str, int, int]:
        """The original name of a weight, and which part it is of how many."""
        if name in self.ends:
            return self.ends[name], 0, 1
        if module in self.ends:
            return f"{self.ends[module]}.{kind}", 0, 1
        inside = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module)
        if inside and inside[1] in self.blocks:
            group, layers = self.blocks[inside[1]]
            for layer, modules in layers.items():
                if inside[3] in modules:
                    key = f"{group}.{inside[2]}.{layer}"
                    key = key if layer.endswith(".scale") else f"{key}.{kind}"
                    return key, modules.index(inside[3]), len(modules)
        if self.others:
            return name, 0, 1
        raise ValueError(f"the original network has no {name}")


# ---- autoencoders and text encoders ---------------------------------------------------------------------------------


def prefixed(prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with something before their names."""
    return ((prefix + name, tensor) for name, tensor in tensors)


def stored_vae(source: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
    """The autoencoder of the pipeline in `source` under the original names; raises like `original_vae`."""
    levels = len(read_json(source, "vae/config.json")["block_out_channels"])
    return original_vae(stored_tensors(weight_files(source, "vae", variant)), levels)


def original_vae(tensors: Iterable[tuple[str, Tensor]], levels: int) -> Iterator[tuple[str, Tensor]]:
    """An AutoencoderKL's weights under the original names; its attention's matrices become 1x1 convolutions.

    Args:
        levels: how many there are; the original counts those of the decoder from the other end.

    Raises:
        ValueError: a weight that the original autoencoder does not have.
    """
    for name, tensor in tensors:
        module, _, kind = name.rpartition(".")
        path = _vae_module(module, levels)
        if re.search(r"\.attn_1\.(q|k|v|proj_out)$", path) and kind == "weight" and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        yield f"{VAE}{path}.{kind}", tensor


def _vae_module(module: str, levels: int) -> str:
    if module in ("quant_conv", "post_quant_conv"):
        return module
    if found := re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out)", module):
        return module
    if found := re.fullmatch(r"(encoder|decoder)\.conv_norm_out", module):
        return f"{found[1]}.norm_out"
    if found := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", module):
        level = int(found[3]) if found[2] == "down" else levels - 1 - int(found[3])
        return f"{found[1]}.{found[2]}.{level}.block.{found[4]}.{_VAE_BLOCK_PARTS.get(found[5], found[5])}"
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"encoder.down.{found[1]}.downsample.conv"
    if found := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv", module):
        return f"decoder.up.{levels - 1 - int(found[1])}.upsample.conv"
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.([01])\.(\w+)", module):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{_VAE_BLOCK_PARTS.get(found[3], found[3])}"
    parts = _VAE_ATTENTION | _VAE_EARLIER
    found = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", module)
    if found and found[2] in parts:
        return f"{found[1]}.mid.attn_1.{parts[found[2]]}"
    raise ValueError(f"the original autoencoder has no {module}")


def open_clip(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A CLIP text encoder's weights, by the names of `text_tensors`, under those of OpenCLIP.

    Its query, key and value are one matrix, in this order, and its projection is transposed.

    Raises:
        ValueError: a weight that OpenCLIP's text encoder does not have.
    """
    inputs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in _CLIP_ENDS:
            yield _CLIP_ENDS[name], tensor
        elif name == "text_projection.weight":
            yield "text_projection", tensor.T
        elif found and found[2] in _CLIP_PARTS:
            yield f"transformer.resblocks.{found[1]}.{_CLIP_PARTS[found[2]]}.{found[3]}", tensor
        elif found and found[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            three = inputs.setdefault(f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}", {})
            three[found[2][-6]] = tensor
        elif not name.endswith("position_ids"):
            raise ValueError(f"OpenCLIP's text encoder has no {name}")
    for name, three in inputs.items():
        yield name, torch.cat([three[part] for part in "qkv"])
