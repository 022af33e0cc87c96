"""What the command line does: one module for each command.

`python scripts/NAME.py` and `python -m distill.commands.NAME` both call `run`, which imports the command's module, and
with it torch, only when its settings are right.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from distill.training.config import Settings, run_script
from distill.training.launched import launched_rank
from distill.training.settings import (
    EvaluateSettings,
    ExportSettings,
    PlanSettings,
    ReportSettings,
    RunChainSettings,
    SampleSettings,
    SubmitSettings,
    TrainSettings,
)

SETTINGS: dict[str, tuple[str, type[Settings]]] = {
    "evaluate": ("evaluate", EvaluateSettings),
    "export": ("export", ExportSettings),
    "make_latents": ("train", TrainSettings),
    "make_trajectories": ("train", TrainSettings),
    "plan": ("plan", PlanSettings),
    "report": ("report", ReportSettings),
    "run_chain": ("run_chain", RunChainSettings),
    "sample": ("sample", SampleSettings),
    "submit": ("submit", SubmitSettings),
    "train": ("train", TrainSettings),
}
"""By command: its file in `configs/`, and what that is checked against."""
INTERRUPTED = 130  # exit code, as shells say it
KEPT = {
    "evaluate": "what was evaluated is kept, and the same command continues",
    "export": "nothing was exported, and an earlier export in output_dir is as it was",
    "make_latents": "the shards that are finished are kept, and the same command continues",
    "make_trajectories": "the shards that are finished are kept, and the same command continues",
    "run_chain": "the links that are done are kept, and the same command continues",
    "sample": "the images that were finished are in output_dir",
    "train": "no step was taken since the newest checkpoint, and the same command starts from it",
}
"""What an interrupted command says."""


def run(name: str) -> NoReturn:
    """The command, as it is typed; one without settings reads its arguments by itself, and returns its exit code."""
    module = f"{__name__}.{name}"
    _catch_interrupts()
    try:
        if name in SETTINGS:
            run_script(module, *SETTINGS[name])
            sys.exit()
        sys.exit(importlib.import_module(module).main())
    except KeyboardInterrupt:
        _end_interrupted(name)
    finally:
        gc.freeze()  # or the interpreter spends seconds on looking for cycles among what ends with it


def _catch_interrupts() -> None:
    """The first Ctrl-C unwinds, so that what is half written is removed; a second one ends the process where it is."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # it is ignored, or somebody else's to handle
    seen = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            _end()
        seen = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def _end_interrupted(name: str) -> NoReturn:
    if launched_rank() == 0:
        print(f"interrupted: {KEPT.get(name, 'nothing was changed')}", file=sys.stderr)
    _end()


def _end() -> NoReturn:
    """Without the last words of libraries, whose threads and processes end with this one."""
    from distill.training.watchdog import end_children

    end_children()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(INTERRUPTED)
