"""Launches that cost a fork in the place of seconds of imports: what a launcher does, for as many ranks as are wanted.

`python -m tests.faults.ranks` imports everything once. Each line that it then reads is a request; it forks a launcher
for it, which forks the ranks, ends all of them when one has failed, and writes down how it went.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.forked import python

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0  # seconds from SIGTERM to SIGKILL
LIMIT = 300.0  # of a launch


@dataclass(frozen=True)
class Ended:
    """How a launch went: the exit codes of its ranks, seconds from the first end to the last, and what they said."""

    codes: list[int]
    seconds: float
    said: str


class Launch:
    """Ranks that run."""

    def __init__(self, pid: int, log: Path) -> None:
        self.log, self._result = log, log.with_suffix(".json")
        self._process = psutil.Process(pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ranks(self) -> list[psutil.Process]:
        """Their processes, in order, once all are there."""
        return sorted(self._process.children(), key=lambda p: p.pid)

    def running(self) -> bool:
        return not self._result.exists()

    def kill(self) -> Ended:
        """Ends every process at once, without a word."""
        doomed = [self._process, *self._process.children(recursive=True)] if self.running() else []
        for one in doomed:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(doomed, timeout=60)
        return Ended([-9], 0.0, self.log.read_text())

    def wait(self) -> Ended:
        while self.running():
            assert self._process.is_running(), self.log.read_text()[-4000:]
            time.sleep(0.02)
        return Ended(**json.loads(self._result.read_text()), said=self.log.read_text())


class Ranks:
    """The server, from the side of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [python(), "-m", "tests.faults.ranks"],
            cwd=ROOT,
            env={name: value for name, value in environment.items() if not name.startswith(("SLURM", "WANDB"))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        arguments: Sequence[str],
        ranks: int = 1,
        faults: Sequence[dict[str, Any]] = (),
        environment: dict[str, str] | None = None,
        script: str = "train",
        disk: tuple[Path, int] | None = None,
    ) -> Launch:
        """Starts a script with settings, on so many ranks, with faults as tests/faults/sabotage.py has them.

        `disk` is a folder that is not there yet and the KiB that fit in it; what it then holds is put there at the end.
        """
        self._count += 1
        log = self.folder / f"launch-{self._count:03d}.log"
        request = {"arguments": list(arguments), "ranks": ranks, "faults": list(faults), "log": str(log)}
        request["script"] = str(ROOT / f"scripts/{script}.py")
        request["disk"] = None if disk is None else (str(disk[0]), disk[1])
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({**request, "environment": environment or {}}) + "\n")
        self._server.stdin.flush()
        return Launch(int(self._server.stdout.readline()), log)

    def run(self, arguments: Sequence[str], *args: Any, **kwargs: Any) -> Ended:
        return self.start(arguments, *args, **kwargs).wait()

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


def serve() -> None:
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a launcher
    for line in sys.stdin:
        request = json.loads(line)
        Path(request["log"]).touch()
        print(_forked(partial(launch, **request)), flush=True)


def launch(
    script: str,
    arguments: list[str],
    ranks: int,
    faults: list[Any],
    log: str,
    environment: dict[str, str],
    disk: tuple[str, int] | None,
) -> None:
    """Forks the ranks and looks after them, as `accelerate launch` does."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(environment)
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    if disk is not None:
        mount_small(*disk)
    port = _free_port()
    started = {_forked(partial(work, script, arguments, faults, r, ranks, port)): r for r in range(ranks)}
    signal.signal(signal.SIGTERM, lambda *_: _send(started, signal.SIGTERM))
    codes: dict[int, int] = {}
    first, deadline, termed = None, time.monotonic() + LIMIT, False
    while len(codes) < ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in started:
            codes[started.pop(pid)] = os.waitstatus_to_exitcode(status)
            first = first or time.monotonic()
            if any(codes.values()) and not termed:
                termed, deadline = True, time.monotonic() + PATIENCE
                _send(started, signal.SIGTERM)
        elif time.monotonic() > deadline:
            _send(started, signal.SIGKILL)
        time.sleep(0.01)
    result = {"codes": [codes[r] for r in range(ranks)], "seconds": time.monotonic() - (first or 0)}
    if disk is not None:
        shutil.copytree(disk[0], f"{log}.disk")
        unmount(disk[0])
        shutil.copytree(f"{log}.disk", disk[0], dirs_exist_ok=True)
    aside = Path(log).with_suffix(".part")
    aside.write_text(json.dumps(result))
    aside.rename(Path(log).with_suffix(".json"))


def work(script: str, arguments: list[str], faults: list[Any], rank: int, ranks: int, port: int) -> None:
    """One rank, from its fork to its end."""
    from tests.faults import sabotage

    if ranks > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(n) for name, n in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sabotage.install(faults, rank)
    sabotage.run(script, arguments)


def _forked(action: Callable[[], None]) -> int:
    """The id of a child that does `action` and ends as a Python program would."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _send(processes: dict[int, int], number: signal.Signals) -> None:
    for pid in list(processes):
        os.kill(pid, number)


def mount_small(folder: str, kib: int) -> None:
    """Mounts a disk of that size, in memory, that only this process and its children see. Raises OSError."""
    new_mounts, new_user, private = 0x00020000, 0x10000000, 0x44000
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", new_mounts | (new_user if uid else 0))
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    Path(folder).mkdir(parents=True)
    _call("mount", b"none", b"/", None, private, None)
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={kib}k".encode())


def unmount(folder: str) -> None:
    _call("umount", folder.encode())


def _call(name: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def can_mount(folder: Path) -> bool:
    """Whether this machine lets us mount at all."""
    child = os.fork()
    if child == 0:
        try:
            mount_small(str(folder), 64)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _import_all() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  (brings a compiler with it)
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import tests.faults.sabotage  # noqa: F401

    torch.set_num_threads(1)
    import distill.commands.train  # noqa: F401


if __name__ == "__main__":
    serve()
