"""Stable Diffusion 3 and 3.5: a transformer over patches and texts together, by flow matching.

Its text is two CLIP encoders' states side by side, padded with zeros to the width of a T5's, and the T5's own behind
them; both CLIPs' pooled outputs come in with the time. A pipeline without a T5 reads zeros in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.diffusion.noise import FlowNoise
from distill.diffusion.prediction import Conditioning
from distill.models.checks import positive
from distill.models.execution import bare
from distill.models.families.base import (
    SD_VAE,
    Config,
    CriticFeatures,
    Family,
    Guidance,
    Latents,
    Network,
    Published,
    Size,
    Text,
)
from distill.models.families.comfy import ComfyModel, ComfyUI, sd3_shift
from distill.models.families.cut import FirstInput, cut_off, earlier_levels, image_map
from distill.models.families.towers import CLIPTower, T5Tower, TextTower
from distill.models.families.transformer import TransformerFile, TransformerLoRA
from distill.models.original import OriginalNames

TEXT, POOLED = "encoder_hidden_states", "pooled_projections"
_GUIDANCE = "guidance"

_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
    "qk_norm": None,
}
_MEDIUM_35 = _MEDIUM | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
_LARGE_35 = _MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
_SIZES = {"sd3": _MEDIUM, "sd35_medium": _MEDIUM_35, "sd35_large": _LARGE_35}
_VAE = dict(SD_VAE) | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def _published(network: Config) -> Published:
    """CLIP ViT-L/14's text encoder, OpenCLIP ViT-bigG/14's and T5 v1.1 XXL's encoder, with 77 and 256 tokens."""
    return Published(network, encoders=5.57e9, tokens=77 + 256, vae=_VAE, noise=FlowNoise(shift=3.0))


@dataclass(frozen=True)
class SD3Network(Network):
    """An SD3Transformer2DModel."""

    folder: str = "transformer"
    kind: str = "SD3Transformer2DModel"
    blocks: tuple[str, ...] = ("transformer_blocks",)
    same: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "patch_size",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    )

    def check(self, path: str, file: Path, network: Config, vae: Config) -> None:
        for key in ("sample_size", "patch_size", "in_channels", "num_layers", "pos_embed_max_size"):
            positive(file, network, key)
        reads, latent = network["in_channels"], vae["latent_channels"]
        writes = network.get("out_channels") or reads
        if not reads == writes == latent:
            raise ValueError(
                f"the transformer of {path} reads {reads} and writes {writes} channels, its autoencoder has {latent}: "
                "inpainting and editing networks cannot be teachers"
            )
        side, patch, most = network["sample_size"], self.patch(network), self.most(network)
        if side % patch or side > most:
            raise ValueError(
                f"{file}: sample_size is {side}; it must be a multiple of patch_size {patch} and at most {most}, which "
                "pos_embed_max_size has positions for"
            )

    def most(self, network: Config) -> int:
        return int(network["pos_embed_max_size"]) * self.patch(network)


@dataclass(frozen=True)
class NoT5(TextTower):
    """Stands for the T5 of a pipeline that has none: its states are zeros.

    Args:
        width: of a state.
        most: tokens of a prompt.
    """

    width: int = 0
    most: int = 0

    @property
    def length(self) -> int:
        return 0  # nothing of a prompt is read, nor cut

    def at_most(self, tokens: int) -> NoT5:
        return NoT5(None, None, self.width, tokens)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), self.most, self.width)

    def cuts(self, prompts: Sequence[str]) -> list[str]:
        return []


