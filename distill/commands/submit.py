"""Submits a run, or the writing of a store, to SLURM: their settings, and `slurm.*` for the job.

distill submit experiment=lcm_lora_sdxl data.store=STORE output_dir=runs/a engine=zero2 \
    slurm.nodes=4 slurm.gpus_per_node=8 slurm.time=12:00:00

Everything is composed and checked here, once. OUTPUT_DIR/slurm/ gets the settings and the batch script that the job
runs, exactly these, and its log. `dry_run=true` prints both and does not submit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("submit")

import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from distill.commands import trajectories as make_trajectories
from distill.config.loading import ConfigError
from distill.config.settings import SlurmSettings, SubmitSettings, TrainSettings
from distill.training.assembly import Run
from distill.training.run import write_atomically
from distill.training.teacher import open_teacher
from distill.training.tracking import setup_logging

log = logging.getLogger("distill")

SLURM = Path(__file__).resolve().parents[2] / "slurm"
TEMPLATES = {"train": "train.sbatch", "make_trajectories": "trajectories.sbatch"}
LAUNCH_FLAGS = {"deepspeed": None, "ddp": "--multi_gpu", "single": ""}  # None: what slurm/launch.sh does by itself


def main(cfg: SubmitSettings) -> None:
    setup_logging()
    slurm = cfg.slurm
    settings = TrainSettings.model_validate(cfg.model_dump(exclude={"slurm", "dry_run"}))
    check(settings, slurm)
    folder = Path(cfg.output_dir).resolve() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    resolved, script = folder / f"{slurm.script}.yaml", folder / TEMPLATES[slurm.script]
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    rendered = render(slurm, settings, resolved)
    write_atomically(resolved, text)
    write_atomically(script, rendered)
    write_atomically(folder / f"{slurm.script}.overrides.txt", "\n".join(sys.argv[1:]) + "\n")
    if cfg.dry_run:
        print(rendered)
        print(text)
        log.info("sbatch %s", script)
        return
    log.info("job %s of %s, its log is beside it", submitted(script), script)


def check(settings: TrainSettings, slurm: SlurmSettings) -> None:
    """All that can be checked before there are processes.

    Raises:
        ConfigError: what the job would end with.
    """
    if slurm.array is not None and slurm.script == "train":
        raise ConfigError("slurm.array is for slurm.script=make_trajectories: a run is one job")
    if slurm.script == "make_trajectories":
        make_trajectories.prompts_of(settings)
        open_teacher(settings.model)
        return
    kind, count = settings.engine["kind"], processes(slurm)
    if kind == "single" and count > 1:
        raise ConfigError(f"engine=single is one process, and the job has {count}: set engine=zero2 or another")
    with launched(count):
        Run.assemble(settings)


@contextmanager
def launched(count: int) -> Iterator[None]:
    """As if a launcher had started so many processes, and this were the first."""
    os.environ["WORLD_SIZE"] = str(count)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]


def processes(slurm: SlurmSettings) -> int:
    """Of the whole job."""
    return slurm.nodes * (slurm.processes_per_node or slurm.gpus_per_node or 1)


def render(slurm: SlurmSettings, settings: TrainSettings, resolved: Path) -> str:
    """The batch script: the one of `slurm/` with this job's options, and these settings in the place of arguments."""
    template = (SLURM / TEMPLATES[slurm.script]).read_text()
    own, _, body = template.partition("set -euo pipefail\n")
    body = body.replace("source slurm/job.sh", f"source {shlex.quote(str(SLURM / 'job.sh'))}")
    own = re.sub(r"^#(?!SBATCH|!).*\n", "", own, flags=re.MULTILINE)  # its own way of being submitted
    lines = [*(f"#SBATCH {option}" for option in options(slurm, resolved.parent)), "set -euo pipefail", ""]
    return own + "\n".join([*lines, *exports(slurm, settings), f"set -- {shlex.quote(f'settings={resolved}')}"]) + body


def options(slurm: SlurmSettings, folder: Path) -> list[str]:
    """Of sbatch; they come after the template's, and are the ones that count."""
    name = "%x-%j.log" if slurm.array is None else "%x-%A-%a.log"
    given = {
        "job-name": re.sub(r"[^\w.-]", "-", folder.parent.name),
        "nodes": slurm.nodes,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "array": None if slurm.array is None else f"0-{slurm.array - 1}",
        "signal": f"B:USR1@{slurm.grace_seconds}",
        "chdir": _quoted(Path.cwd()),
        "output": _quoted(folder / name),
    }
    return [*(f"--{key}={value}" for key, value in given.items() if value is not None), *slurm.options]


def exports(slurm: SlurmSettings, settings: TrainSettings) -> list[str]:
    """What slurm/job.sh and launch.sh read from the environment. What else is in it, sbatch passes on, unwritten."""
    flags = LAUNCH_FLAGS[settings.engine["kind"]] if slurm.script == "train" else None
    given = {
        "PYTHON": sys.executable,
        "GRACE_SECONDS": slurm.grace_seconds,
        "MAX_FAILURES": slurm.max_failures,
        "PROCESSES_PER_NODE": slurm.processes_per_node,
        "LAUNCH_FLAGS": flags,
    }
    return [f"export {name}={shlex.quote(str(value))}" for name, value in given.items() if value is not None]


def submitted(script: Path) -> str:
    """The id of the job that runs it.

    Raises:
        ConfigError: what sbatch says is wrong with it.
    """
    try:
        sbatch = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"sbatch is not installed here; {script} is written: submit it where it is") from None
    if sbatch.returncode:
        raise ConfigError(f"{sbatch.stderr.strip()} ({script})")
    return sbatch.stdout.strip().partition(";")[0]


def _quoted(path: Path) -> str:
    if re.search(r"[\"\\\n]", str(path)):
        raise ConfigError(f"{path}: a batch script cannot name a folder with quotes, backslashes or newlines")
    return f'"{path}"' if " " in str(path) else str(path)
