"""A job as a file: what it runs, how far that is, and how its processes are started on each node.

`distill submit` writes the file, and the supervisor, on the first node of the job, reads it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.data.storage import write_whole

EARLIER = {
    "GRACE_SECONDS": "slurm.grace_seconds=",
    "MAX_FAILURES": "slurm.max_failures=",
    "PROCESSES_PER_NODE": "slurm.processes_per_node=",
    "LAUNCH_FLAGS": "slurm.launch_flags=",
}
"""Environment variables that said what settings say now."""


def check_earlier(environment: Mapping[str, str]) -> None:
    """Raises ValueError for an environment variable that earlier versions read."""
    if left := [name for name in EARLIER if name in environment]:
        raise ValueError(f"the environment variable {left[0]} is a setting now: {EARLIER[left[0]]}…; unset it")


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array.

    Args:
        name: for messages.
        command: what does the work. It runs once, on the first node; `Launcher.command` starts it on all of them.
        progress: a kind of `distill.cluster.progress.KINDS`, and a folder or URL.
        notes: the folder for what has to survive a requeue; each job has a folder of its own in it.
        grace_seconds: from the signal USR1 to the end of the job, as `sbatch --signal` says.
        max_failures: so often in a row a job is run again that failed and got no further.
    """

    name: str
    command: tuple[str, ...]
    progress: tuple[str, str]
    notes: str
    grace_seconds: int = 180
    max_failures: int = 3

    def write(self, path: Path) -> None:
        """Puts it where the job reads it. Nobody reads half a file, after a power loss either."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Job:
        """Raises ValueError: a file that is no job, in one line."""
        try:
            facts: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            kind, where = facts.pop("progress")
            job = cls(command=tuple(facts.pop("command")), progress=(kind, where), **facts)
            job.check()
            return job
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            said = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())[:200]
            raise ValueError(f"{path} is no job that distill submit has written: {said}") from None

    def check(self) -> None:
        """Raises ValueError: an empty command, or a value of another kind than it has to be."""
        texts = (self.name, *self.command, *self.progress, self.notes)
        if not self.command or not all(isinstance(text, str) for text in texts):
            raise ValueError("name, command, progress and notes must be texts, and the command not empty")
        for name in ("grace_seconds", "max_failures"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 10**9:
                raise ValueError(f"{name} must be a whole number from 0 to 10^9")


@dataclass(frozen=True)
class Launcher:
    """What starts a command on all nodes of a job: `srun` starts `distill.cluster.node` on each, which starts the rest.

    Args:
        python: the interpreter of each node.
        processes_per_node: None: one for each GPU of a node, or one.
        flags: of `distill launch`, beside those that say where the nodes are.
        container: what each node's processes run within, such as ("apptainer", "exec", "--nv", "distill.sif"); the
            interpreter is then the `python` of the container.
    """

    python: str = sys.executable
    processes_per_node: int | None = None
    flags: tuple[str, ...] = ()
    container: tuple[str, ...] = ()

    def command(self) -> tuple[str, ...]:
        """Is followed by what `distill launch` runs: `-m distill train …`, say."""
        count = () if self.processes_per_node is None else (f"processes_per_node={self.processes_per_node}",)
        python = "python" if self.container else self.python
        within = ("srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", *self.container, python)
        return (*within, "-m", "distill.cluster.node", *count, *(f"launch_flag={flag}" for flag in self.flags), "--")


def launched(
    command: str, settings: Mapping[str, Any], arguments: Sequence[str], launcher: Launcher, **limits: int
) -> Job:
    """The job of `distill COMMAND ARGUMENTS` on all nodes.

    Args:
        command: train or trajectories.
        settings: what the arguments come to.
        limits: grace_seconds and max_failures.
    """
    folder = Path(settings["output_dir"]).resolve()
    at = ("store", settings["data"]["store"]) if command == "trajectories" else ("run", str(folder))
    work = (*launcher.command(), "-m", "distill", command, *arguments)
    return Job(command, work, at, str(folder / "slurm"), **limits)
