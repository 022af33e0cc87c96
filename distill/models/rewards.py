"""Preference scores of pictures with a gradient: CLIP, PickScore, HPSv2 and ImageReward.

No package but transformers and open_clip is needed, and weights are read as tensors only. The arithmetic is tested
against those two libraries at random weights; the names of ImageReward's weights are those in the published source of
BLIP. No published checkpoint has been loaded here: the first time, compare a score or two with its model card.
MPS (Zhang et al. 2024), the score of MLCM, is published as a pickled module only, which is code: it is refused.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

_log = logging.getLogger(__name__)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP and of BLIP
HEAD_WIDTH = 64  # of every attention head in BLIP


class Reward(Protocol):
    """How well pictures fit prompts, for some taste; an `nn.Module` whose weights are frozen."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] and a prompt for each -> float32 [B], differentiable in the pictures."""


class Pixels(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] as CLIP is shown them: [B, 3, size, size].

    The shorter side is resized to `size` (bicubic, antialiased, as PIL does it, without its rounding to 8 bits), the
    middle cut out, and each channel normalised. HPSv2 pads where this cuts: they agree on square pictures.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        size, (H, W) = self.size, images.shape[-2:]
        h, w = (size, size * W // H) if H <= W else (size * H // W, size)
        resized = F.interpolate(images.float(), (h, w), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (h - size) // 2, (w - size) // 2
        return (resized[..., top : top + size, left : left + size] - self.mean) / self.std


class ClipReward(nn.Module):
    """exp(logit_scale) cos(image, text) by a transformers `CLIPModel`: CLIP scores, and PickScore's by its weights.

    Kirstain et al. 2023, arXiv 2305.01569. Prompts are read as far as the text encoder reaches.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        config: Any = model.config
        self.pixels, self.tokens = Pixels(config.vision_config.image_size), config.text_config.max_position_embeddings
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        _check(images, prompts)
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(images.device)
        found = self.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=self.pixels(images).to(self.model.dtype),
        )
        cosine = (found.image_embeds.float() * found.text_embeds.float()).sum(-1)  # [B]; both are of length 1
        return self.model.logit_scale.float().exp() * cosine


class HpsReward(nn.Module):
    """`scale` cos(image, text) by an open_clip model with HPSv2's weights (Wu et al. 2023, arXiv 2306.09341).

    Published scores are the cosine itself, about 0.2 to 0.3; scale 100 is that of its training.
    """

    def __init__(self, model: Any, tokenizer: Any, scale: float = 100.0) -> None:
        super().__init__()
        self.model, self.tokenizer, self.scale = model, tokenizer, scale
        import open_clip  # seconds, which no other command has to wait for

        self.pixels = Pixels(open_clip.get_model_preprocess_cfg(model)["size"][0])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        _check(images, prompts)
        image = self.model.encode_image(self.pixels(images), normalize=True)  # [B, D]
        text = self.model.encode_text(self.tokenizer(list(prompts)).to(images.device), normalize=True)
        return self.scale * (image.float() * text.float()).sum(-1)


class ImageReward(nn.Module):
    """ImageReward (Xu et al. 2023, arXiv 2304.05977): a linear head over BLIP's text encoder, which sees the picture.

    Its score is (head(first token) - MEAN) / STD: 0 on average and of unit variance over its training set. Prompts are
    read to their 35th token. (MLCM warns that raising it overexposes pictures.)

    Args:
        vision, text: BLIP's encoders, the text's with cross-attention.
        head: from the text's width to 1.
        tokenizer: of BERT, uncased.
    """

    MEAN, STD, TOKENS = 0.16717362830052426, 1.0333394966054072, 35

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        config: Any = vision.config
        self.pixels = Pixels(config.image_size)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        _check(images, prompts)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.TOKENS, return_tensors="pt"
        ).to(images.device)
        seen = self.vision(self.pixels(images)).last_hidden_state  # [B, patches + 1, D]
        read = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        score = self.head(read.last_hidden_state[:, 0].float())[:, 0]
        return (score - self.MEAN) / self.STD


def _check(images: Tensor, prompts: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        found = f"{tuple(images.shape)} and {len(prompts)}"
        raise ValueError(f"a reward takes pictures [B, 3, H, W] and B prompts, got {found}")


# ---- from files -----------------------------------------------------------------------------------------------------


def load_clip_reward(path: str, tokenizer: str | None = None) -> ClipReward:
    """A `ClipReward` from a transformers folder or hub id with safetensors weights; `tokenizer` is another one's.

    Raises FileNotFoundError: one of them is not there.
    """
    with _found(path):
        model = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    return ClipReward(model, _tokenizer(tokenizer or path))


def load_hps_reward(path: str, architecture: str = "ViT-H-14", scale: float = 100.0) -> HpsReward:
    """An `HpsReward` from its published state dict; `architecture` is open_clip's name for it.

    Raises what `load_weights` and `fill` raise.
    """
    import open_clip

    weights = load_weights(path)
    model = fill(open_clip.create_model(architecture), weights, path)
    return HpsReward(model, open_clip.get_tokenizer(architecture), scale)


def load_image_reward(path: str, tokenizer: str = "bert-base-uncased") -> ImageReward:
    """An `ImageReward` from its published state dict, which says all sizes; `tokenizer` is a folder or hub id.

    Raises what `load_weights` and `fill` raise.
    """
    weights = load_weights(path)
    parts = {part: _under(weights, part, path) for part in ("blip.visual_encoder", "blip.text_encoder", "mlp.layers")}
    vision = {_vision_name(name): x for name, x in parts["blip.visual_encoder"].items()}
    text, head = parts["blip.text_encoder"], parts["mlp.layers"]
    text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    try:
        encoder, reader = BlipVisionModel(_vision_config(vision)), BlipTextModel(_text_config(text), False)
        layers = [name.removesuffix(".weight") for name in sorted(head) if name.endswith(".weight")]
        shapes = [head[f"{i}.weight"].shape for i in layers]
        linear = nn.Sequential(*(nn.Linear(inputs, outputs) for outputs, inputs in shapes))
        renamed = {f"{k}.{what}": head[f"{i}.{what}"] for k, i in enumerate(layers) for what in ("weight", "bias")}
    except KeyError as error:
        raise ValueError(f"{path} is not ImageReward's: it has no weight {error}") from None
    return ImageReward(
        fill(encoder, vision, path),
        fill(reader, text, path),
        fill(linear, renamed, path),  # dropout lies between its layers, and nothing that bends
        _tokenizer(tokenizer),
    )


@contextmanager
def _found(path: str) -> Iterator[None]:
    """Says in a line what transformers and the hub client say in several."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no safetensors model or tokenizer at {path!r}: {reason}") from None


def _tokenizer(path: str) -> Any:
    with _found(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a `.safetensors` file, or from a pickle of tensors, bare or as its "state_dict".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the pickle holds anything that is not plain data, which is not executed; or no tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights of a reward at {path}")
    if str(path).endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it is not a state dict of plain tensors") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path} is refused: it is not a state dict of plain tensors")
    return found


def fill(module: nn.Module, weights: Mapping[str, Tensor], path: str) -> Any:
    """The module with these weights. Those that it does not have are left out, with a word in the log.

    Raises:
        ValueError: a weight is missing or of another shape; names the first.
    """
    own = module.state_dict()
    for name, x in own.items():
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != tuple(x.shape):
            raise ValueError(f"{path} does not fit {type(module).__name__}: {name} {list(x.shape)} is {found}")
    if others := sorted(weights.keys() - own.keys()):
        _log.warning("%s: %d tensors are not used, such as %s", path, len(others), others[0])
    module.load_state_dict({name: weights[name] for name in own})
    return module


def _under(weights: Mapping[str, Tensor], part: str, path: str) -> dict[str, Tensor]:
    found = {name.removeprefix(f"{part}."): x for name, x in weights.items() if name.startswith(f"{part}.")}
    if not found:
        raise ValueError(f"{path} is not ImageReward's: it has no {part}")
    return found


_VISION_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}


def _vision_name(name: str) -> str:
    """The name in transformers of a weight of BLIP's image encoder (Li et al. 2022, arXiv 2201.12086)."""
    for theirs, ours in _VISION_NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def _vision_config(weights: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, _, patch = weights["embeddings.patch_embedding.weight"].shape
    places = weights["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(weights, "encoder.layers"),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round(places**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(weights: Mapping[str, Tensor]) -> BlipTextConfig:
    words, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(weights, "encoder.layer"),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
    )


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(f"{prefix}.").partition(".")[0] for name in weights if name.startswith(f"{prefix}.")})
