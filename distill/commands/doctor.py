"""Checks the machine, a line for each thing, with what to do about it: `distill doctor`

    distill doctor                     # versions, devices, processes that compute together, the disk of this folder
    distill doctor path=/scratch/me    # the disk at another place

Exit code 0 if training can be begun, 1 if something has to be repaired first.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from distill.models.devices import (
    USE_CPU,
    VISIBLE,
    cpu_is_asked_for,
    described,
    found_gpus,
    gpu_count,
    gpu_is_used,
    reason,
)

OK, NOTE, BAD = "ok", "note", "BAD"
WRITTEN_BYTES = 64 << 20
SECONDS = 120.0  # for two processes to start, connect and sum a tensor
RANK = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
ones = torch.ones(1 << 20)
dist.all_reduce(ones)
assert ones[0] == dist.get_world_size()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Args:
        state: `ok`, `note` (works, and may not be what is wanted) or `BAD`.
        remedy: what to do, if anything.
    """

    state: str
    name: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<5} {self.name:<10} {self.found}"
        return f"{line}\n{'':<17}-> {self.remedy}" if self.remedy else line


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    unknown = [argument for argument in arguments if not argument.startswith("path=")]
    if unknown:
        print(f"error: unknown setting {unknown[0][:60]!r}: allowed is path=FOLDER", file=sys.stderr)
        return 2
    path = Path(arguments[-1].removeprefix("path=") if arguments else ".").expanduser()
    worst = OK
    for finding in findings(path):
        print(finding, flush=True)
        worst = BAD if BAD in (worst, finding.state) else worst
    return 1 if worst == BAD else 0


def findings(path: Path) -> Iterator[Finding]:
    """Everything that is checked, quick things first; `path` is where runs would be written."""
    yield Finding(OK, "python", f"{platform.python_version()} in {sys.prefix}")
    yield from packages()
    yield processors()
    yield devices()
    yield disk(path)
    yield links(path)
    yield scheduler()
    yield ranks()


def packages() -> Iterator[Finding]:
    """Required packages that are missing, installed ones out of their range, and extras that are not installed."""
    wrong, lacking = [], set()
    for text in requires("distill") or ():
        wanted = Requirement(text)
        extras = extras_of(wanted)
        if wanted.name == "distill" or (wanted.marker and not any(map(wanted.marker.evaluate, extras))):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            if extras != [{"extra": ""}]:
                lacking |= {extra["extra"] for extra in extras}
                continue
            wrong.append((f"{wanted.name} is not installed", text))
        else:
            if not wanted.specifier.contains(found, prereleases=True):
                wrong.append((f"{wanted.name} {found}, needed is {wanted.specifier}", text))
    for said, text in wrong:
        yield Finding(BAD, "packages", said, f"pip install '{text.partition(';')[0].strip()}'")
    if not wrong:
        names = ("torch", "accelerate", "diffusers", "peft", "transformers")
        yield Finding(OK, "packages", ", ".join(f"{name} {version(name)}" for name in names))
    if lacking := lacking - {"dev"}:
        remedy = f"pip install 'distill[{','.join(sorted(lacking))}]', for what needs them"
        yield Finding(NOTE, "extras", f"not installed: {', '.join(sorted(lacking))}", remedy)


def extras_of(wanted: Requirement) -> list[dict[str, str]]:
    """The extras of a requirement, as its marker reads them; of what is always needed the empty one."""
    named = re.findall(r"extra == \"([\w-]+)\"", str(wanted.marker or ""))
    return [{"extra": name} for name in named] or [{"extra": ""}]


def processors() -> Finding:
    """How many cores this process may use, and how much memory the machine has."""
    import psutil

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    found = f"{cores} cores, {memory.total / 2**30:.0f} GiB of memory, {memory.available / 2**30:.0f} free"
    return Finding(OK, "processor", found)


def devices() -> Finding:
    """The device that commands compute on, or why they would refuse to."""
    import torch

    if gpu_is_used():
        return Finding(OK, "device", described(torch.device("cuda"), gpu_count()))
    if cpu_is_asked_for():
        name = VISIBLE if VISIBLE in os.environ and USE_CPU not in os.environ else USE_CPU
        said = f"{name}={os.environ[name]!r}"
        return Finding(NOTE, "device", f"CPU: {said} hides GPUs", f"unset {name} to use them")
    if (found := found_gpus()) is None:
        return Finding(NOTE, "device", "CPU: no NVIDIA driver was found", "the toy trains here, larger teachers do not")
    return Finding(BAD, "device", f"{found}, and torch can use none", reason(torch.__version__, torch.version.cuda))


def disk(path: Path) -> Finding:
    """How fast a file is written until it is on the disk, and how much fits."""
    return tried("disk", path, _written)


def links(path: Path) -> Finding:
    """Whether files can have two names: stores are published faster with them, and are right without."""
    return tried("hard links", path, _linked)


def tried(name: str, path: Path, check: Callable[[Path], Finding]) -> Finding:
    """What a check finds in a folder of its own at a path."""
    try:
        with tempfile.TemporaryDirectory(dir=path, prefix=".doctor-") as folder:
            return check(Path(folder))
    except OSError as error:
        remedy = "choose a folder that can be written to, path=FOLDER"
        return Finding(BAD, name, f"{path}: {error.strerror}", remedy)


def _written(folder: Path) -> Finding:
    start = time.perf_counter()
    with open(folder / "file", "wb") as file:
        file.write(os.urandom(WRITTEN_BYTES))
        file.flush()
        os.fsync(file.fileno())
    speed, free = WRITTEN_BYTES / 2**20 / (time.perf_counter() - start), shutil.disk_usage(folder).free / 2**30
    found = f"{speed:.0f} MiB/s written and synced, {free:.0f} GiB free at {folder.parent}"
    if free < 10:
        return Finding(NOTE, "disk", found, "checkpoints of SDXL take 2 to 40 GiB each: choose another place")
    return Finding(OK, "disk", found)


def _linked(folder: Path) -> Finding:
    (folder / "a").touch()
    try:
        os.link(folder / "a", folder / "b")
    except OSError as error:
        return Finding(NOTE, "hard links", f"none at {folder.parent} ({error.strerror}): files are renamed instead")
    return Finding(OK, "hard links", "can be made")


def scheduler() -> Finding:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        return Finding(NOTE, "SLURM", "no sbatch here: `distill submit` needs a login node")
    return Finding(OK, "SLURM", "sbatch is here")


def ranks() -> Finding:
    """Two processes that connect and sum a tensor, as those of a run do."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        script = Path(folder) / "rank.py"
        script.write_text(RANK)
        command = [sys.executable, "-m", "distill", "launch", "--num_processes", "2", str(script)]
        own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        start = time.perf_counter()
        try:
            done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            remedy = "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface that connects nodes"
            return Finding(BAD, "processes", f"two have not connected within {SECONDS:.0f} s", remedy)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        return Finding(
            BAD, "processes", f"two have not connected: {last[:200]}", "see the error; a firewall may be in the way"
        )
    return Finding(
        OK, "processes", f"two connected and summed a tensor over gloo in {time.perf_counter() - start:.0f} s"
    )
