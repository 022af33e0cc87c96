"""Models at full and tiny size with random weights, built without a download: what the benchmarks compute with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill.benchmarks.common import SCHEDULE
from distill.diffusion.noise import Noise
from distill.diffusion.prediction import Prediction
from distill.models.families.base import Family
from distill.models.families.registry import FAMILIES
from distill.models.families.teacher import Teacher
from distill.models.families.towers import TextTower
from distill.models.full_size import build_unet, unet_config

_TINY_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_TINY_SD15 = {
    "block_out_channels": (32, 64, 64, 64),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
_TINY_SDXL = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "norm_num_groups": 8,
}


@dataclass(frozen=True)
class Model:
    """A model's sizes.

    Args:
        unet: the config of its network.
        side: of its latents.
        towers: configs of its text encoders; of two the second has a projection.
        vae_channels: widths of its autoencoder's levels.
        rank: of the LoRA that is trained.
    """

    unet: Mapping[str, Any]
    side: int
    towers: tuple[Mapping[str, Any], ...]
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    rank: int = 64
    tokens: int = 77

    @property
    def family(self) -> Family:
        return FAMILIES["sdxl" if len(self.towers) > 1 else "sd15"]

    def build_unet(self, device: torch.device | str, dtype: torch.dtype) -> UNet2DConditionModel:
        return build_unet(self.unet, device=device, dtype=dtype).requires_grad_(False)

    def build_vae(self, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
        levels = len(self.vae_channels)
        with torch.device(device):
            vae = AutoencoderKL(
                block_out_channels=self.vae_channels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=2,
                norm_num_groups=min(32, self.vae_channels[0]),
                scaling_factor=0.18215,
            )
        return nn.Module.to(vae, dtype).eval().requires_grad_(False)

    def build_encoders(self, device: torch.device | str, dtype: torch.dtype) -> list[nn.Module]:
        classes = (CLIPTextModel, CLIPTextModelWithProjection)
        with torch.device(device):
            encoders: list[nn.Module] = [
                kind(CLIPTextConfig(**tower)) for kind, tower in zip(classes, self.towers, strict=False)
            ]
        return [nn.Module.to(encoder, dtype).eval().requires_grad_(False) for encoder in encoders]


_SD15, _SDXL = unet_config("sd15"), unet_config("sdxl")
MODELS = {
    "sd15": Model(_SD15, 64, (_CLIP_L,)),
    "sdxl": Model(_SDXL, 128, (_CLIP_L, _CLIP_G)),
    "tiny_sd15": Model(_SD15 | _TINY_SD15, 16, (_TINY_TOWER,), (16, 16, 16, 16), rank=4),
    "tiny_sdxl": Model(_SDXL | _TINY_SDXL, 16, (_TINY_TOWER, _TINY_TOWER), (16, 16, 16, 16), rank=4),
}


def build_pipeline(model: Model, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A stock diffusers pipeline of a model's networks."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    encoders = model.build_encoders(device, dtype)
    parts: dict[str, Any] = {
        "unet": model.build_unet(device, dtype),
        "vae": model.build_vae(device, dtype),
        "scheduler": scheduler,
        "tokenizer": byte_tokenizer(model.tokens),
        "text_encoder": encoders[0],
    }
    if len(encoders) > 1:
        parts |= {"tokenizer_2": byte_tokenizer(model.tokens), "text_encoder_2": encoders[1]}
        pipeline: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **nothing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def teacher_of(pipeline: Any, model: Model) -> Teacher:
    """The same networks as a teacher here."""
    encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
    if len(model.towers) > 1:
        encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    return Teacher(
        family=model.family,
        schedule=SCHEDULE,
        prediction=Prediction.EPSILON,
        noise=Noise(),
        teacher_id="random weights",
        resolution=8 * model.side,
        latent_shape=(4, model.side, model.side),
        parts={
            "network": pipeline.unet,
            "vae": pipeline.vae,
            "text": tuple(TextTower(tokenizer, encoder) for tokenizer, encoder in encoders),
        },
    )


def byte_tokenizer(tokens: int) -> CLIPTokenizer:
    """CLIP's tokenizer without merges, one token a byte, for networks that have learnt nothing."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=tokens)
