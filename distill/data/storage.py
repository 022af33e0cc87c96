"""A folder of files, local or behind any fsspec URL: what the store's reader and writer need of it, and no more.

A read that fails is tried again for a while: a network file system that is away for a moment has lost nothing. When it
stays away, that is a `ReadError`, which says nothing about what the file holds. What no later try would mend (there is
no such object, or it may not be read) is a `StoreError`, at once.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import resource
import secrets
import socket
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from distill.data import remote
from distill.data.remote import TIMEOUT_SECONDS, file_system
from distill.data.retries import RETRY_SECONDS, Patience, Streak, shown

T = TypeVar("T")

MOST_OPEN_FILES = 128
STREAM_BYTES = 1 << 22
CLAIM_SECONDS = 60.0
"""A process that claimed a name and has not published the file for so long counts as dead."""
STALE_SECONDS = 24 * 3600
HOST = re.sub("[^A-Za-z0-9]", "-", socket.gethostname())
TEMPORARY = re.compile(r".+\.(?P<host>[A-Za-z0-9-]+)\.[0-9a-f]{12}\.tmp")

Range = tuple[str, int, int]
"""File name, first byte, end."""
Scattered = tuple[str, int, Sequence[memoryview]]
"""File name, first byte, and the buffers that the bytes from there on fill one after another."""
R = TypeVar("R", Range, Scattered)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)


class Folder:
    """Names one level deep under `url`: a path or an fsspec URL such as `s3://bucket/store` or `memory://store`.

    Args:
        retry_seconds: how long a read that fails is tried again before it is a `ReadError`; 0 tries once.
        timeout_seconds: how long a single request to what is not local may take.

    Attributes:
        name: the URL for messages, without passwords and signed queries.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        retry_seconds: float = RETRY_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self.url, self.retry_seconds, self.timeout_seconds = below(os.fspath(url)), retry_seconds, timeout_seconds
        self.name = shown(self.url)
        fs, self._path = file_system(self.url, timeout_seconds)
        self.local = Path(self._path) if isinstance(fs, LocalFileSystem) else None
        self._fs: tuple[int, Any] = (os.getpid(), fs)
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._streak = Streak()
        self._versions: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "retry_seconds": self.retry_seconds, "timeout_seconds": self.timeout_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Folder.__init__(self, **state)

    @property
    def fs(self) -> Any:
        # A file system with an event loop does not survive a fork: a loader's worker makes its own.
        if self._fs[0] != os.getpid():
            self._fs = (os.getpid(), file_system(self.url, self.timeout_seconds)[0])
        return self._fs[1]

    @property
    def staging(self) -> Path:
        """Where unfinished files lie: in a local folder itself, so that finishing them is a rename."""
        return self.local if self.local is not None else Path(tempfile.gettempdir()) / "distill-staging"

    def path(self, name: str) -> str:
        before, mark, query = self._path.partition("?")  # a signed query holds for all of a folder
        return f"{before}/{name}{mark}{query}"

    def sizes(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """Bytes of every file in the folder, or of those of `names` that there are; nothing if there is no such folder.

        Raises:
            ReadError: it cannot be read.
            StoreError: it may not be read, by what its server says.
        """
        wanted = None if names is None else list(names)
        return self._tried(self.url, lambda: self._sizes(wanted))

    def _sizes(self, names: Sequence[str] | None) -> dict[str, int]:
        found = {}
        if self.local is not None:
            for path in self.local.iterdir() if self.local.is_dir() else ():
                with suppress(FileNotFoundError):  # another writer may rename its temporary file meanwhile
                    found[path.name] = path.stat().st_size
            return found
        if names is not None and remote.is_web(self.fs):
            return {name: facts["size"] for name, facts in self._details(names).items()}
        listed = remote.listing(self.fs, self._path, self.timeout_seconds)
        for name, facts in listed.items():
            self._versions.setdefault(name, facts["version"])
        return {name: facts["size"] for name, facts in listed.items()}

    def _details(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Size and version of those of these files that there are; the versions are kept. Raises what fsspec does."""
        found, there = {}, remote.details(self.fs, list(map(self.path, names)), self.timeout_seconds)
        for name, facts in zip(names, there, strict=True):
            if not isinstance(facts, Exception):
                found[name] = facts
                self._versions.setdefault(name, facts["version"])
            elif not remote.is_missing(facts):
                raise facts
        return found

    def was_replaced(self, name: str) -> bool:
        """Whether a remote file is another one than when the folder was opened, as far as its server says."""
        if self.local is not None or not (before := self._versions.get(name)):
            return False
        (facts,) = remote.details(self.fs, [self.path(name)], self.timeout_seconds)
        return isinstance(facts, dict) and facts["version"] != before

    def read(self, name: str) -> bytes:
        """All bytes of a small file. Raises FileNotFoundError, at once, ReadError, and StoreError as `sizes` does."""

        def content() -> bytes:
            if self.local is not None:
                return (self.local / name).read_bytes()
            (data,) = remote.fetch(self.fs, [(self.path(name), None, None)], self.timeout_seconds)
            if isinstance(data, Exception):
                raise FileNotFoundError(errno.ENOENT, "no such file", name) if remote.is_missing(data) else data
            return data

        return self._tried(self.path(name), content)

    def open(self, name: str, size: int) -> io.BufferedReader:
        """A stream over the `size` bytes of a file, to be read from start to end; its reads may raise ReadError."""
        return io.BufferedReader(_Stream(self, name, size), STREAM_BYTES)

    def ranges(self, requests: Sequence[Range]) -> list[bytearray | bytes]:
        """The bytes of each range, in order; short where a file ends early.

        What is not there takes no memory, however long the range.

        Raises:
            ReadError: one cannot be read, or there is no such local file any more, for longer than `retry_seconds`.
            StoreError: there is no such remote file, or it may not be read.
        """
        return self._all_of(requests, self._ranges)

    def fill(self, requests: Sequence[Scattered]) -> list[int]:
        """Reads from a place of a file on into buffers, one after another, until they are full or the file ends.

        Returns:
            of each request the number of bytes read.

        Raises:
            ReadError: as `ranges` does.
        """
        return self._all_of(requests, self._fill)

    def _all_of(self, requests: Sequence[R], read: Callable[[Sequence[R]], list[T | Exception]]) -> list[T]:
        """What `read` gives for all requests, with those that failed tried again. Raises ReadError and StoreError."""
        found = read(requests)
        if not any(isinstance(data, Exception) for data in found):
            return found  # type: ignore[return-value]
        patience = Patience(self.retry_seconds, self._streak)
        while failed := [at for at, data in enumerate(found) if isinstance(data, Exception)]:
            name, error = requests[failed[0]][0], found[failed[0]]
            assert isinstance(error, Exception)
            errors = [(requests[at][0], e) for at, e in enumerate(found) if isinstance(e, Exception)]
            self._check_worth_a_try(patience, errors)
            patience.after(error, self.path(name))
            for at, data in zip(failed, read([requests[at] for at in failed]), strict=True):
                found[at] = data
        patience.over()
        return [data for data in found if not isinstance(data, Exception)]

    def _fill(self, requests: Sequence[Scattered]) -> list[int | Exception]:
        if self.local is not None:
            return [self._preadv(*request) for request in requests]
        found = self._ranges([(name, start, start + sum(map(len, buffers))) for name, start, buffers in requests])
        return [
            data if isinstance(data, Exception) else _scatter(memoryview(data), buffers)
            for data, (_, _, buffers) in zip(found, requests, strict=True)
        ]

    def _preadv(self, name: str, start: int, buffers: Sequence[memoryview]) -> int | OSError:
        try:
            descriptor = self._descriptor(name)
            done = os.preadv(descriptor, buffers, start)
            return done if done == sum(map(len, buffers)) else self._rest(descriptor, start, buffers, done)
        except OSError as error:
            self.forget(name)  # the handle itself may be stale
            return error

    def _rest(self, descriptor: int, start: int, buffers: Sequence[memoryview], done: int) -> int:
        """Reads on after the first `done` bytes, which may be fewer than there are; how many there are in all."""
        left, read = [buffer for buffer in buffers if len(buffer)], done
        while read:
            while left and read >= len(left[0]):
                read -= len(left.pop(0))
            if not left:
                break
            left[0] = left[0][read:]
            read = os.preadv(descriptor, left, start + done)
            done += read
        return done

    def _ranges(self, requests: Sequence[Range]) -> list[bytearray | bytes | Exception]:
        """`ranges` tried once, with an exception in the place of each that failed."""
        if self.local is not None:
            return [self._pread(*request) for request in requests]
        if not requests:
            return []
        parts = [(self.path(name), start, end) for name, start, end in requests]
        return list(remote.fetch(self.fs, parts, self.timeout_seconds))

    def _check_worth_a_try(self, patience: Patience, failed: Sequence[tuple[str, BaseException]]) -> None:
        """Raises StoreError if what one of these files failed with is for good."""
        for name, error in failed:
            if self.local is None and (final := remote.for_good(error, self.path(name))) is not None:
                patience.given_up()
                raise final from None

    def apart(self) -> Folder:
        """The same folder with files opened on its own, for another thread."""
        other = Folder(self.url, self.retry_seconds, self.timeout_seconds)
        other._streak, other._versions = self._streak, self._versions
        return other

    def _pread(self, name: str, start: int, end: int) -> bytearray | OSError:
        try:
            descriptor = self._descriptor(name)
            buffer = bytearray(max(0, min(end, os.fstat(descriptor).st_size) - start))
            view, done = memoryview(buffer), 0
            while done < len(view) and (read := os.preadv(descriptor, [view[done:]], start + done)):
                done += read
        except OSError as error:
            self.forget(name)  # the handle itself may be stale
            return error
        return buffer if done == len(view) else buffer[:done]

    def _descriptor(self, name: str) -> int:
        """An open file; the ones used last stay open, as many as the process may well have."""
        assert self.local is not None
        if name not in self._open:
            while len(self._open) >= _open_files():
                self._open.popitem(last=False)[1].close()
            try:
                self._open[name] = open(self.local / name, "rb", buffering=0)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
                self.forget(*self._open)
                self._open[name] = open(self.local / name, "rb", buffering=0)
        self._open.move_to_end(name)
        return self._open[name].fileno()

    def forget(self, *names: str) -> None:
        """Opens these files again when they are read next: others may have replaced them."""
        for name in names:
            if name in self._open:
                with suppress(OSError):
                    self._open.pop(name).close()

    def _tried(self, what: str, read: Callable[[], T]) -> T:
        """What `read` gives, tried again while it fails. Raises ReadError; FileNotFoundError and StoreError at once."""
        patience = Patience(self.retry_seconds, self._streak)
        while True:
            try:
                found = read()
            except FileNotFoundError:
                patience.given_up()
                raise
            except NotADirectoryError as error:
                patience.given_up()  # a file in the folder's place holds nothing, however long one waits
                raise FileNotFoundError(error.errno, error.strerror, what) from None
            except Exception as error:
                if self.local is not None and not isinstance(error, OSError):
                    raise
                if self.local is None and (final := remote.for_good(error, what)) is not None:
                    patience.given_up()
                    raise final from None
                patience.after(error, what)
            else:
                patience.over()
                return found

    def make(self) -> None:
        """Creates the folder, and removes what killed writers left unfinished in it."""
        make_folder(self.staging)
        if self.local is None:
            self.fs.makedirs(self._path, exist_ok=True)
        remove_stale(self.staging)

    def publish(self, name: str, data: bytes) -> None:
        """Writes a file that is either complete or absent, whenever the process dies."""
        if self.local is None:
            self.fs.pipe_file(self.path(name), data)
            return
        with temporary(self.local, name) as (path, file):
            file.write(data)
            commit(path, file, self.local / name)

    def publish_first(self, name: str, data: bytes) -> None:
        """`publish`, unless a file of that name is there: of processes that race, the first one wins."""
        if self.local is None:
            if not self.fs.exists(self.path(name)):
                self.publish(name, data)
            return
        with temporary(self.local, name) as (path, file):
            file.write(data)
            sync(file)
            try:
                os.link(path, self.local / name)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                _publish_unlinked(path, self.local / name)
        sync_folder(self.local)

    @contextmanager
    def staged(self, name: str) -> Iterator[tuple[Path, IO[bytes]]]:
        """A temporary local file that `commit_staged` turns into `name`; removed if that never happens."""
        with temporary(self.staging, name) as staged:
            yield staged

    def commit_staged(self, path: Path, file: IO[bytes], name: str) -> None:
        if self.local is not None:
            commit(path, file, self.local / name)
        else:
            file.flush()
            self.fs.put_file(str(path), self.path(name))  # object stores show an object once it is complete


class _Stream(io.RawIOBase):
    """A file from its start to its end, by ranges."""

    def __init__(self, folder: Folder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._at = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        (data,) = self._folder.ranges([(self._name, self._at, end)])
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def below(url: str, name: str = "") -> str:
    """What lies in a folder, or without a name the folder itself; a signed query of a URL holds for all of it."""
    before, mark, query = url.partition("?") if "://" in url else (url, "", "")
    return "/".join(filter(None, (before.rstrip("/"), name))) + mark + query


def _scatter(data: memoryview, buffers: Sequence[memoryview]) -> int:
    """Copies bytes into buffers, one after another; returns how many there were."""
    at = 0
    for buffer in buffers:
        piece = data[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        at += len(piece)
    return at


def _open_files() -> int:
    """How many files a reader keeps open: an eighth of what the process may have, for it is not alone in it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(MOST_OPEN_FILES, soft // 8))


@contextmanager
def temporary(folder: Path, name: str) -> Iterator[tuple[Path, IO[bytes]]]:
    """An open file under a name nobody else uses, locked while its writer lives, and removed if it is not renamed."""
    path, file = _locked(folder, name)
    with file:
        try:
            yield path, file
        finally:
            path.unlink(missing_ok=True)


def _locked(folder: Path, name: str) -> tuple[Path, IO[bytes]]:
    while True:
        path = folder / f"{name}.{HOST}.{secrets.token_hex(6)}.tmp"
        file = open(path, "xb")
        with suppress(OSError):  # some network file systems know no locks; there stale files stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # or `remove_stale` came between opening and locking
            return path, file
        file.close()


def commit(path: Path, file: IO[bytes], target: Path) -> None:
    """Makes a temporary file durable, then visible under its own name."""
    sync(file)
    os.replace(path, target)
    sync_folder(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Replaces a small local file: a reader, a process that dies and a power loss each see the old text or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        replace_whole(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def replace_whole(aside: Path, path: Path) -> None:
    """Puts a finished local file, once it is on the disk, in the place of another one in its folder."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; nothing on file systems that cannot do it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # FUSE file systems, of which many have no folders that could be flushed
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Makes all files below a folder durable, and their names in it. What a link points to is left as it is."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())):
        sync_folder(inner)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, durably."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_folder(path.parent)


def _publish_unlinked(path: Path, target: Path) -> None:
    """Renames a finished file unless there is a target, where a hard link would do that in one step.

    Of processes that race, the one that has made the claim, a file beside the target, may rename. One that was killed
    with the claim in its hands is waited for no longer than `CLAIM_SECONDS`.
    """
    claim = target.with_name(f"{target.name}.claim")
    while not target.exists():
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            os.utime(path)  # both times are then the file system's
            with suppress(FileNotFoundError):
                if path.stat().st_mtime - claim.stat().st_mtime > CLAIM_SECONDS:
                    claim.unlink()
            time.sleep(0.05)
            continue
        try:
            if not target.exists():
                os.replace(path, target)
        finally:
            claim.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Removes temporary files whose writer is dead, and never one that a live writer holds.

    The lock of a dead process is free. A lock taken on another machine may be invisible here, so the files of other
    machines must also have lain untouched for a day.
    """
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        with suppress(OSError):
            if match and (match["host"] == HOST or time.time() - path.stat().st_mtime > STALE_SECONDS):
                with open(path, "rb+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
