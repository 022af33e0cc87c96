"""Runs whose student trains at some steps only, stopped within a period and resumed from the checkpoint there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.training.engine_worker import run

STEPS = 4
SINGLE = {"kind": "single", "max_grad_norm": 0.02}
Whole = Callable[[str], tuple[Path, dict[str, Any]]]


def trained(folder: Path, method: str, **case: Any) -> dict[str, Any]:
    settings = {"engine": SINGLE, "method": method, "steps": STEPS, "run": str(folder), "save_at": [STEPS]}
    engine, result = run({**settings, **case})
    engine.release()
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run that is not stopped, with a checkpoint after every step."""

    @cache
    def made(method: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(method)
        return folder, trained(folder, method, save_at=list(range(1, STEPS + 1)))

    return made


def files_at_the_end(folder: Path) -> dict[str, Any]:
    """Size and hash of all that is saved: weights, averages, optimizer states."""
    manifest = json.loads((folder / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    return manifest["files"]


@pytest.mark.parametrize("method, students", [("dmd2", [2]), ("sid", [1, 3]), ("rcm", [1, 3])])
def test_the_student_trains_in_the_last_step_of_a_period(method: str, students: list[int], whole: Whole) -> None:
    rows = whole(method)[1]["scalars"]
    assert [i for i, row in enumerate(rows) if "student/loss" in row] == students
    assert all("fake_score/loss" in row for row in rows)


@pytest.mark.parametrize("method, stopped", [("dmd2", 1), ("dmd2", 2), ("sid", 1), ("rcm", 1), ("rcm", 3)])
def test_a_run_resumes_within_a_period_to_the_bit(method: str, stopped: int, whole: Whole, tmp_path: Path) -> None:
    folder, result = whole(method)
    name = f"checkpoints/step-{stopped:08d}"
    shutil.copytree(folder / name, tmp_path / name)
    rest = trained(tmp_path, method, resume="latest")
    assert rest["start"] == stopped and rest["scalars"] == result["scalars"][stopped:]
    assert files_at_the_end(tmp_path) == files_at_the_end(folder)
