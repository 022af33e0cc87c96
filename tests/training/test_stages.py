"""A run of stages, stopped within each of them and at each border, and gone on with from its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.engine_worker import run

STEPS = 6
SINGLE = {"kind": "single", "max_grad_norm": 0.02}


def trained(folder: Path, **case: Any) -> dict[str, Any]:
    """Two steps each on stored pairs, on the student's own samples with a new optimizer, and with a reward."""
    settings = {"engine": SINGLE, "method": "rewarded", "steps": STEPS, "run": str(folder), "save_at": [STEPS]}
    engine, result = run({**settings, **case})
    engine.release()
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run that is not stopped, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder, save_at=list(range(1, STEPS + 1)))


def files_at_the_end(folder: Path) -> dict[str, Any]:
    """Size and hash of all that is saved: weights, averages, optimizer states."""
    manifest = json.loads((folder / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    return manifest["files"]


def test_the_three_stages_are_three(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """And the reset between them is no idle one: without it, the run ends elsewhere."""
    rows = whole[1]["scalars"]
    assert [row["stage"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert ["segment_2" in row for row in rows] == [True, True, False, False, False, False]
    assert ["reward" in row for row in rows] == [False, False, False, False, True, True]
    assert rows[2]["lr"] < 0.6 * rows[4]["lr"]
    kept = trained(tmp_path, stages={"fresh_optimizer": False})
    assert kept["scalars"][:2] == rows[:2]
    ends = [result["weights"]["student"] for result in (kept, whole[1])]
    assert not all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


@pytest.mark.parametrize("stopped", range(1, STEPS))
def test_a_run_goes_on_within_a_stage_and_at_its_border_to_the_bit(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, stopped: int
) -> None:
    name = f"checkpoints/step-{stopped:08d}"
    shutil.copytree(whole[0] / name, tmp_path / name)
    rest = trained(tmp_path, resume="latest")
    assert rest["start"] == stopped and rest["scalars"] == whole[1]["scalars"][stopped:]
    assert files_at_the_end(tmp_path) == files_at_the_end(whole[0])
