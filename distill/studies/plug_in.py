"""Plugs a few-step LoRA of the toy teacher into models that it was not distilled from, and measures it there:

distill study plug_in lora=outputs/quickstart/lora

Trains a fine-tuned copy of the teacher ("night") and a style LoRA ("upright") first; what is there is not trained
again, and finished rows are not generated again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.loading import ConfigError
from distill.config.settings import PlugInSettings, ToyControlSettings
from distill.data.progress import Progress
from distill.diffusion.random import generator
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Row, Setting
from distill.evaluation.figures import GridRow, draw_grid
from distill.evaluation.pipelines import load_pipeline, sampling_of
from distill.evaluation.report import format_table
from distill.evaluation.toy import JudgeScorer
from distill.methods.sampling import Sampling
from distill.models.lora import LORA_FILE, add_lora, save_lora
from distill.studies.plug_in_bench import Bench, Line, columns
from distill.studies.toy_teacher import denoising_loss, descend, set_rate
from distill.toy.judge import load_judge
from distill.toy.styles import NIGHT, UPRIGHT, Style
from distill.toy.teacher import teacher_folder
from distill.toy.world import CAPTIONS, balanced_labels
from distill.training.tracking import setup_logging

FEW = 4  # steps at which the style's weights are compared, where the LoRA can be sampled in as many
GRID_COLUMNS = 10
STUDENT = {"student": 1.0}  # the adapter's weight


def main(cfg: PlugInSettings) -> None:
    setup_logging()
    check_lora(cfg.lora, cfg.steps)
    output = Path(cfg.output_dir)
    shared: dict[str, float] = {"pictures": cfg.pictures, "batch_size": cfg.train_batch_size, "seed": cfg.seed}
    facts = shared | {"steps": cfg.fine_tune_steps}
    fine_tune = trained(output / NIGHT.name, facts, lambda folder: train_fine_tune(cfg, folder))
    facts = shared | {"steps": cfg.style_steps, "rank": cfg.style_rank, "alpha": cfg.style_alpha}
    style_lora = trained(output / UPRIGHT.name, facts, lambda folder: train_style_lora(cfg, folder))
    on_fine_tune = bench(cfg, fine_tune, {"student": cfg.lora}, NIGHT)
    beside_style = bench(cfg, teacher_folder(), {"student": cfg.lora, "style": style_lora}, UPRIGHT)
    on_teacher = bench(cfg, teacher_folder(), {"student": cfg.lora}, NIGHT)
    parts = [
        PlugInSection("On a fine-tuned model", "fine_tune", on_fine_tune, fine_tune_lines(cfg)),
        PlugInSection(
            "The same LoRA on its own teacher, which lacks the style", "teacher", on_teacher, [teacher_line(cfg)]
        ),
        PlugInSection("Beside a style LoRA", "style_lora", beside_style, style_lines(cfg)),
    ]
    write_report(output, cfg, parts)


# ------------------------------------------------------------------------------------------------------------ training


def trained(folder: Path, facts: dict[str, Any], train: Callable[[Path], None]) -> Path:
    """The folder, whose files `train` writes if it is not there; a killed training leaves none.

    Raises:
        ConfigError: it is there, of a training with other `facts`.
    """
    record = folder / "training.json"
    if not folder.exists():
        aside = folder.with_name(folder.name + ".part")
        train(aside)
        (aside / record.name).write_text(json.dumps(facts) + "\n")
        os.replace(aside, folder)
    elif json.loads(record.read_text()) != facts:
        raise ConfigError(
            f"{folder} was trained with other settings, {record.read_text().strip()}: delete it to train again"
        )
    return folder


def train_fine_tune(cfg: PlugInSettings, folder: Path) -> None:
    """Trains all of the teacher's denoiser, and writes a full pipeline."""
    pipeline = frozen_teacher()
    parameters = list(pipeline.unet.requires_grad_(True).parameters())
    train(cfg, pipeline, parameters, NIGHT, cfg.fine_tune_steps, rate=5e-4)
    pipeline.save_pretrained(folder)


