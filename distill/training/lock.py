"""One job a run folder: a lock that names its holder, and that passes on when the holder is dead.

It is a file. It appears by a hard link, which is made or not made on network file systems too (their `flock` may end at
the host), or, where there are no hard links, by a creation that fails if the file exists; to be believed from another
machine it needs a holder that touches it now and then.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

import psutil

from distill.config.loading import ConfigError
from distill.data.storage import make_folder
from distill.training.watchdog import give_up

log = logging.getLogger(__name__)

LOCK = "LOCK"
# What a hard link fails with where there are none: cloud buckets that are mounted, exFAT, shares of SMB.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK}


@dataclass(frozen=True)
class Holder:
    """A process that may hold a lock.

    Attributes:
        machine: host, boot and process namespace: two processes with the same can see each other by their ids.
        started: when the process did, seconds by the clock, which may be set meanwhile.
        ticks: the same in the kernel's ticks since the boot, where it is known: a process id may come again.
        job, restarts: of SLURM; a job that is put back into the queue keeps its id, and counts.
        since: for people.
    """

    host: str
    machine: str
    pid: int
    started: float
    job: str | None
    restarts: int
    since: str
    ticks: int | None = None

    @staticmethod
    def here(pid: int | None = None) -> Holder:
        """This process, or another one of this machine."""
        pid = os.getpid() if pid is None else pid
        return Holder(
            host=socket.gethostname(),
            machine=" ".join((socket.gethostname(), _boot(), _namespace())),
            pid=pid,
            started=psutil.Process(pid).create_time(),
            ticks=_ticks(pid),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """Holds the lock of a folder while entered; taken on one rank, it speaks for all.

    A lock is taken over from a process of this machine that is gone, from an earlier start of the same SLURM job, and
    from another machine once `stale` seconds have passed without a touch.

    Args:
        folder: the run's; made if it is not there.
        takes: whether this rank is the one.
        beat: seconds between two touches.
        stale: seconds without one after which a holder on another machine counts as dead.
        lost: called, in a thread, with a line when somebody else holds the lock after all: this process had stood still
            for so long, or was thought dead. It ends the process, since two that write are worse than none.

    Raises:
        ConfigError: on entering, when somebody holds it; one line that says who.
    """

    def __init__(
        self,
        folder: Path,
        takes: bool = True,
        beat: float = 30.0,
        stale: float = 300.0,
        lost: Callable[[str], None] = give_up,
    ) -> None:
        self.folder, self.takes, self.beat, self.stale = Path(folder), takes, beat, stale
        self._lost = lost
        self._lock = self.folder / LOCK
        self._me = Holder.here()
        self._text = json.dumps(asdict(self._me), indent=1) + "\n"
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        if self.takes:
            make_folder(self.folder)
            while not self._appears():
                self._remove_dead()
            self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            if self._read() == self._text:
                self._lock.unlink(missing_ok=True)

    def _appears(self) -> bool:
        """Makes the lock, complete and at once; False if there is one."""
        claim = self._beside("claim")
        try:
            claim.write_text(self._text)
            try:
                os.link(claim, self._lock)
            except FileExistsError:
                raise
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._create()
        except FileExistsError:
            return False
        finally:
            claim.unlink(missing_ok=True)
        return True

    def _create(self) -> None:
        """Makes the lock where there are no hard links: for a moment it is there and empty, held by nobody readable."""
        with self._lock.open("x") as file:
            file.write(self._text)

    def _remove_dead(self) -> None:
        """Removes the lock of a holder that is gone. Raises ConfigError for one that is not."""
        text, quiet = self._read(), self._quiet(self._lock)
        if text is None or quiet is None:
            return
        holder = _parsed(text)
        if problem := self._alive(holder, quiet):
            raise ConfigError(f"output_dir={self.folder} is in use by {problem}")
        with self._successor() as chosen:
            if chosen and self._read() == text:  # and nobody else may remove that one now
                self._lock.unlink()
                log.warning("taking over %s: it was locked by %s", self.folder, holder or "nobody that can be read")

    @contextmanager
    def _successor(self) -> Iterator[bool]:
        """Whether this process, of all that have found the lock of a dead one, is the one that may remove it."""
        chair = self.folder / f".{LOCK}.successor"
        try:
            chair.touch(exist_ok=False)
        except FileExistsError:
            if (self._quiet(chair) or 0) > self.stale:  # killed in there, which takes no longer than a moment
                chair.unlink(missing_ok=True)
            time.sleep(0.05)
            yield False
            return
        try:
            yield True
        finally:
            chair.unlink(missing_ok=True)

    def _alive(self, holder: Holder | None, quiet: float) -> str | None:
        """Who holds the lock and what can be done about it; None if the holder is dead."""
        if holder is not None and holder.machine == self._me.machine:
            return f"{holder}: end that, or choose another output_dir" if _runs(holder) else None
        if holder is not None and self._me.job and holder.job == self._me.job and holder.restarts < self._me.restarts:
            return None
        if quiet > self.stale:
            return None
        return (
            f"{holder or 'somebody unreadable'}: end that, or choose another output_dir; if it is dead, its lock "
            f"{self._lock} can be taken over {self.stale:.0f} s after its last sign of life, {max(quiet, 0):.0f} s ago"
        )

    def _quiet(self, path: Path) -> float | None:
        """Seconds since a file was touched, both times by the clock of the file system; None without it."""
        now = self._beside("now")
        now.touch()
        try:
            return now.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            now.unlink()

    def _keep(self) -> None:
        while not self._end.wait(self.beat):
            with suppress(OSError):  # a file system that is away for a moment
                if self._read() is None and self._appears():
                    log.warning("%s was removed, and is put back", self._lock)
                elif (text := self._read()) != self._text:
                    self._lost(f"{self.folder} is now in use by {_parsed(text or '')}")
                else:
                    os.utime(self._lock)

    def _read(self) -> str | None:
        try:
            return self._lock.read_text()
        except FileNotFoundError:
            return None

    def _beside(self, what: str) -> Path:
        """A name that nobody else uses, for a moment."""
        return self.folder / f".{LOCK}.{what}.{secrets.token_hex(6)}"


def _parsed(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _runs(holder: Holder) -> bool:
    try:
        process = psutil.Process(holder.pid)
        if holder.ticks is not None and (ticks := _ticks(holder.pid)) is not None:
            same = ticks == holder.ticks
        else:
            same = abs(process.create_time() - holder.started) < 10  # a clock that was set moves it a little
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ticks(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since the boot, which no clock changes; None where not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[19])  # the name, in brackets, may hold spaces and brackets
    except (OSError, ValueError, IndexError):
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
