"""LoRA files of any program that diffusers reads, on a stock pipeline: all of a file or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.models.checks import naming
from distill.models.families.base import Family
from distill.models.families.registry import network_of
from distill.models.lora import LORA_FILE


def put_lora(pipeline: Any, path: str | Path, family: Family, adapter: str, setting: str = "lora") -> None:
    """Loads a LoRA into the pipeline's network, and into its text encoders where the file has weights of theirs.

    Args:
        path: a file, a folder or a repository of the hub.
        adapter: what it is called in the pipeline, where `set_adapters` gives it its weight.
        setting: that names it, for messages.

    Raises:
        ValueError: it cannot be read, or some of it has no place in the network.
    """
    source, named = _place(Path(path))
    with naming(Path(path)):
        tensors = family.lora.seen(pipeline, source, **named)
    modules = dict(network_of(pipeline).named_modules())
    if misfits := [key for key, x in tensors.items() if not _fits(modules, key, x)]:
        raise ValueError(
            f"{setting}={path} is not of this model: {len(misfits)} of its {len(tensors)} tensors have no place in its "
            f"network, as {misfits[0]} {list(tensors[misfits[0]].shape)}"
        )
    with naming(Path(path)):
        pipeline.load_lora_weights(source, adapter_name=adapter, **named)


def _place(path: Path) -> tuple[str, dict[str, Any]]:
    """What diffusers is given for a file, a folder or a repository; without the name of the file it may ask the hub."""
    named: dict[str, Any] = {"use_safetensors": True}
    if path.is_file():
        return str(path.parent), named | {"weight_name": path.name}
    if (path / LORA_FILE).is_file():
        named["weight_name"] = LORA_FILE
    return str(path), named


def use_weights(pipeline: Any, weights: Mapping[str, float]) -> None:
    """Computes with the adapters of these names, each with its weight, and with no other."""
    pipeline.set_adapters(list(weights), list(weights.values()))


def _fits(modules: Mapping[str, Any], key: str, tensor: Tensor) -> bool:
    """Whether a LoRA's tensor belongs to one of the network's modules: A [rank, in, ...] and B [out, rank, ...]."""
    name, _, kind = key.partition(".lora_")
    module = modules.get(name)
    weight = getattr(getattr(module, "base_layer", module), "weight", None)  # an earlier one may have adapted it
    if weight is None or kind.partition(".")[0] not in ("A", "B"):
        return weight is not None
    width = weight.shape[1 if kind.startswith("A") else 0]
    return tensor.ndim == weight.ndim and tensor.shape[1 if kind.startswith("A") else 0] == width


def of_text_encoders(names: Sequence[str]) -> bool:
    """Whether a LoRA file, by the names of its tensors, has weights for text encoders."""
    return any(name.startswith(("text_encoder", "lora_te", "text_model")) for name in names)
