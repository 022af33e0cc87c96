"""The report of a comparison: a folder that a person can open, with the same numbers for machines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.data.progress import Progress
from distill.data.words import counted
from distill.evaluation import page
from distill.evaluation.compare import FIRST_SEED, WORK, Comparison, Row, Setting, require_one_protocol
from distill.evaluation.figures import (
    NAMES,
    TUNED,
    GridRow,
    curve_figures,
    draw_curves,
    draw_grid,
    draw_training,
    line_of,
    series_of,
    training_figures,
)
from distill.evaluation.metrics import LEGEND, METRICS
from distill.models.devices import gpu_is_used

SETTINGS = {  # row key: heading, format
    "model": ("model", "{}"),
    "sampler": ("sampler", "{}"),
    "spacing": ("times", "{}"),
    "gamma": ("γ", "{:g}"),
    "steps": ("steps", "{}"),
    "guidance": ("w", "{:g}"),
    "nfe": ("NFE", "{}"),
}
GRID_COLUMNS = 10
TUNED_TEACHER = f"{NAMES['teacher']}, {TUNED}"  # in the grid it is "teacher": its settings are in the table
CONFIG = "config.yaml"
TITLE = "Student and teacher compared"
SAME_NOISE = "Each column has one prompt and one starting noise."
IN_DIFFUSERS = "In a stock diffusers pipeline"
NOT_THE_EXPERIMENTS = "What is not as in its experiment:"


def all_columns() -> dict[str, tuple[str, str]]:
    """Heading and format of what rows hold, by its key: how they were made, and every metric."""
    return SETTINGS | {metric.name: metric.column for metric in METRICS.values()}


def format_table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]] | None = None) -> str:
    """The rows as a Markdown table, aligned so that a terminal shows it well too; errors are standard errors.

    `columns` maps a row's keys to headings and formats, and is by default `all_columns()`; a column that no row has is
    left out.

    Raises:
        ValueError: rows of several protocols, whose numbers do not compare.
    """
    require_one_protocol(rows)
    columns = all_columns() if columns is None else columns
    keys = [key for key in columns if any(key in row for row in rows)]
    cells = [[markdown(columns[key][0]) for key in keys]] + [
        [_cell(row, key, columns[key][1]) for key in keys] for row in rows
    ]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(keys))]
    right = [not any(isinstance(row.get(key), str) for row in rows) for key in keys]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    lines = [cells[0], rule, *cells[1:]]
    padded = (
        [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        for line in lines
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def markdown(text: str) -> str:
    """A text on one line in which nothing is markup: names may be another person's."""
    text = " ".join(text.split()).replace("<", "&lt;").replace("`", "'")
    return text.replace("|", r"\|").replace("[", r"\[")


def _lines_of(text: str) -> str:
    return text.replace("<", "&lt;").replace("[", r"\[")


def _cell(row: Row, key: str, pattern: str) -> str:
    if row.get(key) is None:
        return ""
    text = markdown(pattern.format(row[key]))
    return f"{text} ± {pattern.format(row[f'{key}_se'])}" if f"{key}_se" in row else text


@dataclass(frozen=True)
class RunFacts:
    """The training run that a student comes from, as its folder describes it.

    Args:
        metrics_file: its metrics.jsonl, if there is one.
        changed: settings that are not its experiment's, (there, here) by key; None if it is of no experiment.
        config: all of its settings, as text.
        environment: where it was trained.
    """

    metrics_file: Path | None
    changed: Mapping[str, tuple[Any, Any]] | None = None
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)


