"""What the families with a transformer share: how files name their LoRAs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.models.families.base import Config, LoRA, LoRAFile
from distill.models.files import rounded

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
