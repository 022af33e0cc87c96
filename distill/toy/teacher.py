"""The toy teacher: SDXL's shape at a millionth of its price, for 32 px pictures.

Two CLIP text encoders, pooled embeddings, time ids, a VAE and an epsilon-predicting UNet, stored as a stock diffusers
StableDiffusionXLPipeline folder. The `build_*` functions make the untrained parts; `distill study toy_teacher`
trains them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers import EulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill.toy.world import CAPTIONS, SIZE

Pipeline = Any  # diffusers assembles its pipelines and networks at run time: opaque to a type checker

TOKENS = 8  # of a prompt, the two markers included; deliberately not CLIP's 77
_WIDTH = 64  # of each text encoder and of the pooled embedding
_TIME_ID_WIDTH = 32
_BYTE_COUNT = 256


def teacher_folder() -> Path:
    """The folder of the bundled teacher, ready for `StableDiffusionXLPipeline.from_pretrained`."""
    return Path(__file__).parent / "teacher"


def build_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word of the toy captions is one token, and any other text is spelt."""
    merges: list[tuple[str, str]] = []
    for word in sorted({word for caption in CAPTIONS for word in caption.split()}):
        while len(pieces := _spell(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    symbols = _byte_symbols()
    learnt = ["".join(pair) for pair in merges]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *learnt, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=TOKENS)  # type: ignore[arg-type]


def _spell(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: the earliest merge that applies, again and again."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = list(zip(pieces[:-1], pieces[1:], strict=True))
        known = [pair for pair in pairs if pair in merges]
        if not known:
            return pieces
        at = pairs.index(min(known, key=merges.index))
        pieces[at : at + 2] = ["".join(pairs[at])]


def _byte_symbols() -> list[str]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(_BYTE_COUNT) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(_BYTE_COUNT + index) for index in range(len(others))]


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """A text encoder of two layers, as wide as its pooled embedding, for the tokenizer's tokens."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two text encoders, untrained. It reads the last but one layer of both and pools the second's output."""
    config = clip_config(tokenizer, _WIDTH)
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_vae(latent_channels: int = 4) -> AutoencoderKL:
    """An autoencoder from pictures [B, 3, 32, 32] to latents [B, 4, 8, 8], untrained.

    The posterior's log-variance starts at exp(-6): otherwise the first thousand steps only fight its noise.
    """
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )
    with torch.no_grad():
        vae.quant_conv.bias[latent_channels:] = -6.0
        vae.quant_conv.weight[latent_channels:] *= 0.1
    return vae


def build_unet(latent_channels: int = 4) -> UNet2DConditionModel:
    """SDXL's UNet (text and time ids in the time embedding, no attention at the top level) at 1.1 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
        cross_attention_dim=2 * _WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * _TIME_ID_WIDTH + _WIDTH,
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's scheduler, setting by setting."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_pipeline(latent_channels: int = 4) -> StableDiffusionXLPipeline:
    """The whole pipeline, untrained. Weights come from torch's global generator: seed it for a reproducible start."""
    tokenizer = build_tokenizer()
    text_encoder, text_encoder_2 = build_text_encoders(tokenizer)
    return StableDiffusionXLPipeline(
        vae=build_vae(latent_channels),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(pad_token="!"),
        unet=build_unet(latent_channels),
        scheduler=build_scheduler(),  # type: ignore[arg-type]
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def time_ids(count: int) -> Tensor:
    """SDXL's time ids [count, 6]: original size, crop corner, target size, in pixels."""
    return torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], dtype=torch.float32).repeat(count, 1)


def encode_captions(pipeline: Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [n, 8, 128] and pooled embeddings [n, 64], as the pipeline's `encode_prompt`, with gradient."""
    states = []
    pooled = None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        tokens = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        output = encoder(tokens.input_ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]  # of the second encoder in the end
    assert pooled is not None
    return torch.cat(states, dim=-1), pooled
