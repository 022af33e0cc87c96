"""The second toy teacher: Stable Diffusion 3's shape for the same 32 px pictures, by flow matching.

Two CLIP text encoders and a T5, pooled embeddings, a VAE with a shift, and a transformer with joint attention that
predicts v = eps - x_0 on the straight path x_t = (1 - sigma) x_0 + sigma eps, stored as a stock diffusers
StableDiffusion3Pipeline folder. The `build_*` functions make the untrained parts; `distill study toy_teacher
teacher=flow` trains them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models import AutoencoderKL, SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from distill.toy.teacher import Pipeline, build_tokenizer, clip_config
from distill.toy.world import CAPTIONS, SIZE

T5_TOKENS = 12  # of a prompt, the end marker included; the CLIP encoders read 8
SHIFT = 3.0  # of the scheduler, as SD3's
_CLIP_WIDTH = 32  # of each CLIP text encoder and of its pooled embedding
_WIDTH = 2 * _CLIP_WIDTH  # of the T5, beside whose states the two CLIP encoders' are put
_HEADS = 4
_HEAD_WIDTH = 32
_LAYERS = 4
_PATCH = 2


def flow_teacher_folder() -> Path:
    """The folder of the bundled teacher, ready for `StableDiffusion3Pipeline.from_pretrained`."""
    return Path(__file__).parent / "teacher_flow"


def build_t5_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer in which every word of the toy captions is one token; other text is spelt in ASCII."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in words] + [(letter, -4.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=T5_TOKENS)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 v1.1 encoder, untrained. Without dropout, which a T5 would have until `eval()` is called."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=_WIDTH,
        d_kv=_WIDTH // 4,
        d_ff=2 * _WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def build_transformer(latent_channels: int = 4) -> SD3Transformer2DModel:
    """SD3's transformer with the normed queries and keys of SD3.5, at 2.3 M parameters.

    It starts as in Peebles & Xie 2023, section 3.2 ("adaLN-Zero"): every block is the identity, and the output 0.
    """
    network: Pipeline = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=_PATCH,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=_LAYERS,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_WIDTH,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=_HEADS * _HEAD_WIDTH,
        pooled_projection_dim=_WIDTH,
        pos_embed_max_size=SIZE // 4,
        qk_norm="rms_norm",
    )
    starting_at_zero = [network.norm_out.linear, network.proj_out]
    for block in network.transformer_blocks:
        starting_at_zero += [block.norm1.linear, block.norm1_context.linear]
    for linear in starting_at_zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return network


@torch.no_grad()
def fold_quant_convs(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder without the 1×1 convolutions around its latents, as SD3's: its 3×3 ones take them in.

    The decoder's first convolution pads with zeros, so latents have to move to where `post_quant_conv` gave zero.
    Those that were centred no longer are: channels whose mean would be negative change their sign, and the rest is
    what a shift is for.
    """
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    folded: Pipeline = AutoencoderKL(**{**config, "use_quant_conv": False, "use_post_quant_conv": False})
    state = vae.state_dict()
    folded.load_state_dict({name: x for name, x in state.items() if not name.startswith(("quant_", "post_quant_"))})
    before, after = (state[f"{name}.weight"][:, :, 0, 0].double() for name in ("quant_conv", "post_quant_conv"))
    origin = -torch.linalg.solve(after, state["post_quant_conv.bias"].double())
    sign = torch.where(origin > 0, -1.0, 1.0).double()
    signs = torch.cat([sign, torch.ones_like(sign)])  # of the means, and of their log-variances
    first, last = folded.encoder.conv_out, folded.decoder.conv_in
    bias = before @ first.bias.double() + state["quant_conv.bias"].double() - torch.cat([origin, 0 * origin])
    first.bias.copy_(signs * bias)
    first.weight.copy_(torch.einsum("oi,ikhw->okhw", signs[:, None] * before, first.weight.double()))
    last.weight.copy_(torch.einsum("okhw,ki->oihw", last.weight.double(), after * sign))
    return folded


def build_flow_pipeline(vae: AutoencoderKL, latent_channels: int = 4) -> StableDiffusion3Pipeline:
    """The whole pipeline around a VAE, untrained. Weights come from torch's global generator: seed it."""
    tokenizer, tokenizer_2, tokenizer_3 = build_tokenizer(), build_tokenizer(pad_token="!"), build_t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, _CLIP_WIDTH)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer_2, _CLIP_WIDTH)),
        text_encoder_3=build_t5(tokenizer_3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        transformer=build_transformer(latent_channels),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
    )


def encode_for_flow(pipeline: Pipeline, captions: list[str], tokens: int = T5_TOKENS) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [n, 8 + tokens, 64] and pooled embeddings [n, 64] by `encode_prompt`, which keeps gradients."""
    encoded = pipeline.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    return encoded[0], encoded[2]
