"""The model card of an export: a README.md with the header that the hub reads."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from yaml import YAMLError

from distill.config.settings import ModelSettings, TrainSettings
from distill.data.words import counted
from distill.diffusion.noise import FlowNoise
from distill.diffusion.prediction import Prediction
from distill.models.derived import SINGLE, WeightedLoRA
from distill.models.families.registry import FAMILIES
from distill.models.formats import LORA_FORMATS, NAMED_FORMATS, NETWORK
from distill.models.schedulers import as_code, scheduler_settings, sigmas_for, timesteps_for
from distill.training.clients import CHECKPOINT, LORA, clients_of
from distill.training.comfyui import why_none, workflows_of
from distill.training.export import Export

log = logging.getLogger(__name__)

CARD = "README.md"
SAMPLES = "samples.png"
_LICENCE = ("license", "license_name", "license_link")
_EXAMPLE = "a lighthouse in the snow"
_FILE_NAMES = {
    "kohya": "kohya/{name}.safetensors",
    "comfyui": "comfyui/{name}.safetensors",
    NETWORK: "{network}/diffusion_pytorch_model.safetensors",
    "checkpoint": "checkpoint/{name}.safetensors",
    "pipeline": "the whole folder",
}


def write_card(folder: Path, export: Export, metrics: str | None = None, repository: str | None = None) -> Path:
    """Writes `README.md` to the folder of an export and returns its path.

    Args:
        metrics: a Markdown table.
        repository: where on the hub the export will be found; otherwise it goes by its folder's name.
    """
    parts = [
        f"# {_plain(export.name)}",
        _introduction(export),
        "## Use",
        *_uses(export, repository or export.name),
        *_other_programs(export),
        "## How it was made",
        _table(_recipe(export)),
    ]
    if (folder / SAMPLES).is_file():
        steps = ", ".join(map(str, sample_steps(export)))
        parts += [
            "## Samples",
            f"Generated with these files by a stock diffusers pipeline in {counted(steps, 'step')}, `guidance_scale="
            f"{export.guidance_scale:g}`; one prompt and one starting noise per column.",
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
    """The numbers of steps in which a student is shown: its only one, or some of those that it can be sampled in."""
    return (1, 2, 4, 8) if export.sampling.steps is None else (export.sampling.steps,)


# ---- the header ---------------------------------------------------------------------------------------------------


def _header(export: Export) -> ModelCardData:
    tags = ["text-to-image", FAMILIES.find(export.family).tag, "distillation", export.tag]
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


# ---- the text -----------------------------------------------------------------------------------------------------


def _introduction(export: Export) -> str:
    what = "LoRA" if _is_lora(export) else "network"
    network = FAMILIES.find(export.family).network.noun
    paper = f": {_plain(export.paper)}" if export.paper else ""
    base, digest = f"{_code_span(export.base_model)}{_merged(export)}", _code_span(export.base_hash)
    return (
        f"A {what} that generates in {counted(export.sampling.steps or '1 to 8', 'step')}, distilled from "
        f"{base} (SHA-256 of its {network}: {digest}).\n"
        f"Method: {_plain(export.method)}{paper}."
    )


def _merged(export: Export) -> str:
    """The LoRAs that were merged into the base model, for a sentence."""
    loras = [WeightedLoRA.read(text) for text in export.settings.model.loras]
    named = [f"{_code_span(Path(lora.path).name)} at {lora.weight:g}" for lora in loras]
    return f" with {' and '.join(named)} merged into it" if named else ""


def _plain(value: Any) -> str:
    """Text as it is shown: nothing in it is a table, a link, an image, HTML or emphasis. What is in a run's folder may
    be another person's."""
    text = re.sub(r"\s+", " ", str(value)).strip()
    text = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    text = re.sub(r"([\\`*\[\]<>|~!#$&]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return text.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")


def _code_span(value: Any) -> str:
    """Text between backticks that it cannot end."""
    text = re.sub(r"[\s\x00-\x1f\x7f\ud800-\udfff]+", " ", str(value)).strip().replace("|", "¦")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    pad = " " if longest else ""
    return "`" * (longest + 1) + pad + text + pad + "`" * (longest + 1)


def _literal(value: str) -> str:
    """A text in Python code, which it cannot leave."""
    return json.dumps(value, ensure_ascii=False) if value.isprintable() else ascii(value)


def _licence_text(export: Export) -> str:
    licence, base = base_licence(export.settings.model), _code_span(export.base_model)
    if licence["license"] == "other" and "license_name" not in licence:
        return f"That of the base model: see {base}."
    return f"That of the base model, {base}: {_plain(licence.get('license_name', licence['license']))}."


