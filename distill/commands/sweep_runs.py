"""Runs the runs of a sweep, one after another, and compares them on one page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from distill.commands.relay import PREEMPTED, Relay, held
from distill.config.sweeps import SweptRun
from distill.training.preemption import INTERRUPTED

PAGE = "index.html"
STOPPED = (PREEMPTED, INTERRUPTED)
"""Exit codes of a run that somebody has stopped, and the sweep with it."""
Start = Callable[[SweptRun], int]
"""Runs one run, and returns its exit code."""


class SweepRunner:
    """Runs of one command, one after another. While it is entered, nobody else runs a sweep in its folder.

    Attributes:
        codes: exit codes of the runs that have ended, by their names.
        stopped: whether somebody has stopped a run, and with it the sweep.
    """

    def __init__(self, command: Sequence[str], base: Path, start: Start | None = None) -> None:
        self.command, self.base = command, base
        self.codes: dict[str, int] = {}
        self.stopped = False
        self._start = start

    def __enter__(self) -> SweepRunner:
        self._held = ExitStack()
        lock = held(self.base / ".sweep.lock", f"the sweep in {self.base} is being run by another process")
        self._files = [self._held.enter_context(lock).fileno()]
        self._relay = self._held.enter_context(Relay())
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def run(self, run: SweptRun) -> int:
        """Runs one, and returns its exit code."""
        typed = [sys.executable, "-m", "distill", *self.command, *run.overrides]
        code = self._start(run) if self._start else self._relay.run(typed, self._files)
        self.codes[run.name] = code
        self.stopped = code in STOPPED or self._relay.stopped
        return code

    def code(self) -> int:
        """The exit code of the sweep, that of the first run that failed; which did is said on standard error."""
        failed = {name: code for name, code in self.codes.items() if code and code not in STOPPED}
        for name, code in failed.items():
            print(f"error: {name} ended with exit code {code}, see above", file=sys.stderr)
        if self.stopped:
            print("the sweep was stopped; the same command resumes it", file=sys.stderr)
        return next((code for code in (*failed.values(), *self.codes.values()) if code), 0)


def compare(
    base: Path, runs: Sequence[SweptRun], codes: Mapping[str, int], more: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Writes the page of a sweep of runs that train; other commands have pages of their own.

    Args:
        codes: exit codes of those that have ended, by their names; others have not been started.
        more: further columns of the page, by the runs' names.
    """
    if not any((run.folder / "metrics.jsonl").is_file() for run in runs):
        return
    from distill.evaluation.runs import runs_page  # matplotlib, which a sweep starts without

    about = {
        run.name: {**run.chosen, "ended": how_it_ended(codes.get(run.name)), **(more or {}).get(run.name, {})}
        for run in runs
    }
    runs_page(base / PAGE, base.name, {run.name: run.folder for run in runs}, about)
    print(f"comparison: {base / PAGE}")


def how_it_ended(code: int | None) -> str:
    """What the page says of an exit code."""
    words = {None: "not started", 0: "finished", PREEMPTED: "stopped, saved", INTERRUPTED: "interrupted"}
    return words.get(code, f"failed, exit code {code}")
