"""Submits a sweep: one array of jobs, a task for each combination of values, and a job that compares them at the end.

distill submit -m experiment=lcm_lora_sdxl data.store=STORE output_dir=runs/sweep learning_rate=1e-4,2e-4 \
    slurm.gpus_per_node=8 slurm.parallel=4

Each combination runs in its own folder below OUTPUT_DIR, those of `distill train -m`, and is supervised for itself.
OUTPUT_DIR/slurm/ has the batch scripts, a file for each task, and the logs; OUTPUT_DIR/index.html compares the runs.
Submitted again, a sweep leaves out what is finished.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.cluster import batch
from distill.cluster.progress import finished, steps_taken
from distill.commands.submit import (
    at_once,
    check,
    options_of,
    python_of,
    train_settings,
    write_job,
)
from distill.commands.sweep_runs import PAGE, compare
from distill.config.loading import ConfigError, check_components, checking, load
from distill.config.settings import JobSettings, SubmitSettings, TrainSettings
from distill.config.sweeps import SweptRun, runs_of
from distill.data.storage import make_folder
from distill.training.run import write_atomically
from distill.training.tracking import setup_logging

log = logging.getLogger("distill")


@dataclass(frozen=True)
class SweepTask:
    """One run of a sweep.

    Args:
        number: of its task in the array.
        name: of its folder.
        chosen: what makes it different from the others.
    """

    number: int
    name: str
    chosen: Mapping[str, str]
    settings: TrainSettings

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir).resolve()

    @property
    def done(self) -> bool:
        return finished(self.folder, self.settings.max_train_steps)


def sweep(config: str, arguments: Sequence[str]) -> int:
    """Submits one; returns the exit code.

    Raises:
        ConfigError: what a task would end with, or sbatch says is wrong; nothing was submitted then.
    """
    setup_logging()
    base, slurm, dry_run, tasks = tasks_of(config, arguments)
    left = [task for task in tasks if not task.done]
    for task in left:
        try:
            check(task.settings, slurm, "train")
        except (ConfigError, FileNotFoundError) as error:
            raise ConfigError(f"{task.name}: {error}") from None
    folder = base / "slurm"
    scripts = scripts_of(left, slurm, folder)
    write_sweep(tasks, slurm, folder)
    for name, text in scripts.items():
        write_atomically(folder / name, text)
    write_atomically(folder / "sweep.overrides.txt", "\n".join(sys.argv[1:]) + "\n")
    for task in tasks:
        log.info("task %d: %s%s", task.number, task.name, ", done" if task.done else "")
    if dry_run:
        print("\n".join(scripts.values()))
        return 0
    submit_scripts(left, folder)
    return 0


def tasks_of(config: str, arguments: Sequence[str]) -> tuple[Path, JobSettings, bool, list[SweepTask]]:
    """The folder of a sweep, the settings of its jobs, whether only to show them, and its runs. Raises ConfigError."""
    runs = runs_of(config, SubmitSettings, arguments)
    first = load(config, SubmitSettings, runs[0].overrides)
    if first.slurm.script != "train" or first.slurm.array is not None:
        raise ConfigError("-m submits runs that train, each as one task: leave slurm.script and slurm.array out")
    tasks = []
    for number, run in enumerate(runs):
        cfg = check_components(load(config, SubmitSettings, run.overrides))
        if cfg.slurm != first.slurm or cfg.dry_run != first.dry_run:
            raise ConfigError("the tasks of an array have one shape: settings of slurm and dry_run have one value each")
        tasks.append(SweepTask(number, run.name, run.chosen, train_settings(cfg)))
    return runs[0].folder.parent.resolve(), first.slurm, first.dry_run, tasks


def scripts_of(left: Sequence[SweepTask], slurm: JobSettings, folder: Path) -> dict[str, str]:
    """The batch scripts of the array, if anything is left to run, and of the page. Raises ConfigError."""
    name = folder.parent.name
    page = options_of(slurm.model_copy(update={"gpus_per_node": None, "cpus_per_task": None}), folder, f"{name}-page")
    body = (
        f"exec {shlex.quote(python_of(slurm))} -m distill.commands.submit_sweep {shlex.quote(str(folder))}/sweep.json"
    )
    found = {}
    if left:
        array = ",".join(str(task.number) for task in left)
        if len(left) > 1 and left[-1].number - left[0].number == len(left) - 1:
            array = f"{left[0].number}-{left[-1].number}"
        options = options_of(slurm, folder, name, f"{array}{at_once(slurm)}")
        supervised = batch.supervised(python_of(slurm), folder / "tasks", tasks=True)
        found["sweep.sbatch"] = batch.script(options, slurm.setup, supervised)
    found["page.sbatch"] = batch.script(page, slurm.setup, body)
    return found


def write_sweep(tasks: Sequence[SweepTask], slurm: JobSettings, folder: Path) -> None:
    """Writes the settings and the job of each run, where the run is and where the array looks for it."""
    make_folder(folder / "tasks")
    for task in tasks:
        own = task.folder / "slurm"
        make_folder(own)
        job = write_job(task.settings, slurm, "train", own)
        write_atomically(folder / "tasks" / f"{task.number}.json", job.read_text())
    facts = {
        task.name: {"folder": str(task.folder), "steps": task.settings.max_train_steps, "chosen": dict(task.chosen)}
        for task in tasks
    }
    write_atomically(folder / "sweep.json", json.dumps(facts, indent=2) + "\n")


def submit_scripts(left: Sequence[SweepTask], folder: Path) -> None:
    """The array, and the page after it has ended, however it has."""
    with checking():
        after = []
        if left:
            array = batch.submitted(folder / "sweep.sbatch")
            log.info("job %s: %d runs, its logs are in %s", array, len(left), folder)
            after = [f"--dependency=afterany:{array}"]
        page = batch.submitted(folder / "page.sbatch", *after)
    log.info("job %s: the page that compares them, %s", page, folder.parent / PAGE)


def write_page(file: Path) -> int:
    """Compares the runs of a sweep; returns 0 if all are finished, and otherwise says which are not."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    runs = [SweptRun(Path(fact["folder"]), (), fact["chosen"]) for fact in facts.values()]
    complete = {run.name: finished(run.folder, facts[run.name]["steps"]) for run in runs}
    codes = {run.name: 0 if complete[run.name] else last_code(run.folder / "slurm") for run in runs}
    compare(file.parents[1], runs, {name: code for name, code in codes.items() if code is not None})
    for run in runs:
        if not complete[run.name]:
            at, steps = steps_taken(run.folder), facts[run.name]["steps"]
            print(f"not finished: {run.name}, at step {at} of {steps}", flush=True)
    return 0 if all(complete.values()) else 1


def last_code(notes: Path) -> int | None:
    """The exit code of the last job that a supervisor has noted; None if it has ended none."""
    codes = sorted(notes.glob("*/code"), key=lambda path: path.stat().st_mtime_ns)
    return int(codes[-1].read_text()) if codes else None


if __name__ == "__main__":
    sys.exit(write_page(Path(sys.argv[1]).resolve()))
