"""Reads that fail are tried again with growing, random pauses; a line says that they fail, and one that it is over."""

from __future__ import annotations

import logging
import re
import threading
import time
from random import SystemRandom

from distill.data.errors import ReadError

log = logging.getLogger(__name__)

RETRY_SECONDS = 120.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between two tries of a read, at most; each pause is twice the one before."""
_random = SystemRandom()  # no random state that a training reads is touched


def shown(text: str) -> str:
    """A URL, or a text with URLs in it, without passwords and signed queries."""
    text = re.sub(r"://[^/\s'\"@]+@", "://***@", text)
    return re.sub(r"(\w://[^\s'\"?]*)\?[^\s'\")\]]+", r"\1?***", text)


def said_of(error: BaseException) -> str:
    """What an error says, on one line and without secrets."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"[Errno {error.errno}] {error.strerror}"
    return shown(" ".join(f"{type(error).__name__}: {error}".rstrip(": ").split()))


class Streak:
    """Reads of one folder that fail at present, in whichever thread: what is said once of them all."""

    def __init__(self) -> None:
        self._lock, self._failing, self._since = threading.Lock(), 0, 0.0

    def begins(self, what: str, said: str, seconds: float) -> None:
        """A read has failed for the first time."""
        with self._lock:
            self._failing += 1
            if self._failing > 1:
                return
            self._since = time.monotonic()
        if seconds > 0:
            log.warning("%s cannot be read (%s): trying again for up to %g s", what, said, seconds)

    def ends(self, what: str, read: bool) -> None:
        """That read has succeeded, or was given up."""
        with self._lock:
            self._failing -= 1
            over, since = self._failing == 0 and read, self._since
        if over:
            log.warning("%s is read again, after %.1f s", what, time.monotonic() - since)


class Patience:
    """Waits longer and longer between the tries of one read, for so many seconds in all (`RETRY_SECONDS` by default).

    Args:
        streak: shared by the reads of which only the first that fails, and the last that succeeds again, is said.
    """

    def __init__(self, seconds: float | None = None, streak: Streak | None = None) -> None:
        self._seconds = RETRY_SECONDS if seconds is None else seconds
        self._streak, self._pause = streak or Streak(), FIRST_PAUSE
        self._what, self._since, self._tries = "", 0.0, 1

    def after(self, error: Exception, what: str) -> None:
        """Waits after a failure. Raises ReadError once it has waited enough."""
        now, said, what = time.monotonic(), said_of(error), shown(what)
        if not self._what:
            self._what, self._since = what, now
            self._streak.begins(what, said, self._seconds)
        left = self._since + self._seconds - now
        if left <= 0:
            self.given_up()
            tries = f"{self._tries} tries in {now - self._since:.0f} s" if self._tries > 1 else "1 try"
            raise ReadError(f"{what} cannot be read: {said} ({tries})") from error
        time.sleep(min(self._pause * _random.uniform(0.5, 1), left))
        self._pause, self._tries = min(2 * self._pause, LONGEST_PAUSE), self._tries + 1

    def over(self) -> None:
        """The read has succeeded."""
        if self._what:
            self._streak.ends(self._what, read=True)
            self._what = ""

    def given_up(self) -> None:
        """The read is not tried again."""
        if self._what:
            self._streak.ends(self._what, read=False)
            self._what = ""
