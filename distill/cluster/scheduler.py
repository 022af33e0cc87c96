"""What a supervisor does with SLURM about its own job."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from distill.data.storage import write_whole

LISTENED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
SECONDS = 60  # for an answer of SLURM's controller
TRIES, PAUSE = 6, 10.0  # a controller that is restarted is back within a minute
NOTES = "JOB_NOTES"  # the variable that says where the supervisor of this process's job keeps its notes
WRONG_MACHINES = "wrong-machines"  # the note of what the work has found


def with_signals() -> None:
    """Lets a child, before it runs its program, receive the signals that the supervisor blocks for itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LISTENED)


def note_wrong_machines(names: Iterable[str], environment: Mapping[str, str] = os.environ) -> None:
    """Tells the supervisor of this process's job, if it has one, which machines compute or remember wrongly."""
    if notes := environment.get(NOTES):
        write_whole(Path(notes) / WRONG_MACHINES, "".join(f"{name}\n" for name in names))


def this_machine(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this machine: as SLURM knows it, within a job's step."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


class Slurm:
    """The job that this process is a part of.

    Args:
        environment: of the batch script.
    """

    name = "SLURM"

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.environment = environment
        self.job = job_of(environment)

    def settings(self) -> dict[str, str]:
        """Variables for the work: where its processes connect, and the CPUs of each, which srun does not pass on."""
        number = int(self.environment["SLURM_JOB_ID"])
        found = {"MASTER_ADDR": first_host(self.environment), "MASTER_PORT": str(20000 + number % 20000)}
        if cpus := self.environment.get("SLURM_CPUS_PER_TASK"):
            found["SRUN_CPUS_PER_TASK"] = cpus
        return found

    def signal(self, child: subprocess.Popen[bytes], number: int) -> None:
        """Sends a signal to the steps of this job, which are the launchers and what they have started; SIGTERM to the
        child, too: what has no steps does not listen to USR1."""
        if number != signal.SIGUSR1:
            child.send_signal(number)
        called("scancel", f"--signal={signal.Signals(number).name.removeprefix('SIG')}", self.job)

    def cancelled(self) -> bool:
        """Whether somebody has cancelled this job."""
        done = called("scontrol", "--oneliner", "show", "job", self.job)
        return done is not None and re.search(r"JobState=CANCELLED", done) is not None

    def requeue(self) -> bool:
        """Puts this job back to the queue; whether SLURM has done so."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE)
            if called("scontrol", "requeue", self.job) is not None:
                return True
        return False

    def exclude(self, machines: Sequence[str]) -> str:
        """Keeps this job off machines from now on; returns what came of it, for the log.

        It has to be in the queue, where `requeue` has put it: SLURM changes this of no other job. The supervisor has
        until SLURM kills it (KillWait, 30 s by default), for it does not end at SIGTERM.
        """
        shown = called("scontrol", "--oneliner", "show", "job", self.job) or ""
        earlier = hosts(_field(shown, "ExcNodeList"))
        wanted = [*earlier, *(name for name in machines if name not in earlier)]
        partition = self.environment.get("SLURM_JOB_PARTITION", "")
        there = _field(called("scontrol", "--oneliner", "show", "partition", partition) or "", "TotalNodes")
        needed = int(self.environment.get("SLURM_JOB_NUM_NODES", 1))
        named = ", ".join(machines)
        if there.isdigit() and int(there) - len(wanted) < needed:
            return f"{named} cannot be left out: of {there} nodes of {partition} too few would be left"
        if called("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={','.join(wanted)}") is None:
            return (
                f"SLURM has not left out {named}: submit it again with slurm.options=['--exclude={','.join(wanted)}']"
            )
        return f"it is kept off {named} from now on"


class Alone:
    """No SLURM: signals go to the work itself, and exit code 75 says that it is to be run again."""

    name = "this machine"
    job = "alone"

    def settings(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def signal(self, child: subprocess.Popen[bytes], number: int) -> None:
        """Sends a signal to the work."""
        child.send_signal(number)

    def cancelled(self) -> bool:
        """False: nobody can."""
        return False

    def requeue(self) -> bool:
        """False: there is no queue."""
        return False

    def exclude(self, machines: Sequence[str]) -> str:
        """Says that it is to be run again elsewhere."""
        return f"on another machine than {', '.join(machines)}"


def scheduler(environment: Mapping[str, str] = os.environ) -> Slurm | Alone:
    """SLURM within one of its jobs, otherwise this machine alone."""
    return Slurm(environment) if "SLURM_JOB_ID" in environment else Alone()


def job_of(environment: Mapping[str, str]) -> str:
    """The job's id. A task of an array is named by the array: the last task's own number is that of the array,
    which must not be signalled or requeued for it."""
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def first_host(environment: Mapping[str, str]) -> str:
    """The name of the job's first node."""
    return next(iter(hosts(environment.get("SLURM_JOB_NODELIST", ""))), "127.0.0.1")


def hosts(listed: str) -> list[str]:
    """The names in one of SLURM's lists, such as `n[1-3],gpu7`."""
    if listed in ("", "(null)"):
        return []
    return (called("scontrol", "show", "hostnames", listed) or "").split()


def _field(shown: str, name: str) -> str:
    """A value of what scontrol shows in one line; empty without it."""
    found = re.search(rf"(?:^|\s){name}=(\S*)", shown)
    return found[1] if found else ""


def called(*command: str) -> str | None:
    """What one of SLURM's commands prints; None if it fails, which it then says itself."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, preexec_fn=with_signals)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}", flush=True)
        return None
    return done.stdout if done.returncode == 0 else None
