"""A run that waits for something that does not come says for what, shows where it stands, and ends."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

HUNG = 4  # exit code
_STDERR = 2  # not sys.stderr, nor logging: the thread that hangs may hold their locks


class Watchdog:
    """Ends the process when one thing takes longer than the limit: a line, the stacks of all threads, exit code `HUNG`.

        with Watchdog(minutes=30) as watchdog:
            with watchdog.over("a batch from the loader"):
                batch = next(batches)

    On the other ranks the launcher then ends what this one has left alone; or their own watchdogs do.

    Args:
        minutes: the limit; None watches nothing.
        rank: named in the line.

    Raises:
        ValueError: a limit that is not above 0.
    """

    def __init__(self, minutes: float | None, rank: int = 0) -> None:
        if minutes is not None and minutes <= 0:
            raise ValueError(f"watchdog_minutes must be null or above 0, got {minutes}")
        self.rank = rank
        self._limit = None if minutes is None else 60 * minutes
        self._waits: tuple[str, float] | None = None  # for what, since when
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._limit,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Around one thing that must end in time."""
        self._waits = what, time.monotonic()
        try:
            yield
        finally:
            self._waits = None

    def _watch(self, limit: float) -> None:
        pause = min(limit / 4, 5.0)
        while True:
            # Code that never lets go of the interpreter stops this thread too: then this timer, which needs none, goes
            # off. It is put back here for as long as all is well.
            faulthandler.dump_traceback_later(limit + 4 * pause, exit=True, file=_STDERR)
            if self._end.wait(pause):
                return
            if (waits := self._waits) is not None and (waited := time.monotonic() - waits[1]) > limit:
                give_up(f"rank {self.rank} has waited {waited:.0f} s for {waits[0]} (watchdog_minutes={limit / 60:g})")


def give_up(why: str, code: int = HUNG) -> None:
    """Ends this process, from any thread, and its loader's workers; with a line and the stacks of all threads."""
    os.write(_STDERR, f"error: {why}; giving up, this is where each thread stands:\n".encode())
    faulthandler.dump_traceback(_STDERR)
    for worker in multiprocessing.active_children():
        worker.kill()  # one that hangs would outlive this process
    os._exit(code)
