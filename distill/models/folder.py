"""A diffusers pipeline folder on disk or on the hub: finding it, its configs, its weights and their hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

_CONFIGS = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]


def find_pipeline(
    path: str, components: Sequence[str], revision: str | None = None, variant: str | None = None
) -> Path:
    """The local folder of a pipeline. From the hub come its configs and the named components, nothing else.

    Args:
        path: a folder, or a hub id (`organisation/name`).
        components: sub-folders whose files are needed, if they are there: `unet`, `text_encoder`, `tokenizer`, ...

    Raises:
        FileNotFoundError: if there is no such folder and the hub does not give one, or it holds no pipeline.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        folder = _download(path, components, revision, variant)
        there = [name for name in components if (folder / name).is_dir()]
        plain = [name for name in there if not variant_of(folder, name, variant)]
        if variant and plain:  # those that the variant was not made of
            folder = _download(path, plain, revision, None)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{path} is not a diffusers pipeline folder: it has no model_index.json "
            "(a single-file checkpoint becomes one by from_single_file(...).save_pretrained(folder))"
        )
    return folder


def _download(path: str, components: Sequence[str], revision: str | None, variant: str | None) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise FileNotFoundError(f"there is no folder {path!r}, and it is not a hub id (organisation/name) either")
    patterns = _CONFIGS + [pattern for name in components for pattern in _patterns(name, variant)]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what the hub client raises, connection errors included
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {path!r}, and the hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def _patterns(component: str, variant: str | None) -> list[str]:
    """Names of the files of a component, as globs: those of one variant, and never a pickle."""
    if component.startswith("tokenizer"):
        return [f"{component}/*"]
    if component == "feature_extractor":
        return [f"{component}/preprocessor_config.json"]
    of_transformers = component.startswith(("text_encoder", "image_encoder", "safety_checker"))
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    tag = f".{variant}" if variant else ""
    files = [f"{stem}{tag}.safetensors", f"{stem}{tag}-*-of-*.safetensors", f"{stem}.safetensors.index{tag}.json"]
    return [f"{component}/{file}" for file in files]


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A config of the pipeline.

    Raises:
        FileNotFoundError, ValueError: if it is missing, or is not a JSON object.
    """
    if not (folder / name).is_file():
        raise FileNotFoundError(f"the pipeline folder {folder} lacks {name}")
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / name} is not JSON: {error}") from None
    except OSError as error:
        raise FileNotFoundError(f"{folder / name} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def weight_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: of the variant, or those without one where only other components have it.

    Raises:
        FileNotFoundError: if there are none; it names the variants or the pickles that are there instead.
    """
    if files := _weights(folder, component, variant_of(folder, component, variant)):
        return files
    wanted = f"{component}/ of {folder} has no safetensors weights" + (f" of variant {variant!r}" if variant else "")
    others = sorted(file.name for file in (folder / component).glob("*.safetensors"))
    if others:
        raise FileNotFoundError(f"{wanted}; it has {', '.join(others)}: choose a variant that is there")
    if any((folder / component).glob("*.bin")):
        raise FileNotFoundError(
            f"{wanted}, only pickled ones (.bin), which could run code and are not opened: "
            "re-save the pipeline with save_pretrained(folder, safe_serialization=True)"
        )
    raise FileNotFoundError(wanted)


def variant_of(folder: Path, component: str, variant: str | None) -> str | None:
    """The variant in which a component is there: as in diffusers, None if it lacks this one and another component
    of the pipeline has it."""
    if variant is None or _weights(folder, component, variant):
        return variant
    return None if any(folder.glob(f"*/*.{variant}*.safetensors")) else variant


def _weights(folder: Path, component: str, variant: str | None) -> list[Path]:
    patterns = [pattern for pattern in _patterns(component, variant) if pattern.endswith(".safetensors")]
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of safetensors files, one in memory at a time, in the order of their names."""
    where = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where.update({name: path for name in file.keys()})
    opened = {path: safe_open(path, framework="pt") for path in set(where.values())}
    for name in sorted(where):
        yield name, opened[where[name]].get_tensor(name)


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of the SHA-256 over names, dtypes, shapes and bytes, taken in the order given.

    In the order of the names it is the same for weights in one file, in several or in memory.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()[:16]
