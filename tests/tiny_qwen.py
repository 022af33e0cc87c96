"""Tiny pipelines of the families whose prompts a Qwen3 reads, as plain diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
"""What Qwen3's own template makes of one message, shortened."""
KLEIN: dict[str, Any] = {
    "in_channels": 12,
    "num_layers": 1,
    "num_single_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * 8,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (2, 4, 4, 2),
    "guidance_embeds": False,
}
Z_IMAGE: dict[str, Any] = {
    "in_channels": 5,
    "dim": 24,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 8,
    "axes_dims": [4, 4, 4],
    "axes_lens": [640, 32, 32],
}
SIDE = 24
"""Pixels a side at which these pipelines are quick: their own is 1024."""


def tiny_klein(seed: int = 0, **changes: Any) -> Flux2KleinPipeline:
    """FLUX.2 klein with latents of 3 channels, packed to 12 at a quarter of the pixels a side.

    Args:
        changes: of its network's config; `is_distilled` is the pipeline's.
    """
    distilled = changes.pop("is_distilled", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=3,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        network = _spread(Flux2Transformer2DModel(**KLEIN | changes))
        text = _spread(Qwen3ForCausalLM(_text_config(layers=28)))
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tiny_tokenizer(),
        transformer=network.eval(),
        is_distilled=distilled,
    )


def tiny_z_image(seed: int = 0, **changes: Any) -> ZImagePipeline:
    """Z-Image with latents of 5 channels, at half the pixels a side; `changes` are of its network's config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=5,
            norm_num_groups=4,
            scaling_factor=0.4,
            shift_factor=0.1,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        network = _spread(ZImageTransformer2DModel(**Z_IMAGE | changes))
        text = _spread(Qwen3Model(_text_config(layers=3)))
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tiny_tokenizer(),
        transformer=network.eval(),
    )


def save(pipeline: Any, folder: str | Path) -> str:
    """Saves a pipeline by its own `save_pretrained` and returns the path."""
    pipeline.save_pretrained(folder)
    return str(folder)


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer without a single merge: one token a byte, beside those of the chat."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocab = {symbol: i for i, symbol in enumerate([*symbols, "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _text_config(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=260,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def _spread(network: Any) -> Any:
    """Weights so large that the text, the time and each token make a difference."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return network
