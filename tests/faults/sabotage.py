"""Faults in a real run, put in from outside: `python -m tests.faults.sabotage FAULTS.json scripts/train.py SETTINGS`.

The product has no hooks for this. What happens, and where, is a list of objects:

    {"do": "kill", "rank": 1, "step": 3}                in the middle of optimizer step 3 (counted from 0)
    {"do": "kill", "rank": 0, "save": 1, "touch": 7}    before the 7th touch of a file in the first save of this start,
                                                        or at its end if there are no more
    {"do": "SIGTERM", ...}                              the same two with a signal, or with several: "SIGUSR1 SIGTERM"
    {"do": "hang", ...}                                 the same two, for ever; "freeze" stops all threads of Python;
                                                        "sleep" with "seconds" is over by itself
    {"do": "kill wandb", ...}                           the same two: its service process
    {"do": "flip", ...}                                 the same two: one bit of the teacher's first weight
    {"do": "limit", "bytes": 8000, ...}                 the same two: no file can be longer from then on
    {"do": "hang", "rank": 1, "batch": 3}               in the reading of its 3rd micro-batch, in whichever process
    {"do": "unreadable", "rank": 1, "batch": 3}         likewise: no file of a store can be read there from then on,
                                                        or, with "for": 2, the next two reads fail
    {"do": "nan", "rank": 1, "step": 3, "of": "loss"}   or "gradient"; "inf" in the place of "nan", or "spike"
    {"do": "nudge", "rank": 1, "step": 3, "of": "gradient"}  a relative 1e-6, and in the first backward pass alone
    {"do": "nan", "positions": [36, 40], ...}           wherever a batch has one of these positions, whatever the step
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from distill.data.reader import Store
from distill.methods.base import Losses, Turn
from distill.training.checkpoint import Checkpoints
from distill.training.engine import Engine

Fault = dict[str, Any]
FACTORS = {"nan": float("nan"), "inf": float("inf"), "spike": 1e4, "nudge": 1 + 1e-6}
_ENGINES: list[Engine] = []  # the last one is that of the step
TOUCHES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir")


def install(faults: Sequence[Fault], rank: int) -> None:
    """Puts in those that are meant for this rank."""
    mine = [fault for fault in faults if fault["rank"] == rank]
    for fault in mine:
        if "save" in fault:
            _Touches(fault).watch()
        elif "batch" in fault:
            _before(Store, "fill", _Once(fault))
        elif fault["do"] in FACTORS:
            _spoil(fault)
        else:
            _in_step(fault)


def _do(fault: Fault) -> None:
    if fault["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault["do"] == "sleep":
        time.sleep(fault["seconds"])
    elif fault["do"] == "hang":
        while True:
            time.sleep(1)
    elif fault["do"] == "freeze":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # none of them wakes it
        ctypes.PyDLL(None).sleep(1000)  # unlike CDLL, it does not let go of the interpreter
    elif fault["do"] == "unreadable":
        os.preadv = _Unreadable(fault.get("for"))  # type: ignore[assignment]
    elif fault["do"] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))
    elif fault["do"] == "flip":
        next(iter(_ENGINES[-1]._denoisers["teacher"].module.parameters())).data.view(torch.int32).view(-1)[0] ^= 1
    elif fault["do"] == "kill wandb":
        for _ in range(300):  # it is started beside the training, which need not wait for it
            if found := [p for p in psutil.Process().children(recursive=True) if p.name().startswith("wandb-core")]:
                break
            time.sleep(0.1)
        found[0].kill()
    else:
        for name in fault["do"].split():
            os.kill(os.getpid(), signal.Signals[name])


class _Unreadable:
    """In the place of `os.preadv`: fails so many times, or always."""

    def __init__(self, times: int | None) -> None:
        self.left, self._preadv = times, os.preadv

    def __call__(self, *args: Any) -> int:
        if self.left is not None:
            self.left -= 1
        if self.left is None or self.left >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._preadv(*args)


class _Once:
    """Does it at the so-manieth call."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.left = multiprocessing.get_context("fork").Value("i", int(fault["batch"]))  # of all processes that read

    def __call__(self, *_: Any) -> None:
        with self.left.get_lock():
            self.left.value -= 1
            now = self.left.value == 0
        if now:
            _do(self.fault)