def _recipe(export: Export) -> dict[str, Any]:
    """The settings that shaped the student, and what is exported of it."""
    run = export.settings
    rows = {"method": run.method["_target_"].rpartition(".")[2]}
    rows |= {f"method.{key}": value for key, value in run.method.items() if not key.startswith("_")}
    rows |= {f"student.{key}": value for key, value in run.student.items() if not key.startswith("_")}
    rows |= {key: Path(path).name for key, path in (("start", run.start), ("teacher", run.teacher)) if path}
    rows["guidance w learned from (1 is none)"] = _range(export.guidance)
    if export.built_in_guidance is not None:
        rows["guidance w built in here"] = f"{export.built_in_guidance:g}"
    return rows | {
        "data": _data(export),
        "steps": f"{export.step} of {run.max_train_steps}{f', the best by {export.chosen}' if export.chosen else ''}",
        "batch size": run.global_batch_size,
        "learning rate": f"{run.learning_rate:g}, {run.lr_scheduler}, {run.lr_warmup_steps} steps of warm-up",
        "EMA": "none" if run.ema_decay is None else f"{run.ema_decay:g}{', exported' if export.ema else ', left out'}",
        "mixed precision": run.mixed_precision,
        **({"frozen weights quantized to": run.quantize} if run.quantize else {}),
        "seed": run.seed,
        "dtype of its weights here": export.dtype,
    }


def _range(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _taken(run: TrainSettings, steps: int) -> int:
    """Samples of so many steps, some of which may belong to stages with batches of another size."""
    taken = 0
    for stage in run.method.get("stages") or ():
        of_stage = min(steps, stage["iterations"])
        taken, steps = taken + of_stage * (stage.get("batch_size") or run.global_batch_size), steps - of_stage
    return taken + steps * run.global_batch_size


def _data(export: Export) -> str:
    """What was in the store that it learned from, and how much was taken of it."""
    taken = f"{_taken(export.settings, export.step)} taken in training"
    data = export.data
    if data is None:
        kind = "pictures" if export.settings.data.guidance is None else "trajectories of the teacher"
        return f"{kind} (how many is not recorded), {taken}"
    taken = f"of {len(data.sizes)} sizes ({', '.join(data.sizes)}), {taken}" if data.sizes else taken
    if data.kind == "pictures":
        return f"{data.samples} {'picture' if data.samples == 1 else 'pictures'}, {taken}"
    noun = "trajectory" if data.samples == 1 else "trajectories"
    steps = "step" if data.solver_steps == 1 else "steps"
    return f"{data.samples} {noun} of the teacher, {data.solver_steps} {steps} of {data.solver}, {taken}"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_plain(key)} | {_plain(value)} |" for key, value in rows.items())])


# ---- other programs -------------------------------------------------------------------------------------------------


def _other_programs(export: Export) -> list[str]:
    """Which file, sampler, scheduler and nodes belong to which program; nothing without a file that one loads."""
    if isinstance(export.noise, FlowNoise):
        return _flow_programs(export, export.noise.settled_shift)
    rows = []
    for client in clients_of(export.sampling, Prediction(export.prediction)):
        held = filter(export.holds, client.formats)
        found = [_FILE_NAMES[format].format(name=export.name, network=export.network) for format in held]
        if found:
            rows.append((client, "<br>".join(_code_span(file) if "/" in file else file for file in found)))
    if not rows:
        return []
    steps, w = counted(_steps(export), "step"), f"{export.guidance_scale:g}"
    lines = ["| program | file | sampler | scheduler | further |", "|---|---|---|---|---|"]
    lines += [
        f"| {client.program} | {files} | {_menu(client.sampler)} | {_menu(client.scheduler)} | {client.further} |"
        for client, files in rows
    ]
    texts = ["## In other programs", f"{steps[:1].upper()}{steps[1:]}, CFG scale {w}, no other scheduler than these:"]
    if export.takes_guidance:
        texts[1] = (
            "ComfyUI and most other programs leave out the network's input of guidance, without a word, and then "
            "generate other pictures: export it for them with `guidance=W`, which builds one W in."
        )
    return [*texts, "\n".join(lines), *_workflows(export)]


