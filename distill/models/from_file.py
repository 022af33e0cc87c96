"""A pipeline folder from a checkpoint in one file, as people download them: the way in of what `single_file` writes.

Weights come from the file; configs, the tokenizers and the parts that the file lacks (of a transformer's file mostly
the text encoders and the autoencoder) from a pipeline folder of the same architecture. diffusers knows the names of
the original layouts; it is told where the configs are, so that it guesses and downloads nothing.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.models.checks import UNUSED, check_folder, component, first_line, naming
from distill.models.derived import SINGLE, made_once, stated
from distill.models.families.base import Family
from distill.models.families.registry import family_of_pipeline
from distill.models.folder import find_pipeline, read_json, weight_files

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PREFIXES = {
    "network": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text": ("cond_stage_model.", "conditioner.", "text_encoders."),
}
"""How the names of a part begin in files that hold more than a network, whose names begin in no way of their own."""
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
_VELOCITY, _ZERO_SNR = "v_pred", "ztsnr"  # empty tensors: what SDXL's files say of the noise that they were trained on


def folder_of_file(path: str, config: str | None) -> Path:
    """The pipeline folder that a single-file checkpoint becomes, in the cache.

    Args:
        path: of the file.
        config: a pipeline's folder or hub id, of the same architecture.

    Raises:
        FileNotFoundError: no such file, or no such folder.
        ValueError: no `config`; a file that is no checkpoint of that architecture, or is quantized. One line.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if config is None:
        raise ValueError(
            f"{path} is a single file, which holds no configs and no tokenizers: set model.config to a pipeline folder "
            "(or hub id) of the same architecture, such as that of the model it was fine-tuned from"
        )
    dtypes = _dtypes(file)
    index = read_json(find_pipeline(config, ()), "model_index.json")
    family = family_of_pipeline(config, index.get("_class_name"))
    if not hasattr(getattr(diffusers, family.network.kind), "from_single_file"):
        raise ValueError(f"{path}: diffusers reads no single files of a {family.title}; take its pipeline folder")
    lacking = _lacking(family, dtypes)
    tokenizers = [tower.tokenizer for tower in family.text.towers]
    source = find_pipeline(config, [*tokenizers, *lacking])
    check_folder(source)
    known = [name for name in index if not name.startswith("_") and (source / name).is_dir()]
    configs = sorted(found for name in known for text in _TEXTS for found in (source / name).glob(text))
    weights = [found for name in lacking if (source / name).is_dir() for found in weight_files(source, name)]
    facts = {"file": stated([file]), "config": stated([source / "model_index.json", *configs, *weights])}

    def make(folder: Path) -> None:
        _make(folder, file, source, family, lacking)

    return made_once(file.name.removesuffix(SINGLE), facts, f"making a pipeline folder of {path}", make)


def _dtypes(file: Path) -> dict[str, str]:
    """The dtype of each tensor of a file by its name, from the header alone.

    Raises:
        ValueError: it is no complete safetensors file, a LoRA, or quantized.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({first_line(error)})") from None
    if any(".lora_" in name or name.startswith("lora_") for name in found):
        raise ValueError(f"{file} is a LoRA, not a model: set model.loras=[{file}], and the model that it belongs on")
    if others := sorted({dtype for dtype in found.values() if dtype[0] == "F" and dtype not in (*_DTYPES, "F64")}):
        raise ValueError(f"{file} holds quantized weights ({', '.join(others)}): take the file in 16 or 32 bits")
    return found


def _lacking(family: Family, names: Mapping[str, Any]) -> list[str]:
    """The sub-folders of the parts that a file does not hold."""
    whole = any(name.startswith(_PREFIXES["vae"] + _PREFIXES["text"]) for name in names)
    lacking = [] if whole and _holds("vae", names) else ["vae"]
    for tower in family.text.towers:
        held = is_t5_in_single_file(names) if tower.encoder_kind.startswith("T5") else False
        if tower.encoder_kind.startswith("CLIP"):
            held = _clips(names) > sum(t.encoder_kind.startswith("CLIP") for t in _before(family, tower))
        lacking += [] if held else [tower.encoder]
    return lacking


def _before(family: Family, tower: Any) -> Sequence[Any]:
    return family.text.towers[: family.text.towers.index(tower)]


def _clips(names: Mapping[str, Any]) -> int:
    """How many of CLIP's text encoders a file holds."""
    begins = ["cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1."]
    begins += ["text_encoders.clip_l.", "text_encoders.clip_g."]
    return sum(any(name.startswith(begin) for name in names) for begin in begins)


