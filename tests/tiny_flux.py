"""A tiny FLUX.1 with random weights, saved by plain diffusers, and like the others of `tests.tiny` unlike the real one
in every number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tests.tiny import CHANNELS, TOKENS, _t5_tokenizer, _text_config, _tokenizer, _vae

FLUX_TRANSFORMER: dict[str, Any] = {
    "in_channels": 4 * CHANNELS,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 14,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 4, 6),
}
DYNAMIC = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
"""Of FLUX.1's scheduler."""
PIXELS = 16
"""Side of its pictures: [5, 8, 8] latents, 16 tokens. Its pipeline's own is 256."""


def tiny_flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """The transformer alone. Its modulations are large, so that times, guidance and pooled text count."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = FluxTransformer2DModel(**FLUX_TRANSFORMER | changes)
        for name, parameter in network.named_parameters():
            if ".norm" in name and name.endswith("linear.weight"):
                parameter.mul_(8)
        return network


def tiny_flux_conditioning(batch: int, seed: int = 0, w: float | None = 3.5) -> dict[str, torch.Tensor]:
    """Random text that fits `tiny_flux`, and guidance."""
    random = torch.Generator().manual_seed(seed)
    text = {
        "encoder_hidden_states": torch.randn(batch, TOKENS, 14, generator=random),
        "pooled_projections": torch.randn(batch, 20, generator=random),
    }
    return text if w is None else text | {"guidance": torch.full((batch,), w)}


def tiny_flux_pipeline(seed: int = 0, guidance_embeds: bool = True, **scheduler: Any) -> FluxPipeline:
    """A plain diffusers pipeline; `scheduler` changes its scheduler's config."""
    t5 = T5Config(
        vocab_size=120, d_model=14, d_kv=6, d_ff=20, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxPipeline(
            transformer=tiny_flux(seed, guidance_embeds=guidance_embeds),
            scheduler=FlowMatchEulerDiscreteScheduler(
                **{"use_dynamic_shifting": True, "shift": 3.0} | DYNAMIC | scheduler
            ),
            vae=_vae(levels=2, scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            tokenizer=_tokenizer(),
            text_encoder=CLIPTextModel(_text_config(width=20, heads=5)),
            tokenizer_2=_t5_tokenizer(),
            text_encoder_2=T5EncoderModel(t5).eval(),
        )


def save_tiny_flux(folder: str | Path, seed: int = 0, guidance_embeds: bool = True, **scheduler: Any) -> str:
    """Saves `tiny_flux_pipeline` to `folder` and returns its path."""
    tiny_flux_pipeline(seed, guidance_embeds, **scheduler).save_pretrained(folder)
    return str(folder)
