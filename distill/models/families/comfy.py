"""What ComfyUI has to be told of a family's models: which nodes load them, and which one sets their noise levels.

Nodes and their slots are those of ComfyUI 0.3.64 (nodes.py; comfy_extras/nodes_model_advanced.py, nodes_sd3.py,
nodes_flux.py; comfy/model_sampling.py for the levels), read 2026-11-28 and 2026-11-29. Those for flow matching were
not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ComfyNode = tuple[str, Mapping[str, Any]]
"""A node by its class, and those of its inputs that are values."""


@dataclass(frozen=True)
class ComfyModel:
    """A published model.

    Args:
        title: for people.
        file: as ComfyUI's own examples call it.
        side: of the pictures, in pixels.
    """

    title: str
    file: str
    side: int = 1024


@dataclass(frozen=True)
class ComfyUI:
    """How ComfyUI opens a family's models.

    Args:
        models: those that it recognises by their sizes, by the names that the family's `full_size` has for them.
        formats: those of an export that it reads rightly, LoRAs first.
        loader: the node that loads a published model: of a whole checkpoint, or of a network alone.
        text: the node that loads the text encoders; None where they are in the checkpoint.
        vae: the autoencoder's file; None where it is in the checkpoint.
        latent: the node that makes empty latents.
        guidance: the node that gives a network its input of guidance; None where ComfyUI leaves that out.
        shift: the node that sets the noise levels of flow matching, for a shift and a side in pixels.
        levels: of that node, from which the scheduler `simple` chooses.
        says_velocity: whether a checkpoint of variance-preserving noise says itself that it predicts the velocity.
    """

    models: Mapping[str, ComfyModel]
    formats: tuple[str, ...]
    loader: str = "CheckpointLoaderSimple"
    text: ComfyNode | None = None
    vae: str | None = None
    latent: str = "EmptyLatentImage"
    guidance: str | None = None
    shift: Callable[[float, int], ComfyNode] | None = None
    levels: int = 1000
    says_velocity: bool = False


def sd3_shift(shift: float, side: int) -> ComfyNode:
    """For a network that is told 1000 sigma."""
    return "ModelSamplingSD3", {"shift": _number(shift)}


def aura_shift(shift: float, side: int) -> ComfyNode:
    """For a network that is told sigma."""
    return "ModelSamplingAuraFlow", {"shift": _number(shift)}


def flux_shift(shift: float, side: int) -> ComfyNode:
    """The same shift for pictures of all sizes: the node's two are logarithms, of the smallest and the largest ones."""
    mu = _number(math.log(shift))
    return "ModelSamplingFlux", {"max_shift": mu, "base_shift": mu, "width": side, "height": side}


def _number(value: float) -> float:
    return round(float(value), 6)