def _flow_programs(export: Export, shift: float) -> list[str]:
    """What other programs have to do with a student of flow matching, which was not tried in any."""
    held = [name for name in (*NAMED_FORMATS, NETWORK, CHECKPOINT) if export.holds(name)]
    files = [_FILE_NAMES[name].format(name=export.name, network=export.network) for name in held]
    if not files:
        return []
    sampler = {"ddim": "euler"}.get(export.sampling.sampler, export.sampling.sampler)
    guidance = "CFG scale 1 (guidance is built in)"
    if export.takes_guidance:
        guidance = f"CFG scale 1, and {export.guidance_scale:g} for the model's own input of guidance"
    steps, comfyui = counted(_steps(export), "step"), FAMILIES.find(export.family).comfyui
    node = "its ModelSampling node of the model"
    if comfyui is not None and comfyui.shift is not None:
        kind, inputs = comfyui.shift(shift, export.settings.model.resolution or 1024)
        said = ", ".join(f"{key} {value:g}" for key, value in inputs.items() if "shift" in key)
        node = f"node {kind}, {said}"
    text = (
        f"{', '.join(map(_code_span, files))}: not tried in other programs. They have to sample by "
        f"{_code_span(sampler)} in {steps} at the noise levels that the student learned, sigma = {shift:.6g} u / "
        f"(1 + {shift - 1:.6g} u) for u = 1, 1 - 1/N ... 1/N, which is a shift of {shift:.6g} (ComfyUI's scheduler "
        f"`simple` and {node}); {guidance}."
    )
    return ["## In other programs", text, *_workflows(export)]


def _workflows(export: Export) -> list[str]:
    """Where ComfyUI's workflows are, or why there are none."""
    if not any(map(export.holds, (LORA, "comfyui", NETWORK, CHECKPOINT))):
        return []
    if reason := why_none(export):
        return [f"No workflow for ComfyUI is written: {reason}."]
    lines = ["Workflows for ComfyUI, which its window opens; the file is copied to where ComfyUI looks for it:", ""]
    for one in workflows_of(export):
        lines.append(f"- {_code_span(one.path)}, with {_code_span(one.source)} as {_code_span(one.target)}")
    return ["\n".join(lines)]


def _menu(name: str) -> str:
    return f"`{name}`" if name else "—"


# ---- how to use it ------------------------------------------------------------------------------------------------


def _uses(export: Export, here: str) -> list[str]:
    """A paragraph and a block of code for each format."""
    texts: dict[str, Callable[[Export, str], str]] = {
        "pipeline": _pipeline,
        "diffusers": _diffusers,
        "comfyui": partial(_named, "comfyui"),
        "kohya": partial(_named, "kohya"),
        NETWORK: _network,
        "checkpoint": _checkpoint,
        "peft": _peft,
    }
    guidance, gamma = _guidance_text(export), export.sampling.gamma
    if gamma:
        guidance += f" `eta={gamma:g}` is a part of how it samples that no file holds: give it in each call."
    return [text(export, here) for name, text in texts.items() if export.holds(name)] + [guidance]


def _guidance_text(export: Export) -> str:
    if export.sampling.steps is not None:
        none = "" if export.takes_guidance else " Guidance is built in: `guidance_scale=1.0` adds none."
        return f"It generates in exactly {counted(export.sampling.steps, 'step')}.{none}"
    if not export.takes_guidance:
        return (
            "4 steps are a good start, 1 to 8 work. Guidance is built in: `guidance_scale=1.0` adds none; values up to "
            "2 make negative prompts work, at twice the cost."
        )
    return (
        "4 steps are a good start, 1 to 8 work. `guidance_scale` is an input of the network, which learned "
        f"{_range(export.guidance)}; it costs nothing, and negative prompts have no effect."
    )


def _pipeline(export: Export, here: str) -> str:
    return _code(
        "As a full pipeline, in diffusers. Steps and guidance are given in the call: diffusers' own are 50 and 7.5.",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({_literal(here)})",
        _draws(export),
    )


def _diffusers(export: Export, here: str) -> str:
    return _code(
        "As a LoRA, in diffusers:",
        f"from diffusers import DiffusionPipeline, {_scheduler(export)}",
        "",
        _base(export),
        f'pipeline.load_lora_weights({_literal(here)}, weight_name="pytorch_lora_weights.safetensors")',
        *_sampler(export),
    )


def _named(format: str, export: Export, here: str) -> str:
    file = _literal(f"{export.name}.safetensors")
    return _code(
        f"As a LoRA under the name of this export, {_code_span(f'{format}/{export.name}.safetensors')}, in diffusers:",
        f"from diffusers import DiffusionPipeline, {_scheduler(export)}",
        "",
        _base(export),
        f'pipeline.load_lora_weights({_literal(here)}, subfolder="{format}", weight_name={file})',
        *_sampler(export),
    )


