"""Two jobs on one run folder: the second is refused, and the dead give way."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill.config.loading import ConfigError
from distill.training.lock import LOCK, Holder, RunLock
from tests.faults.runs import Runs, wait_for

Fault = Callable[..., Any]


def locked_by(folder: Path, holder: Holder, quiet: float = 0.0) -> None:
    """As if `holder` had taken the lock and last touched it `quiet` seconds ago."""
    lock = folder / LOCK
    lock.write_text(json.dumps(asdict(holder)))
    os.utime(lock, (time.time() - quiet,) * 2)


def elsewhere(**changes: Any) -> Holder:
    return replace(Holder.here(), host="n7", machine="n7 another-boot", pid=1, **changes)


@contextmanager
def asleep() -> Iterator[Holder]:
    """Another process of this machine, which is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield Holder.here(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_and_the_first_one_does_not_notice(runs: Runs, fault: Fault, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slow = runs.start(run, faults=[{"do": "SIGSTOP", "rank": 0, "step": 5}])
    wait_for(run / "metrics.jsonl", 5, slow)
    (first,) = slow.ranks()
    second = runs.run(run)
    assert second.codes == [2]
    (line,) = second.said.splitlines()[-1:]
    assert line.startswith(f"error: output_dir={run} is in use by process {first.pid} on {socket.gethostname()}, since")
    first.send_signal(signal.SIGCONT)
    assert slow.wait().codes == [0] and not (run / LOCK).exists()
    lost, differ = runs.difference(run)
    assert (lost, differ) == (0, 0)
    fault(19, "two jobs on one run folder").tried(True, None, lost, differ)


def test_a_lock_is_there_while_it_is_held(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new" / "run") as lock, RunLock(tmp_path / "new" / "run", takes=False):
        holder = json.loads((lock.folder / LOCK).read_text())
        assert holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
        assert [p.name for p in lock.folder.iterdir()] == [LOCK]
    assert list(lock.folder.iterdir()) == []


def test_only_the_living_are_believed(fault: Fault, tmp_path: Path) -> None:
    """On this machine by their process, on others by the last touch of the lock."""
    row = fault(19, "two jobs on one run folder")
    with asleep() as other:
        locked_by(tmp_path, other, quiet=1e6)
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .*: end that, or choose another"):
            RunLock(tmp_path).__enter__()
        row.tried()
        assert other.ticks is not None
        locked_by(tmp_path, replace(other, ticks=other.ticks - 1))  # the id has come again
        with RunLock(tmp_path):
            row.tried()
        locked_by(tmp_path, replace(other, ticks=None, started=other.started - 1000))  # of a system without /proc
        with RunLock(tmp_path):
            row.tried()
        locked_by(tmp_path, other)
    with RunLock(tmp_path):  # it has died by now
        row.tried()
    locked_by(tmp_path, elsewhere(job="41"), quiet=100)
    with pytest.raises(ConfigError, match=r"process 1 on n7, SLURM job 41, since .* 300 s after .*, 1\d\d s ago"):
        RunLock(tmp_path).__enter__()
    row.tried()
    locked_by(tmp_path, elsewhere(), quiet=301)
    with RunLock(tmp_path):
        row.tried()
    for text in ("", "{", "[1]", '{"host": "a"}'):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(ConfigError, match="in use by somebody unreadable"):
            RunLock(tmp_path).__enter__()
        os.utime(tmp_path / LOCK, (0, 0))
        with RunLock(tmp_path):
            row.tried()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [-86400.0, -30.0, 30.0, 86400.0])
def test_a_clock_that_was_set_kills_nobody(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system derives from its clock when it was booted, and from that when a process was started."""
    with asleep() as other:
        created = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + seconds)
        assert abs(Holder.here(other.pid).started - other.started - seconds) < 1
        locked_by(tmp_path, other, quiet=1e6)
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on"):
            RunLock(tmp_path).__enter__()


def test_a_lock_of_an_earlier_version_is_still_believed(tmp_path: Path) -> None:
    """It says when its process was started by the clock alone."""
    with asleep() as other:
        known = {name: value for name, value in asdict(other).items() if name != "ticks"}
        (tmp_path / LOCK).write_text(json.dumps(known))
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on"):
            RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_folder_without_hard_links_is_locked_all_the_same(
    refusal: int, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path) as lock:
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"):
            RunLock(tmp_path).__enter__()
        assert (tmp_path / LOCK).read_text() == lock._text
    with asleep() as other:
        dead = other
    locked_by(tmp_path, dead)
    with RunLock(tmp_path):
        fault(19, "two jobs on one run folder").tried()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("job", "restarts", "passes"), [("41", "1", True), ("41", "0", False), ("42", "1", False), (None, None, False)]
)
def test_a_job_back_from_the_queue_is_not_refused_by_its_own_lock(
    job: str | None, restarts: str | None, passes: bool, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    locked_by(tmp_path, elsewhere(job="41", restarts=0))
    if passes:
        with RunLock(tmp_path):
            fault(19, "two jobs on one run folder").tried()
    else:
        with pytest.raises(ConfigError, match="in use by process 1 on n7"):
            RunLock(tmp_path).__enter__()


def test_of_many_that_find_a_dead_lock_one_gets_it(fault: Fault, tmp_path: Path) -> None:
    for _ in range(5):
        locked_by(tmp_path, elsewhere(), quiet=1e6)
        children = {_takes(tmp_path) for _ in range(8)}
        refused: dict[int, int] = {}
        end = time.monotonic() + 20
        while len(refused) < 7 and time.monotonic() < end:
            for child in children - refused.keys():
                pid, status = os.waitpid(child, os.WNOHANG)
                refused |= {pid: os.waitstatus_to_exitcode(status)} if pid else {}
            time.sleep(0.01)
        (holder,) = children - refused.keys()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert set(refused.values()) == {2}
        fault(19, "two jobs on one run folder").tried()


def _takes(folder: Path) -> int:
    """A child that takes the lock and holds it until it is killed, or is refused: 2."""
    child = os.fork()
    if child == 0:
        try:
            RunLock(folder).__enter__()
            time.sleep(60)
        except ConfigError:
            os._exit(2)
        finally:
            os._exit(1)
    return child


def test_a_holder_touches_its_lock_puts_it_back_and_notices_when_it_is_lost(tmp_path: Path) -> None:
    lost: list[str] = []
    path = tmp_path / LOCK
    with RunLock(tmp_path, beat=0.02, lost=lost.append):
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 1)
        path.unlink()
        wait_until(path.exists)
        assert not lost
        locked_by(tmp_path, elsewhere())
        wait_until(lambda: bool(lost))
    assert re.search(r"is now in use by process 1 on n7, since", lost[0])
    assert json.loads(path.read_text())["host"] == "n7"  # it is not ours to remove


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)
