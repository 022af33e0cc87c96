"""A rank that is slow in a real run of two: its times are in the metrics, and a line names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.training.stragglers import READINGS
from tests.faults.runs import Runs

pytestmark = pytest.mark.distributed


def test_a_rank_that_lags_for_long_is_named(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lags = [{"do": "sleep", "seconds": 0.6, "rank": 1, "step": step} for step in range(1, 8)]
    ended = runs.run(run, ranks=2, faults=lags)
    assert ended.codes == [0, 0], ended.said[-4000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slow = [row for row in rows if "compute_seconds/rank1" in row and 1 < row["step"]]
    assert len(slow) >= READINGS + 1
    for row in slow:
        assert row["slowest_rank"] == 1
        assert row["compute_seconds/rank1"] > 0.6 > row["compute_seconds/rank0"]
    (line,) = [line for line in ended.said.splitlines() if "is slow: alone it needs" in line]
    assert "rank 1 on " in line
