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


def test_what_began_first_is_named_first_and_what_waits_for_it_too() -> None:
    watchdog = Watchdog(1)
    with watchdog.beside("the checkpoint of step 2"), watchdog.over("step 4"):
        number, (what, _) = next(iter(watchdog._beside.items()))
        now = time.monotonic()
        watchdog._waits = "step 4", now - 55
        assert watchdog._waited(60, 5) == ""
        watchdog._waits, watchdog._beside[number] = ("step 4", now - 58), (what, now - 62)
        said = watchdog._waited(60, 5)
        assert said.startswith("rank 0 has waited 62 s for the checkpoint of step 2, and 58 s for step 4 (watchdog_")
        watchdog._waits = "step 5", now - 3
        assert watchdog._waited(60, 5) == "rank 0 has waited 62 s for the checkpoint of step 2 (watchdog_minutes=1)"


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
