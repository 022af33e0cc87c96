"""Dying at a chosen point, so that tests can kill a writer everywhere it matters.

`DISTILL_FAULT=shard-renamed:2` kills the process with SIGKILL when it reaches that point for the second time.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_reached: Counter[str] = Counter()


def reached(point: str) -> None:
    """Marks a named point. Does nothing unless the environment asks for death here."""
    wanted = os.environ.get("DISTILL_FAULT")
    if wanted:
        _reached[point] += 1
        if wanted == f"{point}:{_reached[point]}":
            os.kill(os.getpid(), signal.SIGKILL)
