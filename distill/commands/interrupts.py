"""Ctrl-C for a command: one line about what is kept, exit code 130, and no traceback, from its first import on.

Imported before anything that takes time. While a run trains, `distill.training.preemption` is in its place.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # exit code, as shells say it
KEPT = {
    "evaluate": "what was evaluated is kept, and the same command continues",
    "export": "an export is in output_dir complete or not at all, and an earlier one is as it was until then",
    "latents": "the shards that are finished are kept, and the same command continues",
    "trajectories": "the shards that are finished are kept, and the same command continues",
    "chain": "the links that are done are kept, and the same command continues",
    "sample": "the images that were finished are in output_dir",
    "train": "no step was taken since the newest checkpoint, and the same command starts from it",
}
"""What an interrupted command says."""


def catch_from_the_start() -> None:
    """Ends a process that is still importing what it needs, if it is one of a command: nothing has been done yet."""
    is_command = os.path.basename(os.path.dirname(os.path.abspath(sys.argv[0]))) == "scripts" or sys.argv[0] == "-m"
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_before_start)


def catch() -> None:
    """The first Ctrl-C unwinds, so that what is half written is removed; a second one ends the process where it is."""
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _end_before_start):
        return  # it is ignored, or somebody else's to handle
    seen = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            _end()
        seen = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def end(name: str) -> NoReturn:
    """Says what of an interrupted command is kept, and ends the process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"interrupted: {KEPT.get(name, 'nothing was changed')}", file=sys.stderr)
    _end()


def _end_before_start(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted: nothing was done yet\n")
    os._exit(INTERRUPTED)


def _end() -> NoReturn:
    """Ends the process without messages of libraries, whose threads and processes end with it."""
    from distill.training.watchdog import end_children

    end_children()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(INTERRUPTED)


catch_from_the_start()
