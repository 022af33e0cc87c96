"""SDXL and its relatives (SSD-1B): the last but one states of two encoders, and the second one's pooled output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.diffusion.prediction import Prediction
from distill.models.copied import text_tensors
from distill.models.families.base import Config, Latents, Published, Size
from distill.models.families.comfy import ComfyModel, ComfyUI
from distill.models.families.towers import CLIPTower, TextTower
from distill.models.families.unet import TEXT, CLIPText, UNet, UNetCritic, UNetFamily, UNetFile, UNetGuidance, UNetLoRA
from distill.models.original import open_clip, prefixed

_VELOCITY = "v_pred"  # an empty tensor of this name: how a file says that its network predicts the velocity

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


class SDXLText(CLIPText):
    towers = (
        CLIPTower("tokenizer", "text_encoder", "CLIPTokenizer", "CLIPTextModel"),
        CLIPTower("tokenizer_2", "text_encoder_2", "CLIPTokenizer", "CLIPTextModelWithProjection"),
    )

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        outputs = [tower(prompts) for tower in towers]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # [B, tokens, width 1 + width 2]
        return {TEXT: states, "text_embeds": outputs[-1].text_embeds}

    def shapes(self, network: Config, tokens: int) -> dict[str, tuple[int, ...]]:
        pooled = network["projection_class_embeddings_input_dim"] - 6 * network["addition_time_embed_dim"]
        return super().shapes(network, tokens) | {"text_embeds": (pooled,)}

    def check(self, path: str, network: Config, towers: Sequence[TextTower]) -> None:
        super().check(path, network, towers)
        reads, sizes = network.get("projection_class_embeddings_input_dim"), network.get("addition_time_embed_dim")
        pooled = towers[-1].encoder.config.projection_dim or 0
        if isinstance(reads, int) and isinstance(sizes, int) and reads != pooled + 6 * sizes:
            raise ValueError(
                f"{path} cannot be a teacher: its UNet reads {reads} numbers of pooled text and sizes, its text "
                f"encoder and six sizes make {pooled} + 6 * {sizes}"
            )


class SDXLFile(UNetFile):
    """Stability's layout."""

    def texts(self, source: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
        yield from prefixed("conditioner.embedders.0.transformer.", text_tensors(source, "text_encoder", variant))
        second = open_clip(text_tensors(source, "text_encoder_2", variant))
        yield from prefixed("conditioner.embedders.1.model.", second)

    def marks(self, prediction: Prediction) -> dict[str, Tensor]:
        return {_VELOCITY: torch.empty(0)} if prediction is Prediction.V else {}


class SDXLLoRA(UNetLoRA):
    original_names = True

    def architecture(self, network: Config, velocity: bool) -> tuple[str, str]:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    tag = "stable-diffusion-xl"
    pipeline = "StableDiffusionXLPipeline"
    network = UNet(added="text_time", one_file=SDXLFile())
    text = SDXLText()
    latents = Latents()
    guidance = UNetGuidance()
    lora = SDXLLoRA()
    critic = UNetCritic()
    comfyui = ComfyUI(
        models={
            "sdxl": ComfyModel("SDXL", "sd_xl_base_1.0.safetensors"),
            "ssd1b": ComfyModel("SSD-1B", "SSD-1B.safetensors"),
        },
        formats=("kohya", "network", "checkpoint"),
        says_velocity=True,
    )
    # CLIP ViT-L/14's text encoder and OpenCLIP ViT-bigG/14's
    full_size = {"sdxl": Published(_SDXL, encoders=817.7e6), "ssd1b": Published(_SSD1B, encoders=817.7e6)}

    def sizes(self, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
        ids = [[*original, *corner, *size] for original, corner in zip(originals, corners, strict=True)]
        return {"time_ids": torch.tensor(ids, dtype=torch.float32)}  # [B, 6]

    def arguments(self, zeros_for_empty: bool) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": zeros_for_empty}


FAMILY = StableDiffusionXL()
