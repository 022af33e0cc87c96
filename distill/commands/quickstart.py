"""Distils the bundled toy teacher, from nothing to a report: `distill quickstart`

    distill quickstart                                # minutes on two CPU cores, all in outputs/quickstart
    distill quickstart output_dir=outputs/try 'overrides=[max_train_steps=50]' n=100

It writes a store of the teacher's trajectories, trains an LCM-LoRA from it, exports the LoRA, generates pictures, and
evaluates student and teacher (`report/index.html`). Run again, it skips what is finished; killed and run again, it
resumes.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("quickstart")

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from distill.commands.chain import command
from distill.commands.relay import PREEMPTED, Relay, held
from distill.config.loading import ConfigError, load
from distill.config.packages import install_line, is_installed
from distill.config.settings import ChainSettings, EvaluateSettings, LinkSettings, QuickstartSettings, TrainSettings
from distill.models.devices import gpu_count
from distill.training.chain import exported, links_of
from distill.training.export import FACTS
from distill.training.preemption import INTERRUPTED
from distill.training.tracking import setup_logging

log = logging.getLogger("distill")

EXPERIMENT = "quickstart"
CPU_PROCESSES = 2
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
"""What the parts are started with where nothing else is set: all that they need comes with the package."""
ON_CPUS = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
"""Variables for as many processes as cores, with a thread each."""


@dataclass(frozen=True)
class Part:
    """A command, and whether it has anything left to do.

    Args:
        name: of its folder; title: for people.
        seconds: about what it takes on two CPU cores, with the settings as they come; what is left follows from these.
        command: as a process is started.
        done: called before it is run: true skips it.
        mark: called after it has ended well.
    """

    name: str
    title: str
    seconds: float
    command: list[str]
    done: Callable[[], bool]
    mark: Callable[[], None] = lambda: None


def main(cfg: QuickstartSettings) -> None:
    setup_logging()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    parts = parts_of(cfg)
    with alone(Path(cfg.output_dir)) as lock, Relay() as runner:
        code = run_parts(parts, lambda command: runner.run(command, [lock.fileno()]))
    if code:
        sys.exit(code)
    log.info("%s has it all: lora is the student, report/index.html says how good it is", cfg.output_dir)


def run_parts(parts: Sequence[Part], runner: Callable[[list[str]], int]) -> int:
    """Runs the parts that are not done, one after another; returns the exit code of the first that fails, or 0.

    Args:
        runner: runs a command to its end and returns its exit code.
    """
    took = expected = 0.0
    for number, part in enumerate(parts, 1):
        where = f"part {number} of {len(parts)}: {part.title}"
        if part.done():
            log.info("%s is done", where)
            continue
        left = sum(later.seconds for later in parts[number - 1 :]) * (took / expected if expected else 1.0)
        log.info("%s; about %s left in all", where, tqdm.format_interval(int(left)))
        began = time.monotonic()
        if code := runner(part.command):
            return ended(part, code)
        part.mark()
        took, expected = took + time.monotonic() - began, expected + part.seconds
    return 0


def ended(part: Part, code: int) -> int:
    """Says in one line why the quickstart ends here; returns its exit code."""
    if code in (PREEMPTED, INTERRUPTED):
        log.info("stopped in %s: the same command resumes it", part.title)
    else:
        print(f"error: {part.title} ended with exit code {code}, see above; what is finished is kept", file=sys.stderr)
    return code


def parts_of(cfg: QuickstartSettings) -> list[Part]:
    """The five parts.

    Raises:
        ConfigError: settings that one of them would not take, or another quickstart's in the folder.
    """
    folder = Path(cfg.output_dir)
    load("evaluate", EvaluateSettings, evaluation_of(cfg))
    overrides, launch = [*cfg.overrides], None
    processes = processes_of(cfg)
    if not is_installed("deepspeed") and not any(one.startswith("engine=") for one in overrides):
        engine = "ddp" if processes > 1 else "single"
        log.info("DeepSpeed is not installed (%s): engine=%s takes its place", install_line("deepspeed"), engine)
        overrides.append(f"engine={engine}")
    if processes > 1:
        launch = " ".join(launcher(processes))
    links = [LinkSettings(name="store", script="make_trajectories"), LinkSettings(name="run")]
    store, trained = links_of(ChainSettings(experiment=EXPERIMENT, links=links), folder, overrides)
    for link in (store, trained):
        if conflict := link.conflict():
            raise ConfigError(conflict.removeprefix(f"link {link.name}: ").replace("this chain", "this quickstart"))
    lora, python = folder / "lora", [sys.executable, "-m", "distill"]
    parts = [
        Part("store", "the teacher's trajectories", 40.0, command(store, launch), store.made),
        Part("run", "training", 250.0, command(trained, launch), trained.made),
        Part(
            "lora",
            "export",
            10.0,
            [*python, "export", f"run={trained.folder}", f"output_dir={lora}"],
            lambda: exported(lora, trained.folder),
        ),
    ]
    for name, title, seconds, arguments in (
        ("pictures", "pictures", 10.0, ["sample", *pictures_of(cfg)]),
        ("report", "evaluation", 100.0, ["evaluate", *evaluation_of(cfg)]),
    ):
        mark = Mark(folder / f".{name}.done", arguments, lora / FACTS)
        parts.append(Part(name, title, seconds, [*python, *arguments], mark.there, mark.leave))
    return parts


def pictures_of(cfg: QuickstartSettings) -> list[str]:
    """Settings of `distill sample`."""
    prompts = ",".join(f'"{prompt}"' for prompt in cfg.prompts)
    folder = Path(cfg.output_dir)
    return [f"run={folder / 'run'}", f"prompts=[{prompts}]", f"steps={cfg.steps}", f"output_dir={folder / 'pictures'}"]


def evaluation_of(cfg: QuickstartSettings) -> list[str]:
    """Settings of `distill evaluate`, whose report is a folder in the one that it is given."""
    numbers = [f"steps={cfg.steps}", f"n={cfg.n}", f"protocol.tuning_n={cfg.tuning_n}"]
    return [f"student={Path(cfg.output_dir) / 'run'}", f"output_dir={cfg.output_dir}", *numbers]


def processes_of(cfg: QuickstartSettings) -> int:
    """As many as set, or as there are GPUs, or two, as far as they share the batch evenly."""
    if cfg.processes is not None:
        return cfg.processes
    batch = load("train", TrainSettings, [f"experiment={EXPERIMENT}", *cfg.overrides]).global_batch_size
    processes = gpu_count() or CPU_PROCESSES
    while batch % processes:
        processes -= 1
    return processes


def launcher(processes: int) -> list[str]:
    """What starts the processes that write the store and train."""
    own = {} if gpu_count() else {name: os.environ.get(name, value) for name, value in ON_CPUS.items()}
    start = ["env", *(f"{name}={value}" for name, value in own.items())] if own else []
    return [*start, sys.executable, "-m", "distill", "launch", "--num_processes", str(processes)]


@dataclass(frozen=True)
class Mark:
    """A file that says what a part has been made of: its arguments, and an export's own description."""

    path: Path
    arguments: Sequence[str]
    export: Path

    def there(self) -> bool:
        return self.path.is_file() and self.path.read_text() == self._made_of()

    def leave(self) -> None:
        self.path.write_text(self._made_of())

    def _made_of(self) -> str:
        facts = self.export.read_bytes() if self.export.is_file() else b""
        return hashlib.sha256("\0".join(self.arguments).encode() + facts).hexdigest() + "\n"


def alone(folder: Path) -> AbstractContextManager[IO[str]]:
    """One quickstart at a time in a folder.

    Raises:
        ConfigError: another one runs there, when it is entered.
    """
    return held(folder / ".quickstart.lock", f"output_dir={folder}: another quickstart is running there")
