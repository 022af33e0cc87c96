"""Training runs side by side on one page: how their losses fall, and what they have come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distill.evaluation import page
from distill.evaluation.figures import scalars_of

TAIL = 0.1  # share of a run's last steps, over which a noisy scalar is averaged
SHOWN = ("loss", "grad_norm")
NAMED = 12  # curves that a legend has room for


def runs_page(path: Path, title: str, runs: Mapping[str, Path], about: Mapping[str, Mapping[str, str]]) -> None:
    """Writes a page with a row and a curve for each run.

    Args:
        runs: their folders by their names, each with its `metrics.jsonl`; one without is shown as not begun.
        about: what each was made with: columns of the table.
    """
    metrics = {name: scalars(folder) for name, folder in runs.items()}
    rows = [{"run": name, **about[name], **summary(metrics[name])} for name in runs]
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "run"]
    columns = {"run": ("run", "{}")} | {name: (name, pattern(name, rows)) for name in names}
    parts = [
        page.text(
            f"Losses are means over the last {TAIL:.0%} of a run's steps; what validation measured is of its end."
        ),
        page.table(rows, columns),
        page.section(
            "Curves" if len(runs) <= NAMED else f"Curves of {len(runs)} runs, more than a legend names",
            page.curves({name: curve(name, metrics) for name in SHOWN}),
        ),
    ]
    page.write_page(path, title, parts)


def scalars(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` that are complete; none if there is no such file."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [found for line in lines if (found := scalars_of(line))]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps taken, the last losses, and the last of each scalar that validation has measured."""
    if not rows:
        return {"steps": 0}
    last = int(max(row["step"] for row in rows))
    found: dict[str, Any] = {"steps": last}
    for name in SHOWN:
        tail = [row[name] for row in rows if name in row and row["step"] > last * (1 - TAIL)]
        if tail:
            found[name] = sum(tail) / len(tail)
    for row in rows:
        found |= {k: v for k, v in row.items() if k.startswith("validation/") and not k.endswith(("seconds", "share"))}
    return found


def pattern(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """How a column's values are written."""
    return "{:.4g}" if all(isinstance(row.get(name, 0.0), float) for row in rows) else "{}"


def curve(name: str, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """One scalar of every run against its steps, on a logarithmic scale where it is positive."""
    figure = Figure(figsize=(4.6, 3.5), layout="constrained")
    axis = figure.subplots()
    positive = True
    for run, rows in metrics.items():
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        if points:
            axis.plot(*zip(*points, strict=True), label=run, linewidth=1)
            positive &= all(value > 0 for _, value in points)
    if positive:
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_title(name, fontsize=11)
    if 0 < len(axis.lines) <= NAMED:
        figure.legend(loc="outside lower center", fontsize=8, ncols=1, frameon=False)
    return figure
