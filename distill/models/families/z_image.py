"""Z-Image: one stream of image and prompt, told 1 - sigma, that answers the opposite of the usual velocity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.diffusion.noise import FlowNoise, short
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
)
from distill.models.families.comfy import ComfyModel, ComfyUI, aura_shift
from distill.models.families.cut import FirstInput, cut_off, earlier_levels, map_of
from distill.models.families.qwen3 import TEXT, Qwen3Text, Qwen3Tower, check_states
from distill.models.families.towers import TextTower
from distill.models.families.transformer import TransformerFile, TransformerLoRA
from distill.models.files import rounded
from distill.models.original import Layers, OriginalNames

MASK = "text_mask"
PATCH = 2
"""Side of what its pipeline has the network read as one token."""
_FLAT = "lora_unet_"

_VAE = dict(SD_VAE) | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_Z_IMAGE: dict[str, Any] = {
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
}


class ZImageNetwork(Network):
    """A ZImageTransformer2DModel that reads no pictures beside its own."""

    def describes(self, network: Config) -> bool:
        return network.get("siglip_feat_dim") is None

    def check(self, path: str, file: Path, network: Config, vae: Config) -> None:
        if not self.describes(network):
            raise ValueError(f"{path} cannot be a teacher: its network reads pictures beside prompts (siglip_feat_dim)")
        for key in ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads"):
            positive(file, network, key)
        if PATCH not in (network.get("all_patch_size") or ()):
            raise ValueError(
                f"{file}: all_patch_size is {short(network.get('all_patch_size'))}; its pipeline wants {PATCH}"
            )
        if network["in_channels"] != vae["latent_channels"]:
            raise ValueError(
                f"the network of {path} reads {network['in_channels']} channels, its autoencoder has "
                f"{vae['latent_channels']}: it must be the same"
            )

    def patch(self, network: Config) -> int:
        return PATCH

    def most(self, network: Config) -> int | None:
        lengths = network.get("axes_lens")
        return None if lengths is None else PATCH * min(lengths[1:])


class ZImageText(Qwen3Text):
    """The last states but one of a Qwen3, those of the prompt's own tokens alone."""

    towers = (Qwen3Tower("tokenizer", "text_encoder", "Qwen2Tokenizer", "Qwen3Model", thinking=True),)

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        states, mask = towers[0](prompts)
        return {TEXT: states[-2] * mask[..., None], MASK: mask}

    def shapes(self, network: Config, tokens: int) -> dict[str, tuple[int, ...]]:
        return {TEXT: (tokens, network["cap_feat_dim"]), MASK: (tokens,)}

    def check(self, path: str, network: Config, towers: Sequence[TextTower]) -> None:
        encoder = towers[0].encoder.config
        check_states(path, network.get("cap_feat_dim"), encoder.hidden_size, encoder.num_hidden_layers, 1)


class ZImageGuidance(Guidance):
    """A second pass without a prompt. Its pipeline prints g of `cond + g (cond - uncond)`, which is w - 1."""

    def form(self, network: Config, index: Config) -> Literal["cfg", "embedded", "none"]:
        """Z-Image-Turbo's configs say nothing of its distillation, so it is known by its name."""
        names = (network.get("_name_or_path"), index.get("_name_or_path"))
        return "none" if any("turbo" in str(name).lower() for name in names) else "cfg"

    def to_pipeline(self, w: float) -> float:
        return w - 1


class ZImageLoRA(TransformerLoRA):
    formats = ("diffusers", "peft", "comfyui", "kohya")
    targets = {
        "blocks": (
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
        ),
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": (
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
            "noise_refiner.*.adaLN_modulation.0",
            "layers.*.adaLN_modulation.0",
        ),
    }

    def file(
        self, format: str, weights: Mapping[str, Tensor], config: Any, network: Config, dtype: torch.dtype
    ) -> LoRAFile:
        if format != "kohya":
            return super().file(format, weights, config, network, dtype)
        tensors: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            module, factor, _ = name.rsplit(".", 2)
            key = _FLAT + module.replace(".", "_")
            kind = "lora_down" if factor == "lora_A" else "lora_up"
            tensors[f"{key}.{kind}.weight"] = rounded(name, tensor, dtype)
            tensors[f"{key}.alpha"] = torch.tensor(float(config.lora_alpha))
        return LoRAFile(tensors, {})

    def architecture(self, network: Config, velocity: bool) -> tuple[str, str]:
        return "zimage", "z-image"