def write_report(
    folder: Path,
    comparison: Comparison,
    *,
    about: str,
    reproduce: str,
    real: Mapping[str, float] | None = None,
    run: RunFacts | None = None,
    agreement: float | None = None,
) -> list[Row]:
    """Evaluates what is not in the comparison's cache, and writes index.html, report.md, metrics.json, grid.png and
    curves.png (and of a run training.png and config.yaml) to `folder`. Returns the rows.

    Args:
        about: what was distilled from what, a paragraph.
        reproduce: the commands that do all of it again.
        real: metrics of real pictures, the best that can be reached.
        run: of the student's training.
        agreement: greatest difference between our pictures and those of a stock diffusers pipeline, see `proof`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = comparison.rows()
    columns, groups = _grid(comparison, rows)
    draw_grid(folder / "grid.png", columns, groups)
    draw_curves(folder / "curves.png", rows, real)
    if run is not None and run.metrics_file is not None:
        draw_training(folder / "training.png", run.metrics_file)
    (folder / "metrics.json").write_text(json.dumps(rows, indent=1) + "\n")
    if run is not None and run.config:
        (folder / CONFIG).write_text(run.config)
    (folder / "report.md").write_text(_markdown(comparison, rows, about, reproduce, real, run, agreement) + "\n")
    parts = [
        page.text(about),
        page.section("Results", page.table(rows, all_columns()), page.text(_protocol(comparison, real), code=True)),
        page.section("Quality against steps", page.curves(curve_figures(rows, real))),
        page.section("Pictures", page.text(SAME_NOISE), page.grid(columns, groups)),
        *([] if run is None else _of_run(run)),
        *([] if agreement is None else [page.section(IN_DIFFUSERS, page.text(_agreement(agreement)))]),
        page.section("Again", page.code(reproduce)),
        page.section("Environment of the evaluation", page.facts(_environment(comparison))),
    ]
    magnified = groups[0][0].images.shape[-1] <= page.SMALL
    page.write_page(folder / "index.html", TITLE, parts, magnified)
    return rows


def _markdown(
    comparison: Comparison,
    rows: Sequence[Row],
    about: str,
    reproduce: str,
    real: Mapping[str, float] | None,
    run: RunFacts | None,
    agreement: float | None,
) -> str:
    parts = [
        f"# {TITLE}",
        markdown(about),
        format_table(rows),
        f"## How it was measured\n\n{_lines_of(_protocol(comparison, real))}",
        f"## Pictures\n\n{SAME_NOISE}\n\n![samples](grid.png)",
        "## Quality against steps, and against network evaluations\n\n![curves](curves.png)",
    ]
    if run is not None and run.metrics_file is not None:
        parts.append("## Training\n\n![training](training.png)")
    if agreement is not None:
        parts.append(f"## {IN_DIFFUSERS}\n\n{_agreement(agreement)}")
    environment = "\n".join(f"- {name}: {markdown(value)}" for name, value in _environment(comparison).items())
    return "\n\n".join([*parts, f"## Again\n\n```sh\n{reproduce.strip()}\n```", f"## Environment\n\n{environment}"])


def _of_run(run: RunFacts) -> list[str]:
    parts = []
    if run.metrics_file is not None:
        parts.append(page.section("Training", page.curves(training_figures(run.metrics_file))))
    if run.config:
        changed = [] if run.changed is None else [page.text(NOT_THE_EXPERIMENTS), page.changes(run.changed)]
        parts.append(page.section("Settings", *changed, page.folded("all settings", run.config)))
    if run.environment:
        parts.append(page.section("Environment of the training", page.facts(run.environment)))
    return parts


def setting_of(row: Row) -> Setting:
    """The setting that a row was made with."""
    return Setting(**{field.name: row[field.name] for field in fields(Setting) if field.name in row})


def _grid(comparison: Comparison, rows: Sequence[Row]) -> tuple[list[str], list[list[GridRow]]]:
    """Prompts, and pictures of the rows in groups of as many steps."""
    n = comparison.plan.n
    places = [9 * i % n for i in range(min(GRID_COLUMNS, n))]  # prompts in turn: 9 apart, they differ in every way
    groups: dict[int, list[GridRow]] = {}
    work = sum(setting_of(row).work for row in rows if line_of(row) != "undistilled") * len(places)
    advance = Progress("pictures of the report", work, WORK).update
    names = {id(row): line.label for line in series_of(rows[1:]) if line.label != TUNED_TEACHER for row in line.rows}
    for row in rows:
        if line_of(row) != "undistilled":
            setting = setting_of(row)
            title = f"{names.get(id(row), setting.model)}, {counted(setting.steps, 'step')}"
            line = GridRow(title, _detail(row), comparison.pictures(setting, places, advance))
            groups.setdefault(setting.steps, []).append(line)
    prompts = comparison.scorer.prompts("report", n)
    return [prompts[i] for i in places], list(groups.values())


def _detail(row: Row) -> str:
    found = (metric for metric in METRICS.values() if metric.brief and metric.name in row)
    return "   ".join(metric.brief.format(row[metric.name]) for metric in found)


def _protocol(comparison: Comparison, real: Mapping[str, float] | None) -> str:
    plan, scorer = comparison.plan, comparison.scorer
    tried = f"{{{', '.join(plan.spacings)}}} × w in {{{', '.join(f'{w:g}' for w in plan.guidances)}}}"
    tuned = f"""the best of {tried} by Fréchet distance on
  {plan.tuning_n} other noises (seeds from {FIRST_SEED["tuning"]} up)"""
    few = tuned if len(plan.candidates(1)) > 1 else f"{plan.spacings[0]} times, w as the rows say, not tuned"
    text = f"""
- Every row: the same {counted(plan.n, "prompt")} and starting noises (seeds from {FIRST_SEED["report"]} up, one CPU
  generator a picture). Errors are standard errors over these pictures, of one training run.
- teacher, ddim, up to {counted(max(plan.steps), "step")}: {few}.
"""
    if "student" in comparison.denoisers:
        text += f"- teacher, {plan.student_sampler}: the undistilled teacher, guided, in the student's sampler.\n"
    text += f"""\
- w: guidance, `uncond + w (cond - uncond)`; 1 is none. A student has its teacher's guidance built in.
- NFE: network evaluations per picture; a guided step takes two. Compare at equal NFE as well as at equal steps.
- {LEGEND} From teacher: mean squared difference, per latent element, from the teacher's {plan.teacher_steps}-step end
  point from the same noise and prompt. A sampler that adds fresh noise cannot reach 0.
- Protocol: {scorer.protocol}, N = {plan.n}. Results of another one do not compare with these.
- Measured by: {scorer.name}. Fréchet distances compare at equal n only.
"""
    text += "".join(f"- {note}\n" for note in (*scorer.notes, *(comparison.stored.notes if comparison.stored else ())))
    text += "".join(f"- Left out: {name}, {reason}\n" for name, reason in scorer.left_out.items())
    if real:
        measures = {key: METRICS[key] for key in real if key in METRICS}
        scores = ", ".join(f"{measure.heading} {measure.pattern.format(real[k])}" for k, measure in measures.items())
        text += f"- As many other real pictures score: {scores}.\n"
    return text.strip()


def _agreement(difference: float) -> str:
    return f"""The exported student in diffusers' own pipeline, with its own scheduler, generates the same pictures: the
greatest difference of any pixel is {difference:.1e}, of a range of 2."""


def _environment(comparison: Comparison) -> dict[str, str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    device = torch.cuda.get_device_name() if gpu_is_used() else f"{platform.machine()} CPU"
    return {
        "packages": f"Python {platform.python_version()}, {packages}",
        "machine": f"{platform.system()} on {device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "weights": ", ".join(f"{name} {digest}" for name, digest in comparison.hashes.items()),
    }
