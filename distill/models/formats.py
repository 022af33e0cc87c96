"""The formats a student is exported in, and those that hold a whole network: a UNet's folder, a pipeline's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

LORA_FORMATS = ("diffusers", "peft", "kohya")
NETWORK_FORMATS = ("unet", "pipeline")


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in the dtype of a file.

    Raises:
        ValueError: a value that is not finite, or not in that dtype.
    """
    stored = tensor.to(dtype)
    if tensor.is_floating_point() and not stored.isfinite().all():
        if not tensor.isfinite().all():
            raise ValueError(f"the weights are broken: {name} has values that are not finite")
        raise ValueError(f"{name} holds {float(tensor.abs().max()):.3g}, too much for dtype={str(dtype)[6:]}")
    return stored


def save_unet(folder: Path, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Writes `unet` as a diffusers model to the sub-folder `unet`; it is left in that dtype.

    Raises:
        ValueError: a weight that the dtype cannot hold.
    """
    _to(unet, dtype)
    unet.save_pretrained(folder / "unet")
    _forget_paths(folder / "unet")


def save_pipeline(
    folder: Path,
    unet: UNet2DConditionModel,
    pretrained_model_name_or_path: str,
    dtype: torch.dtype,
    scheduler: Callable[[Any], Any],
    revision: str | None = None,
    variant: str | None = None,
) -> None:
    """Writes the teacher's pipeline with `unet` in the place of its own, and with what `scheduler` makes of its config.

    `DiffusionPipeline.from_pretrained(folder)` then draws as a student does. Only the UNet is stored in `dtype`.

    Raises:
        FileNotFoundError: the pipeline lacks a file that diffusers asks for.
        ValueError: a weight that the dtype cannot hold.
    """
    _to(unet, dtype)
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(
            pretrained_model_name_or_path,
            unet=unet,
            torch_dtype=torch.float32,  # stored as halves, a text encoder would be loaded as halves, and the UNet not
            revision=revision,
            variant=variant,
            use_safetensors=True,
        )
    except OSError as error:
        raise FileNotFoundError(
            f"model.pretrained_model_name_or_path={pretrained_model_name_or_path}: {error}"
        ) from None
    pipeline.scheduler = scheduler(pipeline.scheduler.config)
    pipeline.save_pretrained(folder)
    _forget_paths(folder)


def _to(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    for name, parameter in unet.named_parameters():
        parameter.data = rounded(name, parameter.data, dtype)
    nn.Module.to(unet, dtype)


def _forget_paths(folder: Path) -> None:
    """Takes out of the configs where on this machine their models were loaded from."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n")