def train_style_lora(cfg: PlugInSettings, folder: Path) -> None:
    pipeline = frozen_teacher()
    parameters = add_lora(pipeline.unet, cfg.style_rank, cfg.style_alpha)
    train(cfg, pipeline, parameters, UPRIGHT, cfg.style_steps, rate=2e-3)
    save_lora(folder, pipeline.unet)


def frozen_teacher() -> Any:
    pipeline = load_pipeline(str(teacher_folder()))
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    return pipeline


def train(
    cfg: PlugInSettings, pipeline: Any, parameters: Sequence[nn.Parameter], style: Style, steps: int, rate: float
) -> None:
    """The teacher's own training, on the styled world's pictures."""
    latents, labels = styled_latents(cfg, pipeline.vae, style)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    progress = Progress(f"learning {style.name}", steps, "steps")
    for step in range(steps):
        set_rate(optimizer, rate, step, steps, decay=0.5)
        random = generator("plug in", cfg.seed, style.name, step)
        chosen = torch.randint(len(latents), (cfg.train_batch_size,), generator=random)
        alphas = pipeline.scheduler.alphas_cumprod
        descend(denoising_loss(pipeline, alphas, latents[chosen], labels[chosen], random), optimizer)
        progress.update(1)


@torch.no_grad()
def styled_latents(cfg: PlugInSettings, vae: Any, style: Style) -> tuple[Tensor, Tensor]:
    """Scaled latents [n, 4, 8, 8] of pictures in the style, and their labels [n]."""
    labels = balanced_labels(cfg.pictures)
    images = style.render(labels, generator("plug in", cfg.seed, style.name, "pictures"))
    latents = [vae.encode(part).latent_dist.mean * vae.config.scaling_factor for part in images.split(500)]
    return torch.cat(latents), labels


# ---------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class PlugInSection:
    """A section of the report: its rows are generated from `lines`."""

    title: str
    name: str
    bench: Bench
    lines: Sequence[Line]


def bench(cfg: PlugInSettings, pipeline_folder: Path, loras: dict[str, Any], style: Style) -> Bench:
    pipeline = load_pipeline(str(pipeline_folder))
    for name, folder in loras.items():
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=name)
    scorer = JudgeScorer(load_judge(), style.render)
    return Bench(pipeline, style, scorer, Cache(Path(cfg.output_dir) / "evaluation"), cfg.n, cfg.batch_size)


def fine_tune_lines(cfg: PlugInSettings) -> list[Line]:
    lines = [Line({}, [Setting("fine-tune", "ddim", cfg.teacher_steps, cfg.guidance)])]
    for steps in cfg.steps:
        lines.append(Line({}, few_steps(cfg, "fine-tune", steps)))
        lines.append(Line(STUDENT, [student(cfg, "fine-tune + LoRA", steps)]))
    return lines


def style_lines(cfg: PlugInSettings) -> list[Line]:
    """All steps at weight 1, and few at the others."""
    lines = []
    for weight in cfg.weights:
        more, style = {"weight": weight}, {"style": weight}
        lines.append(Line(style, [Setting("teacher + style", "ddim", cfg.teacher_steps, cfg.guidance)], more))
        for steps in cfg.steps if weight == 1 else [some_steps(cfg)]:
            lines.append(Line(style, few_steps(cfg, "teacher + style", steps), more))
            lines.append(Line(STUDENT | style, [student(cfg, "teacher + style + LoRA", steps)], more))
    return lines


def few_steps(cfg: PlugInSettings | ToyControlSettings, model: str, steps: int) -> list[Setting]:
    """What the undistilled model's best is chosen from."""
    return [Setting(model, "ddim", steps, w, spacing) for spacing in ("leading", "trailing") for w in cfg.guidances]


