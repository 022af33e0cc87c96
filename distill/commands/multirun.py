"""Sweeps: `distill train -m learning_rate=1e-4,2e-4 lora_rank=8,64 output_dir=runs/sweep`.

Every combination of the values runs as a command of its own, one after another, in a folder of its own below
`output_dir`; a sweep that is run again leaves what is finished and resumes the rest. A run that fails does not keep the
others from theirs. At the end `output_dir/index.html` compares the runs, and `failed` beside one says how it ended.
With `hydra/sweeper=optuna` each run's values follow from the results of those before (`distill/commands/search.py`).
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from distill.commands.relay import PREEMPTED, Relay
from distill.config.loading import Settings
from distill.config.mistakes import ConfigError
from distill.config.sweeps import SweptRun, combinations, swept_of
from distill.training.preemption import INTERRUPTED

FLAGS = ("-m", "--multirun")
PAGE = "index.html"
STOPPED = (PREEMPTED, INTERRUPTED)
"""Exit codes of a run that somebody has stopped, and the sweep with it."""
Start = Callable[[SweptRun], int]
"""Runs one run, and returns its exit code."""


def multirun(
    command: Sequence[str], config: str, settings: type[Settings], arguments: Sequence[str], start: Start | None = None
) -> int:
    """Runs a command with every combination of what its arguments sweep over; returns the first exit code but 0.

    Args:
        command: what is typed before the settings, such as `["train"]`.
        start: how a run is started; by itself, as a process.

    Raises:
        ConfigError: nothing is swept over, or the settings of a run are wrong; nothing has been started.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("-m starts processes of its own: leave the launcher out, or use distill submit -m")
    swept = swept_of(config, settings, arguments)
    if swept.search is not None:
        from distill.commands.search import search  # and with it what a search alone needs

        return search(command, config, settings, swept, start)
    runs = combinations(config, settings, swept)
    with SweepRunner(command, runs[0].folder.parent, start) as sweep:
        for number, run in enumerate(runs, 1):
            print(f"run {number} of {len(runs)}: {run.name}", flush=True)
            sweep.run(run)
            if sweep.stopped:
                break
    compare(sweep.base, runs, sweep.codes)
    return sweep.code()


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
        self._files = self._held.enter_context(locked(self.base))
        self._relay = self._held.enter_context(Relay())
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def run(self, run: SweptRun) -> int:
        """Runs one, and returns its exit code."""
        typed = [sys.executable, "-m", "distill", *self.command, *run.overrides]
        code = self._start(run) if self._start else self._relay.run(typed, self._files)
        self.codes[run.name] = code
        self.stopped = code in STOPPED or self._relay.asked
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
    """For the page."""
    words = {None: "not started", 0: "finished", PREEMPTED: "stopped, saved", INTERRUPTED: "interrupted"}
    return words.get(code, f"failed, exit code {code}")


@contextmanager
def locked(base: Path) -> Iterator[list[int]]:
    """Nobody else runs the sweep meanwhile; a run inherits the lock's file, and holds it if this process is killed.

    Raises:
        ConfigError: somebody does.
    """
    base.mkdir(parents=True, exist_ok=True)
    with (base / ".sweep.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"the sweep in {base} is being run by another process") from None
        yield [lock.fileno()]
