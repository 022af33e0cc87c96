"""Signals in one process; that two ranks stop together is in test_distributed.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distill.training.preemption import INTERRUPTED, Preemption


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


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_ctrl_c_and_the_end_of_a_terminal_set_the_flag_too(tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    outside = signal.signal(number, signal.default_int_handler)  # the tests themselves may run under nohup
    with Preemption(tmp_path, writes=False) as preemption:
        os.kill(os.getpid(), number)
        assert preemption.requested and preemption.interrupted == (name == "SIGINT")
    assert signal.signal(number, outside) is signal.default_int_handler


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption(tmp_path, writes=False) as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preemption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


BUSY = """
import ctypes, sys
from pathlib import Path
from distill.training.preemption import Preemption

with Preemption(Path(sys.argv[1])) as preemption:
    print("ready", flush=True)
    for _ in range(100):
        ctypes.CDLL(None).usleep(200_000)  # as in a computation, where Python's own handlers have to wait
        if preemption.requested and len(sys.argv) > 2:
            break
print("saved", flush=True)
"""


def busy(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUSY, str(folder), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path: Path) -> None:
    process = busy(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # a launcher's, which is no second Ctrl-C
    time.sleep(0.5)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED and time.monotonic() - start < 5 and out == ""
    first, second = said.splitlines()
    assert first == "interrupted: finishing this step and saving it; Ctrl-C again ends at once"
    assert second.startswith("interrupted again: ended at once")


def test_one_ctrl_c_that_arrives_twice_is_one(tmp_path: Path) -> None:
    """The terminal sends it to a launcher as well, which may hand it on."""
    process = busy(tmp_path, "stops")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=20)
    assert process.returncode == 0 and out == "saved\n" and len(said.splitlines()) == 1


def test_a_copy_of_a_ctrl_c_does_not_end_what_a_quick_run_has_left_to_do(tmp_path: Path) -> None:
    """A step may end, and be saved, before the launcher has handed it on."""

    def press_and_hand_on() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    with Preemption(tmp_path, writes=False) as preemption:
        presser = threading.Thread(target=press_and_hand_on)
        presser.start()
        while not preemption.requested:
            time.sleep(0.001)
    presser.join()
    assert preemption.interrupted
