"""A network of diffusers behind the floor-0 wall: whatever it predicts, what comes out is (x0, eps)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from distill.diffusion.prediction import Conditioning, Denoised, Prediction, check_prediction, to_denoised
from distill.diffusion.schedule import NoiseSchedule
from distill.models.execution import bare, base_dtype
from distill.models.families.base import Family
from distill.models.families.registry import family_of_network
from distill.models.lora import ADAPTER, lora_layers, only_adapter


@dataclass(frozen=True)
class NetworkDenoiser:
    """The `Denoiser` of a network. `dataclasses.replace(denoiser, module=wrapped)` is the same one inside an engine.

    Args:
        module: a denoising network of diffusers, bare or wrapped.
        schedule: of the noise it was trained on.
        prediction: what it predicts.
        adapter: the LoRA that it computes with, alone. The trained one is on whenever no other is named; None
            switches all off around each call, which makes a LoRA student its own teacher; another one takes its place
            there.
        family: how it is called; None is the family that has networks of its class.
    """

    module: nn.Module
    schedule: NoiseSchedule
    prediction: Prediction
    adapter: str | None = ADAPTER
    family: Family | None = None
    _found: list[BaseTunerLayer] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.schedule)

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """x_t [B, C, h, w], t [B] int64 -> (x0, eps), both [B, C, h, w] in float32 or wider.

        The network runs in the dtype of its frozen weights (or in autocast's), the arithmetic around it does not.
        A clean sample (t = 0) has no timestep index; it is shown to the network as index 0, for the caller to mask.
        The entry "guidance" [B], a weight w, reaches a network that was built to take it, and no other.

        Raises:
            ValueError: for a conditioning entry that the network does not take, or without one that it needs; or the
                network has no adapter of that name.
        """
        dtype = self.dtype
        told = self.schedule.told(t)
        with nullcontext() if self.adapter == ADAPTER else only_adapter(self._lora_layers, self.adapter):
            output = self._family.predict(self.module, x_t, told, conditioning, dtype)
        return to_denoised(self.prediction, output, x_t, t, self.schedule)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network expects its inputs in."""
        return base_dtype(self.module)

    @property
    def takes_guidance(self) -> bool:
        """Whether a guidance weight is an input of the network."""
        network: Any = bare(self.module)
        return self._family.guidance.taken(network.config)

    @property
    def _family(self) -> Family:
        return self.family or family_of_network(bare(self.module))

    @property
    def _lora_layers(self) -> list[BaseTunerLayer]:
        if not self._found:  # nothing yet, but a LoRA may still be added
            layers = lora_layers(self.module)
            known = {name for layer in layers for name in layer._get_available_adapters()}
            if self.adapter is not None and self.adapter not in known:
                raise ValueError(f"the network has no adapter {self.adapter!r}")
            self._found.extend(layers)
        return self._found