_BLOCK: Layers = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
}
_ORIGINAL = OriginalNames(
    {group: (group, _BLOCK) for group in ("layers", "noise_refiner", "context_refiner")},
    {
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    },
    others=True,
)


class ZImageCritic(CriticFeatures):
    """The first half of the layers, and all that leads to them."""

    widest_head = 1024

    def encoder(self, network: Any, on_its_weights: bool = False) -> Any:
        kept = (len(network.layers) + 1) // 2
        ends = network.all_final_layer
        replaced: Mapping[nn.Module, nn.Module] = {ends: nn.ModuleDict({name: FirstInput() for name in ends})}
        encoder = cut_off(network, replaced, network.layers[kept:], on_its_weights)
        encoder.layers = encoder.layers[:kept]
        encoder.out_channels = network.dim // PATCH**2  # so what it puts together to a picture are whole states
        return encoder

    def features(
        self, encoder: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        found = _call(encoder, x_t, told, conditioning, dtype)  # [B, width / 4, h, w]
        tokens = found.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, width / 4, h / 2, 2, w / 2, 2]
        return tokens.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def shape(self, network: Any, size: Size) -> tuple[int, int, int]:
        return network.config["dim"], size[0] // PATCH, size[1] // PATCH

    def taps(self, encoder: nn.Module) -> Sequence[nn.Module]:
        network: Any = bare(encoder)
        return earlier_levels(network.layers)

    def tapped(self, encoder: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        """The image's tokens are the first ones."""
        size = (x_t.shape[2] // PATCH, x_t.shape[3] // PATCH)
        return map_of(output[:, : size[0] * size[1]], size)


def _call(module: nn.Module, x: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
    """What the network answers, [B, C, h, w]."""
    allowed = (TEXT, MASK, "guidance")
    for key in conditioning:
        if key not in allowed:
            raise ValueError(f"conditioning {key!r} is not known; allowed: {', '.join(allowed)}")
    for key in (TEXT, MASK):
        if key not in conditioning:
            raise ValueError(f"the conditioning lacks {key!r}; it has {sorted(conditioning)}")
    text, mask = conditioning[TEXT].to(dtype), conditioning[MASK].bool()
    # Without values, as in a plan, all tokens of a prompt count.
    prompts = text.unbind(0) if mask.is_meta else text[mask].split(mask.sum(1).tolist())
    out = module(
        list(x.to(dtype).unsqueeze(2).unbind(0)),
        (1000 - told) / 1000,
        list(prompts),
        return_dict=False,
    )[0]
    return torch.stack(list(out)).squeeze(2)


class ZImage(Family):
    """Z-Image."""

    name = "z_image"
    title = "Z-Image"
    tag = "z-image"
    pipeline = "ZImagePipeline"
    network = ZImageNetwork(
        "transformer",
        "ZImageTransformer2DModel",
        ("noise_refiner", "context_refiner", "layers"),
        ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim"),
        one_file=TransformerFile(_ORIGINAL),
    )
    text = ZImageText()
    latents = Latents()
    guidance = ZImageGuidance()
    lora = ZImageLoRA()
    critic = ZImageCritic()
    comfyui = ComfyUI(
        models={"z_image": ComfyModel("Z-Image", "z_image_bf16.safetensors")},
        formats=("comfyui", "network", "checkpoint"),
        loader="UNETLoader",
        text=("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}),
        vae="ae.safetensors",
        latent="EmptySD3LatentImage",
        shift=aura_shift,
    )
    full_size = {
        "z_image": Published(_Z_IMAGE, encoders=4.02e9, tokens=512, vae=_VAE, noise=FlowNoise(shift=3.0))  # Qwen3-4B
    }

    def predict(
        self, module: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        return -_call(module, x_t, told, conditioning, dtype)


FAMILY = ZImage()
