"""What the command line does: one module for each command.

`distill NAME …`, `python -m distill NAME …` and `python scripts/NAME.py …` all call `run`, which imports the command's
module, and with it torch, only when its settings are right.
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from distill.commands import interrupts
from distill.commands.running import flushed_output, run_script
from distill.config import signatures
from distill.config.loading import Settings
from distill.config.settings import (
    BenchmarkSettings,
    EvaluateSettings,
    ExportSettings,
    PlanChainSettings,
    PlanSettings,
    QuickstartSettings,
    ReportSettings,
    RunChainSettings,
    SampleSettings,
    SubmitChainSettings,
    SubmitSettings,
    TrainSettings,
    VerifySettings,
    WatchSettings,
)


@dataclass(frozen=True)
class Command:
    """Where a command is, and what its settings are.

    Args:
        module: its `main` takes the settings; without settings it takes nothing, and returns an exit code.
        config: its file in `configs/`.
        settings: what that is checked against.
        sweep: the module whose `sweep` takes the place of running it with one combination after another under -m.
        by_key: what runs in its place if a setting of that name is given.
        words: keys of what may be given without its key, in this order; the last one takes all that are left, if it is
            a list.
    """

    module: str
    config: str = ""
    settings: type[Settings] | None = None
    sweep: str = ""
    by_key: Mapping[str, Command] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def run(self, typed: Sequence[str] = ()) -> int:
        """Runs it with the arguments of this process; `--help` is answered without loading it.

        Args:
            typed: what starts it, for what it may start itself: `["train"]`, or `["launch", …, "train"]`.
        """
        for key, other in self.by_key.items():
            if any(argument.startswith(f"{key}=") for argument in sys.argv[1:]):
                return other.run(typed)
        if self.settings is not None:
            return run_script(self.module, self.config, self.settings, typed, self.sweep, self.words)
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(signatures.docstring(self.module))
            return 0
        return int(importlib.import_module(self.module).main() or 0)


_CHAIN = "distill.commands.submit_chain"
SUBMIT_CHAIN = Command(_CHAIN, "submit_chain", SubmitChainSettings, sweep=_CHAIN)
PLAN_CHAIN = Command("distill.commands.plan_chain", "plan_chain", PlanChainSettings)
COMMANDS = {
    "quickstart": Command("distill.commands.quickstart", "quickstart", QuickstartSettings),
    "trajectories": Command("distill.commands.trajectories", "train", TrainSettings),
    "latents": Command("distill.commands.latents", "train", TrainSettings),
    "train": Command("distill.commands.train", "train", TrainSettings),
    "export": Command("distill.commands.export", "export", ExportSettings),
    "sample": Command("distill.commands.sample", "sample", SampleSettings),
    "evaluate": Command("distill.commands.evaluate", "evaluate", EvaluateSettings),
    "report": Command("distill.commands.report", "report", ReportSettings),
    "watch": Command("distill.commands.watch", "watch", WatchSettings, words=("runs",)),
    "chain": Command("distill.commands.chain", "run_chain", RunChainSettings),
    "plan": Command("distill.commands.plan", "plan", PlanSettings, by_key={"chain": PLAN_CHAIN}),
    "submit": Command(
        "distill.commands.submit",
        "submit",
        SubmitSettings,
        sweep="distill.commands.submit_sweep",
        by_key={"chain": SUBMIT_CHAIN},
    ),
    "launch": Command("distill.commands.launch"),
    "verify": Command("distill.commands.verify", "verify", VerifySettings, words=("store", "shards")),
    "configs": Command("distill.commands.configs"),
    "doctor": Command("distill.commands.doctor"),
    "benchmark": Command("distill.benchmarks.benchmark", "benchmark", BenchmarkSettings, words=("measure",)),
    "study": Command("distill.studies.study"),
}


def run(name: str) -> NoReturn:
    """The command, as it is typed."""
    run_command([name], COMMANDS[name])


def run_command(typed: Sequence[str], command: Command) -> NoReturn:
    """Runs a command and ends the process with its exit code; of an interrupted one a line says what is kept."""
    interrupts.catch()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft, it warns of kernels nobody asked for
    try:
        with flushed_output():
            code = command.run(typed)
        sys.exit(code)
    except KeyboardInterrupt:
        interrupts.end(typed[-1])
    finally:
        gc.freeze()  # or the interpreter spends seconds on looking for cycles among what ends with it
