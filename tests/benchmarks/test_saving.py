"""`distill benchmark checkpoint` on the toy: both ways of saving, by two processes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.forked import python, unlaunched

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed


def test_both_ways_are_timed() -> None:
    command = [python(), "-m", "distill", "benchmark", "checkpoint", "size=toy", "rounds=1"]
    own = {**unlaunched(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = {name: float(value) for name, value in re.findall(r"  (\S.*?) {2,}([\d.]+) ", done.stdout)}
    assert seconds["training waits"] > 0 and seconds["in the background"] > 0, done.stdout
    assert "ZeRO-2 on 2 processes, 1 saves each way" in done.stdout
