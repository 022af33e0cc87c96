"""FLUX.1: a transformer over packed latents that reads T5's states, and has guidance as an input (dev) or none at all
(schnell)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from torch import Tensor, nn

from distill.diffusion.noise import DynamicShift, FlowNoise
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
    LoRAFile,
    Network,
    Published,
    Size,
    Text,
)
from distill.models.families.comfy import ComfyModel, ComfyUI, flux_shift
from distill.models.families.cut import FirstInput, cut_off, earlier_levels, image_map
from distill.models.families.towers import CLIPTower, T5Tower, TextTower
from distill.models.families.transformer import TransformerFile, TransformerLoRA
from distill.models.files import rounded
from distill.models.original import Layers, OriginalNames

TEXT, POOLED, GUIDANCE = "encoder_hidden_states", "pooled_projections", "guidance"
PATCH = 2
"""Side of what is packed into one token, in entries of a state."""
_SIDE = 128  # of the states that diffusers' pipeline generates by itself: the network's config does not say it
_TOLD = 1000  # the network is told sigma, and multiplies it by this itself


_SIZES: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
_ENCODERS = 4.88e9  # weights of CLIP ViT-L/14's text encoder and of T5 v1.1 XXL's encoder
_VAE = dict(SD_VAE) | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def pack(x: Tensor) -> Tensor:
    """Maps [B, C, h, w] as tokens [B, h/2 w/2, 4 C]: rows of patches, and in a patch channels first."""
    B, C, h, w = x.shape
    patches = x.reshape(B, C, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(B, (h // PATCH) * (w // PATCH), C * PATCH**2)


def unpack(tokens: Tensor, size: Size) -> Tensor:
    """Tokens of maps of `size` (h, w) as maps [B, C, h, w]: the inverse of `pack`."""
    B, _, width = tokens.shape
    h, w = size
    patches = tokens.reshape(B, h // PATCH, w // PATCH, width // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(B, width // PATCH**2, h, w)


def image_ids(size: Size, device: torch.device) -> Tensor:
    """The places of the tokens of maps of `size` (h, w), [n, 3]: 0, row, column."""
    rows, columns = size[0] // PATCH, size[1] // PATCH
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)
    return ids.reshape(rows * columns, 3)


def flux_keywords(
    config: Config, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
) -> dict[str, Any]:
    """The keyword arguments of a call of the network for states x_t [B, C, h, w].

    Times, places and w stay in float32, whatever the network computes in.

    Raises:
        ValueError: an entry of the conditioning that is missing, or that the network does not take.
    """
    allowed = (TEXT, POOLED, GUIDANCE)
    for key in conditioning:
        if key not in allowed:
            raise ValueError(f"conditioning {key!r} is not known; allowed: {', '.join(allowed)}")
    guided = bool(config["guidance_embeds"])
    for key in allowed if guided else (TEXT, POOLED):
        if key not in conditioning:
            raise ValueError(f"the conditioning lacks {key!r}; it has {sorted(conditioning)}")
    text = conditioning[TEXT].to(dtype)
    return {
        "hidden_states": pack(x_t.to(dtype)),
        "timestep": told.float() / _TOLD,
        "guidance": conditioning[GUIDANCE].float() if guided else None,
        "pooled_projections": conditioning[POOLED].to(dtype),
        "encoder_hidden_states": text,
        "txt_ids": torch.zeros(text.shape[1], 3, device=text.device),
        "img_ids": image_ids((x_t.shape[2], x_t.shape[3]), x_t.device),
        "return_dict": False,
    }


@dataclass(frozen=True)
class FluxTransformer(Network):
    """A FluxTransformer2DModel, which reads 2 x 2 entries of a state as one token."""

    folder: str = "transformer"
    kind: str = "FluxTransformer2DModel"
    blocks: tuple[str, ...] = ("transformer_blocks", "single_transformer_blocks")
    same: tuple[str, ...] = (
        "in_channels",
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    )

    def check(self, path: str, file: Path, network: Config, vae: Config) -> None:
        for key in ("num_layers", "num_single_layers", "joint_attention_dim", "pooled_projection_dim"):
            positive(file, network, key)
        reads, patch = positive(file, network, "in_channels"), network.get("patch_size", 1)
        writes, packed = network.get("out_channels") or reads, vae["latent_channels"] * PATCH**2
        if not reads == writes == packed or patch != 1:
            raise ValueError(
                f"the transformer of {path} reads {reads} and writes {writes} numbers a token (patch_size {patch}), "
                f"its autoencoder packs {packed}: filling, editing and control networks cannot be teachers"
            )

    def patch(self, network: Config) -> int:
        return PATCH

    def side(self, network: Config) -> int:
        return _SIDE


class FluxText(Text):
    """T5's states, which the network attends to, and CLIP's pooled output."""

    towers = (
        CLIPTower("tokenizer", "text_encoder", "CLIPTokenizer", "CLIPTextModel"),
        T5Tower("tokenizer_2", "text_encoder_2", "T5Tokenizer", "T5EncoderModel"),
    )
    max_tokens = 512
    stored = "bfloat16"
    shared = True

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        clip, t5 = towers
        return {TEXT: t5(prompts), POOLED: clip(prompts).pooler_output}

    def shapes(self, network: Config, tokens: int) -> dict[str, tuple[int, ...]]:
        return {TEXT: (tokens, network["joint_attention_dim"]), POOLED: (network["pooled_projection_dim"],)}

    def check(self, path: str, network: Config, towers: Sequence[TextTower]) -> None:
        clip, t5 = (tower.encoder.config for tower in towers)
        for key, width, what in (
            ("joint_attention_dim", t5.d_model, "T5"),
            ("pooled_projection_dim", clip.hidden_size, "CLIP"),
        ):
            if network.get(key) != width:
                raise ValueError(
                    f"{path} cannot be a teacher: its transformer has {key} {network.get(key)}, its {what} makes "
                    f"{width}"
                )


class FluxGuidance(Guidance):
    """w is an input of dev's network, in the only pass; schnell was distilled, and takes none."""

    def form(self, network: Config, index: Config) -> Literal["cfg", "embedded", "none"]:
        return "embedded" if self.taken(network) else "none"

    def taken(self, network: Config) -> bool:
        return bool(network.get("guidance_embeds"))

    def add(self, network: Any, dim: int, seed: int | None = None) -> None:
        """Nothing where the network has its own, of whatever width."""
        if not self.taken(network.config):
            super().add(network, dim, seed)

    @torch.no_grad()
    def build_in(self, network: Any, w: float) -> None:
        """What w adds to the embedding of times moves into the bias of that one's last layer."""
        if not self.taken(network.config):
            raise ValueError("the network takes no guidance as an input")
        own = network.time_text_embed
        weight = own.timestep_embedder.linear_2.weight
        told = torch.tensor([w], device=weight.device).to(weight.dtype) * _TOLD
        added = own.guidance_embedder(own.time_proj(told).to(weight.dtype))[0]
        bias = own.timestep_embedder.linear_2.bias
        bias.copy_(bias.double() + added.double())
        with torch.device("meta"):
            plain = CombinedTimestepTextProjEmbeddings(network.inner_dim, network.config["pooled_projection_dim"])
        for name in ("time_proj", "timestep_embedder", "text_embedder"):
            setattr(plain, name, getattr(own, name))
        network.time_text_embed = plain
        network.register_to_config(guidance_embeds=False)


