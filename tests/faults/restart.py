"""How long a job of two ranks stands still when one is killed: `python -m tests.faults.restart FOLDER TRIES`.

Rank 1 gets SIGKILL in a step, under `distill launch` and ZeRO-2. Said are the seconds until the launcher has ended, and
until the same command, which follows at once, has logged its first step. Both starts are those of users, imports too.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

from tests.faults.runs import ROOT, Runs, wait_for

LAUNCH = ("launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def started(runs: Runs, run: Path, log: Path) -> psutil.Popen:
    command = [sys.executable, "-m", "distill", *LAUNCH, "train", *runs.settings(run, ranks=2, steps=10**6)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        return psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def rank_of(process: psutil.Process) -> str | None:
    return process.environ().get("RANK")


def measured(runs: Runs, run: Path) -> tuple[float, float]:
    """Seconds from the kill until the launcher has ended, and until the next step."""
    first, second = run.with_suffix(".first"), run.with_suffix(".second")
    launcher = started(runs, run, first)
    wait_for(run / "metrics.jsonl", 6, launcher)
    rank = min((one for one in launcher.children(recursive=True) if rank_of(one) == "1"), key=lambda one: one.pid)
    begin = time.monotonic()
    rank.kill()
    launcher.wait(120)
    noticed = time.monotonic() - begin
    launcher = started(runs, run, second)
    while " INFO step " not in second.read_text():
        assert launcher.poll() is None, second.read_text()[-4000:]
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    launcher.terminate()
    launcher.wait(120)
    return noticed, seconds


def main(folder: str, tries: str) -> None:
    place = Path(folder)
    place.mkdir(parents=True)
    runs = Runs(place)
    runs.ranks.close()
    for i in range(int(tries)):
        load = os.getloadavg()[0]
        noticed, seconds = measured(runs, place / f"run-{i}")
        print(f"load {load:.1f}: the launcher ended after {noticed:.1f} s, the next step came after {seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
