"""A run's folder: what a person finds in it, and whether a run may resume there."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from distill.cluster.progress import checkpoints_of, finished, steps_done, steps_taken
from distill.config.loading import ConfigError, checking, read_settings, read_yaml, validated
from distill.config.recorded import Differences, chief, differences, given_keys
from distill.config.settings import TrainSettings
from distill.data.errors import short
from distill.data.storage import make_folder, write_whole
from distill.training import arithmetic
from distill.training.launched import launched_rank, launched_world_size

log = logging.getLogger(__name__)

PACKAGES = ("distill", "torch", "accelerate", "deepspeed", "diffusers", "peft", "transformers", "numpy", "safetensors")
# The only variables that are written down, each because it changes what is computed, or says where. Everything else
# stays out, however harmless its name: headers, addresses with a key in them, notes and comments of all kinds.
VARIABLES = frozenset(
    """
    RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES KMP_AFFINITY KMP_BLOCKTIME MKL_NUM_THREADS MKL_DYNAMIC MKL_CBWR
    MKL_ENABLE_INSTRUCTIONS OPENBLAS_NUM_THREADS ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA ONEDNN_DEFAULT_FPMATH_MODE
    ATEN_CPU_CAPABILITY
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_DEVICE_MAX_CONNECTIONS CUBLAS_WORKSPACE_CONFIG
    NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_DISTRIBUTED_DEBUG
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT TORCHDYNAMO_DISABLE
    NCCL_ALGO NCCL_PROTO NCCL_DEBUG NCCL_IB_DISABLE NCCL_IB_HCA NCCL_IB_GID_INDEX NCCL_IB_TIMEOUT NCCL_NET
    NCCL_NET_GDR_LEVEL NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_SHM_DISABLE NCCL_SOCKET_IFNAME NCCL_TIMEOUT
    GLOO_SOCKET_IFNAME
    ACCELERATE_USE_CPU ACCELERATE_CPU_AFFINITY ACCELERATE_DEBUG_MODE DS_ACCELERATOR
    HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE TOKENIZERS_PARALLELISM WANDB_MODE
    SLURM_JOB_ID SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_CLUSTER_NAME SLURM_JOB_PARTITION SLURM_JOB_NODELIST
    SLURM_JOB_NUM_NODES SLURM_NNODES SLURM_NODEID SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_PROCID SLURM_LOCALID
    SLURM_CPUS_PER_TASK SLURM_CPUS_ON_NODE SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_MEM_PER_NODE SLURM_RESTART_COUNT
    """.split()
)
_ADDRESS = re.compile(r"://|[@?&]")  # even there: nothing that can carry a password or a key

# What may change between a run and its continuation without changing what it computes, or to set what it does next.
FREE = frozenset(
    {
        "output_dir",
        "max_train_steps",
        "engine",
        "gradient_accumulation_steps",
        "micro_batch_size",
        "gradient_checkpointing",
        "compile",
        "channels_last",
        "attention",
        "dataloader_num_workers",
        "resume_from_checkpoint",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "checkpoints_in_background",
        "validation_prompts",
        "validation_sizes",
        "validation_steps",
        "validation_sampling_steps",
        "validation_guidance",
        "validation_diversity_seeds",
        "validation_teacher_steps",
        "validation_reward",
        "health",
        "best",
        "spikes",
        "preemption_signals",
        "watchdog_minutes",
        "compare_replicas_steps",
        "compute_twice_steps",
        "deterministic",
        "tracking",
        "report_to",  # these two were its place
        "wandb",
        "log_every",
        "data",
        "model",
        "teacher",  # these two are compared by what is in them, when a checkpoint is resumed from
        "start",
    }
)


IDENTITY = "run_id"
CONFIG = "config.yaml"
HISTORY = "history.jsonl"
PROBE_BYTES = 64 << 10  # more than a run's small files have
SMALL = (CONFIG, IDENTITY, "overrides.txt", "environment.json")


def open_run(settings: TrainSettings) -> Path:
    """The folder of a new or continued run; rank 0 writes its config and environment to it.

    What a finished run has recorded stays as it is. A run that is continued records the settings that it is continued
    with, and adds a line to `history.jsonl`: when, from which step, and what changed.

    Raises:
        ConfigError: another run lives there: a setting that shapes the result differs, or it is already beyond
            `max_train_steps`.
    """
    folder = Path(settings.output_dir)
    wanted = settings.model_dump(mode="json")
    changed: Differences | None = None
    if steps_taken(folder):
        recorded = recorded_settings(folder)
        changed = differences(recorded, wanted, TrainSettings) if recorded else {}
        _same_run(folder, changed)
        _check_steps(folder, settings, changed)
        if finished(folder, settings.max_train_steps, settings.best.get("stop", False)):
            return folder
    if launched_rank() > 0:
        return folder
    make_folder(folder)
    if not _content(folder / IDENTITY):
        write_atomically(folder / IDENTITY, (_of_newest_checkpoint(folder, "run") or secrets.token_hex(8)) + "\n")
    if changed is not None:
        _note(folder, changed)
    write_atomically(folder / CONFIG, yaml.safe_dump(wanted, sort_keys=False))
    write_atomically(folder / "overrides.txt", "\n".join(sys.argv[1:]) + "\n")
    now = environment()
    if changed is not None:
        _warn_of_other_bits(folder, now)
    write_atomically(folder / "environment.json", json.dumps(now, indent=2) + "\n")
    return folder


def note_batch(folder: Path, micro_batch_size: int, accumulated: int, processes: int) -> None:
    """Adds to `environment.json` how the samples of a step are taken, which settings may leave to be found."""
    path = folder / "environment.json"
    batch = {"micro_batch_size": micro_batch_size, "accumulated": accumulated, "processes": processes}
    write_atomically(path, json.dumps({**json.loads(path.read_text()), "batch": batch}, indent=2) + "\n")


def _warn_of_other_bits(folder: Path, now: Mapping[str, Any]) -> None:
    """Warns where a run resumes with another arithmetic than `environment.json` has recorded."""
    try:
        before = json.loads((folder / "environment.json").read_text())["arithmetic"]
        changed = arithmetic.differences(before, now["arithmetic"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of an earlier version, or damaged
        return
    if changed:
        log.warning(
            "%s resumes with other arithmetic, so it agrees with a run on one machine within rounding, "
            "not to the bit: %s",
            folder,
            "; ".join(changed),
        )


def _same_run(folder: Path, changed: Differences) -> None:
    """Refuses what differs and is not free to."""
    bound = {key: values for key, values in changed.items() if key.partition(".")[0] not in FREE}
    if bound:
        key = chief(bound, given_keys())
        before, now = bound[key]
        raise ConfigError(
            f"output_dir={folder} holds a run with {key}={before!r}, this one has {now!r}: "
            f"choose another output_dir, or the same {key}"
        )


def _check_steps(folder: Path, settings: TrainSettings, changed: Differences) -> None:
    """Refuses what a run that has taken steps cannot do, and says what a schedule makes of more steps."""
    wanted, done, taken = settings.max_train_steps, steps_done(folder), steps_taken(folder)
    where = f"output_dir={folder} holds a run that"
    if done > wanted:
        raise ConfigError(
            f"{where} has finished, with {done} steps, and max_train_steps={wanted} is less: choose another output_dir "
            f"for a run of {wanted} steps; max_train_steps above {done} continues this one"
        )
    latest = settings.resume_from_checkpoint == "latest"
    if done == wanted and not latest and "resume_from_checkpoint" in changed:
        raise ConfigError(
            f"{where} has finished, with {done} steps: resume_from_checkpoint={settings.resume_from_checkpoint} is for "
            "a run that has not; choose another output_dir, and name the checkpoint by its folder"
        )
    if taken > wanted and latest:
        raise ConfigError(
            f"{where} has taken {taken} steps, and max_train_steps={wanted} is less: set max_train_steps={taken} or "
            "more, choose another output_dir, or name an earlier checkpoint with resume_from_checkpoint=STEP"
        )
    if "max_train_steps" in changed and settings.lr_scheduler in ("linear", "cosine") and launched_rank() == 0:
        log.warning(
            "max_train_steps was %s, is %d: lr_scheduler=%s is stretched to it, so the learning rate jumps at step %d; "
            "a run with %d steps from the start would have had other rates before it",
            changed["max_train_steps"][0],
            wanted,
            settings.lr_scheduler,
            taken,
            wanted,
        )


def _note(folder: Path, changed: Differences) -> None:
    """Adds a start to the history of a run that is continued."""
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "newest_step": steps_taken(folder),
        "host": socket.gethostname(),
        "processes": launched_world_size(),
        "changed": {key: list(values) for key, values in changed.items()},
        "overrides": sys.argv[1:],
    }
    with open(folder / HISTORY, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def prepare_folder(folder: Path) -> None:
    """Checks that a run's files can be written to its folder, before minutes are spent on anything else.

    Raises:
        ConfigError: they cannot; one line that says why.
    """
    with writing(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        probe = folder / f".{secrets.token_hex(6)}.probe"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(probe, " " * PROBE_BYTES)
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
            for path in missing:  # what turns out to be a mistake in other settings leaves no folder behind
                with suppress(OSError):
                    path.rmdir()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Surrounds what makes a run's folder and its small files: what fails there is for the user to repair.

    Raises:
        ConfigError: one line.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        file = next((path for path in (folder, *folder.parents) if path.is_file()), folder)
        raise ConfigError(f"output_dir={folder}: {file} is a file, and no folder can be made there") from None
    except OSError as error:
        said = short(str(folder))
        if error.errno == errno.ENOSPC:
            raise ConfigError(f"output_dir={said}: the disk is full, not even a run's settings fit on it") from None
        raise ConfigError(f"output_dir={said} cannot be written to: {error.strerror or error}") from None


def recorded_settings(folder: Path) -> Mapping[str, Any]:
    """The settings of the run in `folder`, as they were written down; {} if there are none.

    A config.yaml that a power loss has emptied is no loss where there is an intact checkpoint: it holds them too.

    Raises:
        ConfigError: they are damaged.
    """
    path = folder / CONFIG
    if not _content(path):
        return _of_newest_checkpoint(folder, "config") or {}
    with checking(f"{path}: "):
        found = read_yaml(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings: put back what was there, or remove it to have it written again")
    return found


def kept_files(folder: Path) -> Callable[[], None]:
    """Reads the small files of a run, and returns what writes those of them again that have gone.

    A folder that is removed or renamed during a run is thus made again, and what is saved to it later can be found,
    continued and exported.
    """
    texts = {name: (folder / name).read_text() for name in SMALL if (folder / name).is_file()}

    def restore() -> None:
        missing = [name for name in texts if not (folder / name).exists()]
        if not missing:
            return
        make_folder(folder)
        for name in missing:
            write_atomically(folder / name, texts[name])
        log.warning(
            "%s had lost %s: written again; what else was in it is gone, or where it was moved to",
            folder,
            ", ".join(missing),
        )

    return restore


def identity(folder: Path) -> str:
    """A run's own name, which its checkpoints bear; its folder may be moved. `open_run` has given it."""
    return (folder / IDENTITY).read_text().strip()


