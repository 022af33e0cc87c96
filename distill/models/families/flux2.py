"""FLUX.2 klein, base 4B and 9B: states of three layers of a Qwen3, latents packed 2 x 2, ordinary guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.diffusion.noise import AnyNoise, DynamicShift, FlowNoise, short
from distill.diffusion.prediction import Conditioning
from distill.models.checks import levels, positive
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
)
from distill.models.families.comfy import ComfyModel, ComfyUI, flux_shift
from distill.models.families.cut import FirstInput, cut_off, earlier_levels, image_map
from distill.models.families.qwen3 import TEXT, Qwen3Text, Qwen3Tower, check_states
from distill.models.families.towers import TextTower
from distill.models.families.transformer import TransformerFile, TransformerLoRA
from distill.models.original import OriginalNames

LAYERS = (9, 18, 27)
"""The layers of the text encoder whose states the network reads, side by side."""
PATCH = 2
"""Side of what the autoencoder's latents are packed into one entry of a state."""
USUAL_STEPS = 50
"""diffusers' default: the shift of its pipeline depends on how many steps are made, and a run has one shift."""

_VAE = dict(SD_VAE) | {"latent_channels": 32}


def _published(network: Config, encoders: float) -> Published:
    noise = FlowNoise(shift=None, dynamic=DynamicShift())
    return Published(network, encoders, tokens=512, vae=_VAE, noise=noise)


_KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_KLEIN_9B: dict[str, Any] = _KLEIN_4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}


class KleinNetwork(Network):
    """A Flux2Transformer2DModel that takes no guidance as an input: FLUX.2 dev has one that does."""

    def describes(self, network: Config) -> bool:
        return not network.get("guidance_embeds", True)

    def check(self, path: str, file: Path, network: Config, vae: Config) -> None:
        if not self.describes(network):
            raise ValueError(
                f"{path} cannot be a teacher: its network takes guidance as an input (guidance_embeds), which its "
                "pipeline does not give"
            )
        for key in ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels"):
            positive(file, network, key)
        if (network.get("patch_size") or 1) != 1:
            raise ValueError(
                f"{file}: patch_size is {short(network['patch_size'])}; its pipeline packs by itself, so 1"
            )
        reads, writes = network["in_channels"], network.get("out_channels") or network["in_channels"]
        packed = PATCH**2 * vae["latent_channels"]
        if not reads == writes == packed:
            raise ValueError(
                f"the network of {path} reads {reads} and writes {writes} channels, the latents of its autoencoder "
                f"have {packed} when they are packed: it must be the same"
            )


class KleinText(Qwen3Text):
    towers = (Qwen3Tower("tokenizer", "text_encoder", "Qwen2Tokenizer", "Qwen3ForCausalLM"),)

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        states, _ = towers[0](prompts)  # the network reads the padding too
        return {TEXT: torch.cat([states[layer] for layer in LAYERS], dim=-1)}  # [B, tokens, 3 width]

    def shapes(self, network: Config, tokens: int) -> dict[str, tuple[int, ...]]:
        return {TEXT: (tokens, network["joint_attention_dim"])}

    def check(self, path: str, network: Config, towers: Sequence[TextTower]) -> None:
        encoder = towers[0].encoder.config
        makes = len(LAYERS) * encoder.hidden_size
        check_states(path, network.get("joint_attention_dim"), makes, encoder.num_hidden_layers, LAYERS[-1])


