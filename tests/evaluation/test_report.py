"""The report: the numbers a machine reads are the rows, the pictures are the samples, pixel by pixel."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.evaluation.figures import CELL, GAP, HEADER, LABEL_WIDTH, GridRow, draw_grid, draw_training
from distill.evaluation.report import RunFacts, format_table, setting_of, write_report
from tests.evaluation.world import comparison

ROW = {
    "model": "student",
    "sampler": "lcm",
    "spacing": "lcm",
    "steps": 4,
    "guidance": 1.0,
    "nfe": 4,
    "n": 1000,
    "caption_accuracy": 0.98765,
    "caption_accuracy_se": 0.0035,
    "frechet": 0.3456,
    "teacher_consistency": 0.01234,
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_is_aligned_markdown_with_errors() -> None:
    teacher = ROW | {"model": "teacher", "sampler": "ddim", "guidance": 7.5, "nfe": 100, "steps": 50}
    lines = format_table([teacher, ROW]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert cells(lines[0]) == (
        ["model", "sampler", "times", "steps", "w", "NFE", "caption accuracy ↑", "Fréchet ↓", "from teacher ↓"]
    )
    assert all(re.fullmatch("-+:?", cell) for cell in cells(lines[1]))
    assert cells(lines[3]) == ["student", "lcm", "lcm", "4", "1", "4", "0.988 ± 0.004", "0.346", "0.0123"]
    assert cells(lines[2])[4:6] == ["7.5", "100"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("report")
    metrics = folder / "metrics.jsonl"
    lines = [{"step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": "nan"} for step in range(1, 6)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = write_report(
        folder / "out",
        comparison(folder / "cache"),
        about="A Gaussian.",
        reproduce="bash quickstart.sh\n",
        run=RunFacts(metrics, {"learning_rate": (1, 2)}, "seed: 0", {"torch": "2.14"}),
        agreement=1.5e-6,
    )
    return folder / "out", rows


def test_the_report_is_a_folder_that_is_complete(report: tuple[Path, list[dict]]) -> None:  # type: ignore[type-arg]
    folder, rows = report
    assert json.loads((folder / "metrics.json").read_text()) == rows
    text = (folder / "report.md").read_text()
    assert format_table(rows) in text
    for said in ("bash quickstart.sh", "1.5e-06", "A Gaussian.", "10000000", "20000000", "mean squared difference"):
        assert said in text
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(linked) == ["curves.png", "grid.png", "training.png"]
    for name in linked:
        picture = np.asarray(Image.open(folder / name).convert("L"))
        assert picture.std() > 5  # something is drawn


def test_the_page_tells_what_the_markdown_tells(report: tuple[Path, list[dict]]) -> None:  # type: ignore[type-arg]
    folder, rows = report
    told = html.unescape((folder / "index.html").read_text())
    for said in ("bash quickstart.sh", "1.5e-06", "A Gaussian.", "10000000", "mean squared difference", "seed: 0"):
        assert said in told
    assert told.count('<tr class="student">') == sum(row["model"] == "student" for row in rows) > 0
    assert '<dt>learning_rate</dt><dd><span class="was">1</span> → <span class="is">2</span>' in told
    shown = [row for row in rows if row["sampler"] == "ddim" or row["model"] == "student"]
    assert told.count("<figure>") == len(shown) and told.count('aria-label="loss"') == 1


def test_the_grid_shows_the_pictures_of_the_rows(report: tuple[Path, list[dict]]) -> None:  # type: ignore[type-arg]
    folder, rows = report
    study = comparison(folder.parent / "cache")
    full = study.pictures(setting_of(rows[0]), [0, 9])
    grid = np.asarray(Image.open(folder / "grid.png"))
    for column in (0, 1):
        left = LABEL_WIDTH + column * (CELL + GAP)
        cell = grid[HEADER : HEADER + CELL, left : left + CELL]
        block = CELL // 2  # 2 x 2 pixels, magnified
        expected = ((full[column] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert (cell == expected.repeat(block, 0).repeat(block, 1)).all()


@pytest.mark.parametrize("size", [8, 200])
def test_small_pictures_are_magnified_and_large_ones_shrunk(size: int, tmp_path: Path) -> None:
    row = GridRow("student, 1 step", "", torch.full((3, 3, size, size), -1.0))
    draw_grid(tmp_path / "grid.png", ["a very long prompt about many things"] * 3, [[row], [row]])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    black = (grid[:, LABEL_WIDTH : LABEL_WIDTH + CELL] == 0).all(-1)
    assert black.sum() == 2 * CELL * CELL


def test_a_run_without_metrics_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl holds no metrics$"):
        draw_training(tmp_path / "training.png", tmp_path / "metrics.jsonl")
