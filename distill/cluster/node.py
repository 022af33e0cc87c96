"""Starts the processes of one node of a job: a process for each GPU, all of which find those of the other nodes.

    srun --ntasks-per-node=1 python -m distill.cluster.node train experiment=lcm_lora_sdxl data.store=STORE …

It is `distill launch` with the flags that say how many nodes and processes there are, from SLURM's variables. Before
the command may stand `processes_per_node=8`, `launch_flag=--FLAG` for `distill launch` (as often as there are flags),
and `--`. If the environment says where the supervisor keeps its notes (JOB_NOTES), the exit code goes there too: that
of `srun` is one of all nodes'.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.cluster.job import check_earlier
from distill.cluster.scheduler import NOTES, Slurm

NEEDED = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NODEID")


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of the process that failed first on this node, or 0."""
    if arguments in ([], ["-h"], ["--help"]):
        print(__doc__)
        return 0 if arguments else 2
    try:
        command = launch_command(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for the processes that train, which set their own handlers
    for number in (signal.SIGTERM, signal.SIGINT):  # the launcher hands these on, and is waited for
        signal.signal(number, lambda number, frame: None)
    code = subprocess.Popen(command).wait()
    code = code if code >= 0 else 128 - code
    if notes := os.environ.get(NOTES):
        (Path(notes) / f"exit-{os.environ['SLURM_NODEID']}").write_text(f"{code}\n")
    return code


def launch_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """`distill launch` for this node, and the command after it.

    Raises:
        ValueError: this is no step of a SLURM job, or the arguments are not understood.
    """
    check_earlier(environment)
    if missing := [name for name in NEEDED if name not in environment]:
        raise ValueError(
            f"{missing[0]} is not set: this is for srun, within a job of SLURM; elsewhere use distill launch"
        )
    processes, flags, command = parsed(arguments)
    on_node = processes or int(environment.get("SLURM_GPUS_ON_NODE", 1))
    nodes = int(environment["SLURM_NNODES"])
    where = {**Slurm(environment).settings(), **environment} if "MASTER_ADDR" not in environment else environment
    options = {
        "num_processes": on_node * nodes,
        "num_machines": nodes,
        "machine_rank": environment["SLURM_NODEID"],
        "rdzv_backend": "static",
        "main_process_ip": where["MASTER_ADDR"],
        "main_process_port": where["MASTER_PORT"],
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    said = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "distill", "launch", *flags, *said, *command]


def parsed(arguments: Sequence[str]) -> tuple[int | None, list[str], list[str]]:
    """Processes per node, flags of the launcher, and the command. Raises ValueError."""
    processes, flags = None, []
    left = list(arguments)
    while left and (left[0] == "--" or left[0].startswith(("processes_per_node=", "launch_flag="))):
        one = left.pop(0)
        if one == "--":
            break
        key, _, value = one.partition("=")
        if key == "launch_flag":
            flags.append(value)
        elif not value.isdigit() or int(value) < 1:
            raise ValueError(f"processes_per_node={value!r} is no number of processes")
        else:
            processes = int(value)
    if not left:
        raise ValueError("no command is given: train SETTINGS, or another that distill launch starts")
    return processes, flags, left


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