class PackedLatents(Latents):
    """Latents of an AutoencoderKLFlux2, 2 x 2 of them as channels of one entry, normalised by statistics of its own."""

    kind = "AutoencoderKLFlux2"
    same = ("latent_channels", "patch_size", "batch_norm_eps")

    def check(self, file: Path, vae: Config) -> None:
        levels(file, vae)
        positive(file, vae, "latent_channels")
        if list(vae.get("patch_size") or ()) != [PATCH, PATCH]:
            raise ValueError(f"{file}: patch_size is {short(vae.get('patch_size'))}; it must be [{PATCH}, {PATCH}]")

    def channels(self, vae: Config) -> int:
        return PATCH**2 * int(vae["latent_channels"])

    def factor(self, vae: Config) -> int:
        return PATCH * super().factor(vae)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        weight = next(vae.parameters())
        mean, std = _statistics(vae)
        z = unpack(latents.to(weight.device, torch.float32) * std + mean)
        return vae.decode(z.to(weight.dtype), return_dict=False)[0].float()

    def encode(self, vae: Any, pictures: Tensor, noise: Tensor) -> Tensor:
        weight = next(vae.parameters())
        posterior = vae.encode(pictures.to(weight), return_dict=False)[0]
        z = pack(posterior.mean.float()) + pack(posterior.std.float()) * noise.to(weight.device, torch.float32)
        mean, std = _statistics(vae)
        return (z - mean) / std


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """(mean, std) of packed latents, each [1, C, 1, 1] in float32."""
    mean, variance = (x.float().view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config["batch_norm_eps"]).sqrt()


def pack(z: Tensor) -> Tensor:
    """[B, c, 2 h, 2 w] to [B, 4 c, h, w]; the channels of each of c stand together."""
    return nn.functional.pixel_unshuffle(z, PATCH)


