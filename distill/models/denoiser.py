"""A diffusers UNet behind the floor-0 wall: whatever it predicts, what comes out is (x0, eps)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from distill.diffusion.guidance import guidance_embedding
from distill.diffusion.prediction import Conditioning, Denoised, Prediction, check_prediction, to_denoised
from distill.diffusion.schedule import NoiseSchedule
from distill.models.lora import ADAPTER, lora_layers, only_adapter

_TEXT, _GUIDANCE = "encoder_hidden_states", "guidance"
_ADDED = ("text_embeds", "time_ids")  # diffusers wants these inside the keyword `added_cond_kwargs`
_NUMBERS = ("time_ids",)  # pixel counts: bfloat16 would round 1023 to 1024


def bare(module: nn.Module) -> nn.Module:
    """The network inside DDP's or DeepSpeed's wrapper."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


@dataclass(frozen=True)
class NetworkDenoiser:
    """The `Denoiser` of a UNet. `dataclasses.replace(denoiser, module=wrapped)` is the same one inside an engine.

    Args:
        module: a diffusers UNet2DConditionModel, bare or wrapped.
        schedule: of the noise it was trained on.
        prediction: what it predicts.
        adapter: the LoRA that it computes with, alone. The trained one is on whenever no other is named; None
            switches all off around each call, which makes a LoRA student its own teacher; another one takes its place
            there, for calls without a gradient.
    """

    module: nn.Module
    schedule: NoiseSchedule
    prediction: Prediction
    adapter: str | None = ADAPTER
    _found: list[BaseTunerLayer] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.schedule)

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """x_t [B, C, h, w], t [B] int64 -> (x0, eps), both [B, C, h, w] in float32 or wider.

        The network runs in the dtype of its frozen weights (or in autocast's), the arithmetic around it does not.
        A clean sample (t = 0) has no timestep index; it is shown to the network as index 0, for the caller to mask.
        The entry "guidance" [B], a weight w, reaches a network that was built to take it, and no other.

        Raises:
            ValueError: for a conditioning entry that a UNet does not take, or without one that it needs; or the network
                has no adapter of that name.
        """
        dtype = self.dtype
        keywords = unet_keywords(conditioning, dtype, self.guidance_embedding_dim)
        with nullcontext() if self.adapter == ADAPTER else only_adapter(self._lora_layers, self.adapter):
            output = self.module(x_t.to(dtype), self.schedule.told(t), return_dict=False, **keywords)[0]
        return to_denoised(self.prediction, output, x_t, t, self.schedule)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network expects its inputs in: that of its first layer, which no standard LoRA touches."""
        first: Any = bare(self.module).conv_in
        return first.weight.dtype

    @property
    def guidance_embedding_dim(self) -> int | None:
        """Width of the features in which the network is shown a guidance weight; None if it takes none."""
        return getattr(getattr(bare(self.module), "config", None), "time_cond_proj_dim", None)

    @property
    def _lora_layers(self) -> list[BaseTunerLayer]:
        if not self._found:  # nothing yet, but a LoRA may still be added
            layers = lora_layers(self.module)
            known = {name for layer in layers for name in layer._get_available_adapters()}
            if self.adapter is not None and self.adapter not in known:
                raise ValueError(f"the network has no adapter {self.adapter!r}")
            self._found.extend(layers)
        return self._found


def unet_keywords(
    conditioning: Conditioning, dtype: torch.dtype, guidance_dim: int | None
) -> dict[str, Tensor | Mapping[str, Tensor]]:
    """The UNet's keyword arguments for a flat conditioning."""
    allowed = (_TEXT, *_ADDED, _GUIDANCE)
    for key in conditioning:
        if key not in allowed:
            raise ValueError(f"conditioning {key!r} is not known; allowed: {', '.join(allowed)}")
    for key in [_TEXT] if guidance_dim is None else [_TEXT, _GUIDANCE]:
        if key not in conditioning:
            raise ValueError(f"the conditioning lacks {key!r}; it has {sorted(conditioning)}")
    keywords: dict[str, Any] = {_TEXT: conditioning[_TEXT].to(dtype)}
    if guidance_dim is not None:
        keywords["timestep_cond"] = guidance_embedding(conditioning[_GUIDANCE], guidance_dim).to(dtype)
    if added := {k: x if k in _NUMBERS else x.to(dtype) for k, x in conditioning.items() if k in _ADDED}:
        keywords["added_cond_kwargs"] = added
    return keywords