def _holds(part: str, names: Mapping[str, Any]) -> bool:
    return any(name.startswith(_PREFIXES[part]) for name in names)


def _make(folder: Path, file: Path, source: Path, family: Family, lacking: Sequence[str]) -> None:
    """Fills a pipeline folder."""
    index = read_json(source, "model_index.json")
    for name in UNUSED:
        if name in index:
            index[name] = [None, None]
    checkpoint = _tensors(file)
    parts = {family.network.folder: "network", "vae": "vae"}
    parts |= {tower.encoder: "text" for tower in family.text.towers if component(source, index, tower.encoder)[1]}
    for name, part in parts.items():
        if name in lacking:
            _link(source, folder, name)
        else:
            with naming(file):
                _save(folder / name, component(source, index, name), checkpoint, source, part)
    for name in ("scheduler", *(tower.tokenizer for tower in family.text.towers)):
        if (source / name).is_dir():
            (folder / name).mkdir()
            for text in _TEXTS:
                for found in (source / name).glob(text):
                    shutil.copyfile(found, folder / name / found.name)
    _say_noise(folder / "scheduler/scheduler_config.json", checkpoint)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def _save(
    place: Path, kind: tuple[str | None, str | None], checkpoint: dict[str, Tensor], source: Path, part: str
) -> None:
    """Writes a part of the file as a model of diffusers or transformers, in the dtype that it has in the file."""
    library, name = kind
    cls = getattr(importlib.import_module(str(library)), str(name))
    dtype = _usual_dtype(checkpoint, part)
    given: dict[str, Any] = {"config": str(source), "subfolder": place.name, "torch_dtype": dtype}
    given |= {"local_files_only": True}
    tensors = dict(checkpoint)  # what reads them takes out what it has read
    if part != "text":
        model = cls.from_single_file(tensors, **given)
    elif is_clip_model_in_single_file(cls, tensors):
        model = create_diffusers_clip_model_from_ldm(cls, tensors, **given)
    else:
        model = create_diffusers_t5_model_from_checkpoint(cls, tensors, **given)
        model.tie_weights()  # a file may have its embedding under one of two names
    for weight, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"it lacks {weight} of the {place.name} that {source} describes")
    model.save_pretrained(place, safe_serialization=True)


def _usual_dtype(checkpoint: Mapping[str, Tensor], part: str) -> torch.dtype:
    """The dtype of most weights of a part."""
    own = [x.dtype for name, x in checkpoint.items() if name.startswith(_PREFIXES[part]) and x.is_floating_point()]
    own = own or [x.dtype for x in checkpoint.values() if x.is_floating_point()]
    (most, _), *_ = Counter(dtype for dtype in own if dtype in _DTYPES.values()).most_common(1) or [(torch.float32, 0)]
    return most


def _link(source: Path, folder: Path, name: str) -> None:
    """A part of another folder, which stays where it is."""
    if not (source / name).is_dir():
        raise FileNotFoundError(f"the file has no {name}, and {source} has none either")
    (folder / name).symlink_to((source / name).resolve(), target_is_directory=True)


def _say_noise(scheduler: Path, names: Mapping[str, Any]) -> None:
    """Notes in the scheduler's config what the file says of its noise."""
    if _VELOCITY not in names and _ZERO_SNR not in names:
        return
    config = json.loads(scheduler.read_text())
    config |= {"prediction_type": "v_prediction"} if _VELOCITY in names else {}
    config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if _ZERO_SNR in names else {}
    scheduler.write_text(json.dumps(config, indent=2) + "\n")
