"""Batch scripts, and their submission."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ALWAYS = ("--ntasks-per-node=1", "--requeue", "--open-mode=append")
"""Options of every job: a launcher on each node, back to the queue by its own wish, one log for all its starts."""
SUPERVISED = "trap '' USR1 # until the supervisor listens\nexec {python} -m distill.cluster.supervise {job}"
TASK = "$SLURM_ARRAY_TASK_ID"


def script(options: Sequence[str], setup: Sequence[str], body: str) -> str:
    """A batch script.

    Args:
        options: of sbatch.
        setup: lines of bash before the body.
    """
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options), "set -euo pipefail", *setup, body]
    return "\n".join(lines) + "\n"


def supervised(python: str, job: Path, tasks: bool = False) -> str:
    """The body of a job that is supervised.

    Args:
        job: its file; of an array with `tasks` a folder, which has a file for each task: `7.json`.
    """
    file = f'{shlex.quote(f"{job}/")}"{TASK}".json' if tasks else shlex.quote(str(job))
    return SUPERVISED.format(python=shlex.quote(python), job=file)


def options_of(given: Mapping[str, object | None], others: Sequence[str]) -> list[str]:
    """Options of sbatch, those that are None left out; `others` come last, and are the ones that count."""
    return [*ALWAYS, *(f"--{key}={value}" for key, value in given.items() if value is not None), *others]


def quoted(path: Path) -> str:
    """A path in an option. Raises ValueError: one that a batch script cannot name."""
    if re.search(r"[\"\\\n]", str(path)):
        raise ValueError(f"{path}: a batch script cannot name a folder with quotes, backslashes or newlines")
    return f'"{path}"' if " " in str(path) else str(path)


def job_name(text: str) -> str:
    """A name that SLURM shows as it is."""
    return re.sub(r"[^\w.-]", "-", text)


def submitted(path: Path, *more: str) -> str:
    """The id of the job that runs a script.

    Args:
        more: options of sbatch that depend on jobs submitted before.

    Raises:
        ValueError: what sbatch says is wrong with it.
    """
    try:
        sbatch = subprocess.run(["sbatch", "--parsable", *more, str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"sbatch is not installed here; {path} is written: submit it where it is") from None
    if sbatch.returncode:
        raise ValueError(f"{sbatch.stderr.strip()} ({path})")
    return sbatch.stdout.strip().partition(";")[0]
