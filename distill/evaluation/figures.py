"""Pictures of a comparison: a grid of samples, curves of quality against steps, and the training's own curves."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
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

from distill.data.words import counted
from distill.diffusion.samplers import SAMPLERS
from distill.evaluation.metrics import METRICS, plotted

CELL, GAP, LABEL_WIDTH, HEADER = 96, 4, 230, 44  # pixels
TITLE_LINE = 18  # pixels
LABEL = 48  # letters of a line's name
INK, GREY = "#222222", "#808080"
COLOURS = {"teacher": "#4477aa", "undistilled": "#aaaaaa", "student": "#ee6633"}
LINES = (("#4477aa", "o"), ("#ee6677", "s"), ("#66ccee", "v"), ("#ccbb44", "^"), ("#228833", "D"), ("#aa3377", "P"))
"""Colours and markers of lines in turn; the colours are Paul Tol's, for the colour-blind too."""
MARKERS = tuple(marker for _, marker in LINES)
NAMES = {"student": "student", "teacher": "teacher", "undistilled": "teacher in the student's sampler"}
TUNED = "best settings at these steps"
STUDENTS = ("#ee6633", "#228833", "#aa3377", "#ccbb44", "#66ccee")
"""Colours of several lines of a student; those of a teacher share its colour and differ by their markers."""


