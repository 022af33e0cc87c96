"""A pipeline folder whose networks have LoRAs merged into them: "base + LoRAs" as a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from distill.models.checks import first_line, naming
from distill.models.derived import SINGLE, WeightedLoRA, made_once, stated
from distill.models.families.loading import PipelineFacts, check_pipeline, folders_of, load_part
from distill.models.folder import find_pipeline, variant_of, weight_files
from distill.models.lora import LORA_FILE
from distill.models.lora_files import of_text_encoders, put_lora, use_weights

SETTING = "model.loras"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def folder_with_loras(
    path: str, loras: Sequence[WeightedLoRA], revision: str | None = None, variant: str | None = None
) -> Path:
    """The pipeline folder that a pipeline with LoRAs in it becomes, in the cache, with the same variant.

    Weights keep their dtype; what the LoRAs do not touch stays where it is, behind links.

    Args:
        path: a pipeline's folder or hub id.

    Raises:
        FileNotFoundError, ValueError: a LoRA that is missing, that cannot be read, or that is of another model; see
            `load_teacher` too.
    """
    files = [_file(lora) for lora in loras]
    with_text = any(of_text_encoders(_names(file)) for file in files)
    parts = ("network", "text", "vae")
    source = find_pipeline(path, [name for part in parts for name in folders_of(part)], revision, variant)
    described = check_pipeline(path, source)
    facts = {
        "base": stated([p for p in sorted(source.glob("*/*")) if p.suffix in (SINGLE, ".json")]),
        "loras": [(*stated([file]), lora.weight) for file, lora in zip(files, loras, strict=True)],
        "variant": variant,
    }
    base = path.rstrip("/").rpartition("/")[2]
    name = "+".join([source.name if Path(path).exists() else base, *(lora.name for lora in loras)])

    def make(folder: Path) -> None:
        _make(folder, described, files, loras, with_text, variant)

    return made_once(name, facts, f"merging {', '.join(lora.name for lora in loras)} into {path}", make)


def _file(lora: WeightedLoRA) -> Path:
    path = Path(lora.path)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{SETTING}={lora.path}: no such LoRA file, nor a folder with a {LORA_FILE}")
    if file.suffix != SINGLE:
        raise ValueError(f"{SETTING}={lora.path} must be a {SINGLE} file: others could run code and are not opened")
    return file


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{SETTING}={file} is not a complete safetensors file ({first_line(error)})") from None


def _make(
    folder: Path,
    described: PipelineFacts,
    files: Sequence[Path],
    loras: Sequence[WeightedLoRA],
    with_text: bool,
    variant: str | None,
) -> None:
    """Fills a pipeline folder."""
    family, source = described.family, described.folder
    parts: dict[str, Any] = {
        family.network.folder: load_part("network", described, _dtype(described, variant), variant)
    }
    if with_text:
        for place, tower in zip(family.text.towers, load_part("text", described, torch.float32, variant), strict=False):
            parts |= {place.tokenizer: tower.tokenizer, place.encoder: tower.encoder}
    pipeline = _pipeline(described, parts)
    weights = {f"lora{i}": lora.weight for i, lora in enumerate(loras)}
    for name, file, lora in zip(weights, files, loras, strict=True):
        put_lora(pipeline, file, family, name, f"{SETTING}={lora.name}, that is")
    use_weights(pipeline, weights)
    networks: dict[str, Any] = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    adapted = [name for name, network in networks.items() if getattr(network, "peft_config", None)]
    with naming(files[0]):
        pipeline.fuse_lora(components=adapted, safe_fusing=True, adapter_names=list(weights))
        pipeline.unload_lora_weights()
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name not in adapted:
            (folder / path.name).symlink_to(path.resolve(), target_is_directory=True)
    for name in adapted:
        networks[name].save_pretrained(
            folder / name, safe_serialization=True, variant=variant_of(source, name, variant)
        )
    (folder / "model_index.json").write_bytes((source / "model_index.json").read_bytes())


def _pipeline(described: PipelineFacts, parts: dict[str, Any]) -> Any:
    """A pipeline of these parts and no others: enough to load LoRAs into."""
    family = described.family
    none = {name: None for tower in family.text.towers for name in (tower.tokenizer, tower.encoder)}
    everything = {**none, "vae": None, "scheduler": described.own_scheduler(), **parts}
    return getattr(diffusers, family.pipeline)(**everything, **family.arguments(described.zeros_for_empty))


def _dtype(described: PipelineFacts, variant: str | None) -> torch.dtype:
    """The dtype of the network's weights in their files; float32 for any but halves."""
    file = weight_files(described.folder, described.family.network.folder, variant)[0]
    with safe_open(file, framework="pt") as opened:
        return _DTYPES.get(opened.get_slice(next(iter(opened.keys()))).get_dtype(), torch.float32)
