"""Curves of several lines: what is drawn is what the rows say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from distill.evaluation.figures import LINES, draw_lines

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
