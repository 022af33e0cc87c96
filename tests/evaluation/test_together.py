"""Reports beside each other: what compares shares a table, what does not has one of its own."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from PIL import Image

from distill.evaluation.together import write_together

TEACHER = {"model": "teacher", "sampler": "ddim", "steps": 50, "frechet": 0.2, "protocol": "toy, N = 100"}
STUDENT = {"model": "student", "sampler": "lcm", "steps": 4, "frechet": 0.3, "protocol": "toy, N = 100"}


def report(folder: Path, rows: list[dict], rate: float) -> Path:  # type: ignore[type-arg]
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(rows))
    (folder / "config.yaml").write_text(f"seed: 0\noptimizer: {{lr: {rate}}}\n")
    Image.new("RGB", (40, 20), "red").save(folder / "grid.png")
    return folder


def test_a_teacher_they_share_is_one_row_and_settings_that_differ_are_told(tmp_path: Path) -> None:
    worse = STUDENT | {"frechet": 0.5}
    reports = {
        "a": report(tmp_path / "a", [TEACHER, STUDENT], 0.1),
        "b": report(tmp_path / "b", [TEACHER, worse], 0.2),
    }
    write_together(tmp_path / "both", reports)
    rows = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert [(row["evaluation"], row["frechet"]) for row in rows] == [("—", 0.2), ("a", 0.3), ("b", 0.5)]
    text = (tmp_path / "both" / "report.md").read_text()
    assert "optimizer.lr" in text and "seed" not in text
    told = html.unescape((tmp_path / "both" / "index.html").read_text())
    assert told.count("<table>") == 2 and "optimizer.lr" in told and 'alt="b"' in told


def test_protocols_do_not_share_a_table(tmp_path: Path) -> None:
    other = STUDENT | {"protocol": "coco2017-5k, N = 5000", "clip_score": 33.0}
    reports = {"a": report(tmp_path / "a", [STUDENT], 0.1), "b": report(tmp_path / "b", [other], 0.1)}
    write_together(tmp_path / "both", reports)
    told = (tmp_path / "both" / "index.html").read_text()
    assert told.count("<table>") == 2 and told.count("<h2>Protocol: ") == 2


def test_a_folder_without_a_report_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: no report there \(scripts/evaluate.py writes"):
        write_together(tmp_path / "both", {"none": tmp_path / "none"})
    assert not (tmp_path / "both").exists()