def student(cfg: PlugInSettings | ToyControlSettings, model: str, steps: int) -> Setting:
    """The setting that its export names; LCM-LoRAs from elsewhere name none."""
    own = sampling_of(cfg.lora) or Sampling()
    return Setting(model, own.sampler, steps, 1.0, own.spacing, gamma=own.gamma)


def teacher_line(cfg: PlugInSettings) -> Line:
    return Line(STUDENT, [student(cfg, "teacher + LoRA", some_steps(cfg))])


def some_steps(cfg: PlugInSettings) -> int:
    return FEW if FEW in cfg.steps else cfg.steps[0]


def check_lora(folder: str, steps: Sequence[int]) -> None:
    """Checks that there is one, and that it can be sampled in so many steps.

    Raises:
        FileNotFoundError, ConfigError: otherwise.
    """
    if not list(Path(folder).glob("*.safetensors")):
        raise FileNotFoundError(f"lora={folder}: no LoRA in that folder; distill export writes one")
    own = sampling_of(folder)
    if own is not None and own.steps is not None and list(steps) != [own.steps]:
        raise ConfigError(f"lora={folder} was made for {own.steps} steps: set steps=[{own.steps}]")


# -------------------------------------------------------------------------------------------------------------- report


def write_report(output: Path, cfg: PlugInSettings, parts: Sequence[PlugInSection]) -> None:
    """report.md, report.json and a grid for each part, in `output`."""
    results: dict[str, list[Row]] = {}
    sections = ["# A few-step LoRA, plugged in", protocol(cfg)]
    for part in parts:
        rows = part.bench.rows(part.name, part.lines)
        draw_part(output / f"{part.name}.png", part, rows)
        results[part.name] = [part.bench.real(), *rows]
        table = format_table(results[part.name], columns(part.bench.style))
        sections += [f"## {part.title}", table, f"![pictures]({part.name}.png)"]
    (output / "report.md").write_text("\n\n".join(sections) + "\n")
    (output / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(sections))


def draw_part(path: Path, part: PlugInSection, rows: Sequence[Row]) -> None:
    places = [9 * i % part.bench.n for i in range(GRID_COLUMNS)]  # prompts in turn: 9 apart, they differ in every way
    groups: dict[Any, list[GridRow]] = {}
    for line, row in zip(part.lines, rows, strict=True):
        weight = f"at {row['weight']:g}   " if "weight" in row else ""
        detail = f"{weight}captions {row['caption_accuracy']:.0%}   style {row['style']:.0%}"
        images = part.bench.pictures(row, line.adapters, places)
        group = groups.setdefault(row.get("weight", row["steps"]), [])
        group.append(
            GridRow(f"{row['model']}, {row['steps']} {'step' if row['steps'] == 1 else 'steps'}", detail, images)
        )
    draw_grid(path, [CAPTIONS[place % len(CAPTIONS)] for place in places], list(groups.values()))


def protocol(cfg: PlugInSettings) -> str:
    tried = f"{{leading, trailing}} × w in {{{', '.join(f'{w:g}' for w in cfg.guidances)}}}"
    return f"""The LoRA was distilled from the bundled teacher and has seen neither of the others. "{NIGHT.name}" is
a copy of that teacher, fine-tuned for {cfg.fine_tune_steps} steps on pictures with dark backgrounds only.
"{UPRIGHT.name}" is a LoRA of rank {cfg.style_rank} and alpha {cfg.style_alpha:g}, trained for {cfg.style_steps} steps
on pictures whose stripes and checks stand upright.

- Every row: the same {cfg.n} prompts and noises. ± is the standard error over these pictures, of one training.
- ddim, below {cfg.teacher_steps} steps: the undistilled model's best of {tried} by Fréchet
  distance, chosen on the very pictures that are reported, which favours it.
- Style: the share of pictures that have it, of those in which it could be seen, measured in pixels.
- Fréchet: to real pictures of the styled world, in the classifier's features, at equal n. w: guidance, 1 is none. NFE:
  network evaluations per picture."""
