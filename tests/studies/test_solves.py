"""Quality over the number of solves: the table and its picture, and the second teacher."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from distill.config.loading import load
from distill.config.settings import SolvesSettings
from distill.models.families.loading import load_teacher
from distill.studies.solves import teacher_of, write
from distill.toy.teacher import teacher_folder
from tests.forked import python

ROOT = Path(__file__).resolve().parents[2]


def settings(tmp_path: Path, *more: str) -> SolvesSettings:
    return load("solves", SolvesSettings, [f"output_dir={tmp_path}", "n=100", *more])


def test_the_second_teacher_is_the_first_one_trained_further_and_is_kept(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "fine_tune=[fine_tune_steps=1,pictures=100]")
    assert teacher_of("toy", cfg, tmp_path) == teacher_folder()
    folder = teacher_of("night", cfg, tmp_path)
    weights = [load_teacher(f, parts=("network",)).network.state_dict() for f in (folder, teacher_folder())]
    assert not all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    before = (folder / "training.json").stat().st_mtime_ns
    assert teacher_of("night", cfg, tmp_path) == folder and (folder / "training.json").stat().st_mtime_ns == before


def test_the_report_has_a_row_for_each_number_of_solves_and_a_curve(tmp_path: Path) -> None:
    metrics = {"caption_accuracy": 0.5, "frechet": 1.0, "teacher_consistency": 0.2}
    errors = {f"{name}_se": 0.1 for name in metrics}
    rows = [{"title": "teacher", "steps": 50, **metrics, **errors}]
    rows += [{"title": f"{n} solves", "solves": n, "steps": 4, **metrics, **errors} for n in (32, 64)]
    write(tmp_path, settings(tmp_path), {"toy": rows})
    report = (tmp_path / "report.md").read_text()
    assert "| 32 solves |" in report and "| 64 solves |" in report and (tmp_path / "toy.png").stat().st_size > 5000
    assert json.loads((tmp_path / "report.json").read_text())["toy"] == rows


@pytest.mark.slow
def test_the_study_trains_a_student_for_each_number_and_resumes(tmp_path: Path) -> None:
    short = "overrides=[max_train_steps=2,lr_warmup_steps=1,global_batch_size=4,data.solver_steps=10]"
    given = [f"output_dir={tmp_path}", "teachers=[toy]", "solves=[4,8]", "steps=[1]", "n=100", short]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second time it finds everything done
        command = [python(), "-m", "distill", "study", "solves", *given]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "report.json").read_text())["toy"]
    assert [row["title"] for row in rows] == ["teacher", "4 solves", "8 solves"]
