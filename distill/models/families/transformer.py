"""What the families with a transformer share: how files name their LoRAs and their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.models.copied import text_tensors
from distill.models.families.base import Config, LoRA, LoRAFile, OneFile
from distill.models.files import rounded
from distill.models.folder import read_json, stored_tensors, weight_files
from distill.models.original import NETWORK, OriginalNames, prefixed, stored_vae

_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
METADATA = "lora_adapter_metadata"
"""The entry of a file's header in which diffusers finds a LoRA's rank and alpha."""


class TransformerLoRA(LoRA):
    """LoRAs as diffusers writes them: peft's names behind the network's, rank and alpha in the header alone.

    A program that does not read the header takes alpha for the rank. So `comfyui` is a file of its own, with
    alpha / rank multiplied into B: it is right wherever it is read, diffusers included.
    """

    formats: tuple[str, ...] = ("diffusers", "peft", "comfyui")
    prefix = "transformer"

    def file(
        self, format: str, weights: Mapping[str, Tensor], config: Any, network: Config, dtype: torch.dtype
    ) -> LoRAFile:
        folded = format == "comfyui"
        factor = config.lora_alpha / config.r if folded else 1.0
        tensors = {
            f"{self.prefix}.{name}": rounded(name, x.float() * factor if ".lora_B." in name else x, dtype)
            for name, x in weights.items()
        }
        return LoRAFile(tensors, {} if folded else {METADATA: self._metadata(config)}, folded)

    def _metadata(self, config: Any) -> str:
        """Of a LoRA, as diffusers packs it: each key behind the network's name."""
        said = {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "target_modules": sorted(config.target_modules or ()),
            "rank_pattern": {},
            "alpha_pattern": {},
            "bias": "none",
            "use_dora": False,
            "use_rslora": False,
        }
        return json.dumps({f"{self.prefix}.{key}": value for key, value in said.items()}, indent=2, sort_keys=True)

    def read(self, tensors: Mapping[str, Tensor], modules: Sequence[str], network: Config) -> dict[str, Tensor]:
        return {key.removeprefix(f"{self.prefix}."): x for key, x in tensors.items()}


class TransformerFile(OneFile):
    """A transformer by its original names.

    Args:
        original: those names.
        texts: how the names of each text encoder begin, whose file then has the autoencoder as well. Without any, the
            network is alone in it, as other programs want it where they read text encoders from files of their own.
    """

    def __init__(self, original: OriginalNames, texts: Mapping[str, str] | None = None) -> None:
        self.original, self.beginnings = original, dict(texts or {})
        self.parts = ("vae", *self.beginnings) if self.beginnings else ()

    def names(self, network: Config) -> OriginalNames:
        """The original names of a network with this config."""
        return self.original

    def tensors(self, network: Any, source: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
        beginning = NETWORK if self.beginnings else ""
        yield from prefixed(beginning, self.names(network.config).tensors(network.state_dict()))
        if self.beginnings:
            yield from stored_vae(source, variant)
        for name, beginning in self.beginnings.items():
            if not (source / name).is_dir():
                continue  # a pipeline may lack a T5
            is_clip = "CLIP" in str(read_json(source, f"{name}/config.json").get("architectures"))
            found = text_tensors(source, name, variant) if is_clip else _t5_tensors(source, name, variant)
            yield from prefixed(beginning, found)


def _t5_tensors(source: Path, name: str, variant: str | None) -> Iterator[tuple[str, Tensor]]:
    """A T5's weights. Its embedding has two names, of which transformers saves one, and other programs read both."""
    tensors = dict(stored_tensors(weight_files(source, name, variant)))
    for key, other in (_T5_EMBEDDINGS, _T5_EMBEDDINGS[::-1]):
        if other in tensors:
            tensors.setdefault(key, tensors[other].clone())
    yield from tensors.items()
