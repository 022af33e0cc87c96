"""Progress of long work: a line that renews itself on a terminal, a log line now and then elsewhere.

And what the process is at, since when: a watchdog ends a command that is at one thing for too long.
"""

from __future__ import annotations

import logging
import sys
import time

from distill.data.words import counted

log = logging.getLogger(__name__)
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 30.0
_at = ("its start", time.monotonic())


def begin(what: str) -> None:
    """Notes what this process does from now on, for people: "the files of the student"."""
    global _at
    _at = what, time.monotonic()


def begun() -> tuple[str, float]:
    """What this process is at, and since when, by time.monotonic()."""
    return _at


class Progress:
    """Counts units of work and says how fast they go and when they will be done.

    Args:
        what: leads every line.
        total: units in all.
        unit: their name, in the plural.
        bar: whether to renew a line on a terminal; of several processes only one can.
    """

    def __init__(self, what: str, total: int, unit: str, bar: bool = True) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._start = self._said = time.monotonic()
        self._terminal = bar and sys.stderr.isatty()
        self._note()

    def update(self, units: int) -> None:
        """Notes that so many more units are done."""
        self.done += units
        self._note()
        now, last = time.monotonic(), self.done == self.total
        if last or now - self._said >= (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            self._said = now
            if self._terminal:
                print("\r\x1b[K" + self.line(), end="\n" if last else "", file=sys.stderr, flush=True)
            else:
                log.info(self.line())

    def _note(self) -> None:
        begin(f"{self.what}: {self.done} of {counted(self.total, self.unit.removesuffix('s'), self.unit)} done")

    def line(self) -> str:
        """Such as `rank 0: 120/2000 samples (6 %), 3.41 samples/s, 0:09:11 left`."""
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        left = round((self.total - self.done) / max(rate, 1e-9))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        total = counted(self.total, self.unit.removesuffix("s"), self.unit)
        share = f"{self.done}/{total} ({100 * self.done // max(self.total, 1)} %)"
        return f"{self.what}: {share}, {rate:.3g} {self.unit}/s, {clock} left"
