"""Curves of several lines: what is drawn is what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from distill.evaluation.figures import LINES, curve_figures, draw_lines, series_of, training_figures

STEPS = (2, 3, 4)


def rows(offset: float) -> list[dict[str, Any]]:
    """Out of order, as a caller may have them."""
    points = [{"steps": s, "frechet": offset / s, "frechet_se": 0.05 / s, "reward": offset * s} for s in STEPS]
    return points[::-1]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that is saved."""
    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **k: (kept.append(figure), save(figure, path, **k)))
    lines = {"one": rows(1.0), "other": rows(2.0)}
    level = {"frechet": 0.1, "reward": 0.0}
    draw_lines(tmp_path / "lines.png", lines, "steps", ("frechet", "reward"), ("real", level), {"begins": 3})
    assert np.asarray(Image.open(tmp_path / "lines.png").convert("L")).std() > 5
    return kept[0]


def test_each_panel_has_each_line_with_its_values_and_errors(drawn: Figure) -> None:
    for axis, name, scale in zip(drawn.axes, ("frechet", "reward"), ("log", "linear"), strict=True):
        assert axis.get_yscale() == scale and axis.get_xscale() == "log"
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "3", "4"]
        for container, offset, (colour, _) in zip(axis.containers, (1.0, 2.0), LINES, strict=False):
            line, _, (bars,) = container.lines
            expected = [row[name] for row in rows(offset)[::-1]]
            assert line.get_xdata().tolist() == list(STEPS) and line.get_ydata().tolist() == pytest.approx(expected)
            assert line.get_color() == colour
            heights = [bar[1, 1] - bar[0, 1] for bar in bars.get_segments()]
            assert heights == pytest.approx([0.1 / s if name == "frechet" else 0.0 for s in STEPS])


def test_levels_that_are_0_are_left_out_and_all_else_is_named(drawn: Figure) -> None:
    levels = [[line for line in axis.lines if line.get_linestyle() == ":"] for axis in drawn.axes]
    assert [len(found) for found in levels] == [1, 0] and levels[0][0].get_ydata()[0] == 0.1
    (legend,) = drawn.legends
    assert {text.get_text() for text in legend.get_texts()} == {"one", "other", "real", "begins"}


def row(model: str, steps: int, sampler: str = "lcm", spacing: str = "lcm", w: float = 1.0, **more: Any) -> Any:
    settings = {"model": model, "sampler": sampler, "spacing": spacing, "steps": steps, "guidance": w}
    return settings | {"nfe": steps, "frechet": steps + w, "teacher_consistency": 1 / steps} | more


REFERENCE = row("teacher", 50, "ddim", "trailing", 7.5)


def test_no_line_has_two_rows_of_as_many_steps() -> None:
    rows = [row("student", n, *way) for n in (1, 2, 4) for way in (("lcm", "lcm"), ("ddim", "trailing"))]
    rows += [row("student", n, w=2.0) for n in (1, 2, 4)]
    rows += [row("teacher", n, "ddim", "trailing", w) for n in (1, 2, 4) for w in (1.0, 7.5)]
    rows += [row("teacher", n, w=7.5) for n in (1, 2, 4)]
    found = {line.label: [point["steps"] for point in line.rows] for line in series_of(rows)}
    assert found == dict.fromkeys(
        [
            "student, lcm/lcm, w 1",
            "student, ddim/trailing, w 1",
            "student, lcm/lcm, w 2",
            "teacher, w 1",
            "teacher, w 7.5",
            "teacher in the student's sampler",
        ],
        [1, 2, 4],
    )
    (figure,) = (figure for name, figure in curve_figures([REFERENCE, *rows]).items() if name == "Fréchet distance")
    for container in figure.axes[0].containers:
        steps = container.lines[0].get_xdata().tolist()
        assert steps == sorted(set(steps))  # nothing goes to and fro


def test_best_settings_are_said_only_of_what_was_tuned() -> None:
    tuned = [row("teacher", n, "ddim", s, w, tuned=True) for n, s, w in ((1, "leading", 1.0), (4, "trailing", 3.0))]
    beside = row("teacher", 3, "ddim", "trailing", 1.0)
    labels = [line.label for line in series_of([*tuned, beside, row("student", 4)])]
    assert labels == ["teacher, best settings at these steps", "teacher", "student"]
    assert [line.label for line in series_of([row("teacher", n, "ddim") for n in (1, 2)])] == ["teacher"]


def test_a_metric_that_was_left_out_has_no_plot() -> None:
    rows = [REFERENCE, row("student", 2, fid=float("nan")), row("student", 4, fid=None)]
    figures = curve_figures(rows)
    assert list(figures) == ["Fréchet distance", "distance from the teacher"]
    assert [figure.axes[0].get_title()[-1] for figure in figures.values()] == ["↓", "↓"]


def test_updates_that_were_never_skipped_have_no_plot(tmp_path: Path) -> None:
    def titles(skipped: int) -> list[str]:
        lines = [{"step": n, "loss": 1.0, "skipped": skipped} for n in (1, 2)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return list(training_figures(tmp_path / "metrics.jsonl"))

    assert titles(0) == ["loss"] and titles(1) == ["loss", "skipped"]