def _checkpoint(export: Export, here: str) -> str:
    family = FAMILIES.find(export.family)
    file = f"file = {_literal(f'{here}/checkpoint/{export.name}.safetensors')}"
    if family.network.one_file is not None and not family.network.one_file.parts:
        name, kind = export.network, family.network.kind
        return _code(
            f"As a {family.network.noun} in one file, by the names of its original code, in diffusers:",
            f"from diffusers import DiffusionPipeline, {_scheduler(export)}, {kind}",
            "",
            file,
            _base(export),
            f"config = {_literal(export.base_model)}",
            f'pipeline.{name} = {kind}.from_single_file(file, config=config, subfolder="{name}")',
            *_sampler(export),
        )
    return _code(
        "As a checkpoint in one file, in diffusers:",
        f"from diffusers import {family.pipeline}, {_scheduler(export)}",
        "",
        file,
        f"pipeline = {family.pipeline}.from_single_file(file, config={_literal(export.base_model)})",
        *_sampler(export),
    )


def _network(export: Export, here: str) -> str:
    network, name = FAMILIES.find(export.family).network, export.network
    return _code(
        f"As a {network.noun}, in diffusers:",
        f"from diffusers import DiffusionPipeline, {_scheduler(export)}, {network.kind}",
        "",
        _base(export),
        f'pipeline.{name} = {network.kind}.from_pretrained({_literal(here)}, subfolder="{name}")',
        *_sampler(export),
    )


def _peft(export: Export, here: str) -> str:
    name = export.network
    return _code(
        "As a LoRA, in PEFT:",
        f"from diffusers import DiffusionPipeline, {_scheduler(export)}",
        "from peft import PeftModel",
        "",
        _base(export),
        f'pipeline.{name} = PeftModel.from_pretrained(pipeline.{name}, {_literal(here)}, subfolder="peft")',
        *_sampler(export),
    )


def _base(export: Export) -> str:
    model = export.settings.model
    given = {"revision": model.revision, "variant": model.variant}
    more = "".join(f", {key}={_literal(value)}" for key, value in given.items() if value is not None)
    if model.config is not None:  # a single file
        cls, file = FAMILIES[export.family].pipeline, f"{export.base_model}{SINGLE}"
        lines = [f"pipeline = diffusers.{cls}.from_single_file({_literal(file)})"]
        lines.insert(0, "import diffusers")
    else:
        lines = [f"pipeline = DiffusionPipeline.from_pretrained({_literal(export.base_model)}{more})"]
    loras = [WeightedLoRA.read(text) for text in model.loras]
    for i, lora in enumerate(loras):
        file = _literal(Path(lora.path).name)
        lines.append(f'pipeline.load_lora_weights(".", weight_name={file}, adapter_name="lora{i}")')
    if loras:
        names, weights = [f"lora{i}" for i in range(len(loras))], [lora.weight for lora in loras]
        lines.append(f"pipeline.set_adapters({json.dumps(names)}, {weights})")
        lines += ["pipeline.fuse_lora()", "pipeline.unload_lora_weights()"]
    return "\n".join(lines)


def _sampler(export: Export) -> tuple[str, str]:
    return f"pipeline.scheduler = {as_code(*_scheduler_settings(export))}", _draws(export)


def _scheduler(export: Export) -> str:
    return _scheduler_settings(export)[0].__name__


def _scheduler_settings(export: Export) -> tuple[type[Any], dict[str, Any]]:
    sampling = export.sampling
    prediction = Prediction(export.prediction)
    return scheduler_settings(export.noise, sampling.sampler, sampling.spacing, prediction, sampling.steps)


def _steps(export: Export) -> int:
    return export.sampling.steps or 4


def _draws(export: Export) -> str:
    pixels = export.settings.model.resolution
    size = "" if pixels is None else f", height={pixels}, width={pixels}"
    cls, settings = _scheduler_settings(export)
    steps, w = _steps(export), export.guidance_scale
    scheduler, spacing = cls(**settings), export.sampling.spacing
    times = timesteps_for(scheduler, spacing, steps)
    steps_or_times = f"num_inference_steps={steps}" if times is None else f"timesteps={times}"
    sigmas = sigmas_for(scheduler, spacing, steps)
    if sigmas is not None:
        steps_or_times += f", sigmas={[round(sigma, 6) for sigma in sigmas]}"
    if (tokens := export.settings.model.max_tokens) is not None:
        size += f", max_sequence_length={tokens}"
    if export.sampling.gamma:
        size += f", eta={export.sampling.gamma:g}"
    w = FAMILIES.find(export.family).guidance.to_pipeline(w)
    return f'image = pipeline("{_EXAMPLE}", {steps_or_times}, guidance_scale={w}{size}).images[0]'


def _code(text: str, *lines: str) -> str:
    return "\n".join([text, "", "```python", *lines, "```"])
