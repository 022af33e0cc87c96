"""The report of a comparison: a folder that a person can open, with the same numbers for machines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch

from distill.evaluation.compare import FIRST_SEED, Comparison, Row, Setting
from distill.evaluation.figures import GridRow, draw_curves, draw_grid, draw_training, line_of

COLUMNS = {  # row key: heading, format
    "model": ("model", "{}"),
    "sampler": ("sampler", "{}"),
    "spacing": ("times", "{}"),
    "steps": ("steps", "{}"),
    "guidance": ("w", "{:g}"),
    "nfe": ("NFE", "{}"),
    "caption_accuracy": ("captions right", "{:.3f}"),
    "frechet": ("Fréchet", "{:.3f}"),
    "sharpness": ("sharpness", "{:.2f}"),
    "diversity": ("diversity", "{:.2f}"),
    "teacher_consistency": ("teacher consistency", "{:.4f}"),
}
GRID_COLUMNS = 10


def format_table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]] = COLUMNS) -> str:
    """The rows as a Markdown table, aligned so that a terminal shows it well too; errors are standard errors.

    `columns` maps a row's keys to headings and formats; a column that no row has is left out.
    """
    keys = [key for key in columns if any(key in row for row in rows)]
    cells = [[columns[key][0] for key in keys]] + [[_cell(row, key, columns[key][1]) for key in keys] for row in rows]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(keys))]
    right = [not any(isinstance(row.get(key), str) for row in rows) for key in keys]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    lines = [cells[0], rule, *cells[1:]]
    padded = (
        [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        for line in lines
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def _cell(row: Row, key: str, pattern: str) -> str:
    if key not in row:
        return ""
    text = pattern.format(row[key])
    return f"{text} ± {pattern.format(row[f'{key}_se'])}" if f"{key}_se" in row else text


def write_report(
    folder: Path,
    comparison: Comparison,
    *,
    about: str,
    reproduce: str,
    real: Mapping[str, float] | None = None,
    metrics_file: Path | None = None,
    agreement: float | None = None,
) -> list[Row]:
    """Evaluates what is not in the comparison's cache, and writes metrics.json, report.md, grid.png and curves.png
    (and training.png) to `folder`. Returns the rows.

    Args:
        about: what was distilled from what, a paragraph of Markdown.
        reproduce: the commands that do all of it again.
        real: metrics of real pictures, the best that can be reached.
        metrics_file: of the training run.
        agreement: greatest difference between our pictures and those of a plain diffusers pipeline, see `proof`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = comparison.rows()
    _write_grid(folder / "grid.png", comparison, rows)
    draw_curves(folder / "curves.png", rows, real)
    if metrics_file is not None:
        draw_training(folder / "training.png", metrics_file)
    (folder / "metrics.json").write_text(json.dumps(rows, indent=1) + "\n")
    parts = [
        "# Student and teacher compared",
        about,
        format_table(rows),
        _protocol(comparison, real),
        "## Pictures\n\nEach column has one prompt and one starting noise.\n\n![samples](grid.png)",
        "## Quality against steps, and against network evaluations\n\n![curves](curves.png)",
    ]
    if metrics_file is not None:
        parts.append("## Training\n\n![training](training.png)")
    if agreement is not None:
        parts.append(_agreement(agreement))
    parts += [f"## Again\n\n```sh\n{reproduce.strip()}\n```", _environment(comparison)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    return rows


def setting_of(row: Row) -> Setting:
    """The setting that a row was made with."""
    return Setting(**{field.name: row[field.name] for field in fields(Setting)})


def _write_grid(path: Path, comparison: Comparison, rows: Sequence[Row]) -> None:
    n = comparison.plan.n
    places = [9 * i % n for i in range(min(GRID_COLUMNS, n))]  # prompts in turn: 9 apart, they differ in every way
    groups: dict[int, list[GridRow]] = {}
    for row in rows:
        if line_of(row) != "undistilled":
            setting = setting_of(row)
            line = GridRow(_title(setting), _detail(row), comparison.pictures(setting, places))
            groups.setdefault(setting.steps, []).append(line)
    prompts = comparison.scorer.prompts("report", n)
    draw_grid(path, [prompts[i] for i in places], list(groups.values()))


def _title(setting: Setting) -> str:
    return f"{setting.model}, {setting.steps} {'step' if setting.steps == 1 else 'steps'}"


def _detail(row: Row) -> str:
    words = {"caption_accuracy": "captions {:.0%}", "frechet": "Fréchet {:.2f}"}
    return "   ".join(words[name].format(row[name]) for name in words if name in row)


def _protocol(comparison: Comparison, real: Mapping[str, float] | None) -> str:
    plan = comparison.plan
    tried = f"{{{', '.join(plan.spacings)}}} × w in {{{', '.join(f'{w:g}' for w in plan.guidances)}}}"
    text = f"""
- Every row: the same {plan.n} prompts and starting noises (seeds from {FIRST_SEED["report"]} up, one CPU generator a
  picture). Errors are standard errors over these pictures, of one training run.
- teacher, ddim, up to {max(plan.steps)} steps: the best of {tried} by Fréchet distance on
  {plan.tuning_n} other noises (seeds from {FIRST_SEED["tuning"]} up).
- teacher, {plan.student_sampler}: the undistilled teacher, guided, in the student's sampler.
- w: guidance, `uncond + w (cond - uncond)`; 1 is none. A student has its teacher's guidance built in.
- NFE: network evaluations a picture; a guided step takes two. Compare at equal NFE as well as at equal steps.
- Teacher consistency: mean squared difference, per latent element, from the teacher's {plan.teacher_steps}-step end
  point from the same noise and prompt. A sampler that adds fresh noise cannot reach 0.
- Judged by: {comparison.scorer.name}. Fréchet distances compare at equal n only.
"""
    if real:
        scores = ", ".join(f"{COLUMNS[k][0]} {COLUMNS[k][1].format(v)}" for k, v in real.items() if k in COLUMNS)
        text += f"- As many other real pictures score: {scores}.\n"
    return "## How it was measured\n" + text.rstrip()


def _agreement(difference: float) -> str:
    return f"""## In a plain diffusers pipeline

The exported LoRA, loaded by `load_lora_weights` into diffusers' own pipeline with its own `LCMScheduler`, draws the
same pictures: the greatest difference of any pixel is {difference:.1e}, of a range of 2."""


def _environment(comparison: Comparison) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    weights = ", ".join(f"{name} {digest}" for name, digest in comparison.hashes.items())
    lines = [
        f"- Python {platform.python_version()}, {packages}",
        f"- {platform.system()} on {device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        f"- weights: {weights}",
    ]
    return "## Environment\n\n" + "\n".join(lines)
