"""Signals in one process; that two ranks stop together is in test_distributed.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from distill.training.preemption import Preemption


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_sets_the_flag_once_or_twice_and_nothing_else(tmp_path: Path, name: str) -> None:
    before = signal.getsignal(signal.Signals[name])
    with Preemption(tmp_path) as preemption:
        assert not preemption.requested
        for _ in range(2):
            os.kill(os.getpid(), signal.Signals[name])
            assert preemption.requested
        preemption.mark(7)
    assert (tmp_path / "PREEMPTED").read_text() == "7\n"
    assert signal.getsignal(signal.Signals[name]) is before


def test_the_next_run_takes_the_marker_away_and_one_rank_only(tmp_path: Path) -> None:
    marker = tmp_path / "PREEMPTED"
    marker.write_text("3\n")
    with Preemption(tmp_path, writes=False) as preemption:
        preemption.mark(4)
    assert marker.read_text() == "3\n"
    with Preemption(tmp_path):
        assert not marker.exists()


def test_it_listens_to_the_signals_it_is_given(tmp_path: Path) -> None:
    with Preemption(tmp_path, signals=["SIGUSR2"]) as preemption:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert preemption.requested


@pytest.mark.parametrize("name, says", [("SIGNONE", "no signal is called 'SIGNONE'"), ("SIGKILL", "cannot be caught")])
def test_a_name_that_is_no_signal_is_refused(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Preemption(tmp_path, signals=[name])