# ---- LoRAs ----------------------------------------------------------------------------------------------------------

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_BLOCKS = (
    *_ATTENTION,
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "single_transformer_blocks.*.proj_out",  # the network's own end is called so too
)
_ALL = (
    *_BLOCKS[:-1],
    "proj_out",
    "norm1.linear",
    "norm1_context.linear",
    "norm.linear",
    "norm_out.linear",
    "x_embedder",
    "context_embedder",
    "timestep_embedder.linear_1",
    "timestep_embedder.linear_2",
    "guidance_embedder.linear_1",
    "guidance_embedder.linear_2",
    "text_embedder.linear_1",
    "text_embedder.linear_2",
)
_LAYERS: Mapping[str, tuple[str, Layers]] = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        },
    ),
}
"""For each list of blocks its name in the original network, and for each of a block's layers there the modules here
that it is made of. kohya-ss' files have the same with underscores (kohya-ss/sd-scripts, networks/lora_flux.py)."""
_NORMS: dict[str, Layers] = {
    "transformer_blocks": {
        "img_attn.norm.query_norm.scale": ("attn.norm_q",),
        "img_attn.norm.key_norm.scale": ("attn.norm_k",),
        "txt_attn.norm.query_norm.scale": ("attn.norm_added_q",),
        "txt_attn.norm.key_norm.scale": ("attn.norm_added_k",),
    },
    "single_transformer_blocks": {
        "norm.query_norm.scale": ("attn.norm_q",),
        "norm.key_norm.scale": ("attn.norm_k",),
    },
}
ORIGINAL = OriginalNames(
    {group: (name, {**layers, **_NORMS[group]}) for group, (name, layers) in _LAYERS.items()},
    {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    swapped=("norm_out.linear",),
)
"""Names of Black Forest Labs' code."""
TEXTS_IN_A_FILE = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
}


