"""What the families with a UNet share: Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from distill.diffusion.guidance import guidance_embedding
from distill.diffusion.noise import short
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import generator
from distill.models.checks import levels, positive
from distill.models.execution import bare
from distill.models.families.base import (
    Config,
    CriticFeatures,
    Family,
    Guidance,
    LoRA,
    LoRAFile,
    Network,
    OneFile,
    Size,
    Text,
)
from distill.models.families.towers import TextTower
from distill.models.layouts import kohya_state_dict, original_module, peft_state_dict
from distill.models.original import NETWORK, stored_vae
from distill.models.shared import on_the_weights_of

TEXT = "encoder_hidden_states"
_GUIDANCE = "guidance"
_ADDED = ("text_embeds", "time_ids")  # diffusers wants these inside the keyword `added_cond_kwargs`
_NUMBERS = ("time_ids",)  # pixel counts: bfloat16 would round 1023 to 1024
MOST_SIDE = 8192
"""The largest side of latents: a picture has 65,536 pixels per side."""

LCM_LORA_TARGETS: tuple[str, ...] = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Module name suffixes that LCM-LoRA (arXiv 2311.05556) adapts: all of the UNet but its ends and its embeddings."""


class UNetFamily(Family):
    """A family whose network is a UNet2DConditionModel."""

    def predict(
        self, module: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        keywords = unet_keywords(conditioning, dtype, guidance_width(bare(module)))
        return module(x_t.to(dtype), told, return_dict=False, **keywords)[0]


def guidance_width(unet: Any) -> int | None:
    """Width of the features in which a UNet is shown a guidance weight; None if it takes none."""
    return getattr(getattr(unet, "config", None), "time_cond_proj_dim", None)


def unet_keywords(
    conditioning: Conditioning, dtype: torch.dtype, guidance_dim: int | None
) -> dict[str, Tensor | Mapping[str, Tensor]]:
    """The UNet's keyword arguments for a flat conditioning."""
    allowed = (TEXT, *_ADDED, _GUIDANCE)
    for key in conditioning:
        if key not in allowed:
            raise ValueError(f"conditioning {key!r} is not known; allowed: {', '.join(allowed)}")
    for key in [TEXT] if guidance_dim is None else [TEXT, _GUIDANCE]:
        if key not in conditioning:
            raise ValueError(f"the conditioning lacks {key!r}; it has {sorted(conditioning)}")
    keywords: dict[str, Any] = {TEXT: conditioning[TEXT].to(dtype)}
    if guidance_dim is not None:
        keywords["timestep_cond"] = guidance_embedding(conditioning[_GUIDANCE], guidance_dim).to(dtype)
    if added := {k: x if k in _NUMBERS else x.to(dtype) for k, x in conditioning.items() if k in _ADDED}:
        keywords["added_cond_kwargs"] = added
    return keywords


@dataclass(frozen=True)
class UNet(Network):
    """A UNet2DConditionModel.

    Args:
        added: its `addition_embed_type`, of what is added to the embedding of its times.
    """

    folder: str = "unet"
    kind: str = "UNet2DConditionModel"
    blocks: tuple[str, ...] = ("down_blocks", "mid_block", "up_blocks")
    same: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "addition_embed_type",
        "block_out_channels",
    )
    noun: str = "UNet"
    added: str | None = None

    def describes(self, network: Config) -> bool:
        return network.get("addition_embed_type") == self.added

    def check(self, path: str, file: Path, network: Config, vae: Config) -> None:
        levels(file, network)
        positive(file, network, "in_channels")
        positive(file, network, "out_channels")
        if not self.describes(network):
            raise ValueError(
                f"{path} cannot be a teacher: its UNet has addition_embed_type "
                f"{short(network.get('addition_embed_type'))}, those of its pipeline's class have {short(self.added)}"
            )
        for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim"):
            if network.get(key) is not None:
                raise ValueError(
                    f"{path} cannot be a teacher: its UNet has {key} {short(network[key])}, an input of its own"
                )
        positive(file, network, "sample_size", MOST_SIDE)
        reads, writes, latent = network["in_channels"], network["out_channels"], vae["latent_channels"]
        if not reads == writes == latent:
            raise ValueError(
                f"the UNet of {path} reads {reads} and writes {writes} channels, its autoencoder has {latent}: "
                "inpainting, editing and variance-predicting networks cannot be teachers"
            )

    def patch(self, network: Config) -> int:
        return 1