def unpack(x: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return nn.functional.pixel_shuffle(x, PATCH)


class KleinGuidance(Guidance):
    """A second pass without a prompt, unless the pipeline says that its network was distilled."""

    def form(self, network: Config, index: Config) -> Literal["cfg", "embedded", "none"]:
        return "none" if index.get("is_distilled") else "cfg"


class KleinLoRA(TransformerLoRA):
    targets = {
        "blocks": (
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
            "ff.linear_in",
            "ff.linear_out",
            "ff_context.linear_in",
            "ff_context.linear_out",
            "to_qkv_mlp_proj",
            "single_transformer_blocks.*.attn.to_out",
        ),
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    }

    def architecture(self, network: Config, velocity: bool) -> tuple[str, str]:
        return "flux2_klein", "flux-2-klein"


_ORIGINAL = OriginalNames(
    {
        "transformer_blocks": (
            "double_blocks",
            {
                "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "img_attn.proj": ("attn.to_out.0",),
                "img_attn.norm.query_norm.scale": ("attn.norm_q",),
                "img_attn.norm.key_norm.scale": ("attn.norm_k",),
                "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",),
                "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "txt_attn.proj": ("attn.to_add_out",),
                "txt_attn.norm.query_norm.scale": ("attn.norm_added_q",),
                "txt_attn.norm.key_norm.scale": ("attn.norm_added_k",),
                "txt_mlp.0": ("ff_context.linear_in",),
                "txt_mlp.2": ("ff_context.linear_out",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                "linear1": ("attn.to_qkv_mlp_proj",),
                "linear2": ("attn.to_out",),
                "norm.query_norm.scale": ("attn.norm_q",),
                "norm.key_norm.scale": ("attn.norm_k",),
            },
        ),
    },
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    swapped=("norm_out.linear",),
)
"""Names of Black Forest Labs' code."""


class KleinCritic(CriticFeatures):
    """The first half of the blocks, at least one of those in which text and image are one stream."""

    widest_head = 1024

    def encoder(self, network: Any, on_its_weights: bool = False) -> Any:
        double, single = network.transformer_blocks, network.single_transformer_blocks
        kept = max(1, math.ceil((len(double) + len(single)) / 2) - len(double))
        ends: Mapping[nn.Module, nn.Module] = {network.norm_out: FirstInput(), network.proj_out: nn.Identity()}
        encoder = cut_off(network, ends, single[kept:], on_its_weights)
        encoder.single_transformer_blocks = encoder.single_transformer_blocks[:kept]
        return encoder

    def features(
        self, encoder: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        return _call(encoder, x_t, told, conditioning, dtype)

    def shape(self, network: Any, size: Size) -> tuple[int, int, int]:
        return network.config["num_attention_heads"] * network.config["attention_head_dim"], size[0], size[1]

    def taps(self, encoder: nn.Module) -> Sequence[nn.Module]:
        network: Any = bare(encoder)
        return earlier_levels([*network.transformer_blocks, *network.single_transformer_blocks])

    def tapped(self, encoder: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        return image_map(output, (x_t.shape[2], x_t.shape[3]))


def _call(module: nn.Module, x: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
    """What the network makes of each entry of a state: a map of as many entries."""
    allowed = (TEXT, "guidance")
    for key in conditioning:
        if key not in allowed:
            raise ValueError(f"conditioning {key!r} is not known; allowed: {', '.join(allowed)}")
    if TEXT not in conditioning:
        raise ValueError(f"the conditioning lacks {TEXT!r}; it has {sorted(conditioning)}")
    text = conditioning[TEXT].to(dtype)
    config: Any = bare(module).config  # type: ignore[union-attr]
    (h, w), device = x.shape[2:], x.device
    axes = len(config["axes_dims_rope"])  # (image, row, column, word), of which an image has the second and third
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    image = torch.zeros(h * w, axes, dtype=torch.int64, device=device)
    image[:, 1], image[:, 2] = rows.flatten(), columns.flatten()
    words = torch.zeros(text.shape[1], axes, dtype=torch.int64, device=device)
    words[:, 3] = torch.arange(text.shape[1], device=device)
    out = module(
        hidden_states=x.to(dtype).flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=told / 1000,  # which the network multiplies by as many
        img_ids=image,
        txt_ids=words,
        guidance=None,
        return_dict=False,
    )[0]
    return out.transpose(1, 2).unflatten(2, (h, w))


class Flux2Klein(Family):
    """FLUX.2 klein."""

    name = "flux2"
    title = "FLUX.2 klein"
    tag = "flux2"
    pipeline = "Flux2KleinPipeline"
    network = KleinNetwork(
        "transformer",
        "Flux2Transformer2DModel",
        ("transformer_blocks", "single_transformer_blocks"),
        (
            "in_channels",
            "out_channels",
            "num_layers",
            "num_single_layers",
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
        ),
        one_file=TransformerFile(_ORIGINAL),
    )
    text = KleinText()
    latents = PackedLatents()
    guidance = KleinGuidance()
    lora = KleinLoRA()
    critic = KleinCritic()
    comfyui = ComfyUI(
        models={
            "flux2_klein": ComfyModel("FLUX.2 klein base 4B", "flux-2-klein-base-4b.safetensors"),
            "flux2_klein_9b": ComfyModel("FLUX.2 klein base 9B", "flux-2-klein-base-9b.safetensors"),
        },
        formats=("checkpoint",),  # of diffusers' names of its layers nothing is known there
        loader="UNETLoader",
        text=("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "flux2"}),
        vae="flux2-vae.safetensors",
        latent="EmptyFlux2LatentImage",
        shift=flux_shift,
        levels=10_000,
    )
    full_size = {
        "flux2_klein": _published(_KLEIN_4B, encoders=4.02e9),  # Qwen3-4B
        "flux2_klein_9b": _published(_KLEIN_9B, encoders=7.57e9),  # Qwen3-8B, by the width of its states
    }

    def noise(self, noise: AnyNoise, tokens: int) -> AnyNoise:
        """Where the scheduler leaves the shift to the pipeline, that of diffusers' pipeline at its usual steps."""
        if not isinstance(noise, FlowNoise) or noise.dynamic is None:
            return noise.at(tokens)
        mu = empirical_mu(tokens, USUAL_STEPS)
        return replace(noise, shift=mu if noise.dynamic.time_shift_type == "linear" else math.exp(mu))

    def predict(
        self, module: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        return _call(module, x_t, told, conditioning, dtype)


def empirical_mu(tokens: int, steps: int) -> float:
    """mu of `Flux2KleinPipeline` for pictures of so many tokens in so many steps; the shift is e^mu.

    A line in the tokens at 200 steps and another at 10, and between them a line in the steps; above 4300 tokens that of
    200 steps. The numbers are Black Forest Labs' (diffusers, `compute_empirical_mu`).
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


FAMILY = Flux2Klein()
