"""Pictures of a comparison: a grid of samples, curves of quality against steps, and the training's own curves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib import get_data_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, GAP, LABEL_WIDTH, HEADER = 96, 4, 230, 44  # pixels
TITLE_LINE = 18  # pixels
INK, GREY = "#222222", "#808080"
COLOURS = {"teacher": "#4477aa", "undistilled": "#aaaaaa", "student": "#ee6633"}
LINES = (("#4477aa", "o"), ("#ee6677", "s"), ("#66ccee", "v"), ("#ccbb44", "^"), ("#228833", "D"), ("#aa3377", "P"))
"""Colours and markers of lines in turn; the colours are Paul Tol's, for the colour-blind too."""
METRICS = {  # row key: title, logarithmic axis, which way is better
    "caption_accuracy": ("captions right", False, "higher"),
    "frechet": ("Fréchet distance", True, "lower"),
    "teacher_consistency": ("teacher consistency", True, "lower"),
    "reward": ("reward", False, "higher"),
    "fid": ("FID", True, "lower"),
    "fid_patch": ("FID-patch", True, "lower"),
    "clip_score": ("CLIP score", False, "higher"),
    "aesthetic": ("aesthetic score", False, "higher"),
    "image_reward": ("ImageReward", False, "higher"),
    "hps": ("HPS", False, "higher"),
    "pickscore": ("PickScore", False, "higher"),
}


@dataclass(frozen=True)
class GridRow:
    """A line of the grid: images [G, 3, H, W] in [-1, 1], a title (cut to three lines) and a smaller line below it."""

    title: str
    detail: str
    images: Tensor


