"""A real SLURM on this machine: munged, slurmctld and two slurmd, with ports, keys and folders of their own.

The nodes are called 127.0.0.1 and 127.0.0.2, so that their names resolve wherever there is a loopback device; each says
that it has two GPUs, which are two files. Nothing is needed of the machine but the programs, and root.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def missing() -> str | None:
    """Why there can be no cluster here."""
    if lacking := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"{lacking[0]} is not installed: scripts/install_slurm.sh does it"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


@dataclass(frozen=True)
class Cluster:
    """What tests ask of a cluster that runs."""

    environment: dict[str, str]

    def call(self, *command: str, both: bool = False, **more: str) -> str:
        """The output (`both`: the errors too) of a command that may use the cluster; an error if it fails."""
        environment = self.environment | more
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return (done.stdout + done.stderr * both).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, ExitCode, Restarts and so on."""
        line = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.partition("=")[::2] for word in line.split() if "=" in word)

    def listed(self, *command: str) -> list[str]:
        """The words that squeue or sinfo prints; none while the cluster is not up."""
        given = [*command, "--noheader"]
        return subprocess.run(given, env=self.environment, capture_output=True, text=True).stdout.split()

    def ended(self, job: str, seconds: float = 400) -> dict[str, str]:
        """The facts of a job once it has ended, for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.facts(job)["JobState"] in over, seconds, lambda: str(self.facts(job)))
        return self.facts(job)


ROOT = Path(__file__).parents[2]


def until(true: Callable[[], bool], seconds: float = 400, why: Callable[[], str] = str, every: float = 0.05) -> None:
    """Waits until something is true. The seconds are for machines that have much else to do."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {why()}"
        time.sleep(every)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Starts a cluster; when left, ends all that it started. Its folder's name is short: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        with _cluster(Path(folder)) as one:
            yield one


@contextmanager
def _cluster(folder: Path) -> Iterator[Cluster]:
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
    _write_configuration(folder)
    processes: list[psutil.Popen] = []

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.out").open("w") as out:
            processes.append(psutil.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))

    try:
        key, munge = folder / "munge" / "key", folder / "munge"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=environment, check=True)
        files = [f"--{kind}-file={munge / kind}" for kind in ("pid", "log", "seed")]
        # A folder that is its user's alone is no place for a socket, munged finds; here it is right.
        start(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}", *files
        )
        until((munge / "socket").exists, 10, (folder / "munged.out").read_text)
        start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            start(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        one = Cluster(environment)
        until(lambda: one.listed("sinfo", "--Node", "--format=%T") == ["idle"] * 2, 30, lambda: _outputs(folder))
        try:
            yield one
        finally:
            one.call("scancel", f"--user={getpass.getuser()}")
            until(lambda: one.listed("squeue") == [], 60)
    finally:
        _end(processes, str(folder))


def _outputs(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("*.out"))


def _end(processes: list[psutil.Popen], folder: str) -> None:
    """Ends these processes, and what is left of those that slurmd started for jobs: they are nobody's children."""
    for process in reversed(processes):
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    left = [process for process in psutil.process_iter() if _of_cluster(process, folder)]
    for process in [*alive, *left]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs([*alive, *left], timeout=10)


def _of_cluster(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get("SLURM_CONF", "").startswith(f"{folder}/")
    except psutil.Error:
        return False


def _write_configuration(folder: Path) -> None:
    for name in ("state", "munge"):
        (folder / name).mkdir(mode=0o700)
    controller, first, last = _free_ports(3)
    host = socket.gethostname().partition(".")[0]
    user = getpass.getuser()
    lines = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge' / 'socket'},cred_expire=5",  # a job goes back to the queue after this
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",  # more processors than there are
        "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0",
        "ReturnToService": 2,
        "KillWait": 5,
        "MailProg": "/bin/true",
        "GresTypes": "gpu",
    }
    nodes = f"NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=16 Gres=gpu:2"
    nodes += "\nPartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "slurm.conf").write_text("".join(f"{key}={value}\n" for key, value in lines.items()) + nodes)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")


def _free_ports(count: int) -> list[int]:
    """Ports that follow one another, free just now."""
    for first in range(26817, 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + i))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError("no free ports")
