"""The formats a student is exported in, and those that hold a full network: a UNet's folder, a pipeline's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from distill.diffusion.noise import AnyNoise, read_noise
from distill.models.checks import check_folder, component
from distill.models.copied import COPIED, copy_parts
from distill.models.folder import find_pipeline, read_json

LORA_FORMATS = ("diffusers", "peft", "kohya")
FOLDER_FORMATS = ("unet", "pipeline")
"""Formats with the sub-folder `unet`, from which a later run can take a network."""
NETWORK_FORMATS = (*FOLDER_FORMATS, "checkpoint")
_ONE_FILE = "1TB"  # a shard's greatest size: ComfyUI and others load a network from one file
_OF_PIPELINES = (
    "_class_name",
    "_diffusers_version",
    "force_zeros_for_empty_prompt",
    "requires_safety_checker",
    "add_watermarker",
)


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
    """Writes `unet` as a diffusers model, its weights in one file, to the sub-folder `unet`; it is left in that dtype.

    Raises:
        ValueError: a weight that the dtype cannot hold.
    """
    _to(unet, dtype)
    unet.save_pretrained(folder / "unet", max_shard_size=_ONE_FILE)
    _forget_paths(folder / "unet")


def save_pipeline(
    folder: Path,
    unet: UNet2DConditionModel,
    pretrained_model_name_or_path: str,
    dtype: torch.dtype,
    scheduler: Callable[[AnyNoise], Any],
    revision: str | None = None,
    variant: str | None = None,
) -> None:
    """Writes the teacher's pipeline with `unet` in the place of its own, and with what `scheduler` makes of its noise.

    `DiffusionPipeline.from_pretrained(folder)` is then the student. Its other parts are the teacher's files, copied
    (see `copy_parts`), in the teacher's precision; `dtype` is the UNet's. A safety checker that lacks a file is
    left out.

    Raises:
        FileNotFoundError: the pipeline lacks a file that diffusers needs.
        ValueError: a weight that the dtype cannot hold; a part of a class that is not known.
    """
    source = find_pipeline(pretrained_model_name_or_path, COPIED, revision, variant)
    index = check_folder(source)
    sampling_scheduler = scheduler(
        read_noise(component(source, index, "scheduler")[1], read_json(source, "scheduler/scheduler_config.json"))
    )
    save_unet(folder, unet, dtype)
    sampling_scheduler.save_pretrained(folder / "scheduler")
    _forget_paths(folder / "scheduler")
    entries = copy_parts(source, folder, variant)
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = bool(entries.get("safety_checker", [None])[0])
    written = {key: index[key] for key in _OF_PIPELINES if isinstance(index.get(key), (str, bool))} | entries
    written["unet"] = ["diffusers", type(unet).__name__]
    written["scheduler"] = ["diffusers", type(sampling_scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(written, indent=2) + "\n")


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
