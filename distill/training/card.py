"""The model card of an export: a README.md with the header that the hub reads."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from yaml import YAMLError

from distill.diffusion.prediction import Prediction
from distill.models.formats import LORA_FORMATS
from distill.models.schedulers import scheduler_settings
from distill.training.export import Export
from distill.training.settings import DataSettings, ModelSettings

log = logging.getLogger(__name__)

CARD = "README.md"
SAMPLES = "samples.png"
_TAGS = {"lcm": "latent-consistency-distillation"}  # where a method has a better known name than its module
_FAMILIES = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
_LICENCE = ("license", "license_name", "license_link")
_EXAMPLE = "a lighthouse in the snow"
_SAMPLERS = {"lcm": "LCM", "euler": "Euler", "ddim": "DDIM", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}
_TRAILING = " (scheduler `sgm_uniform`)"  # as user interfaces call it


def write_card(folder: Path, export: Export, metrics: str | None = None, repository: str | None = None) -> Path:
    """Writes `README.md` to the folder of an export and returns its path.

    Args:
        metrics: a Markdown table.
        repository: where on the hub the export will be found; otherwise it goes by its folder's name.
    """
    parts = [
        f"# {export.name}",
        _introduction(export),
        "## Use",
        *_uses(export, repository or export.name),
        "## How it was made",
        _table(_recipe(export)),
    ]
    if (folder / SAMPLES).is_file():
        steps = ", ".join(map(str, sample_steps(export)))
        parts += [
            "## Samples",
            f"Drawn with these files by a plain diffusers pipeline in {_count(steps)}, `guidance_scale="
            f"{export.guidance_scale:g}`; one prompt and one starting noise a column.",
            f"![samples]({SAMPLES})",
        ]
    if metrics is not None:
        parts += ["## Metrics", metrics]
    parts += ["## Licence", _licence_text(export)]
    header = f"---\n{_header(export).to_yaml()}\n---\n"
    path = folder / CARD
    path.write_text(header + "\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def sample_steps(export: Export) -> tuple[int, ...]:
    """The numbers of steps in which a student is shown: its only one, or some of those that it can be drawn in."""
    return (1, 2, 4, 8) if export.sampling.steps is None else (export.sampling.steps,)


# ---- the header ---------------------------------------------------------------------------------------------------


def _header(export: Export) -> ModelCardData:
    tags = ["text-to-image", _FAMILIES[export.family], "distillation", _TAGS.get(_method(export), _method(export))]
    lora = _is_lora(export)
    return ModelCardData(
        base_model=export.base_model,
        base_model_relation="adapter" if lora else "finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, "lora"] if lora else tags,
        **base_licence(export.settings.model),
    )


def base_licence(model: ModelSettings) -> dict[str, Any]:
    """`license`, and what belongs to it, from the card of the base model; `other` where it says nothing."""
    path = _base_card(model)
    try:
        header = ModelCard.load(path).data.to_dict() if path is not None else {}
    except (ValueError, TypeError, YAMLError) as error:
        log.warning("the header of %s is not readable (%s): license is `other`", path, str(error).splitlines()[0])
        header = {}
    found = {key: header[key] for key in _LICENCE if isinstance(header.get(key), str)}
    return found if "license" in found else {"license": "other"}


def _base_card(model: ModelSettings) -> Path | None:
    folder = Path(model.pretrained_model_name_or_path).expanduser()
    if folder.exists():
        return folder / CARD if (folder / CARD).is_file() else None
    try:
        return Path(hf_hub_download(str(model.pretrained_model_name_or_path), CARD, revision=model.revision))
    except (OSError, ValueError):  # offline, or the repository has none
        return None


def _is_lora(export: Export) -> bool:
    return any(name in LORA_FORMATS for name in export.formats)


def _method(export: Export) -> str:
    """The name of the method's module."""
    return export.settings.method["_target_"].split(".")[-2]


# ---- the text -----------------------------------------------------------------------------------------------------


def _introduction(export: Export) -> str:
    module = importlib.import_module(export.settings.method["_target_"].rpartition(".")[0])
    paper = (inspect.getdoc(module) or "").split("\n")[0]
    what = "LoRA" if _is_lora(export) else "network"
    return (
        f"A {what} that draws in {_count(export.sampling.steps or '1 to 8')}, distilled from `{export.base_model}` "
        f"(SHA-256 of its UNet: `{export.base_hash}`).\nMethod: {paper}"
    )


def _licence_text(export: Export) -> str:
    licence = base_licence(export.settings.model)
    if licence["license"] == "other" and "license_name" not in licence:
        return f"That of the base model: see `{export.base_model}`."
    return f"That of the base model, `{export.base_model}`: {licence.get('license_name', licence['license'])}."


def _recipe(export: Export) -> dict[str, Any]:
    """The settings that shaped the student, and what is exported of it."""
    run = export.settings
    low, high = export.guidance
    rows = {"method": run.method["_target_"].rpartition(".")[2]}
    rows |= {f"method.{key}": value for key, value in run.method.items() if not key.startswith("_")}
    rows |= {f"student.{key}": value for key, value in run.student.items() if not key.startswith("_")}
    rows |= {key: Path(path).name for key, path in (("start", run.start), ("teacher", run.teacher)) if path}
    return rows | {
        "guidance w learned from (1 is none)": f"{low:g}" if low == high else f"{low:g} to {high:g}",
        "data": _data(run.data),
        "steps": f"{export.step} of {run.max_train_steps}",
        "batch size": run.global_batch_size,
        "learning rate": f"{run.learning_rate:g}, {run.lr_scheduler}, {run.lr_warmup_steps} steps of warm-up",
        "EMA": "none" if run.ema_decay is None else f"{run.ema_decay:g}{', exported' if export.ema else ', left out'}",
        "mixed precision": run.mixed_precision,
        "seed": run.seed,
        "dtype of its weights here": export.dtype,
    }