def draw_grid(path: Path, columns: Sequence[str], groups: Sequence[Sequence[GridRow]], cell: int = CELL) -> None:
    """Draws rows of images under their columns' titles, prompts for example; groups of rows stand a little apart."""
    rows = sum(len(group) for group in groups)
    width = LABEL_WIDTH + len(columns) * (cell + GAP) + 2 * GAP
    height = HEADER + rows * (cell + GAP) + len(groups) * 3 * GAP
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(columns):
        x = LABEL_WIDTH + column * (cell + GAP) + cell // 2
        pen.multiline_text((x, HEADER - 6), _wrapped(title), INK, _font(12), "md", align="center")
    top = HEADER
    for group in groups:
        for row in group:
            for above, line in enumerate(reversed(_wrapped(row.title, width=25, lines=3).split("\n"))):
                pen.text((14, top + cell / 2 - 4 - TITLE_LINE * above), line, INK, _font(15), "ls")
            pen.text((14, top + cell / 2 + 16), row.detail, GREY, _font(11), "ls")
            for column, image in enumerate(row.images):
                canvas.paste(cell_picture(image, cell), (LABEL_WIDTH + column * (cell + GAP), top))
            top += cell + GAP
        top += 3 * GAP
    canvas.save(path)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which is everywhere where matplotlib is, and knows more letters than Pillow's."""
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def cell_picture(image: Tensor, cell: int) -> Image.Image:
    """An image [3, H, W] in [-1, 1] at most `cell` pixels a side: a small one magnified by a whole factor."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest > cell:
        picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    else:
        factor = cell // longest
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture


def _wrapped(text: str, width: int = 15, lines: int = 2) -> str:
    """The beginning of a text on few short lines."""
    wrapped = [""]
    for word in text.split():
        if wrapped[-1] and len(wrapped[-1]) + 1 + len(word) > width:
            wrapped.append(word)
        else:
            wrapped[-1] = f"{wrapped[-1]} {word}".strip()
    return "\n".join(wrapped[:lines]) + ("…" if len(wrapped) > lines else "")


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]], real: Mapping[str, float] | None = None) -> None:
    """Each metric against steps (above) and against network evaluations (below), with standard errors.

    The first row is the teacher at full steps, drawn as a dashed line; `real` pictures' own scores as a dotted one.
    """
    metrics = [name for name in METRICS if name in rows[0]]
    figure = Figure(figsize=(4.3 * len(metrics), 7.2), layout="constrained")
    axes = figure.subplots(2, len(metrics), squeeze=False, sharey="col")
    for column, name in enumerate(metrics):
        for axis, x in zip(axes[:, column], ("steps", "nfe"), strict=True):
            _draw_metric(axis, rows, name, x, real)
        axes[0, column].set_title(_title(name), fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=10, frameon=False)
    figure.savefig(path, dpi=110)


def curve_figures(rows: Sequence[Mapping[str, Any]], real: Mapping[str, float] | None = None) -> dict[str, Figure]:
    """Each metric against steps as a figure of its own, by its title; the rows are those of `draw_curves`."""
    figures = {}
    for name in (name for name in METRICS if name in rows[0]):
        figure = Figure(figsize=(4.6, 3.9), layout="constrained")
        axis = figure.subplots()
        _draw_metric(axis, rows, name, "steps", real)
        axis.set_title(_title(name), fontsize=11)
        axis.legend(fontsize=8, frameon=False)
        figures[METRICS[name][0]] = figure
    return figures


def _draw_metric(
    axis: Axes, rows: Sequence[Mapping[str, Any]], name: str, x: str, real: Mapping[str, float] | None
) -> None:
    full, rest = rows[0], rows[1:]
    for line, points in _lines(rest).items():
        _draw_line(axis, line, sorted(points, key=lambda row: row[x]), x, name)
    _draw_levels(axis, name, full, real)
    _powers_of_two(axis, {row[x] for row in rest})
    axis.set_xlabel("steps" if x == "steps" else "network evaluations a picture")
    _open(axis, METRICS[name][1])


def _title(name: str) -> str:
    title, _, better = METRICS[name]
    return f"{title} ({better} is better)"


def draw_lines(
    path: Path,
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    x: str,
    metrics: Sequence[str],
    level: tuple[str, Mapping[str, float]],
    begins: Mapping[str, float] | None = None,
) -> None:
    """Rows as lines against their `x`, "steps" of sampling or the training's "step", a panel for each metric.

    Args:
        lines: rows by the line's name, in the order of the legend; bars are their standard errors.
        metrics: of those that have a title above.
        level: the name of a dotted line, and at which value of each metric it stands; one that is 0 is not drawn.
        begins: what begins at which x, as vertical lines.
    """
    figure = Figure(figsize=(4.3 * len(metrics), 4.4), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, name in zip(axes, metrics, strict=True):
        _draw_rows(axis, lines, name, x)
        for what, where in (begins or {}).items():
            axis.axvline(where, color=GREY, linewidth=1, label=what)
        if level[1].get(name):
            axis.axhline(level[1][name], color=GREY, linestyle=":", label=level[0])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=10, frameon=False)
    figure.savefig(path, dpi=110)


def line_figures(lines: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]) -> dict[str, Figure]:
    """Rows as lines against their steps, a figure for each metric, by its title."""
    figures = {}
    for name in metrics:
        figure = Figure(figsize=(4.6, 3.9), layout="constrained")
        axis = figure.subplots()
        _draw_rows(axis, lines, name, "steps")
        axis.legend(fontsize=8, frameon=False)
        figures[METRICS[name][0]] = figure
    return figures


def _draw_rows(axis: Axes, lines: Mapping[str, Sequence[Mapping[str, Any]]], name: str, x: str) -> None:
    for (label, rows), (colour, marker) in zip(lines.items(), cycle(LINES), strict=False):
        _draw_points(axis, sorted(rows, key=lambda row: row[x]), x, name, label, colour, marker)
    if x == "steps":
        _powers_of_two(axis, {row[x] for rows in lines.values() for row in rows})
    axis.set_xlabel("steps" if x == "steps" else "training step")
    axis.set_title(_title(name), fontsize=11)
    _open(axis, METRICS[name][1])


def _powers_of_two(axis: Axes, values: Iterable[int]) -> None:
    """A logarithmic axis with a tick at each value."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(values), [str(v) for v in sorted(values)])
    axis.minorticks_off()


