"""A run's folder: what a person finds in it, and whether a run may go on there."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from distill.training.config import ConfigError, checking, read_settings, read_yaml
from distill.training.settings import TrainSettings

PACKAGES = ("distill", "torch", "accelerate", "deepspeed", "diffusers", "peft", "transformers", "numpy", "safetensors")
# What launchers, schedulers and libraries are told through variables; never one that may hold a secret.
_VARIABLES = re.compile(
    r"(SLURM|NCCL|GLOO|TORCH|PYTORCH|CUDA|CUBLAS|OMP|MKL|ACCELERATE|DS|HF|WANDB|TOKENIZERS)_.*"
    r"|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
)
_SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|JWT", re.IGNORECASE)

# What may change between a run and its continuation without changing what it computes, or what is asked of it next.
FREE = frozenset(
    {
        "output_dir",
        "max_train_steps",
        "engine",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "dataloader_num_workers",
        "resume_from_checkpoint",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_prompts",
        "validation_steps",
        "validation_sampling_steps",
        "validation_guidance",
        "validation_diversity_seeds",
        "validation_teacher_steps",
        "validation_reward",
        "health",
        "preemption_signals",
        "watchdog_minutes",
        "report_to",
        "log_every",
        "data",
        "model",
        "teacher",  # these two are compared by what is in them, when a checkpoint is resumed from
        "start",
    }
)


IDENTITY = "run_id"


def launched_rank() -> int:
    """This process's rank as its launcher says, before any process group exists."""
    return int(os.environ.get("RANK", 0))


def launched_world_size() -> int:
    """The number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def open_run(settings: TrainSettings) -> Path:
    """The folder of a new or continued run; rank 0 writes its config and environment to it.

    Raises:
        ConfigError: another run lives there: a setting that shapes the result differs.
    """
    folder = Path(settings.output_dir)
    wanted = settings.model_dump(mode="json")
    recorded = folder / "config.yaml"
    if recorded.is_file() and any(checkpoints_of(folder).glob("step-*")):
        with checking(f"{recorded}: "):
            before = read_yaml(recorded)
        _same_run(folder, before, wanted)
    if launched_rank() > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(recorded, yaml.safe_dump(wanted, sort_keys=False))
    write_atomically(folder / "overrides.txt", "\n".join(sys.argv[1:]) + "\n")
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    if not (folder / IDENTITY).is_file():
        write_atomically(folder / IDENTITY, secrets.token_hex(8) + "\n")
    return folder


def identity(folder: Path) -> str:
    """A run's own name, which its checkpoints bear; its folder may be moved. `open_run` has given it."""
    return (folder / IDENTITY).read_text().strip()


def read_run(folder: str | Path) -> TrainSettings:
    """The settings of the run in `folder`.

    Raises:
        FileNotFoundError: no run there.
        ConfigError: its settings are damaged, or not those of a run of this version.
    """
    recorded = Path(folder) / "config.yaml"
    if not recorded.is_file():
        raise FileNotFoundError(f"run={folder}: no run there (config.yaml is missing)")
    return read_settings(recorded, TrainSettings)


def mark_finished(folder: Path, step: int) -> None:
    """Leaves `DONE`, with the steps taken, for people and batch scripts."""
    write_atomically(folder / "DONE", f"{step}\n")


def finished(folder: Path, max_train_steps: int) -> bool:
    """Whether the run in `folder` has taken so many steps."""
    done = folder / "DONE"
    return done.is_file() and int(done.read_text()) >= max_train_steps


def checkpoints_of(folder: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(folder) / "checkpoints"


def environment() -> dict[str, Any]:
    """Versions, git commit, machine and variables: what one needs to know to repeat a run. Nothing secret."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_count": os.cpu_count(),
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _is_told(name, value)},
    }


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file in one step: a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _same_run(folder: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in wanted:
        if key not in FREE and key in recorded and recorded[key] != wanted[key]:
            raise ConfigError(
                f"output_dir={folder} holds a run with {key}={recorded[key]!r}, this one has {wanted[key]!r}: "
                f"choose another output_dir, or the same {key}"
            )


def _is_told(name: str, value: str) -> bool:
    secret = _SECRET.search(name) or re.search(r"://[^/]*@", value)  # a password before a host
    return _VARIABLES.fullmatch(name) is not None and not secret


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
