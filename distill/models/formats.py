"""The formats a student is exported in, and those that hold a full network: its own folder, a pipeline's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.diffusion.noise import AnyNoise, read_noise
from distill.models.checks import check_folder, component
from distill.models.copied import copy_parts, parts_of
from distill.models.families.base import Family
from distill.models.families.registry import FAMILIES, family_of_network
from distill.models.files import rounded
from distill.models.folder import find_pipeline, read_json

LORA_FORMATS = ("diffusers", "peft", "comfyui", "kohya")
"""All that there are; a family has those that its `LoRA.formats` names."""
NAMED_FORMATS = ("comfyui", "kohya")
"""Those of one file that is called like the export, in a sub-folder of the format's name."""
NETWORK = "network"
"""The network alone. An export says the name of its sub-folder, `unet` or `transformer`, which users may type too."""
FOLDER_FORMATS = (NETWORK, "pipeline")
"""Formats with a sub-folder of the network, from which a later run can take it."""
NETWORK_FORMATS = (*FOLDER_FORMATS, "checkpoint")
_ONE_FILE = "1TB"  # a shard's greatest size: ComfyUI and others load a network from one file
_OF_PIPELINES = (
    "_class_name",
    "_diffusers_version",
    "force_zeros_for_empty_prompt",
    "requires_safety_checker",
    "add_watermarker",
    "is_distilled",
)


def format_named(name: str) -> str:
    """A format by one of its names: those of networks' sub-folders are names of `NETWORK`."""
    return NETWORK if name in {family.network.folder for family in FAMILIES.values()} else name


def save_network(folder: Path, network: Any, dtype: torch.dtype, family: Family | None = None) -> None:
    """Writes a network as a diffusers model, its weights in one file, to its family's sub-folder for it.

    It is left in that dtype.

    Raises:
        ValueError: a weight that the dtype cannot hold.
    """
    _to(network, dtype)
    place = folder / (family or family_of_network(network)).network.folder
    network.save_pretrained(place, max_shard_size=_ONE_FILE)
    _forget_paths(place)


def save_pipeline(
    folder: Path,
    network: Any,
    pretrained_model_name_or_path: str,
    dtype: torch.dtype,
    scheduler: Callable[[AnyNoise], Any],
    revision: str | None = None,
    variant: str | None = None,
    family: Family | None = None,
) -> None:
    """Writes the teacher's pipeline with `network` for its own, and with what `scheduler` makes of its noise.

    `DiffusionPipeline.from_pretrained(folder)` is then the student. Its other parts are the teacher's files, copied
    (see `copy_parts`), in the teacher's precision; `dtype` is the network's. A safety checker that lacks a file is
    left out.

    Raises:
        FileNotFoundError: the pipeline lacks a file that diffusers needs.
        ValueError: a weight that the dtype cannot hold; a part of a class that is not known.
    """
    family = family or family_of_network(network)
    source = find_pipeline(pretrained_model_name_or_path, list(parts_of(family)), revision, variant)
    index = check_folder(source)
    sampling_scheduler = scheduler(
        read_noise(component(source, index, "scheduler")[1], read_json(source, "scheduler/scheduler_config.json"))
    )
    save_network(folder, network, dtype, family)
    sampling_scheduler.save_pretrained(folder / "scheduler")
    _forget_paths(folder / "scheduler")
    entries = copy_parts(source, folder, family, variant)
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = bool(entries.get("safety_checker", [None])[0])
    written = {key: index[key] for key in _OF_PIPELINES if isinstance(index.get(key), (str, bool))} | entries
    written[family.network.folder] = ["diffusers", type(network).__name__]
    written["scheduler"] = ["diffusers", type(sampling_scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(written, indent=2) + "\n")


def _to(network: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in network.named_parameters():
        parameter.data = rounded(name, parameter.data, dtype)
    nn.Module.to(network, dtype)


def _forget_paths(folder: Path) -> None:
    """Takes out of the configs where on this machine their models were loaded from."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n")
