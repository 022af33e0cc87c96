"""What a supervisor does with SLURM about its own job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping

LISTENED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
SECONDS = 60  # for an answer of SLURM's controller
TRIES, PAUSE = 6, 10.0  # a controller that is restarted is back within a minute


def with_signals() -> None:
    """Lets a child, before it runs its program, receive the signals that the supervisor blocks for itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LISTENED)


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
    hosts = called("scontrol", "show", "hostnames", environment.get("SLURM_JOB_NODELIST", ""))
    return hosts.split()[0] if hosts and hosts.split() else "127.0.0.1"


def called(*command: str) -> str | None:
    """What one of SLURM's commands prints; None if it fails, which it then says itself."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, preexec_fn=with_signals)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}", flush=True)
        return None
    return done.stdout if done.returncode == 0 else None