class SD3Text(Text):
    """Both CLIPs' last but one states, then a T5's; and both CLIPs' pooled outputs."""

    towers = (
        CLIPTower("tokenizer", "text_encoder", "CLIPTokenizer", "CLIPTextModelWithProjection"),
        CLIPTower("tokenizer_2", "text_encoder_2", "CLIPTokenizer", "CLIPTextModelWithProjection"),
        T5Tower("tokenizer_3", "text_encoder_3", "T5Tokenizer", "T5EncoderModel", optional=True),
    )
    max_tokens = 256
    stored = "bfloat16"
    shared = True

    def load(
        self,
        folder: Path,
        index: Config,
        network: Config,
        dtype: torch.dtype,
        variant: str | None,
        max_tokens: int | None = None,
    ) -> tuple[TextTower, ...]:
        found = super().load(folder, index, network, dtype, variant, max_tokens)
        if len(found) == len(self.towers):
            return found
        return *found, NoT5(None, None, network["joint_attention_dim"], self.prompt_tokens(max_tokens) or 0)

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        clips = [tower(prompts) for tower in towers[:2]]
        beside = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        behind = towers[2](prompts).to(beside.device)  # [B, tokens, width]
        beside = F.pad(beside, (0, behind.shape[-1] - beside.shape[-1]))
        return {
            TEXT: torch.cat([beside, behind], dim=1),
            POOLED: torch.cat([output.text_embeds for output in clips], dim=-1),
        }

    def shapes(self, network: Config, tokens: int) -> dict[str, tuple[int, ...]]:
        return {TEXT: (tokens, network["joint_attention_dim"]), POOLED: (network["pooled_projection_dim"],)}

    def tokens(self, folder: Path, max_tokens: int | None = None) -> int:
        return self.towers[0].tokens(folder) + (self.prompt_tokens(max_tokens) or 0)

    def check(self, path: str, network: Config, towers: Sequence[TextTower]) -> None:
        clips, t5 = [tower.encoder.config for tower in towers[:2]], towers[2]
        reads, pooled = network.get("joint_attention_dim"), network.get("pooled_projection_dim")
        width = reads if t5.encoder is None else t5.encoder.config.d_model
        beside = sum(clip.hidden_size for clip in clips)
        if reads != width or beside > width:
            raise ValueError(
                f"{path} cannot be a teacher: its transformer reads text of width {reads}, its T5 makes {width} and "
                f"its CLIP text encoders {beside}"
            )
        if pooled != (made := sum(clip.projection_dim for clip in clips)):
            raise ValueError(
                f"{path} cannot be a teacher: its transformer reads {pooled} numbers of pooled text, its text encoders "
                f"make {made}"
            )
        if towers[0].length != towers[1].length:
            raise ValueError(
                f"{path} cannot be a teacher: its CLIP tokenizers cut prompts after {towers[0].length} and "
                f"{towers[1].length} tokens"
            )


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_BLOCKS = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_REST = (
    "norm1.linear",
    "norm1_context.linear",
    "pos_embed.proj",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2",
    "context_embedder",
    "norm_out.linear",
    "proj_out",
)


class SD3LoRA(TransformerLoRA):
    """kohya-ss' names for these layers are read by no loader of diffusers, and are not offered."""

    targets = {"blocks": _BLOCKS, "attention": _ATTENTION, "all": (*_BLOCKS, *_REST)}

    def architecture(self, network: Config, velocity: bool) -> tuple[str, str]:
        size = "large" if network["num_layers"] > _MEDIUM["num_layers"] else "medium"
        name = f"stable-diffusion-v3.5-{size}" if network.get("qk_norm") else "stable-diffusion-v3-medium"
        return "sd3", name