def _data(data: DataSettings) -> str:
    if data.guidance is None:
        return "pictures"
    return f"{data.num_samples} trajectories of the teacher, {data.solver_steps} steps of {data.solver}"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


# ---- how to use it ------------------------------------------------------------------------------------------------


def _uses(export: Export, here: str) -> list[str]:
    """A paragraph and a block of code for each format."""
    texts = {"pipeline": _pipeline, "diffusers": _diffusers, "kohya": _kohya, "unet": _unet, "peft": _peft}
    guidance = _guidance_text(export)
    return [text(export, here) for name, text in texts.items() if name in export.formats] + [guidance]


def _guidance_text(export: Export) -> str:
    if export.sampling.steps is not None:
        none = "" if export.told_guidance else " Guidance is built in: `guidance_scale=1.0` adds none."
        return f"It draws in exactly {_count(export.sampling.steps)}.{none}"
    if not export.told_guidance:
        return (
            "4 steps are a good start, 1 to 8 work. Guidance is built in: `guidance_scale=1.0` adds none; values up to "
            "2 make negative prompts work, at twice the cost."
        )
    low, high = export.guidance
    return (
        f"4 steps are a good start, 1 to 8 work. `guidance_scale` is an input of the network, which learned {low:g} to "
        f"{high:g}; it costs nothing, and negative prompts have no effect."
    )


def _pipeline(export: Export, here: str) -> str:
    return _code(
        "As a whole pipeline, in diffusers:",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{here}")',
        _draws(export),
    )


def _diffusers(export: Export, here: str) -> str:
    return _code(
        "As a LoRA, in diffusers:",
        f"from diffusers import DiffusionPipeline, {_scheduler(export)}",
        "",
        _base(export),
        f'pipeline.load_lora_weights("{here}", weight_name="pytorch_lora_weights.safetensors")',
        *_sampler(export),
    )


def _kohya(export: Export, here: str) -> str:
    trailing = _TRAILING if export.sampling.spacing == "trailing" else ""
    return _code(
        f"In the Stable Diffusion web UI, Forge or ComfyUI: put `kohya/{export.name}.safetensors` among the LoRAs, and "
        f"draw with the {_SAMPLERS[export.sampling.sampler]} sampler{trailing}, {_count(_steps(export))} and CFG scale "
        f"{export.guidance_scale:g}. The same file in diffusers:",
        f"from diffusers import DiffusionPipeline, {_scheduler(export)}",
        "",
        _base(export),
        f'pipeline.load_lora_weights("{here}", subfolder="kohya", weight_name="{export.name}.safetensors")',
        *_sampler(export),
    )


def _unet(export: Export, here: str) -> str:
    return _code(
        "As a UNet, in diffusers:",
        f"from diffusers import DiffusionPipeline, {_scheduler(export)}, UNet2DConditionModel",
        "",
        _base(export),
        f'pipeline.unet = UNet2DConditionModel.from_pretrained("{here}", subfolder="unet")',
        *_sampler(export),
    )


def _peft(export: Export, here: str) -> str:
    return _code(
        "As a LoRA, in PEFT:",
        f"from diffusers import DiffusionPipeline, {_scheduler(export)}",
        "from peft import PeftModel",
        "",
        _base(export),
        f'pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "{here}", subfolder="peft")',
        *_sampler(export),
    )


def _base(export: Export) -> str:
    model = export.settings.model
    given = {"revision": model.revision, "variant": model.variant}
    more = "".join(f', {key}="{value}"' for key, value in given.items() if value is not None)
    return f'pipeline = DiffusionPipeline.from_pretrained("{export.base_model}"{more})'


def _sampler(export: Export) -> tuple[str, str]:
    cls, said = _scheduler_settings(export)
    more = "".join(f", {key}={json.dumps(value) if isinstance(value, str) else value}" for key, value in said.items())
    return f"pipeline.scheduler = {cls.__name__}.from_config(pipeline.scheduler.config{more})", _draws(export)


def _scheduler(export: Export) -> str:
    return _scheduler_settings(export)[0].__name__


def _scheduler_settings(export: Export) -> tuple[Any, dict[str, Any]]:
    """What it predicts is said where it is not what its base model does."""
    changed = export.settings.student.get("prediction")
    sampling = export.sampling
    return scheduler_settings(sampling.sampler, sampling.spacing, None if changed is None else Prediction(changed))


def _steps(export: Export) -> int:
    return export.sampling.steps or 4


def _count(steps: int | str) -> str:
    return f"{steps} {'step' if steps in (1, '1') else 'steps'}"


def _draws(export: Export) -> str:
    pixels = export.settings.model.resolution
    size = "" if pixels is None else f", height={pixels}, width={pixels}"
    steps, w = _steps(export), export.guidance_scale
    return f'image = pipeline("{_EXAMPLE}", num_inference_steps={steps}, guidance_scale={w}{size}).images[0]'


def _code(text: str, *lines: str) -> str:
    return "\n".join([text, "", "```python", *lines, "```"])
