"""A student with its text encoders and autoencoder in one file, as the original checkpoints: for user interfaces.

ComfyUI, A1111, Forge, InvokeAI and `from_single_file` of diffusers read it. UNet under `model.diffusion_model.`,
autoencoder under `first_stage_model.`, text encoders under `cond_stage_model.` (Stable Diffusion 1.x and 2.x) or
`conditioner.embedders.` (SDXL).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from distill.diffusion.prediction import Prediction
from distill.models.copied import text_tensors
from distill.models.files import rounded, save_file
from distill.models.folder import find_pipeline, read_json, stored_tensors, weight_files
from distill.models.layouts import original_module

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_OPENAIS_ACTIVATION = "quick_gelu"  # OpenAI's CLIP has it, the OpenCLIP models have not
_VELOCITY = "v_pred"  # an empty tensor of this name: how SDXL checkpoints say that they predict the velocity

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


def save_single_file(
    path: Path,
    unet: UNet2DConditionModel,
    pretrained_model_name_or_path: str,
    dtype: torch.dtype,
    prediction: Prediction,
    metadata: Mapping[str, str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> None:
    """Writes `unet` with the autoencoder and the text encoders of the teacher, all in `dtype`.

    Raises:
        FileNotFoundError: the pipeline lacks a file.
        ValueError: a weight that the dtype cannot hold; a network that is not of the original ones' shape.
    """
    names = ("vae", "text_encoder", "text_encoder_2")
    source = find_pipeline(pretrained_model_name_or_path, names, revision, variant)
    tensors = {
        name: rounded(name, tensor.detach(), dtype).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in _all_tensors(source, unet, variant)
    }
    if prediction is Prediction.V and _is_sdxl(unet):
        tensors[_VELOCITY] = torch.empty(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"} | dict(metadata or {}))


def _is_sdxl(unet: UNet2DConditionModel) -> bool:
    return unet.config["addition_embed_type"] == "text_time"


def _all_tensors(source: Path, unet: UNet2DConditionModel, variant: str | None) -> Iterator[tuple[str, Tensor]]:
    yield from original_unet(unet.state_dict(), unet.config)
    levels = len(read_json(source, "vae/config.json")["block_out_channels"])
    yield from original_vae(stored_tensors(weight_files(source, "vae", variant)), levels)
    if _is_sdxl(unet):
        yield from _prefixed("conditioner.embedders.0.transformer.", text_tensors(source, "text_encoder", variant))
        second = open_clip(text_tensors(source, "text_encoder_2", variant))
        yield from _prefixed("conditioner.embedders.1.model.", second)
    elif read_json(source, "text_encoder/config.json").get("hidden_act", _OPENAIS_ACTIVATION) == _OPENAIS_ACTIVATION:
        yield from _prefixed("cond_stage_model.transformer.", text_tensors(source, "text_encoder", variant))
    else:
        yield from _prefixed("cond_stage_model.model.", open_clip(text_tensors(source, "text_encoder", variant)))


def _prefixed(prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((prefix + name, tensor) for name, tensor in tensors)


def original_unet(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A UNet's weights under the original names.

    Raises ValueError for a network that the original code cannot build.
    """
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        yield f"{UNET}{original_module(module, config)}.{kind}", tensor


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
