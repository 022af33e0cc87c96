"""Which device a process computes on: one answer for training, stores, sampling, evaluation and benchmarks.

A GPU is taken where there is one that torch can use. The CPU is taken where there is none, where
`ACCELERATE_USE_CPU=true` chooses it, and where `CUDA_VISIBLE_DEVICES` hides every GPU. GPUs that are there and that
torch cannot use are an error, not a reason to compute on the CPU for days.

The environment is read in functions: a command may still change it before torch looks for GPUs.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import MutableMapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # loaded where a device is needed, and not by commands that only look at the environment
    import torch

USE_CPU, VISIBLE = "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"
_YES = ("1", "true", "t", "yes", "y", "on")  # as Accelerate reads it
_A_GPU = re.compile(r"\s*(\d+|GPU-|MIG-)")
_SLURM_COUNTS, _SLURM_LISTS = ("SLURM_GPUS_ON_NODE",), ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
NEEDED_DRIVERS = {13: 580, 12: 525, 11: 450}
"""The oldest driver of Linux that runs programs built for a major version of CUDA, by that version (NVIDIA's "CUDA
Compatibility", minor version compatibility)."""
ON_CPU = f"to compute on the CPU, set {USE_CPU}=true"


class UnusableGPU(ValueError):
    """There are GPUs, and torch cannot use them; one line that says what to do."""


def cpu_is_asked_for(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether the environment keeps this process from GPUs."""
    visible = environment.get(VISIBLE)
    hidden = visible is not None and not _A_GPU.match(visible)  # CUDA stops reading at the first that it does not know
    return hidden or environment.get(USE_CPU, "").lower() in _YES


def hide_gpus_if_asked(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where the environment chooses the CPU, hides GPUs from torch, all that use it, and processes started later.

    It has to be called before torch looks for GPUs.
    """
    if cpu_is_asked_for(environment):
        environment[VISIBLE] = ""


def gpu_is_used() -> bool:
    """Whether this process computes on a GPU. It never fails: GPUs that torch cannot use are not used."""
    import torch

    return not cpu_is_asked_for() and torch.cuda.is_available()


def gpu_count() -> int:
    """How many GPUs processes on this machine compute on; 0 if they compute on the CPU."""
    import torch

    return torch.cuda.device_count() if gpu_is_used() else 0


def own_device(local_rank: int | None = None) -> torch.device:
    """The device of this process: of several on a machine each has its own GPU.

    Args:
        local_rank: of the process on its machine; None: what its launcher says.

    Raises:
        UnusableGPU: there are GPUs that torch cannot use, and the environment does not choose the CPU.
    """
    import torch

    hide_gpus_if_asked()
    if gpu_is_used():
        place = int(os.environ.get("LOCAL_RANK", 0)) if local_rank is None else local_rank
        return torch.device("cuda", place % gpu_count())
    check_no_gpu_is_left_out()
    return torch.device("cpu")


def check_no_gpu_is_left_out() -> None:
    """Raises UnusableGPU if there are GPUs which torch cannot use, unless the environment chooses the CPU."""
    import torch

    if cpu_is_asked_for() or torch.cuda.is_available():
        return
    if (found := found_gpus()) is not None:
        raise UnusableGPU(f"{found}, and torch can use none: {reason(torch.__version__, torch.version.cuda)}; {ON_CPU}")


def found_gpus(environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str | None:
    """What says that this process has NVIDIA GPUs, in words: SLURM, files of devices, or nvidia-smi; else None."""
    for name in _SLURM_COUNTS:
        if (count := environment.get(name, "")).isdigit() and int(count):
            return f"SLURM has given this job GPUs ({name}={count})"
    for name in _SLURM_LISTS:
        if listed := environment.get(name):
            return f"SLURM has given this job GPUs ({name}={listed})"
    if files := [path.name for path in sorted(devices.glob("nvidia[0-9]*")) if _may_be_opened(path)]:
        return f"this machine has GPUs ({', '.join(f'/dev/{name}' for name in files)})"
    if names := nvidia_smi("name"):
        return f"this machine has GPUs ({len(names)} x {names[0]}, as nvidia-smi says)"
    return None


def reason(torch_version: str, cuda: str | None) -> str:
    """Why a torch built for this CUDA (None: for CPUs only) uses no GPU here, and what to do about it."""
    if cuda is None:
        return f"torch {torch_version} is for CPUs only: install a torch for CUDA"
    needed, driver = needed_driver(cuda), driver_version()
    if driver is None:
        return "nvidia-smi finds no driver that runs: in a job, ask for GPUs and use srun; else install NVIDIA's driver"
    if needed is not None and int(driver.partition(".")[0]) < needed:
        return (
            f"its driver {driver} is too old for CUDA {cuda}, which needs {needed} or newer: update the driver, or "
            "install a torch for an older CUDA, as scripts/setup.sh does"
        )
    if visible := os.environ.get(VISIBLE):
        return f"{VISIBLE}={visible} names none that is there: unset it, or name some that nvidia-smi lists"
    return f"torch {torch_version} for CUDA {cuda} cannot start CUDA with driver {driver}: run nvidia-smi, and see why"


def needed_driver(cuda: str) -> int | None:
    """The oldest major version of the driver for a CUDA such as "13.0"; None for one that is not known."""
    return NEEDED_DRIVERS.get(int(cuda.partition(".")[0]))


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None without one that runs."""
    found = nvidia_smi("driver_version")
    return found[0] if found and found[0][:1].isdigit() else None


@cache
def nvidia_smi(field: str) -> tuple[str, ...]:
    """What nvidia-smi says of each GPU; empty without it, or without GPUs."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def described(device: torch.device, count: int = 1) -> str:
    """A line about devices of one kind and what computes on them: names, memory, torch and CUDA."""
    import torch

    if device.type != "cuda":
        processes = "the CPU" if count == 1 else f"{count} x CPU"
        return f"{processes} ({torch.get_num_threads()} threads); torch {torch.__version__}"
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    driver = driver_version() or "unknown"
    name = torch.cuda.get_device_name(device)
    return f"{count} x {name} ({gib:.0f} GiB); torch {torch.__version__}, CUDA {torch.version.cuda}, driver {driver}"


def _may_be_opened(path: Path) -> bool:
    """Whether the file of a device is this process's to use: jobs see the files of GPUs that others were given, too."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    except PermissionError:
        return False
    except OSError:  # a driver that does not run
        return True
    return True
