"""Watchdogs of two processes: the one that gives up has the other say where it stands; and what counts as waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from distill.training.processes import record_collectives
from distill.training.watchdog import HUNG, Watchdog

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys, time
from pathlib import Path
from distill.training.watchdog import Watchdog

def is_stuck_here():
    time.sleep(60)

rank, minutes, folder = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
with Watchdog(minutes, rank, folder, 2) as watchdog, watchdog.over("the start"):
    (folder / f"ready-{rank}").touch()
    is_stuck_here()
"""


def test_the_rank_that_gives_up_has_the_others_write_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "hang-request").write_text("of an earlier start\n")
    command = [sys.executable, "-c", RANK]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    patient = subprocess.Popen([*command, "1", "0.1", str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "ready-1").exists():
        time.sleep(0.02)
    assert not (tmp_path / "hang-rank-1.txt").exists()
    hasty = [*command, "0", "0.02", str(tmp_path)]
    ended = subprocess.run(hasty, env=environment, capture_output=True, text=True)
    patient.kill()
    patient.wait()
    assert ended.returncode == HUNG and "rank 0 has waited" in ended.stderr and "for the start" in ended.stderr
    assert "rank 0 has waited" in (tmp_path / "hang-request").read_text()
    for rank in (0, 1):
        said = (tmp_path / f"hang-rank-{rank}.txt").read_text()
        assert said.startswith(f"rank {rank}, process ") and "in is_stuck_here" in said


def test_an_outer_wait_begins_anew_after_an_inner_one() -> None:
    watchdog = Watchdog(1)
    with watchdog.over("outer"):
        began = watchdog._waits
        assert began is not None and began[0] == "outer"
        with watchdog.over("inner"):
            assert watchdog._waits is not None and watchdog._waits[0] == "inner"
            time.sleep(0.01)
        assert watchdog._waits is not None and watchdog._waits[0] == "outer" and watchdog._waits[1] > began[1]
    assert watchdog._waits is None


def test_collectives_are_recorded_on_gpus_alone() -> None:
    import torch

    before = dict(os.environ)
    record_collectives()
    assert (dict(os.environ) == before) == (not torch.cuda.is_available() or "TORCH_FR_BUFFER_SIZE" in before)
