"""The parts of a teacher's pipeline that a student leaves as they are: which files of theirs an export has, and how.

They are copied, not loaded and saved again: a library's new version saves other names and leaves files out, so that
older ones cannot read the result. Only files with names that are known here are copied, never code and never a pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from distill.models.families.base import Family
from distill.models.families.towers import Tower
from distill.models.files import save_file
from distill.models.folder import read_json, stored_tensors, weight_files

Classes = dict[str, tuple[str, tuple[str, ...]]]
"""Parts by what a pipeline calls them: the library and the classes that they may be of."""
_OPTIONAL: Classes = {  # a pipeline works without them
    "feature_extractor": ("transformers", ("CLIPImageProcessor",)),
    "image_encoder": ("transformers", ("CLIPVisionModelWithProjection",)),
    "safety_checker": ("stable_diffusion", ("StableDiffusionSafetyChecker",)),
}
_EARLIER_CLASSES = {"CLIPFeatureExtractor": "CLIPImageProcessor"}  # renamed in transformers, the files are the same
_OF_TOKENIZERS = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "chat_template.jinja",
)
_OF_PROCESSORS = ("preprocessor_config.json",)
_MERGES_HEADER = "#version: 0.2"
_HALVES = ("F16", "BF16")
_TEXT_MODEL = "text_model."
_PROJECTION = "text_projection."


def parts_of(family: Family) -> Classes:
    """What is copied of a pipeline of a family: all parts but its network and scheduler."""
    towers = family.text.towers
    return {
        "vae": ("diffusers", (family.latents.kind,)),
        **{tower.encoder: ("transformers", (tower.encoder_kind,)) for tower in towers},
        **{tower.tokenizer: ("transformers", _with_fast(tower.tokenizer_kind)) for tower in towers},
        **_OPTIONAL,
    }


def _with_fast(kind: str) -> tuple[str, ...]:
    return kind.removesuffix("Fast"), f"{kind.removesuffix('Fast')}Fast"


def copy_parts(source: Path, folder: Path, family: Family, variant: str | None = None) -> dict[str, list[str | None]]:
    """Copies the parts of a family's pipeline; returns their entries for `model_index.json`.

    Links are followed, a variant's files lose its name, and paths of the machine that wrote a config are left out.
    A part that a pipeline works without is left out, with the entry [None, None], if its weights are not there as
    safetensors, or if it is of a class that is not known here.

    Raises:
        FileNotFoundError, ValueError: another part lacks a file, or is not of a known class.
    """
    index = read_json(source, "model_index.json")
    entries: dict[str, list[str | None]] = {}
    parts = parts_of(family)
    lacking = {name for tower in family.text.towers if tower.optional for name in (tower.tokenizer, tower.encoder)}
    for name in [name for name in parts if name in index]:
        library, classes = parts[name]
        found = index[name][1] if isinstance(index[name], list) and len(index[name]) == 2 else None
        kind = _EARLIER_CLASSES.get(found, found) if isinstance(found, str) else None
        entries[name] = [None, None]
        try:
            if kind in classes:
                _copy(source, folder, name, family, variant)
                entries[name] = [library, kind]
            elif name not in _OPTIONAL and not (name in lacking and kind is None):
                raise ValueError(f"{source} cannot be copied: its {name} is {found}, known: {', '.join(classes)}")
        except FileNotFoundError:
            shutil.rmtree(folder / name, ignore_errors=True)
            if name not in _OPTIONAL:
                raise
    return _without_half_a_checker(folder, entries)


def _without_half_a_checker(folder: Path, entries: dict[str, list[str | None]]) -> dict[str, list[str | None]]:
    """A safety checker reads what the feature extractor prepares: diffusers refuses one without the other."""
    none: list[str | None] = [None, None]
    if entries.get("safety_checker", none) != none and entries.get("feature_extractor", none) == none:
        shutil.rmtree(folder / "safety_checker")
        entries["safety_checker"] = none
    return entries


def _copy(source: Path, folder: Path, name: str, family: Family, variant: str | None) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    reading = {tower.tokenizer: tower for tower in family.text.towers}
    if name in reading:
        _copy_named(source, folder, name, _OF_TOKENIZERS)
        _complete_tokenizer(folder / name)
        _say_length(source, folder / name, reading[name])
    elif name == "feature_extractor":
        _copy_named(source, folder, name, _OF_PROCESSORS)
    else:
        renames = any(tower.renames for tower in family.text.towers if tower.encoder == name)
        _copy_model(source, folder, name, renames, variant)


def _copy_named(source: Path, folder: Path, name: str, allowed: tuple[str, ...]) -> None:
    found = [file for file in allowed if (source / name / file).is_file()]
    if not found:
        raise FileNotFoundError(f"{name}/ of {source} has none of {', '.join(allowed)}")
    for file in found:
        _copy_text(source / name / file, folder / name / file)


def _copy_model(source: Path, folder: Path, name: str, renames: bool, variant: str | None) -> None:
    config = read_json(source, f"{name}/config.json")
    weights = weight_files(source, name, variant)
    targets = {path.name: re.sub(rf"\.{re.escape(variant)}(?=[.-])", "", path.name) if variant else path.name
               for path in weights}  # fmt: skip
    if renames and not _has_usual_names(weights):
        save_file(dict(text_tensors(source, name, variant)), folder / name / "model.safetensors", {"format": "pt"})
    else:
        for path in weights:
            shutil.copyfile(path, folder / name / targets[path.name])
        for path in sorted((source / name).glob("*.safetensors.index*.json")) if len(weights) > 1 else ():
            listed = json.loads(path.read_text())
            files = listed.get("weight_map", {})
            if set(files.values()) == targets.keys():
                listed["weight_map"] = {tensor: targets[file] for tensor, file in files.items()}
                unnamed = path.name.split(".index")[0] + ".index.json"
                (folder / name / unnamed).write_text(json.dumps(listed, indent=2) + "\n")
    # transformers 5 loads a model in the dtype of its files where the config names none, and the UNet is loaded as
    # float32: a pipeline of both would not run.
    loads_as = config.get("dtype", config.get("torch_dtype"))
    if name != "vae" and _is_half(weights[0]) and loads_as != "float32":
        config.pop("dtype", None)
        (folder / name / "config.json").write_text(
            json.dumps(_clean(config) | {"torch_dtype": "float32"}, indent=2) + "\n"
        )
    else:
        _copy_text(source / name / "config.json", folder / name / "config.json")


def _copy_text(source: Path, target: Path) -> None:
    """Byte for byte, but for what a JSON says of the machine that wrote it, or of code beside it."""
    if source.suffix == ".json":
        content = json.loads(source.read_text())
        if isinstance(content, dict) and _clean(content) != content:
            target.write_text(json.dumps(_clean(content), indent=2) + "\n")
            return
    shutil.copyfile(source, target)


def _clean(config: Mapping[str, Any]) -> dict[str, Any]:
    left_out = {"auto_map", "custom_pipelines"}
    if re.match(r"[/~.\\]|[A-Za-z]:[\\/]", str(config.get("_name_or_path", ""))):
        left_out.add("_name_or_path")
    return {key: value for key, value in config.items() if key not in left_out}


def _is_half(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return any(file.get_slice(name).get_dtype() in _HALVES for name in file.keys())


# ---- text encoders and tokenizers ---------------------------------------------------------------------------------


def text_tensors(source: Path, name: str, variant: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """A CLIP text encoder's weights under the names that all readers know, `text_model.encoder....`.

    transformers 5 saves a CLIPTextModel without the prefix. Version 4 then starts such an encoder at random, with a
    warning; others find nothing.
    """
    for key, tensor in stored_tensors(weight_files(source, name, variant)):
        usual = key.startswith((_TEXT_MODEL, _PROJECTION))
        yield (key if usual else _TEXT_MODEL + key), tensor


def _has_usual_names(weights: list[Path]) -> bool:
    with safe_open(weights[0], framework="pt") as file:
        return all(key.startswith((_TEXT_MODEL, _PROJECTION)) for key in file.keys())


def _say_length(source: Path, folder: Path, tower: Tower) -> None:
    """Writes how many tokens a prompt has where the tokenizer does not say it: as many as the encoder has positions."""
    path = folder / "tokenizer_config.json"
    config = read_json(folder, path.name) if path.is_file() else {}
    if "model_max_length" not in config and (source / tower.encoder / "config.json").is_file():
        path.write_text(json.dumps(config | {"model_max_length": tower.positions(source)}, indent=2) + "\n")


def _complete_tokenizer(folder: Path) -> None:
    """Adds `vocab.json` and `merges.txt`, which other readers need, where only `tokenizer.json` is there.

    They say the same; transformers 5 no longer writes them.
    """
    if not (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return
    tokenizer = read_json(folder, "tokenizer.json")
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        return
    vocab = model["vocab"] | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    by_number = dict(sorted(vocab.items(), key=lambda item: item[1]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(by_number, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join([_MERGES_HEADER, *merges]) + "\n", encoding="utf-8")
