"""Faults that a run of a chain meets once: `python -m tests.faults.once SPENT FAULTS.json -m distill SETTINGS`.

As tests/faults/sabotage.py, for `launch=` of a chain: whichever link comes first to where a fault lies meets it. Then
the file SPENT is there, and later links and starts run as if there were no faults.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

from tests.faults import sabotage

HOUR = 3600.0


def install(spent: Path, faults: Path) -> None:
    if spent.exists():
        return
    does = sabotage._do

    def do_once(fault: sabotage.Fault) -> None:
        if not spent.exists():
            spent.write_text(json.dumps(fault))
            set_clock(fault["by"]) if fault["do"] == "clock" else does(fault)

    sabotage._do = do_once
    sabotage.install(json.loads(faults.read_text()), int(os.environ.get("RANK", 0)))


def set_clock(by: float) -> None:
    """The clock of this process jumps, as a machine's does whose time is set: not that of intervals."""
    now = time.time
    time.time = lambda: now() + by  # type: ignore[assignment]


if __name__ == "__main__":
    install(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.argv = [sys.argv[0], *sys.argv[5:]]
    runpy.run_module("distill", run_name="__main__", alter_sys=True)