_ORIGINAL = OriginalNames(
    {
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn.ln_q": ("attn.norm_q",),
                "x_block.attn.ln_k": ("attn.norm_k",),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "x_block.attn2.ln_q": ("attn2.norm_q",),
                "x_block.attn2.ln_k": ("attn2.norm_k",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "context_block.attn.proj": ("attn.to_add_out",),
                "context_block.attn.ln_q": ("attn.norm_added_q",),
                "context_block.attn.ln_k": ("attn.norm_added_k",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
            },
        )
    },
    {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
)


_FIRST_PROJECTION = "text_encoders.clip_l.transformer.text_projection.weight"


class SD3File(TransformerFile):
    """Stability's layout, with all that a pipeline has: the T5 too, if there is one."""

    def __init__(self) -> None:
        beginnings = {f"text_encoder{number}": f"text_encoders.{name}.transformer."
                      for number, name in (("", "clip_l"), ("_2", "clip_g"), ("_3", "t5xxl"))}  # fmt: skip
        super().__init__(_ORIGINAL, beginnings)

    def names(self, network: Config) -> OriginalNames:
        """The last block's text ends in a norm of the kind that the network itself ends in."""
        last = f"transformer_blocks.{network['num_layers'] - 1}.norm1_context.linear"
        return replace(_ORIGINAL, swapped=("norm_out.linear", last))

    def tensors(self, network: Any, source: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().tensors(network, source, variant):
            if name == _FIRST_PROJECTION and not torch.equal(tensor.float(), torch.eye(*tensor.shape)):
                raise ValueError(
                    "text_encoder has a text_projection, and readers of such files take none: export the pipeline"
                )
            yield name, tensor


class SD3Critic(CriticFeatures):
    """The hidden states of the image's patches after the first half of the blocks."""

    widest_head = 1024

    def encoder(self, network: Any, on_its_weights: bool = False) -> Any:
        kept = max(1, len(network.transformer_blocks) // 2)
        ends = {network.norm_out: FirstInput(), network.proj_out: nn.Identity()}
        encoder = cut_off(network, ends, network.transformer_blocks[kept:], on_its_weights)
        encoder.transformer_blocks = encoder.transformer_blocks[:kept]
        encoder.out_channels = _width(encoder) // encoder.config["patch_size"] ** 2
        for module in self.idle(encoder):
            module.requires_grad_(False)
        return encoder

    def idle(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """What the last block makes of the text, which nothing reads."""
        last: Any = bare(encoder).transformer_blocks[-1]  # type: ignore[index, union-attr]
        attention = last.attn
        found = (attention.add_q_proj, attention.norm_added_q, attention.to_add_out, last.norm2_context,
                 last.ff_context)  # fmt: skip
        return [module for module in found if module is not None]

    def features(
        self, encoder: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        patch: int = bare(encoder).config["patch_size"]  # type: ignore[index, assignment]
        apart = FAMILY.predict(encoder, x_t, told, conditioning, dtype)  # [B, width / p², p h', p w']
        B, C, H, W = apart.shape
        patches = apart.reshape(B, C, H // patch, patch, W // patch, patch)
        return patches.permute(0, 3, 5, 1, 2, 4).reshape(B, C * patch**2, H // patch, W // patch)

    def shape(self, network: Any, size: Size) -> tuple[int, int, int]:
        patch = network.config["patch_size"]
        return _width(network), size[0] // patch, size[1] // patch

    def taps(self, encoder: nn.Module) -> Sequence[nn.Module]:
        network: Any = bare(encoder)
        return earlier_levels(network.transformer_blocks)

    def tapped(self, encoder: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        patch: int = bare(encoder).config["patch_size"]  # type: ignore[index, assignment]
        return image_map(output, (x_t.shape[2] // patch, x_t.shape[3] // patch))


def _width(network: Any) -> int:
    return int(network.config["num_attention_heads"] * network.config["attention_head_dim"])


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "sd3"
    title = "Stable Diffusion 3"
    tag = "stable-diffusion-3"
    pipeline = "StableDiffusion3Pipeline"
    network = SD3Network(one_file=SD3File())
    text = SD3Text()
    latents = Latents()
    guidance = Guidance()
    lora = SD3LoRA()
    critic = SD3Critic()
    comfyui = ComfyUI(
        models={
            "sd3": ComfyModel("SD3-medium", "sd3_medium.safetensors"),
            "sd35_medium": ComfyModel("SD3.5-medium", "sd3.5_medium.safetensors"),
            "sd35_large": ComfyModel("SD3.5-large", "sd3.5_large.safetensors"),
        },
        formats=("comfyui", "network", "checkpoint"),
        text=(
            "TripleCLIPLoader",
            {
                "clip_name1": "clip_l.safetensors",
                "clip_name2": "clip_g.safetensors",
                "clip_name3": "t5xxl_fp16.safetensors",
            },
        ),
        latent="EmptySD3LatentImage",
        shift=sd3_shift,
    )
    full_size = {name: _published(config) for name, config in _SIZES.items()}

    def predict(
        self, module: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        for key in conditioning:
            if key not in (TEXT, POOLED, _GUIDANCE):
                raise ValueError(f"conditioning {key!r} is not known; allowed: {TEXT}, {POOLED}, {_GUIDANCE}")
        for key in (TEXT, POOLED):
            if key not in conditioning:
                raise ValueError(f"the conditioning lacks {key!r}; it has {sorted(conditioning)}")
        text, pooled = conditioning[TEXT].to(dtype), conditioning[POOLED].to(dtype)
        return module(x_t.to(dtype), text, pooled, told, return_dict=False)[0]


FAMILY = StableDiffusion3()