class UNetFile(OneFile):
    """The network, the autoencoder and the text encoders, as the original checkpoints have them."""

    parts = ("vae", "text_encoder", "text_encoder_2")

    def tensors(self, network: UNet2DConditionModel, source: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in network.state_dict().items():
            module, _, kind = name.rpartition(".")
            yield f"{NETWORK}{original_module(module, network.config)}.{kind}", tensor
        yield from stored_vae(source, variant)
        yield from self.texts(source, variant)

    @abstractmethod
    def texts(self, source: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
        """The text encoders, by their names in the file."""


class CLIPText(Text):
    """Prompts as CLIP's states, side by side: what the UNet attends to."""

    def shapes(self, network: Config, tokens: int) -> dict[str, tuple[int, ...]]:
        return {TEXT: (tokens, network["cross_attention_dim"])}

    def check(self, path: str, network: Config, towers: Sequence[TextTower]) -> None:
        widths = [tower.encoder.config.hidden_size for tower in towers]
        if isinstance(reads := network.get("cross_attention_dim"), int) and reads != sum(widths):
            raise ValueError(
                f"{path} cannot be a teacher: its UNet reads text of width {reads}, its text encoders make "
                f"{' + '.join(map(str, widths))}"
            )


class UNetGuidance(Guidance):
    """A second pass; or, in a student, w as an addition to what the time embedding reads (Meng et al. 2023)."""

    weights = ("time_embedding.cond_proj.weight",)

    def form(self, network: Config, index: Config) -> Literal["cfg", "embedded", "none"]:
        return "none" if self.taken(network) else "cfg"

    def taken(self, network: Config) -> bool:
        return network.get("time_cond_proj_dim") is not None

    def add(self, network: UNet2DConditionModel, dim: int, seed: int | None = None) -> None:
        if network.config["time_cond_proj_dim"] is not None:
            return
        first: nn.Linear = network.time_embedding.linear_1
        projection = nn.Linear(dim, first.in_features, bias=False, device=first.weight.device, dtype=first.weight.dtype)
        with torch.no_grad():
            if seed is None:
                projection.weight.zero_()
            else:
                bound = dim**-0.5
                projection.weight.uniform_(-bound, bound, generator=generator(seed, "guidance start"))
        network.time_embedding.cond_proj = projection
        network.register_to_config(time_cond_proj_dim=dim)

    @torch.no_grad()
    def build_in(self, network: UNet2DConditionModel, w: float) -> None:
        """Exact: w comes in as an addition to what the time embedding's first layer reads, so it moves into that one's
        bias."""
        dim = network.config["time_cond_proj_dim"]
        if dim is None:
            raise ValueError("the network takes no guidance as an input")
        embedding = network.time_embedding
        first: nn.Linear = embedding.linear_1
        added = embedding.cond_proj.weight.double() @ guidance_embedding(torch.tensor([w]), dim)[0].double()
        first.bias.add_((first.weight.double() @ added).to(first.bias))
        embedding.cond_proj = None  # type: ignore[assignment]
        network.register_to_config(time_cond_proj_dim=None)


class UNetLoRA(LoRA):
    """LoRAs as kohya-ss writes them: each module with an `.alpha` of its own.

    Every program that reads LoRAs reads all of that layout, and at its scale. In peft's names alpha would stand in the
    header alone, where diffusers before 0.35 and ComfyUI do not look.
    """

    formats = ("diffusers", "peft", "kohya")
    prefix = "unet"
    original_names = False
    """Whether files have the original code's paths of modules, where diffusers reads them rightly."""
    targets = {"blocks": LCM_LORA_TARGETS, "attention": ("to_q", "to_k", "to_v", "to_out.0")}

    def file(
        self, format: str, weights: Mapping[str, Tensor], config: Any, network: Config, dtype: torch.dtype
    ) -> LoRAFile:
        return LoRAFile(kohya_state_dict(weights, config.lora_alpha, network, dtype, self.original_names), {})

    def seen(self, pipeline: Any, file: str, **named: Any) -> dict[str, Tensor]:
        tensors = super().seen(pipeline, file, unet_config=pipeline.unet.config, **named)
        return convert_unet_state_dict_to_peft(tensors)

    def read(self, tensors: Mapping[str, Tensor], modules: Sequence[str], network: Config) -> dict[str, Tensor]:
        return peft_state_dict(tensors, modules, network, self.original_names)


class UNetCritic(CriticFeatures):
    """The encoder and middle of a UNet."""

    def encoder(self, network: UNet2DConditionModel, on_its_weights: bool = False) -> UNet2DConditionModel:
        left_out: dict[int, nn.Module] = {id(network.up_blocks): nn.ModuleList(), id(network.conv_out): nn.Identity()}
        if network.conv_norm_out is not None:
            left_out[id(network.conv_norm_out)] = nn.Identity()
            left_out[id(network.conv_act)] = nn.Identity()
        if on_its_weights:
            return on_the_weights_of(network, left_out)
        return copy.deepcopy(network, left_out).requires_grad_(True)

    def features(
        self, encoder: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        keywords = unet_keywords(conditioning, dtype, guidance_width(encoder))
        return encoder(x_t.to(dtype), told, return_dict=False, **keywords)[0]

    def shape(self, network: UNet2DConditionModel, size: Size) -> tuple[int, int, int]:
        halvings = sum(block.downsamplers is not None for block in network.down_blocks)
        h, w = (math.ceil(side / 2**halvings) for side in size)
        return network.config["block_out_channels"][-1], h, w

    def taps(self, encoder: nn.Module) -> Sequence[nn.Module]:
        network: Any = bare(encoder)
        return list(network.down_blocks)

    def tapped(self, encoder: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        return output[0]

    def level_shapes(self, network: UNet2DConditionModel, encoder: nn.Module, size: Size) -> list[tuple[int, int, int]]:
        found, (h, w) = [], size
        for width, block in zip(network.config["block_out_channels"], network.down_blocks, strict=True):
            if block.downsamplers is not None:
                h, w = math.ceil(h / 2), math.ceil(w / 2)
            found.append((width, h, w))
        return [*found, self.shape(network, size)]
