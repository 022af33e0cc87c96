"""A run that waits for something that does not come says for what, shows where all ranks stand, and ends.

Commands are watched, too: each does something of which it notes the progress (`distill.data.progress`).

The rank that gives up asks the others through a file in the folder that all of them see, and each writes where its
threads stand to `hang-rank-N.txt` there; on GPUs, NCCL's flight recorder (its last collectives) to `hang-rank-N.nccl`.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import psutil

from distill.data.progress import begin, begun
from distill.training.launched import launched_rank

HUNG = 4  # exit code
JOIN_SAYS_SECONDS, JOIN_SECONDS = 20.0, 600.0
REQUEST = "hang-request"
POLL_SECONDS = 5.0  # at most, between two looks at the request
_STDERR = 2  # not sys.stderr, nor logging: the thread that hangs may hold their locks


class Watchdog:
    """Ends the process when one thing takes longer than the limit: a line, the stacks of all threads, exit code `HUNG`.

        with Watchdog(minutes=30) as watchdog:
            with watchdog.over("a batch from the loader"):
                batch = next(batches)

    On the other ranks the launcher then ends what this one has left alone; or their own watchdogs do.

    Args:
        minutes: the limit; None and 0 watch nothing.
        rank: named in the line.
        folder: where the ranks write their stacks; None: nowhere but to standard error.
        world_size: how many ranks there are; the one that gives up waits a moment for the files of the others.
        at: what else the process is at, and since when, by time.monotonic().

    Raises:
        ValueError: a limit below 0.
    """

    def __init__(
        self,
        minutes: float | None,
        rank: int = 0,
        folder: Path | None = None,
        world_size: int = 1,
        at: Callable[[], tuple[str, float] | None] = lambda: None,
    ) -> None:
        if minutes is not None and minutes < 0:
            raise ValueError(f"watchdog_minutes must be 0, which watches nothing, or above it, got {minutes}")
        self.rank, self.folder, self.world_size, self._at = rank, folder, world_size, at
        self._limit = 60 * minutes if minutes else None
        self._waits: tuple[str, float] | None = None  # for what, since when
        self._seen: int | None = None  # the request that is known
        self._beside: dict[int, tuple[str, float]] = {}  # what other threads do, since when, by their numbers
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit is not None:
            self._seen = self._request()
            self._thread = threading.Thread(target=self._watch, args=(self._limit,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Surrounds something that must end in time; such blocks may be nested, and the innermost one counts. After it
        the time of the outer one begins anew."""
        outer, self._waits = self._waits, (what, time.monotonic())
        try:
            yield
        finally:
            self._waits = None if outer is None else (outer[0], time.monotonic())

    @contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Surrounds what another thread does beside the main one, and must end in time as well."""
        number = threading.get_ident()
        self._beside[number] = what, time.monotonic()
        try:
            yield
        finally:
            del self._beside[number]

    def _watch(self, limit: float) -> None:
        pause = min(limit / 4, POLL_SECONDS)
        while True:
            # Code that never lets go of the interpreter stops this thread too: then this timer, which needs none, goes
            # off. It is put back here for as long as all is well.
            faulthandler.dump_traceback_later(limit + 4 * pause, exit=True, file=_STDERR)
            if self._end.wait(pause):
                return
            if (now := self._request()) != self._seen:
                self._seen = now
                write_stacks(self.folder, self.rank)
            if why := self._waited(limit, pause):
                self._ask_others(why, pause)
                give_up(why)

    def _waited(self, limit: float, pause: float) -> str:
        """What this rank has waited for, if one of it took too long. What began first leads: others may wait for it,
        as a step does for a checkpoint that is written beside it."""
        now = time.monotonic()
        waits = [one for one in (self._waits, self._at(), *list(self._beside.values())) if one is not None]
        waited = sorted(((now - since, what) for what, since in waits), reverse=True)
        if not waited or waited[0][0] <= limit:
            return ""
        said = ", and ".join(f"{seconds:.0f} s for {what}" for seconds, what in waited if seconds > limit - pause)
        return f"rank {self.rank} has waited {said} (watchdog_minutes={limit / 60:g})"

    def _request(self) -> int | None:
        """When the request was written that lies in the folder; None without one."""
        try:
            return None if self.folder is None else (self.folder / REQUEST).stat().st_mtime_ns
        except OSError:
            return None

    def _ask_others(self, why: str, pause: float) -> None:
        """Writes this rank's stacks, asks the others for theirs, and waits for as long as they may take to look."""
        write_stacks(self.folder, self.rank)
        if self.folder is None or self.world_size == 1:
            return
        asked = time.time() - 1
        with suppress(OSError):
            (self.folder / REQUEST).write_text(f"{why}\n")
        end = time.monotonic() + 2 * pause + 1
        while time.monotonic() < end and self._written_since(asked) < self.world_size:
            time.sleep(0.1)

    def _written_since(self, asked: float) -> int:
        with suppress(OSError):
            return sum(path.stat().st_mtime >= asked for path in Path(self.folder or "").glob("hang-rank-*.txt"))
        return 0


