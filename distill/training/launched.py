"""How this process was started: by a launcher, which gives it a rank, or by itself; and whether that launcher lives.

Nothing here loads torch: it is called before.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path

import psutil

log = logging.getLogger("distill")

# What torchrun, accelerate and DeepSpeed's launcher set for each process: one is launched if the first two are there.
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# What MPI's launchers set for theirs. Accelerate believes it on CPUs, and would wait for as many processes.
_MPI = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_RANK", "MV2_COMM_WORLD_", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_PROCESSES = {"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "orted", "prted", "hydra_pmi_proxy"}
# A task's place among those that `srun` has started; a shell started by `srun --pty` has one too, and hands it on.
_SLURM_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
_REAPERS = {"init", "systemd", "tini", "dumb-init", "docker-init", "catatonit", "containerd-shim", "slurmstepd"}
_LAUNCHERS = ("accelerate", "accelerate-launch", "launch.py", "accelerate.commands.launch", "distill.commands.launch")

POLL_SECONDS = 1.0


class LaunchError(ValueError):
    """What the environment says of launched processes makes no sense; one line."""


def launched_rank() -> int:
    """This process's rank as its launcher says, before any process group exists."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0  # `settle` refuses what is none


def launched_world_size() -> int:
    """The number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Puts aside what other launchers, or earlier ones of this shell, have left in the environment; a warning says so.

    Raises:
        LaunchError: a rank or number of processes that is none, or processes that mpirun or srun has started by the
            number, each of which would take itself for the only one.
    """
    _check_numbers(environment)
    launched = "RANK" in environment and "WORLD_SIZE" in environment
    if not launched:
        left = {key: environment[key] for key in _NUMBERS if key in environment}
        _remove(environment, _OURS, ("TORCHELASTIC_",))
        if left:
            log.warning(
                "no launcher has started this process: %s, which the environment still says, is put aside",
                " ".join(f"{key}={value}" for key, value in left.items()),
            )
    _put_mpi_aside(environment, launched)
    if not launched and "SLURM_PROCID" in environment and _has_terminal():  # a shell within `salloc` or `srun --pty`
        _remove(environment, _SLURM_TASK)


def only_one_process() -> str | None:
    """A line about `accelerate launch --num_processes N` that starts one process, as it does without a GPU unless it is
    given a way to distribute; None if that is not so."""
    if "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    try:
        arguments = " ".join(psutil.Process().parent().cmdline())
    except (psutil.Error, AttributeError):
        return None
    number = re.search(r"--num[_-]processes[ =](\d+)", arguments)
    if number is None or int(number[1]) < 2:
        return None
    return (
        f"accelerate launch is to start {number[1]} processes and has started one, which does all of the work: "
        "use distill launch, or add --multi_gpu, which starts them on CPUs too"
    )


def require_one_task(environment: MutableMapping[str, str] = os.environ) -> None:
    """Raises LaunchError if srun started several of this process, which know nothing of each other."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in environment and "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1:
        raise LaunchError(
            f"srun has started {tasks} of these processes, and each would take itself for the only one: use "
            "distill submit, or srun --ntasks-per-node=1 python -m distill.cluster.node, which start a launcher on "
            "each node"
        )


def _check_numbers(environment: MutableMapping[str, str]) -> None:
    for key in _NUMBERS:
        value = environment.get(key, "1")
        if not value.isdigit() or (key.endswith("SIZE") and int(value) < 1):
            raise LaunchError(f"the environment says {key}={value!r}, which is no number of a launcher: unset {key}")
    rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is not None and size is not None and int(rank) >= int(size):
        raise LaunchError(f"the environment says RANK={rank} of WORLD_SIZE={size}: unset both, or set a smaller RANK")


def _put_mpi_aside(environment: MutableMapping[str, str], launched: bool) -> None:
    found = [(key, environment[key]) for key in _MPI_SIZES if environment.get(key, "1") not in ("", "1")]
    if found and not launched:
        key, size = found[0]
        if _started_by(_MPI_PROCESSES):
            raise LaunchError(
                f"mpirun has started {size} of these processes, and each would take itself for the only one: use "
                f"distill launch --num_processes {size} in its place"
            )
        log.warning("no mpirun has started this process: %s=%s is put aside", key, size)
    _remove(environment, (), _MPI)


def _remove(environment: MutableMapping[str, str], names: tuple[str, ...], starts: tuple[str, ...] = ()) -> None:
    for key in list(environment):
        if key in names or (starts and key.startswith(starts)):
            del environment[key]


def _started_by(names: set[str]) -> bool:
    try:
        return any(process.name() in names for process in psutil.Process().parents())
    except psutil.Error:
        return False


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal, as those have that a person starts in a shell."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    except OSError:
        return False


# ---- the launcher -------------------------------------------------------------------------------------------------


class _Launcher:
    """The process that started this one as a rank, and the thread that looks whether it is there."""

    pid: int | None = None
    saves = False  # whether the loop looks itself, and saves


def follow_launcher() -> None:
    """Ends this process by SIGTERM once its launcher is gone, unless `launcher_gone` is looked at; if one started it.

    What a person starts from a shell outlives that shell, as usual.
    """
    if _Launcher.pid is not None or not _is_launched():
        return
    _Launcher.pid = os.getppid()
    threading.Thread(target=_watch, name="launcher", daemon=True).start()


def launcher_gone() -> bool:
    """Whether the launcher that started this process has ended without it."""
    return _Launcher.pid is not None and (os.getppid() != _Launcher.pid or _is_orphan())


def save_without_launcher() -> None:
    """From now on the caller checks `launcher_gone`, saves and ends: nothing else ends this process."""
    _Launcher.saves = True


def _watch() -> None:
    while not launcher_gone():
        time.sleep(POLL_SECONDS)
    if not _Launcher.saves:
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launched() -> bool:
    """Whether the parent is a launcher: one of ranks, or `accelerate launch` with a single process, which has none."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    try:
        parent = psutil.Process(os.getppid())
        python = parent.name().startswith("python")
        names = [os.path.basename(argument) for argument in parent.cmdline()[1:4]]
    except psutil.Error:
        return False
    return python and ("RANK" in os.environ or any(name in _LAUNCHERS for name in names))


def _is_orphan() -> bool:
    """Whether the launcher was gone before this process could look: then its parent is one that adopts."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip() in _REAPERS
    except OSError:
        return False
