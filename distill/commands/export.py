"""Writes a run's student as files for other programs, with a model card:

distill export run=runs/a output_dir=exports/a
distill export run=runs/a output_dir=exports/a formats=[diffusers,kohya,pipeline] push_to_hub=me/a
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("export")

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftModel

from distill.config.loading import ConfigError, checking
from distill.config.settings import ExportSettings, TrainSettings
from distill.data.progress import Progress, begin
from distill.data.prompts import read_prompts
from distill.diffusion.prediction import Prediction
from distill.evaluation.figures import GridRow, draw_grid
from distill.evaluation.pipelines import arguments_of, generate_images, load_pipeline, use_network, use_sampler
from distill.evaluation.report import all_columns, format_table
from distill.models.devices import own_device
from distill.models.families.registry import FAMILIES, network_of
from distill.models.folder import find_pipeline
from distill.training.card import SAMPLES, sample_steps, write_card
from distill.training.comfyui import write_workflows
from distill.training.export import Export, check_formats, published, push, require_login, write_student
from distill.training.micro_batch import within_memory
from distill.training.run import read_run
from distill.training.teacher import located
from distill.training.tracking import setup_logging
from distill.training.watchdog import watched

CELL = 192  # pixels of a sample on the card
MOST_PROMPTS = 8  # of a run's validation prompts


@watched
@within_memory("set card_prompts=[], and generate pictures with distill sample batch_size=1")
def main(cfg: ExportSettings) -> None:
    setup_logging()
    # What the user may have to correct is checked before anything is loaded or written.
    run = read_run(cfg.run)
    check_formats(run, cfg.formats)
    prompts = prompts_of(cfg, run)
    metrics = None if cfg.metrics is None else table_of(Path(cfg.metrics))
    if cfg.push_to_hub is not None:
        require_login(cfg.push_to_hub)

    final = Path(cfg.output_dir)
    name = (cfg.push_to_hub or str(final.resolve())).rpartition("/")[2]
    with published(final) as folder:
        dtype = getattr(torch, cfg.dtype)
        begin("the files of the student")
        export = write_student(folder, cfg.run, name, cfg.checkpoint, cfg.use_ema, cfg.formats, dtype, cfg.guidance)
        if prompts:
            generate_samples(folder, export, prompts)
        begin("the workflows and the card")
        write_workflows(folder, export)
        write_card(folder, export, metrics, cfg.push_to_hub)
    for path in sorted(p for p in final.rglob("*") if p.is_file()):
        print(f"{path.stat().st_size / 2**20:9.2f} MiB  {path}")
    if cfg.push_to_hub is not None:
        begin(f"the upload to {cfg.push_to_hub}")
        print(push(final, cfg.push_to_hub, cfg.hub_private))


def prompts_of(cfg: ExportSettings, run: TrainSettings) -> list[str]:
    """The prompts of the card's pictures, none if there is to be no picture."""
    if cfg.card_prompts is not None:
        return cfg.card_prompts
    if not run.validation_prompts:
        return []
    with checking("validation_prompts of the run: "):
        return read_prompts(run.validation_prompts)[:MOST_PROMPTS]


def table_of(path: Path) -> str:
    """Rows of `distill evaluate` as Markdown."""
    if not path.is_file():
        raise FileNotFoundError(f"metrics={path}: no such file")
    try:
        rows = json.loads(path.read_text())
    except ValueError:
        rows = None
    known = all_columns().keys()
    if not isinstance(rows, list) or not any(isinstance(row, dict) and known & row.keys() for row in rows):
        raise ConfigError(f"metrics={path} must be a metrics.json of distill evaluate, a list of rows")
    return format_table(rows)


def generate_samples(folder: Path, export: Export, prompts: list[str]) -> None:
    """The card's picture, generated from the files as they will be used."""
    pipeline = pipeline_of(folder, export)
    if (device := own_device()).type == "cuda":
        pipeline.to(device, torch.float16)
    progress = Progress("samples of the card", len(sample_steps(export)) * len(prompts), "pictures")
    rows = []
    for steps in sample_steps(export):
        images = []
        how = export.sampling
        arguments = arguments_of(pipeline, how.spacing, steps, export.settings.model.max_tokens, how.gamma)
        for seed, prompt in enumerate(prompts):
            resolution = export.settings.model.resolution
            one = generate_images(
                pipeline, [prompt], [seed], steps, export.guidance_scale, resolution, arguments=arguments
            )
            images.append(one.float().cpu())
            progress.update(1)
        rows.append(GridRow(f"{steps} {'step' if steps == 1 else 'steps'}", "", torch.cat(images) * 2 - 1))
    draw_grid(folder / SAMPLES, prompts, [rows], cell=CELL)


def pipeline_of(folder: Path, export: Export) -> Any:
    """A stock diffusers pipeline with the exported student."""
    if "pipeline" in export.formats:
        return load_pipeline(str(folder))
    files = {"diffusers": folder, "kohya": folder / "kohya" / f"{export.name}.safetensors"}
    lora = next((files[name] for name in files if name in export.formats), None)
    model = located(export.settings.model)
    pipeline = load_pipeline(
        model.pretrained_model_name_or_path, lora=lora, revision=model.revision, variant=model.variant
    )
    family = FAMILIES.find(export.family)
    name = family.network.folder
    if lora is None and name in export.formats:
        use_network(pipeline, folder, family)
    elif lora is None and "checkpoint" in export.formats:
        file, cls = folder / "checkpoint" / f"{export.name}.safetensors", getattr(diffusers, family.network.kind)
        configs = find_pipeline(model.pretrained_model_name_or_path, [name], model.revision, model.variant)
        setattr(pipeline, name, cls.from_single_file(str(file), config=str(configs), subfolder=name))
    elif lora is None:
        setattr(pipeline, name, PeftModel.from_pretrained(network_of(pipeline), folder / "peft"))
    use_sampler(pipeline, export.sampling.sampler, export.sampling.spacing, Prediction(export.prediction))
    return pipeline