def _content(path: Path) -> bytes:
    """What a small file holds; nothing if it is not there or, after a power loss, empty or all zeros."""
    try:
        return path.read_bytes().strip(b"\0 \r\n\t")
    except FileNotFoundError:
        return b""


def _of_newest_checkpoint(folder: Path, key: str) -> Any:
    """What the newest checkpoint says of its run in the place of a small file that is lost; None without one."""
    from distill.training.checkpoint import newest_manifest  # which loads DeepSpeed, and is seldom needed here

    found = newest_manifest(checkpoints_of(folder)).get(key)
    if found and launched_rank() == 0:
        log.warning("%s has lost its %s: taken from its newest checkpoint", folder, {"run": IDENTITY}.get(key, CONFIG))
    return found


def read_run(folder: str | Path) -> TrainSettings:
    """The settings of the run in `folder`.

    Raises:
        FileNotFoundError: no run there.
        ConfigError: its settings are damaged, or not those of a run of this version.
    """
    recorded = Path(folder) / CONFIG
    if _content(recorded):
        return read_settings(recorded, TrainSettings)
    if found := _of_newest_checkpoint(Path(folder), "config"):
        return validated(found, TrainSettings)
    problem = "empty" if recorded.is_file() else "missing"
    raise FileNotFoundError(f"run={folder}: no run there ({CONFIG} is {problem}, and no checkpoint says what it held)")


def mark_finished(folder: Path, step: int, planned: int | None = None) -> None:
    """Leaves `DONE` for people and batch scripts: the steps taken, and of how many, where it was to take more."""
    write_atomically(folder / "DONE", f"{step} of {planned}\n" if planned not in (None, step) else f"{step}\n")


def environment() -> dict[str, Any]:
    """Versions, git commit, machine and variables: what one needs to know to repeat a run. Nothing secret."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "arithmetic": arithmetic.in_force(),
        "cpu_count": os.cpu_count(),
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _is_recorded(name, value)},
    }


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file in one step, with fsync before and after: after a power loss, too, it is old or new."""
    write_whole(path, text)


def _is_recorded(name: str, value: str) -> bool:
    return name in VARIABLES and not _ADDRESS.search(value)


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
