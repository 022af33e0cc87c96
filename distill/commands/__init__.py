"""What the command line does: one module for each command.

`python scripts/NAME.py` and `python -m distill.commands.NAME` both call `run`, which imports the command's module, and
with it torch, only when its settings are right.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import NoReturn

from distill.commands import interrupts
from distill.training.config import Settings, run_script
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


def run(name: str) -> NoReturn:
    """The command, as it is typed; one without settings reads its arguments by itself, and returns its exit code."""
    module = f"{__name__}.{name}"
    interrupts.catch()
    try:
        if name in SETTINGS:
            run_script(module, *SETTINGS[name])
            sys.exit()
        sys.exit(importlib.import_module(module).main())
    except KeyboardInterrupt:
        interrupts.end(name)
    finally:
        gc.freeze()  # or the interpreter spends seconds on looking for cycles among what ends with it
