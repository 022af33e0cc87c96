"""Submits to SLURM: a run, the writing of a store, a chain or a sweep. Settings are theirs, and `slurm.*` for the jobs.

distill submit experiment=lcm_lora_sdxl data.store=STORE output_dir=runs/a engine=zero2 \
    slurm.nodes=4 slurm.gpus_per_node=8 slurm.time=12:00:00
distill submit slurm.script=trajectories slurm.array=32 experiment=lcm_lora_sdxl data.store=STORE …
distill submit chain=lightning_sdxl output_dir=runs/l slurm.nodes=4       # a job for each link; chain=NAME --help
distill submit -m experiment=lcm_lora_sdxl learning_rate=1e-4,2e-4 …      # an array, a task for each combination

Everything is composed and checked here, once. OUTPUT_DIR/slurm/ gets the settings and the batch script that the job
runs, exactly these, and its log. `dry_run=true` prints both and does not submit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("submit")

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from distill.cluster import batch
from distill.cluster.job import Job, Launcher, launched
from distill.commands import trajectories
from distill.config.loading import ConfigError, checking
from distill.config.settings import SlurmSettings, SubmitSettings, TrainSettings
from distill.data.storage import make_folder
from distill.training.assembly import Run
from distill.training.run import write_atomically
from distill.training.teacher import open_teacher
from distill.training.tracking import setup_logging

log = logging.getLogger("distill")


def main(cfg: SubmitSettings) -> None:
    setup_logging()
    slurm, settings = cfg.slurm, train_settings(cfg)
    check(settings, slurm, slurm.script)
    if slurm.parallel is not None and slurm.array is None:
        raise ConfigError("slurm.parallel is for arrays and sweeps: set slurm.array too, or leave it out")
    folder = Path(cfg.output_dir).resolve() / "slurm"
    options = options_of(slurm, folder, folder.parent.name, array=array_of(slurm))
    make_folder(folder)
    job = write_job(settings, slurm, slurm.script, folder)
    script = folder / f"{slurm.script}.sbatch"
    rendered = batch.script(options, slurm.setup, batch.supervised(python_of(slurm), job))
    write_atomically(script, rendered)
    write_atomically(folder / f"{slurm.script}.overrides.txt", "\n".join(sys.argv[1:]) + "\n")
    if cfg.dry_run:
        print(rendered)
        print(job.with_suffix(".yaml").read_text())
        log.info("sbatch %s", script)
        return
    with checking():
        log.info("job %s of %s, its log is beside it", batch.submitted(script), script)


def train_settings(cfg: SubmitSettings) -> TrainSettings:
    """The settings of the run alone."""
    return TrainSettings.model_validate(cfg.model_dump(exclude={"slurm", "dry_run"}))


def check(settings: TrainSettings, slurm: SlurmSettings, command: str) -> None:
    """All that can be checked before there are processes.

    Raises:
        ConfigError: what the job would end with.
    """
    if command == "trajectories":
        trajectories.prompts_of(settings)
        open_teacher(settings.model)
        return
    if slurm.array is not None:
        raise ConfigError("slurm.array is for slurm.script=trajectories: a run is one job")
    check_processes(settings, slurm)
    with launched_as(processes(slurm)):
        Run.assemble(settings)


def check_processes(settings: TrainSettings, slurm: SlurmSettings) -> None:
    """Raises ConfigError: the engine is one process, and the job has more."""
    kind, count = settings.engine["kind"], processes(slurm)
    if kind == "single" and count > 1:
        raise ConfigError(f"engine=single is one process, and the job has {count}: set engine=zero2 or another")


@contextmanager
def launched_as(count: int) -> Iterator[None]:
    """The environment as if a launcher had started so many processes, this being the first."""
    os.environ["WORLD_SIZE"] = str(count)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]


def processes(slurm: SlurmSettings) -> int:
    """How many processes a job has, on all nodes."""
    return slurm.nodes * (slurm.processes_per_node or slurm.gpus_per_node or 1)


def write_job(settings: TrainSettings, slurm: SlurmSettings, command: str, folder: Path) -> Path:
    """Writes the settings, which the job does not compose again, and the job's file; returns the latter."""
    resolved = folder / f"{command}.yaml"
    dumped = settings.model_dump(mode="json")
    write_atomically(resolved, yaml.safe_dump(dumped, sort_keys=False))
    job = launched(command, dumped, [f"settings={resolved}"], launcher_of(slurm), **limits_of(slurm))
    return written(job, folder / f"{command}.json")


def written(job: Job, path: Path) -> Path:
    """Writes a job's file, and says where."""
    job.write(path)
    return path


def launcher_of(slurm: SlurmSettings) -> Launcher:
    """What starts the processes of a job on its nodes."""
    container = tuple(shlex.split(slurm.container or ""))
    return Launcher(python_of(slurm), slurm.processes_per_node, tuple(slurm.launch_flags), container)


def limits_of(slurm: SlurmSettings) -> dict[str, int]:
    """The limits of a job's supervision."""
    return {"grace_seconds": slurm.grace_seconds, "max_failures": slurm.max_failures}


def python_of(slurm: SlurmSettings) -> str:
    """The interpreter of a job."""
    return slurm.python or sys.executable


def array_of(slurm: SlurmSettings) -> str | None:
    """The array of a store, as `sbatch --array` takes it."""
    return None if slurm.array is None else f"0-{slurm.array - 1}{at_once(slurm)}"


def at_once(slurm: SlurmSettings) -> str:
    """How many tasks of an array may run at once, as `sbatch --array` takes it."""
    return "" if slurm.parallel is None else f"%{slurm.parallel}"


def options_of(slurm: SlurmSettings, folder: Path, name: str, array: str | None = None, nodes: int = 0) -> list[str]:
    """Options of sbatch.

    Args:
        folder: of the log.
        nodes: 0: as many as the settings say.

    Raises:
        ConfigError: a folder that a batch script cannot name.
    """
    with checking():
        given = {
            "job-name": batch.job_name(name),
            "nodes": nodes or slurm.nodes,
            "gpus-per-node": slurm.gpus_per_node,
            "cpus-per-task": slurm.cpus_per_task,
            "mem": slurm.mem,
            "time": slurm.time,
            "partition": slurm.partition,
            "account": slurm.account,
            "array": array,
            "signal": f"B:USR1@{slurm.grace_seconds}",
            "chdir": batch.quoted(Path.cwd()),
            "output": batch.quoted(folder / ("%x-%j.log" if array is None else "%x-%A-%a.log")),
        }
        return batch.options_of(given, slurm.options)
