"""Python programs that start in a moment: forks of a process that has imported everything.

A start of `python -m distill train` takes ten seconds of imports, and the tests start it often. What `python()` returns
is called as `sys.executable` is, with `-m MODULE …` or `SCRIPT …`. The program has arguments, an environment, a working
directory and standard streams of its own; signals reach it; its exit code is passed on; it dies with the process that
stands for it. What it does not have is a start of its own: tests of what happens before and while torch is loaded, of
times and of memory begin with `sys.executable`.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import signal
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
_SERVERS: list[Any] = []
RELAYED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@cache
def python() -> str:
    """The executable to call in the place of Python's; the process that forks starts with the first call."""
    import subprocess
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    executable, address = folder / "python", str(folder / "socket")
    executable.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} {address} "$0" "$@"\n')
    executable.chmod(0o700)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen([sys.executable, "-m", "tests.forked", address], cwd=ROOT, env=environment)
    _SERVERS.append(server)
    atexit.register(_end, server, folder)
    return str(executable)


def unlaunched() -> dict[str, str]:
    """The environment without what a launcher sets, and DeepSpeed, if an earlier test ran it in this process."""
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC")
    return {name: value for name, value in os.environ.items() if not name.startswith(left)}


def settled(since: float) -> None:
    """Waits for the ends of all programs that were started after a time: those of killed ones follow a moment later."""
    import time

    import psutil

    begun = time.monotonic()
    for server in _SERVERS:
        while left := [one for one in psutil.Process(server.pid).children() if one.create_time() >= since]:
            assert time.monotonic() - begun < 60, left
            time.sleep(0.01)


def _end(server: Any, folder: Path) -> None:
    import shutil

    server.kill()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)


def stand_for(address: str, executable: str, program: list[str]) -> NoReturn:
    """What the executable does: asks for a fork that runs the program, and ends as that does."""
    while program[0] == "-u":  # standard output is a file or a pipe here, and flushed at the end
        del program[0]
    if program[0].startswith("-") and program[0] not in ("-m", "-c"):
        os.execv(sys.executable, [sys.executable, *program])
    connection = _connect(address)
    ignored = [number for number in RELAYED if signal.getsignal(number) is signal.SIG_IGN]
    request = {"program": program, "executable": executable, "folder": os.getcwd(), "environment": dict(os.environ)}
    request["ignored"] = [int(number) for number in ignored]
    _send(connection, request, [0, 1, 2])
    pid = int(_line(connection))

    def relay(number: int, frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in RELAYED:
        signal.signal(number, relay)
    code = int(_line(connection))
    if code < 0:  # by a signal: the same one ends this process
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(address: str) -> None:
    """Forks for each request a process that looks after the program, which is one more fork."""
    import gc

    _import_all()
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    listener.settimeout(5)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                look_after(connection)
            finally:
                os._exit(1)
        connection.close()


def look_after(connection: socket.socket) -> NoReturn:
    """Runs the program, says its id and then its exit code, and kills it if nobody listens any more."""
    import select

    connection.setblocking(True)
    request, descriptors = _receive(connection)
    os.setsid()
    pid = os.fork()
    if pid == 0:
        connection.close()
        for standard, descriptor in enumerate(descriptors):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        _run(request)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{pid}\n".encode())
    watched = os.pidfd_open(pid)
    ready, _, _ = select.select([connection, watched], [], [])
    if watched not in ready:
        _kill(pid)
        os.killpg(0, signal.SIGKILL)  # this one, the program and its children
    _, status = os.waitpid(pid, 0)
    try:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    except OSError:
        pass
    os._exit(0)


def _kill(pid: int) -> None:
    """The program and all that it has started, in sessions of their own too."""
    import psutil

    program = psutil.Process(pid)
    for one in (program, *program.children(recursive=True)):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass


def _run(request: dict[str, Any]) -> NoReturn:
    """The program, from its fork to its end, which is that of a Python program."""
    import runpy
    import traceback
    from types import ModuleType

    code = 1
    try:
        environment, program = request["environment"], request["program"]
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(request["folder"])
        sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        sys.stderr.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
        is_script = program[0] not in ("-m", "-c")
        first = str(Path(program[0]).resolve().parent) if is_script else os.getcwd()
        added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:] = [first, *added, *(entry for entry in sys.path[1:] if entry != str(ROOT))]
        sys.argv = program if is_script else program[1:]
        sys.executable = request["executable"]  # so that what the program starts is forked, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        if is_script:
            runpy.run_path(program[0], run_name="__main__")
        elif program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = "-c"
            sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(program[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        import threading

        for thread in threading.enumerate():  # as an interpreter waits for them
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(code)


def _import_all() -> None:
    """What the product's commands import. Modules of the product itself are left to them."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    torch.set_num_threads(1)


def _connect(address: str) -> socket.socket:
    """A connection to the process that forks, which may be at its imports yet."""
    import time

    begun = time.monotonic()
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() - begun > 120:
                raise
            time.sleep(0.05)


def _send(connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    body = json.dumps(request).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    connection.sendmsg([len(body).to_bytes(8, "big")], ancillary)
    connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    left, body = int.from_bytes(head, "big"), b""
    while len(body) < left:
        body += connection.recv(left - len(body))
    return json.loads(body), list(descriptors)


def _line(connection: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n"):
        more = connection.recv(1)
        if not more:
            raise ConnectionError("the process that forks has ended")
        text += more
    return text.decode()


if __name__ == "__main__":
    stand_for(*sys.argv[1:3], sys.argv[3:]) if len(sys.argv) > 2 else serve(sys.argv[1])
