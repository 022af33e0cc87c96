"""Runs one command after another; a signal to this process is passed on to the one that runs: it saves and ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from distill.config.mistakes import ConfigError
from distill.training.preemption import INTERRUPTED, SAME_SECONDS
from distill.training.watchdog import end_children

PREEMPTED = 75  # as of `distill train`: saved, and to be run again


@contextmanager
def held(file: Path, taken: str, shared: bool = False) -> Iterator[IO[str]]:
    """A lock on a file. What is started inherits it, and holds it if this process is killed.

    Raises:
        ConfigError: `taken`: another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(taken) from None
        yield lock


class Relay:
    """Runs commands while entered. SIGTERM and SIGUSR1 reach the one that runs as SIGTERM: it saves and ends.

    So does Ctrl-C, which the terminal has sent to that one too; a second one ends both at once.
    """

    def __init__(self) -> None:
        self._stopped = False
        self._interrupted: float | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def stopped(self) -> bool:
        """Whether a signal has come: nothing new is started."""
        return self._stopped

    def __enter__(self) -> Relay:
        self._before = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGUSR1)}
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], files: Sequence[int] = ()) -> int:
        """The exit code of a command, as shells say it; `files` are open files that it inherits, such as a lock."""
        if self._stopped:
            return PREEMPTED
        self._process = subprocess.Popen(command, pass_fds=files)
        if self._stopped:  # between the two lines above
            self._process.terminate()
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        now = time.monotonic()
        if self._interrupted is not None and now - self._interrupted > SAME_SECONDS:
            end_children()
            os._exit(INTERRUPTED)
        self._interrupted = self._interrupted or now
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.terminate()
