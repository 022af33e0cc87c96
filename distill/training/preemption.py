"""Stopping on request: a signal sets a flag, the loop finishes its step, saves, and leaves a marker."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from distill.data.storage import write_whole
from distill.training.launched import launcher_gone, save_without_launcher
from distill.training.watchdog import end_children

log = logging.getLogger(__name__)

MARKER = "PREEMPTED"
INTERRUPTED = 130  # exit code, as shells say it
# A launcher in the same terminal may hand on the signal that the terminal has sent to both.
SAME_SECONDS = 0.3
_STDERR = 2


class Preemption:
    """Listens for signals while entered. One or many, during a step or during a save, they do nothing but set the flag.

        with Preemption(output_dir) as preemption:
            ...
            if processes.any(preemption.requested):      # a signal may have reached only some of the ranks
                checkpoints.save(engine, step)
                preemption.mark(step)

    Ctrl-C sets it too, and a second Ctrl-C ends the process at once, wherever it stands. So does the end of a terminal
    (SIGHUP, unless it is ignored, as under nohup), and that of the launcher which started this process as a rank.

    Args:
        folder: the run's; the marker `PREEMPTED`, with the step saved, lies there until the next run takes over.
        writes: whether this rank writes and removes the marker, and answers the person who pressed Ctrl-C.
        signals: names of the signals to listen for, beside SIGINT and SIGHUP.

    Raises:
        ValueError: a name that is no signal, or one that cannot be caught.
    """

    def __init__(self, folder: Path, writes: bool = True, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> None:
        self.interrupted = False
        self._interrupted_at: float | None = None  # by the monotonic clock
        self._requested = False
        self._marker, self._writes = Path(folder) / MARKER, writes
        self._signals = {_signal(name) for name in signals} | {signal.SIGINT}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._signals.add(signal.SIGHUP)
        self._before: dict[signal.Signals, Any] = {}
        self._ends_at_second = signal.SIGINT.name not in signals
        self._wakeup: tuple[int, int, int] | None = None

    @property
    def requested(self) -> bool:
        """Whether the run is to save and end."""
        return self._requested or launcher_gone()

    def __enter__(self) -> Preemption:
        save_without_launcher()
        if self._ends_at_second:
            self._listen()
        self._before = {s: signal.signal(s, self._request) for s in self._signals}
        if self._writes:
            self._marker.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._await_copies()
        for s, handler in self._before.items():
            signal.signal(s, handler)
        if self._wakeup is not None:
            reader, writer, before = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(writer)  # which ends the thread that reads

    def mark(self, step: int) -> None:
        """Leaves the marker: this run ended on request, and is saved at `step`."""
        if self._writes:
            write_whole(self._marker, f"{step}\n")

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True  # and no more: a handler runs between any two instructions
        if number == signal.SIGINT:
            self.interrupted = True
            self._interrupted_at = self._interrupted_at or time.monotonic()

    def _await_copies(self) -> None:
        """Gives a launcher time to hand on the Ctrl-C that this process has had: it would end what is left to do."""
        if self._interrupted_at is not None:
            time.sleep(max(0.0, self._interrupted_at + SAME_SECONDS - time.monotonic()))

    def _listen(self) -> None:
        """Starts a thread that hears of signals while the main one is within a computation or waits for other ranks."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wakeup = reader, writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(reader,), name="Ctrl-C", daemon=True).start()

    def _hear(self, reader: int) -> None:
        first: float | None = None
        while number := os.read(reader, 1):
            if number[0] != signal.SIGINT:
                continue
            now = time.monotonic()
            if first is None:
                first = now
                self._say("interrupted: finishing this step and saving it; Ctrl-C again ends at once")
            elif now - first > SAME_SECONDS:
                self._say("interrupted again: ended at once; the same command resumes from the newest checkpoint")
                end_children()
                os._exit(INTERRUPTED)
        os.close(reader)

    def _say(self, line: str) -> None:
        if self._writes:
            os.write(_STDERR, f"{line}\n".encode())


def _signal(name: str) -> signal.Signals:
    if name not in signal.Signals.__members__:
        raise ValueError(f"no signal is called {name!r}; SIGTERM and SIGUSR1 are usual")
    if name in ("SIGKILL", "SIGSTOP"):
        raise ValueError(f"{name} cannot be caught")
    return signal.Signals[name]