def _before(owner: Any, name: str, action: Callable[..., object]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


class _Touches:
    """Counts this process's touches of files in a save: of Python's own, of fsync, and of what writes tensors.

    Those of the thread that trains until it goes on, and then those of the thread that writes. "list" in the fault
    names a file: there every touch of that save is written down, and nothing happens.
    """

    def __init__(self, fault: Fault) -> None:
        self.fault, self.saves, self.written = fault, 0, 0
        self.threads: set[int] = set()  # in which it is that save
        self.names: list[str] = []

    def watch(self) -> None:
        begin, write = Checkpoints.begin, Checkpoints._write

        def begun(checkpoints: Checkpoints, *args: Any, **settings: Any) -> None:
            self.saves += 1
            with self.counting(self.saves):
                begin(checkpoints, *args, **settings)

        def wrote(checkpoints: Checkpoints, *args: Any) -> None:
            self.written += 1
            with self.counting(self.written):
                write(checkpoints, *args)
                self.touch("the end")
            if self.written == self.fault["save"] and "list" in self.fault:
                Path(self.fault["list"]).write_text(json.dumps(self.names))

        Checkpoints.begin, Checkpoints._write = begun, wrote  # type: ignore[assignment, method-assign]
        sys.addaudithook(lambda event, args: self.touch(f"{event} {args[0]}") if event in TOUCHES else None)
        _before(os, "fsync", lambda *_: self.touch("fsync"))
        _before(torch, "save", lambda *_: self.touch("torch.save"))

    @contextmanager
    def counting(self, number: int) -> Iterator[None]:
        thread = threading.get_ident()
        if number == self.fault["save"]:
            self.threads.add(thread)
        try:
            yield
        finally:
            self.threads.discard(thread)

    def touch(self, name: str) -> None:
        if threading.get_ident() not in self.threads or ("/" in name and "checkpoints" not in name):
            return
        self.names.append(name)
        number = self.fault.get("touch")
        if len(self.names) == number or (name == "the end" and number and len(self.names) < number):
            _do(self.fault)


def _in_step(fault: Fault) -> None:
    """Between forward and backward, when other ranks wait for this one's gradient or are about to."""
    _around_loss(fault, lambda losses: (_do(fault), losses)[1])


def _spoil(fault: Fault) -> None:
    value, left = FACTORS[fault["do"]], [1 if fault["do"] == "nudge" else None]

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            if left[0] is not None:
                left[0] -= 1
            return gradient * value if left[0] is None or left[0] == 0 else gradient

    def spoiled(losses: Losses) -> Losses:
        total = losses.total * value if fault["of"] == "loss" else Spoiled.apply(losses.total)
        return Losses(total, losses.parts)

    _around_loss(fault, spoiled)


def _around_loss(fault: Fault, change: Callable[[Losses], Losses]) -> None:
    update = Engine.update
    where = fault.get("positions", (0, 0))

    def changed(engine: Engine, turn: Turn, micro_batches: Any, step: int, *more: Any) -> None:
        _ENGINES.append(engine)
        met = any(position in range(*where) for batch in micro_batches for position in batch.positions)
        if step == fault.get("step") or met:
            turn = Turn(turn.updates, lambda *args, loss=turn.loss: change(loss(*args)))
        update(engine, turn, micro_batches, step, *more)

    Engine.update = changed  # type: ignore[method-assign]


def run(script: str, arguments: Sequence[str]) -> None:
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    install(json.loads(Path(sys.argv[1]).read_text()), int(os.environ.get("RANK", 0)))
    run(sys.argv[2], sys.argv[3:])
