"""A run that waits for something that does not come says for what, shows where it stands, and ends."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

import psutil

HUNG = 4  # exit code
JOIN_SAYS_SECONDS, JOIN_SECONDS = 20.0, 600.0
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
        """Surrounds something that must end in time; such blocks may be nested, and the innermost one counts."""
        outer, self._waits = self._waits, (what, time.monotonic())
        try:
            yield
        finally:
            self._waits = outer

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


@contextmanager
def joining(rank: int, world_size: int) -> Iterator[None]:
    """Surrounds the start of all ranks, for which torch would wait half an hour, as for anything else.

    Says after a while what is waited for, and ends the process when the others have not come: they may not exist, where
    a shell still has the variables of an earlier launch.
    """
    if world_size == 1:
        yield
        return
    at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    what = f"the other processes of WORLD_SIZE={world_size}, at {at}"
    unset = "if nobody has started them: unset RANK WORLD_SIZE LOCAL_RANK"
    line = f"rank {rank} waits for {what}; {unset}\n".encode()
    timers = [
        threading.Timer(JOIN_SAYS_SECONDS, os.write, (_STDERR, line)),
        threading.Timer(JOIN_SECONDS, give_up, (f"rank {rank} has waited {JOIN_SECONDS:.0f} s for {what}; {unset}",)),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def give_up(why: str, code: int = HUNG) -> None:
    """Ends this process, from any thread, and all that it has started; with a line and the stacks of all threads."""
    os.write(_STDERR, f"error: {why}; giving up, this is where each thread stands:\n".encode())
    faulthandler.dump_traceback(_STDERR)
    end_children()
    os._exit(code)


def end_children() -> None:
    """Ends what this process has started: a loader's worker that hangs would outlive it."""
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
