"""Stopping when asked: a signal sets a flag, the loop finishes its step, saves, and leaves a marker."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from distill.data.storage import write_whole

log = logging.getLogger(__name__)

MARKER = "PREEMPTED"


class Preemption:
    """Listens for signals while entered. One or many, during a step or during a save, they do nothing but set the flag.

        with Preemption(output_dir) as preemption:
            ...
            if engine.any(preemption.requested):      # a signal may have reached only some of the ranks
                checkpoints.save(engine, step)
                preemption.mark(step)

    Args:
        folder: the run's; the marker `PREEMPTED`, with the step saved, lies there until the next run takes over.
        writes: whether this rank writes and removes the marker.
        signals: names of the signals to listen for.

    Raises:
        ValueError: a name that is no signal, or one that cannot be caught.
    """

    def __init__(self, folder: Path, writes: bool = True, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> None:
        self.requested = False
        self._marker, self._writes = Path(folder) / MARKER, writes
        self._signals = [_signal(name) for name in signals]
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        self._before = {s: signal.signal(s, self._request) for s in self._signals}
        if self._writes:
            self._marker.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def mark(self, step: int) -> None:
        """Leaves the marker: this run ended because it was asked to, and is saved at `step`."""
        if self._writes:
            write_whole(self._marker, f"{step}\n")

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True  # and no more: a handler runs between any two instructions


def _signal(name: str) -> signal.Signals:
    if name not in signal.Signals.__members__:
        raise ValueError(f"no signal is called {name!r}; SIGTERM and SIGUSR1 are usual")
    if name in ("SIGKILL", "SIGSTOP"):
        raise ValueError(f"{name} cannot be caught")
    return signal.Signals[name]
