"""Tiny pipelines with random weights, shaped like the real families and unlike them in every number.

Nothing in them has its usual size (77 tokens, 4 latent channels, an 8-fold autoencoder, 8 heads), so code that has
such a number written into it fails on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

FAMILIES = ("sd15", "sdxl")
"""Those with a UNet. `tiny_pipeline` and `save_tiny` know `sd3` as well."""
TOKENS = 11
CHANNELS = 5

SD15_UNET: dict[str, Any] = {
    "sample_size": 6,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (16, 24),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (2, 3),
    "norm_num_groups": 4,
    "cross_attention_dim": 20,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 1),
    "attention_head_dim": (1, 2, 3),
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "cross_attention_dim": 12 + 20,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 10,
    "projection_class_embeddings_input_dim": 6 * 10 + 28,
}
UNETS = {"sd15": SD15_UNET, "sdxl": SDXL_UNET}
SD3_TRANSFORMER: dict[str, Any] = {
    "sample_size": 6,
    "patch_size": 2,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "joint_attention_dim": 40,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 16 + 28,
    "pos_embed_max_size": 5,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
SHIFT = 2.5


def tiny_unet(family: str = "sd15", seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """The UNet alone: a thousandth of a second a forward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**UNETS[family] | changes)


def tiny_transformer(seed: int = 0, **changes: Any) -> SD3Transformer2DModel:
    """SD3's transformer alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SD3Transformer2DModel(**SD3_TRANSFORMER | changes)


def tiny_conditioning(family: str, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random keyword tensors that fit `tiny_unet(family)`."""
    random = torch.Generator().manual_seed(seed)
    if family == "sd3":
        return {
            "encoder_hidden_states": torch.randn(batch, TOKENS + 7, 40, generator=random),
            "pooled_projections": torch.randn(batch, 16 + 28, generator=random),
        }
    width = UNETS[family]["cross_attention_dim"]
    text = {"encoder_hidden_states": torch.randn(batch, TOKENS, width, generator=random)}
    if family == "sd15":
        return text
    sizes = torch.tensor([[24.0, 24.0, 0.0, 0.0, 24.0, 24.0]]).repeat(batch, 1)
    return text | {"text_embeds": torch.randn(batch, 28, generator=random), "time_ids": sizes}


def tiny_pipeline(family: str = "sd15", seed: int = 0, **scheduler: Any) -> Any:
    """A plain diffusers pipeline; `scheduler` changes its scheduler's config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "sd3":
            return _sd3(seed, FlowMatchEulerDiscreteScheduler(**{"shift": SHIFT} | scheduler))
        unet = tiny_unet(family, seed)
        return _sd15(unet, _scheduler(scheduler)) if family == "sd15" else _sdxl(unet, _scheduler(scheduler))


def save_tiny(folder: str | Path, family: str = "sd15", seed: int = 0, **scheduler: Any) -> str:
    """Saves `tiny_pipeline` to `folder` and returns its path."""
    tiny_pipeline(family, seed, **scheduler).save_pretrained(folder)
    return str(folder)


def _sd15(unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=_vae(levels=3, scaling_factor=0.3),
        tokenizer=_tokenizer(),
        text_encoder=CLIPTextModel(_text_config(width=20, heads=5)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=_vae(levels=2, scaling_factor=0.7),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(pad_token="!"),
        text_encoder=CLIPTextModel(_text_config(width=12, heads=3)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(width=20, heads=2, projection_dim=28)),
    )


def _sd3(seed: int, scheduler: FlowMatchEulerDiscreteScheduler) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=tiny_transformer(seed),
        scheduler=scheduler,
        vae=_vae(levels=3, scaling_factor=0.4, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(pad_token="!"),
        tokenizer_3=_t5_tokenizer(),
        text_encoder=CLIPTextModelWithProjection(_text_config(width=12, heads=3)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(width=20, heads=2, projection_dim=28)),
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=120, d_model=40, d_kv=10, d_ff=48, num_layers=2, num_heads=4,
                     feed_forward_proj="gated-gelu")
        ).eval(),
    )  # fmt: skip


def _t5_tokenizer() -> T5Tokenizer:
    """A token a letter."""
    letters = [(chr(code), -4.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *letters], extra_ids=0)


def _scheduler(changes: dict[str, Any]) -> DDIMScheduler:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**betas | {"clip_sample": False, "steps_offset": 1} | changes)


def _vae(levels: int, scaling_factor: float, **further: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
        **further,
    )


def _tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer without a single merge: one token a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + i) for i in range(256 - len(printable))]  # GPT-2's stand-ins for the unprintable bytes
    symbols = [chr(i) for i in printable] + others
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=TOKENS)


def _text_config(width: int, heads: int, projection_dim: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        projection_dim=projection_dim,
        max_position_embeddings=TOKENS,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