class FluxLoRA(TransformerLoRA):
    """Beside the formats of transformers kohya-ss', in which a layer's q, k and v are one."""

    formats = ("diffusers", "peft", "comfyui", "kohya")
    targets = {"blocks": _BLOCKS, "attention": _ATTENTION, "all": _ALL}

    def file(
        self, format: str, weights: Mapping[str, Tensor], config: Any, network: Config, dtype: torch.dtype
    ) -> LoRAFile:
        if format != "kohya":
            return super().file(format, weights, config, network, dtype)
        tensors = fused_state_dict(weights, config.lora_alpha, network, dtype)
        return LoRAFile(tensors, {"ss_network_module": "networks.lora_flux"})

    def architecture(self, network: Config, velocity: bool) -> tuple[str, str]:
        return "flux1", "flux-1-dev" if network.get("guidance_embeds") else "flux-1-schnell"


def fused_state_dict(
    weights: Mapping[str, Tensor], alpha: float, network: Config, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A LoRA by peft's names under kohya-ss' names of FLUX.1's layers.

    Of a layer that is n modules here, the As are stacked, [n r, in], and the Bs stand on the diagonal, [all outputs,
    n r]; a module without an adapter has zeros. Its alpha is n alpha, so that the scale is each one's own.

    Raises:
        ValueError: a module that kohya-ss' files have no name for, or a value that the dtype cannot hold.
    """
    blocks: dict[tuple[str, str], set[str]] = {}
    for name in weights:
        module = name.rsplit(".", 2)[0]
        found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module)
        if not found or found[1] not in _LAYERS or not any(found[3] in ms for ms in _LAYERS[found[1]][1].values()):
            raise ValueError(f"kohya-ss' files have no name for {module}: export formats=[diffusers,comfyui]")
        blocks.setdefault((found[1], found[2]), set()).add(found[3])
    named: dict[str, Tensor] = {}
    for (group, number), adapted in blocks.items():
        original, layers = _LAYERS[group]
        for layer, modules in layers.items():
            if not adapted.isdisjoint(modules):
                key = f"lora_unet_{original}_{number}_{layer}".replace(".", "_")
                A, B = _fused(weights, [f"{group}.{number}.{module}" for module in modules], network)
                named[f"{key}.lora_down.weight"] = rounded(key, A, dtype)
                named[f"{key}.lora_up.weight"] = rounded(key, B, dtype)
                named[f"{key}.alpha"] = torch.tensor(alpha * len(modules), dtype=torch.float32)
    return named


def _fused(weights: Mapping[str, Tensor], modules: Iterable[str], network: Config) -> tuple[Tensor, Tensor]:
    """One A and one B for modules that read the same."""
    parts = {m: (weights.get(f"{m}.lora_A.weight"), weights.get(f"{m}.lora_B.weight")) for m in modules}
    A_like, B_like = next((A, B) for A, B in parts.values() if A is not None and B is not None)
    width = network["num_attention_heads"] * network["attention_head_dim"]
    As, Bs = [], []
    for module, (A, B) in parts.items():
        outputs = width * 4 if module.endswith("proj_mlp") else width
        As.append(torch.zeros_like(A_like) if A is None else A)
        Bs.append(B_like.new_zeros(outputs, B_like.shape[1]) if B is None else B)
    return torch.cat(As), torch.block_diag(*Bs)


# ---- critics --------------------------------------------------------------------------------------------------------


class FluxCritic(CriticFeatures):
    """The hidden states of the image's tokens after the first half of all blocks, those with two streams first."""

    widest_head = 1024

    def encoder(self, network: Any, on_its_weights: bool = False) -> Any:
        ends = {network.norm_out: FirstInput(), network.proj_out: nn.Identity()}
        kept = self.kept(network)
        dropped = [block for name, many in kept.items() for block in getattr(network, name)[many:]]
        encoder = cut_off(network, ends, dropped, on_its_weights)
        for name, many in kept.items():
            setattr(encoder, name, getattr(encoder, name)[:many])
        for module in self.idle(encoder):
            module.requires_grad_(False)
        return encoder

    def kept(self, network: Any) -> dict[str, int]:
        """How many blocks of each kind."""
        double, single = len(network.transformer_blocks), len(network.single_transformer_blocks)
        half = max(1, (double + single) // 2)
        return {"transformer_blocks": min(half, double), "single_transformer_blocks": max(0, half - double)}

    def idle(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """What the last block makes of the text, which nothing reads; one with a single stream has no such part."""
        network: Any = bare(encoder)
        if len(network.single_transformer_blocks):
            return ()
        last = network.transformer_blocks[-1]
        return last.attn.add_q_proj, last.attn.norm_added_q, last.attn.to_add_out, last.ff_context

    def features(
        self, encoder: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        network: Any = bare(encoder)
        tokens = encoder(**flux_keywords(network.config, x_t, told, conditioning, dtype))[0]  # [B, n, width]
        return tokens.transpose(1, 2).reshape(len(x_t), -1, x_t.shape[2] // PATCH, x_t.shape[3] // PATCH)

    def shape(self, network: Any, size: Size) -> tuple[int, int, int]:
        return network.inner_dim, size[0] // PATCH, size[1] // PATCH

    def taps(self, encoder: nn.Module) -> Sequence[nn.Module]:
        network: Any = bare(encoder)
        return earlier_levels([*network.transformer_blocks, *network.single_transformer_blocks])

    def tapped(self, encoder: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        return image_map(output, (x_t.shape[2] // PATCH, x_t.shape[3] // PATCH))


class Flux(Family):
    """FLUX.1 [dev] and [schnell]."""

    name = "flux"
    title = "FLUX.1"
    tag = "flux"
    pipeline = "FluxPipeline"
    network = FluxTransformer(one_file=TransformerFile(ORIGINAL, TEXTS_IN_A_FILE))
    text = FluxText()
    latents = Latents()
    guidance = FluxGuidance()
    lora = FluxLoRA()
    critic = FluxCritic()
    comfyui = ComfyUI(
        models={
            "flux_dev": ComfyModel("FLUX.1 [dev]", "flux1-dev.safetensors"),
            "flux_schnell": ComfyModel("FLUX.1 [schnell]", "flux1-schnell.safetensors"),
        },
        formats=("comfyui", "network", "checkpoint"),
        loader="UNETLoader",
        text=(
            "DualCLIPLoader",
            {"clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"},
        ),
        vae="ae.safetensors",
        latent="EmptySD3LatentImage",
        guidance="FluxGuidance",
        shift=flux_shift,
        levels=10_000,
    )
    full_size = {
        "flux_dev": Published(_SIZES | {"guidance_embeds": True}, noise=FlowNoise(shift=None, dynamic=DynamicShift()),
                              encoders=_ENCODERS, tokens=512, vae=_VAE),
        "flux_schnell": Published(_SIZES | {"guidance_embeds": False}, noise=FlowNoise(shift=1.0),
                                  encoders=_ENCODERS, tokens=512, vae=_VAE),
    }  # fmt: skip

    def predict(
        self, module: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        network: Any = bare(module)
        tokens = module(**flux_keywords(network.config, x_t, told, conditioning, dtype))[0]
        return unpack(tokens, (x_t.shape[2], x_t.shape[3]))


FAMILY = Flux()
