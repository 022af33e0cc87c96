"""Stable Diffusion 1.x and 2.x: the last hidden states of one CLIP text encoder, final layer norm included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.models.copied import text_tensors
from distill.models.families.base import Config, Latents, Published
from distill.models.families.comfy import ComfyModel, ComfyUI
from distill.models.families.towers import CLIPTower, TextTower
from distill.models.families.unet import TEXT, CLIPText, UNet, UNetCritic, UNetFamily, UNetFile, UNetGuidance, UNetLoRA
from distill.models.folder import read_json
from distill.models.original import open_clip, prefixed

_OPENAIS_ACTIVATION = "quick_gelu"  # OpenAI's CLIP has it, the OpenCLIP models have not

SD2_WIDTH = 1024
"""Width of the text states that SD 2.x reads; SD 1.x reads 768."""

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


class SD15Text(CLIPText):
    towers = (CLIPTower("tokenizer", "text_encoder", "CLIPTokenizer", "CLIPTextModel"),)

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        return {TEXT: towers[0](prompts).last_hidden_state}  # [B, tokens, width]


class SD15File(UNetFile):
    """CompVis' layout with OpenAI's text encoder, or Stability's with one of OpenCLIP's, which SD 2.x has."""

    def texts(self, source: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
        tensors = text_tensors(source, "text_encoder", variant)
        activation = read_json(source, "text_encoder/config.json").get("hidden_act", _OPENAIS_ACTIVATION)
        if activation == _OPENAIS_ACTIVATION:
            return prefixed("cond_stage_model.transformer.", tensors)
        return prefixed("cond_stage_model.model.", open_clip(tensors))


class SD15LoRA(UNetLoRA):
    def architecture(self, network: Config, velocity: bool) -> tuple[str, str]:
        if network["cross_attention_dim"] != SD2_WIDTH:
            return ("sd_v1_v" if velocity else "sd_v1"), "stable-diffusion-v1"
        return ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    name = "sd15"
    title = "Stable Diffusion 1 or 2"
    tag = "stable-diffusion"
    pipeline = "StableDiffusionPipeline"
    network = UNet(one_file=SD15File())
    text = SD15Text()
    latents = Latents()
    guidance = UNetGuidance()
    lora = SD15LoRA()
    critic = UNetCritic()
    comfyui = ComfyUI(
        models={"sd15": ComfyModel("SD 1.5", "v1-5-pruned-emaonly.safetensors", 512)},
        formats=("kohya", "network", "checkpoint"),
    )
    full_size = {"sd15": Published(_SD15, encoders=123.1e6)}  # CLIP ViT-L/14's

    def arguments(self, zeros_for_empty: bool) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


FAMILY = StableDiffusion()
