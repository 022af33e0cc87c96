"""A rank that is slow for long is named, once, until it is as fast as the others again."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from distill.training.stragglers import READINGS, OwnTime, Stragglers


def ranks(seconds: list[float], waits: list[float]) -> Stragglers:
    """What rank 0 sees where each rank computes and waits for so many seconds a step."""
    rows = [(own, wait, f"node-{rank}") for rank, (own, wait) in enumerate(zip(seconds, waits, strict=True))]
    return Stragglers(lambda mine: [mine, *rows[1:]], len(seconds), host="node-0")


def test_each_ranks_times_are_logged_by_step() -> None:
    found = ranks([1.0, 2.0, 1.0], [0.0, 0.5, 0.25]).read(4.0, 1.0, steps=4, step=8)
    assert found == {
        "slowest_rank": 1.0,
        **{"compute_seconds/rank0": 1.0, "compute_seconds/rank1": 2.0, "compute_seconds/rank2": 1.0},
        **{"data_seconds/rank0": 0.25, "data_seconds/rank1": 0.5, "data_seconds/rank2": 0.25},
    }
    many = ranks([1.0] * 40, [0.5] * 40).read(9.0, 0.5, steps=1, step=1)
    assert many == {
        "slowest_rank": 0.0,
        **{"compute_seconds/median": 1.0, "compute_seconds/max": 9.0},
        **{"data_seconds/median": 0.5, "data_seconds/max": 0.5},
    }
    assert ranks([1.0], [0.0]).read(1.0, 0.0, 1, 1) == {}


def test_a_rank_is_named_when_it_was_slow_for_long_and_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distill")
    stragglers = ranks([1.0, 1.0, 1.0, 1.0], [0.0] * 4)
    slow = [1.7] * (READINGS - 1) + [1.0] + [1.7] * (READINGS + 3) + [1.3, 1.0, 1.0]
    for step, seconds in enumerate(slow):
        stragglers.read(seconds, 0.0, 1, step)
    named, mended = [record.getMessage() for record in caplog.records]
    assert named == (
        "rank 0 on node-0 is slow: alone it needs 1.7 s a step, 1.7 times the others' median of 1 s, for "
        f"{READINGS} log lines up to step {2 * READINGS - 1}"
    )
    assert mended == f"rank 0 on node-0 is as fast as the others again, at step {len(slow) - 2}"


def test_what_a_rank_computes_is_measured_and_what_it_waits_for_in_between_is_not() -> None:
    own = OwnTime(torch.device("cpu"))
    for _ in range(2):
        with own.measured():
            time.sleep(0.03)
        time.sleep(0.05)
    assert 0.06 <= own.read() < 0.11
    assert own.read() == 0
