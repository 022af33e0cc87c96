"""A job of settings that nobody has submitted: `sbatch slurm/train.sbatch SETTINGS`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from distill.cluster.job import Job, Launcher, check_earlier, launched

COMMANDS = {"train": "train", "trajectories": "trajectories", "make_trajectories": "trajectories"}
NUMBERS = ("processes_per_node", "grace_seconds", "max_failures")
WORDS = ("launch_flags", "container")


def job_by_hand(command: str, arguments: Sequence[str]) -> Job:
    """The job of a command and its settings, which are composed here, by the command itself.

    Args:
        arguments: settings; those of `slurm` that are no options of sbatch may be among them.

    Raises:
        ValueError: an unknown command or setting; what else is wrong, the command itself has said.
    """
    if command not in COMMANDS:
        raise ValueError(f"{command!r} is no job's file and no command; allowed: train, trajectories")
    check_earlier(os.environ)
    slurm = slurm_settings([one for one in arguments if one.startswith("slurm.")])
    rest = [one for one in arguments if not one.startswith("slurm.")]
    launcher = Launcher(
        processes_per_node=slurm.pop("processes_per_node", None),
        flags=tuple(slurm.pop("launch_flags", ())),
        container=tuple(slurm.pop("container", ())),
    )
    return launched(COMMANDS[command], composed(COMMANDS[command], rest), rest, launcher, **slurm)


def slurm_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Values of `slurm.KEY=VALUE` by their keys. Raises ValueError."""
    found: dict[str, Any] = {}
    for argument in arguments:
        key, _, value = argument.removeprefix("slurm.").partition("=")
        if key in NUMBERS and value.isdigit():
            found[key] = int(value)
        elif key in WORDS and value:
            found[key] = value.strip("[]").replace(",", " ").split()
        elif key in NUMBERS:
            raise ValueError(f"slurm.{key}={value!r} is no whole number")
        else:
            allowed = ", ".join(f"slurm.{name}" for name in (*NUMBERS, *WORDS))
            raise ValueError(f"slurm.{key}: here it is an option of sbatch, or none at all; allowed: {allowed}")
    return found


def composed(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What the settings come to, as `--cfg` prints it. Raises ValueError."""
    import yaml

    done = subprocess.run([sys.executable, "-m", "distill", command, *arguments, "--cfg"], stdout=subprocess.PIPE)
    if done.returncode:
        raise ValueError("these settings cannot be run, see above")
    settings: dict[str, Any] = yaml.safe_load(done.stdout)
    return settings