@dataclass(frozen=True)
class Series:
    """Rows that are one line: of one model by one sampler, spacing and guidance, or of the teacher tuned at each number
    of steps. `kind` is "student", "teacher" or "undistilled", the teacher in the student's sampler."""

    label: str
    kind: str
    rows: list[Mapping[str, Any]]


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
        pen.multiline_text(
            (x, HEADER - 6), _wrapped(title, width=15 * cell // CELL), INK, _font(12), "md", align="center"
        )
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
    return ImageFont.truetype(
        str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )  # old Pillows take no path


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
    metrics = measured_in(rows)
    figure = Figure(figsize=(4.3 * max(1, len(metrics)), 6.9), layout="constrained")
    axes = figure.subplots(2, max(1, len(metrics)), squeeze=False, sharey="col")
    for column, name in enumerate(metrics):
        for axis, x in zip(axes[:, column], ("steps", "nfe"), strict=True):
            _draw_metric(axis, rows, name, x, real)
        axes[0, column].set_title(METRICS[name].curve, fontsize=11)
    _legend_below(figure)
    figure.savefig(path, dpi=110)


def curve_figures(rows: Sequence[Mapping[str, Any]], real: Mapping[str, float] | None = None) -> dict[str, Figure]:
    """Each metric against steps as a figure of its own, by its title; the rows are those of `draw_curves`."""
    figures = {}
    for name in measured_in(rows):
        figure = Figure(figsize=(4.6, 3.5), layout="constrained")
        axis = figure.subplots()
        _draw_metric(axis, rows, name, "steps", real)
        axis.set_title(METRICS[name].curve, fontsize=11)
        _legend_below(figure, 8)
        figures[METRICS[name].curve_title] = figure
    return figures


def measured_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that rows have numbers of: one that was left out has no curve."""
    return [name for name in plotted() if any(_is_number(row.get(name)) for row in rows)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _draw_metric(
    axis: Axes, rows: Sequence[Mapping[str, Any]], name: str, x: str, real: Mapping[str, float] | None
) -> None:
    full, rest = rows[0], rows[1:]
    for line, colour, marker in _styled(series_of(rest)):
        width, above = (2.4, 3) if line.kind == "student" else (1.6, 2)
        points = sorted((row for row in line.rows if _is_number(row.get(name))), key=lambda row: row[x])
        _draw_points(axis, points, x, name, line.label, colour, marker, linewidth=width, zorder=above)
    _draw_levels(axis, name, full, real)
    _powers_of_two(axis, {row[x] for row in rest})
    axis.set_xlabel("steps" if x == "steps" else "network evaluations per picture")
    _open(axis, METRICS[name].logarithmic)


def plain(text: str) -> str:
    """A text that matplotlib draws as it is: without formulas between dollars, and named in legends though it begins
    with an underscore. A long one is cut."""
    text = text if len(text) <= LABEL else text[: LABEL - 1] + "…"
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def _legend_below(figure: Figure, size: int = 10) -> None:
    """One legend of all panels, below them; the figure grows by its height."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if not found:
        return
    longest = max(map(len, found)) + 6  # and a handle
    columns = max(1, min(5, int(figure.get_figwidth() * 120 / size / longest)))
    figure.set_figheight(figure.get_figheight() + 0.02 * size * -(-len(found) // columns))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=size, frameon=False)


def draw_lines(
    path: Path,
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    x: str,
    metrics: Sequence[str],
    level: tuple[str, Mapping[str, float]],
    begins: Mapping[str, float] | None = None,
) -> None:
    """Rows as lines against their `x`, "steps" of sampling, the training's "step" or "solves", a panel for each metric.

    Args:
        lines: rows by the line's name, in the order of the legend; bars are their standard errors.
        metrics: of those that have a title above.
        level: the name of a dotted line, and at which value of each metric it stands; one that is 0 is not drawn.
        begins: what begins at which x, as vertical lines.
    """
    figure = Figure(figsize=(4.3 * len(metrics), 4.1), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, name in zip(axes, metrics, strict=True):
        _draw_rows(axis, lines, name, x)
        for what, where in (begins or {}).items():
            axis.axvline(where, color=GREY, linewidth=1, label=what)
        if level[1].get(name):
            axis.axhline(level[1][name], color=GREY, linestyle=":", label=level[0])
    _legend_below(figure)
    figure.savefig(path, dpi=110)


FAMILY_MARKERS = "osv^DPX*<>hd"


def draw_methods(
    path: Path,
    lines: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    metric: str,
    against: str,
    at: int,
    levels: Mapping[str, float | None],
) -> None:
    """Methods beside each other, a colour for each family and a marker for each method.

    Left: the metric over steps. Right: the metric over another one at one number of steps, a point a method.

    Args:
        lines: rows by (family, method).
        against: the metric that the right panel has the other axis of.
        at: the number of steps there.
        levels: of the metric, as dotted lines, by name.
    """
    families = list(dict.fromkeys(family for family, _ in lines))
    colours = {family: LINES[i % len(LINES)][0] for i, family in enumerate(families)}
    figure = Figure(figsize=(11.5, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ((family, method), rows), marker in zip(lines.items(), cycle(FAMILY_MARKERS), strict=False):
        label, colour = f"{method} ({family})", colours[family]
        _draw_points(left, rows, "steps", metric, label, colour, marker)
        points = [row for row in rows if row["steps"] == at and _is_number(row.get(against))]
        _draw_points(right, points, against, metric, label, colour, marker)
    for axis in (left, right):
        for (name, level), style in zip(levels.items(), cycle((":", "--")), strict=False):
            if level:
                axis.axhline(level, color=GREY, linestyle=style, label=name)
        axis.set_title(METRICS[metric].curve, fontsize=11)
        _open(axis, METRICS[metric].logarithmic)
    _powers_of_two(left, {row["steps"] for rows in lines.values() for row in rows})
    left.set_xlabel("steps")
    right.set_xlabel(f"{METRICS[against].curve_title}, at {counted(at, 'step')}")
    _legend_below(figure)
    figure.savefig(path, dpi=110)


def line_figures(lines: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]) -> dict[str, Figure]:
    """Rows as lines against their steps, a figure for each metric, by its title."""
    figures = {}
    for name in metrics:
        figure = Figure(figsize=(4.6, 3.5), layout="constrained")
        axis = figure.subplots()
        _draw_rows(axis, lines, name, "steps")
        _legend_below(figure, 8)
        figures[METRICS[name].curve_title] = figure
    return figures


def _draw_rows(axis: Axes, lines: Mapping[str, Sequence[Mapping[str, Any]]], name: str, x: str) -> None:
    for (label, rows), (colour, marker) in zip(lines.items(), cycle(LINES), strict=False):
        points = sorted((row for row in rows if _is_number(row.get(name))), key=lambda row: row[x])
        _draw_points(axis, points, x, name, label, colour, marker)
    if x in ("steps", "solves"):
        _powers_of_two(axis, {row[x] for rows in lines.values() for row in rows})
    axis.set_xlabel("training step" if x == "step" else x)
    axis.set_title(METRICS[name].curve, fontsize=11)
    _open(axis, METRICS[name].logarithmic)


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


def line_of(row: Mapping[str, Any]) -> str:
    """A row's kind: "student", the "teacher", or the "undistilled" teacher in the student's sampler."""
    if row["model"] == "student":
        return "student"
    return "teacher" if SAMPLERS.find(row["sampler"]).solves else "undistilled"


def series_of(rows: Iterable[Mapping[str, Any]]) -> list[Series]:
    """Rows by the line that they belong to, of which each has at most one row for a number of steps."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((line_of(row), *_apart(row).values()), []).append(row)
    several: dict[str, list[dict[str, str]]] = {}
    for (kind, *_), own in groups.items():
        several.setdefault(kind, []).append(_apart(own[0]))
    return [Series(_label(kind, own[0], several[kind]), kind, own) for (kind, *_), own in groups.items()]


def _apart(row: Mapping[str, Any]) -> dict[str, str]:
    """What distinguishes lines of one kind, in words; nothing for a tuned teacher, whose settings are its best."""
    if row.get("tuned"):
        return {"tuned": TUNED}
    evaluation = row.get("evaluation", "")
    return {
        "evaluation": evaluation if row["model"] == "student" else "",
        "sampler": "/".join(str(row[name]) for name in ("sampler", "spacing", "gamma") if name in row),
        "guidance": f"w {row['guidance']:g}" if "guidance" in row else "",
    }


def _label(kind: str, row: Mapping[str, Any], others: Sequence[Mapping[str, str]]) -> str:
    """A line's label: its kind, and those of its settings that differ among the lines of that kind."""
    own = _apart(row)
    if "tuned" in own:
        return f"{NAMES[kind]}, {TUNED}"
    settings = [other for other in others if "tuned" not in other]
    differ = [key for key in own if own[key] and (key == "evaluation" or len({other[key] for other in settings}) > 1)]
    first = own["evaluation"] or NAMES[kind]
    return ", ".join([first, *(own[key] for key in differ if key != "evaluation")])


def _styled(lines: Sequence[Series]) -> Iterator[tuple[Series, str, str]]:
    """Lines with a colour and a marker each."""
    seen: Counter[str] = Counter()
    for line in lines:
        number = seen[line.kind]
        seen[line.kind] += 1
        colour = STUDENTS[number % len(STUDENTS)] if line.kind == "student" else COLOURS[line.kind]
        yield line, colour, MARKERS[number % len(MARKERS)]


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
    if not points:
        return
    axis.errorbar(
        [point[x] for point in points],
        [point[name] for point in points],
        [point.get(f"{name}_se", 0.0) for point in points],
        label=plain(label),
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=linewidth,
        capsize=3,
        zorder=zorder,
    )


def _draw_levels(axis: Axes, name: str, full: Mapping[str, Any], real: Mapping[str, float] | None) -> None:
    if _is_number(full.get(name)) and full[name] > 0:  # from itself it is 0, which no logarithmic axis shows
        label = f"teacher, {counted(full['steps'], 'step')}"
        axis.axhline(full[name], color=COLOURS["teacher"], linestyle="--", label=label)
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


def _trained(metrics_file: Path, more: Sequence[str] = ()) -> tuple[list[dict[str, float]], dict[str, list[str]]]:
    """The lines of a metrics.jsonl, and which of their scalars go into which panel."""
    lines = [found for line in metrics_file.read_text(encoding="utf-8").splitlines() if (found := scalars_of(line))]
    if not lines:
        raise ValueError(f"{metrics_file} holds no metrics")
    known = dict.fromkeys(name for line in lines for name in line)  # a validation's line has other names than a step's
    if not any(line.get("skipped") for line in lines):
        known.pop("skipped", None)  # no step was
    panels = {"loss": [name for name in known if "loss" in name]}
    panels |= {name: [name] for name in ("lr", "grad_norm", *more) if name in known}
    return lines, panels | {name: [name] for name in known if more and name.startswith("validation/")}


def scalars_of(line: str) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, which may be another person's; nothing of a line without a step."""
    try:
        row = json.loads(line)
        found: dict[str, float] = {"step": int(row["step"])}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    for name, value in row.items():
        with suppress(ValueError, TypeError):
            found[name] = float(value)  # "nan" is written as a text
    return found


def _draw_scalars(axis: Axes, lines: Sequence[Mapping[str, Any]], title: str, names: Sequence[str]) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), label=plain(name), linewidth=1.6)
    axis.set_title(plain(title), fontsize=11)
    axis.set_xlabel("step")
    _open(axis, title in ("loss", "grad_norm"))
    if len(names) > 1:
        axis.legend(fontsize=9, frameon=False)