class WatchedSettings(Protocol):
    """Settings of a command that is watched."""

    @property
    def watchdog_minutes(self) -> float | None: ...


S = TypeVar("S", bound=WatchedSettings)
R = TypeVar("R")


def watched(main: Callable[[S], R]) -> Callable[[S], R]:
    """A command that ends, as a run does, when it is at one thing for longer than `watchdog_minutes`.

    What it is at, it says by `distill.data.progress`.
    """

    @functools.wraps(main)
    def within(cfg: S) -> R:
        begin("its start")
        with Watchdog(cfg.watchdog_minutes, launched_rank(), at=begun):
            return main(cfg)

    return within


def write_stacks(folder: Path | None, rank: int) -> None:
    """Writes where each thread of this process stands to a file in `folder`, and what NCCL has recorded; what cannot be
    written is left out."""
    if folder is None:
        return
    with suppress(OSError, ValueError), open(folder / f"hang-rank-{rank}.txt", "w", encoding="utf-8") as file:
        file.write(f"rank {rank}, process {os.getpid()} on {os.uname().nodename}, {time.ctime()}\n")
        file.flush()
        faulthandler.dump_traceback(file)
    recorder = threading.Thread(target=_write_flight_record, args=(folder / f"hang-rank-{rank}.nccl",), daemon=True)
    recorder.start()
    recorder.join(POLL_SECONDS)


def _write_flight_record(path: Path) -> None:
    """What NCCL's flight recorder holds, as torch pickles it; nothing where no collective of NCCL was recorded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)  # of builds with NCCL
    if dump is not None:
        with suppress(OSError, RuntimeError):
            path.write_bytes(dump())


@contextmanager
def joining(rank: int, world_size: int) -> Iterator[None]:
    """Surrounds the start of all ranks, for which torch would wait half an hour, as for anything else.

    Says after a while what is waited for, and ends the process when the others have not come: they may not exist, where
    a shell still has the variables of an earlier launch.
    """
    if world_size == 1:
        yield
        return
    at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    what = f"the other processes of WORLD_SIZE={world_size}, at {at}"
    unset = "if nobody has started them: unset RANK WORLD_SIZE LOCAL_RANK"
    line = f"rank {rank} waits for {what}; {unset}\n".encode()
    timers = [
        threading.Timer(JOIN_SAYS_SECONDS, os.write, (_STDERR, line)),
        threading.Timer(JOIN_SECONDS, give_up, (f"rank {rank} has waited {JOIN_SECONDS:.0f} s for {what}; {unset}",)),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def give_up(why: str, code: int = HUNG) -> None:
    """Ends this process, from any thread, and all that it has started; with a line and the stacks of all threads."""
    os.write(_STDERR, f"error: {why}; giving up, this is where each thread stands:\n".encode())
    faulthandler.dump_traceback(_STDERR)
    end_children()
    os._exit(code)


def end_children() -> None:
    """Ends what this process has started: a loader's worker that hangs would outlive it."""
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