def _open(axis: Axes, logarithmic: bool) -> None:
    """No box around it; a logarithmic axis has its numbers at 1, 2 and 5 of each power, written out."""
    if logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(line_of(row), []).append(row)
    return lines


def line_of(row: Mapping[str, Any]) -> str:
    """A row's curve: "student", the tuned "teacher", or the "undistilled" teacher in the student's sampler."""
    if row["model"] == "student":
        return "student"
    return "teacher" if row["sampler"] == "ddim" else "undistilled"


def _draw_line(axis: Axes, line: str, points: Sequence[Mapping[str, Any]], x: str, name: str) -> None:
    names = {
        "student": "student",
        "teacher": "teacher, best settings at these steps",
        "undistilled": "teacher in the student's sampler",
    }
    width, above = (2.4, 3) if line == "student" else (1.6, 2)
    _draw_points(axis, points, x, name, names[line], COLOURS[line], linewidth=width, zorder=above)


def _draw_points(
    axis: Axes,
    points: Sequence[Mapping[str, Any]],
    x: str,
    name: str,
    label: str,
    colour: str,
    marker: str = "o",
    linewidth: float = 1.6,
    zorder: float = 2,
) -> None:
    axis.errorbar(
        [point[x] for point in points],
        [point[name] for point in points],
        [point.get(f"{name}_se", 0.0) for point in points],
        label=label,
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=linewidth,
        capsize=3,
        zorder=zorder,
    )


def _draw_levels(axis: Axes, name: str, full: Mapping[str, Any], real: Mapping[str, float] | None) -> None:
    if full[name] > 0:  # the teacher's distance from itself is 0, which no logarithmic axis shows
        axis.axhline(full[name], color=COLOURS["teacher"], linestyle="--", label=f"teacher, {full['steps']} steps")
    if real and name in real:
        axis.axhline(real[name], color=GREY, linestyle=":", label="real pictures")


def draw_training(path: Path, metrics_file: Path) -> None:
    """The losses, the learning rate and the gradient norm of a run's metrics.jsonl, against steps.

    Raises:
        ValueError: the file holds no line of metrics.
    """
    lines, panels = _trained(metrics_file)
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_scalars(axis, lines, title, names)
    figure.savefig(path, dpi=110)


def training_figures(metrics_file: Path) -> dict[str, Figure]:
    """The panels of `draw_training` and those of the other scalars, each a figure of its own, by its title."""
    lines, panels = _trained(metrics_file, ("samples_per_second", "skipped"))
    figures = {}
    for title, names in panels.items():
        figures[title] = Figure(figsize=(4.6, 3.4), layout="constrained")
        _draw_scalars(figures[title].subplots(), lines, title, names)
    return figures


def _trained(metrics_file: Path, more: Sequence[str] = ()) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The lines of a metrics.jsonl, and which of their scalars go into which panel."""
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    if not lines:
        raise ValueError(f"{metrics_file} holds no metrics")
    known = dict.fromkeys(name for line in lines for name in line)  # a validation's line has other names than a step's
    panels = {"loss": [name for name in known if "loss" in name]}
    panels |= {name: [name] for name in ("lr", "grad_norm", *more) if name in known}
    return lines, panels | {name: [name] for name in known if more and name.startswith("validation/")}


def _draw_scalars(axis: Axes, lines: Sequence[Mapping[str, Any]], title: str, names: Sequence[str]) -> None:
    for name in names:
        points = [(line["step"], float(line[name])) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), label=name, linewidth=1.6)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step")
    _open(axis, title in ("loss", "grad_norm"))
    if len(names) > 1:
        axis.legend(fontsize=9, frameon=False)
