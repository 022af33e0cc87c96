"""A folder of files, local or behind any fsspec URL: what the store's reader and writer need of it, and no more."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import socket
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

OPEN_FILES = 64
STALE_SECONDS = 24 * 3600
HOST = re.sub("[^A-Za-z0-9]", "-", socket.gethostname())
TEMPORARY = re.compile(r".+\.(?P<host>[A-Za-z0-9-]+)\.[0-9a-f]{12}\.tmp")

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)

Range = tuple[str, int, int]
"""File name, first byte, end."""


PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
PACKAGES |= {
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
}


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a path or URL, and the path within it.

    Raises:
        ValueError: no such kind of URL, or its package is not installed; names the package.
    """
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package else " ".join(str(error).split())
        raise ValueError(f"{url}: a package that opens {protocol}:// is not installed: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{url}: {' '.join(str(error).split())}") from None


class Folder:
    """Names one level deep under `url`: a path or an fsspec URL such as `s3://bucket/store` or `memory://store`."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/")
        fs, self._path = file_system(self.url)
        self.local = Path(self._path) if isinstance(fs, LocalFileSystem) else None
        self._fs: tuple[int, Any] = (os.getpid(), fs)
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Folder.__init__(self, state["url"])

    @property
    def fs(self) -> Any:
        # A file system with an event loop does not survive a fork: a loader's worker makes its own.
        if self._fs[0] != os.getpid():
            self._fs = (os.getpid(), file_system(self.url)[0])
        return self._fs[1]

    @property
    def staging(self) -> Path:
        """Where unfinished files lie: in a local folder itself, so that finishing them is a rename."""
        return self.local if self.local is not None else Path(tempfile.gettempdir()) / "distill-staging"

    def path(self, name: str) -> str:
        return f"{self._path}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in the folder, by name; nothing if there is no such folder."""
        found = {}
        if self.local is not None:
            for path in self.local.iterdir() if self.local.is_dir() else ():
                with suppress(FileNotFoundError):  # another writer may rename its temporary file meanwhile
                    found[path.name] = path.stat().st_size
            return found
        with suppress(FileNotFoundError):
            self.fs.invalidate_cache(self._path)
            for entry in self.fs.ls(self._path, detail=True):
                found[entry["name"].rsplit("/", 1)[-1]] = entry["size"]
        return found

    def read(self, name: str) -> bytes:
        """A whole small file. Raises FileNotFoundError."""
        return (self.local / name).read_bytes() if self.local is not None else self.fs.cat_file(self.path(name))

    def open(self, name: str) -> IO[bytes]:
        """A stream over one file, to be read from start to end."""
        return open(self.local / name, "rb") if self.local is not None else self.fs.open(self.path(name), "rb")

    def ranges(self, requests: Sequence[Range]) -> list[bytearray | bytes | OSError]:
        """The bytes of each range, in order; short where a file ends early, an OSError where it cannot be read.

        What is not there takes no memory, however long the range.
        """
        if self.local is not None:
            return [self._pread(*request) for request in requests]
        if not requests:
            return []
        names, starts, ends = zip(*requests, strict=True)
        found = self.fs.cat_ranges([self.path(n) for n in names], list(starts), list(ends), on_error="return")
        return [x if isinstance(x, bytes) else OSError(str(x) or type(x).__name__) for x in found]

    def _pread(self, name: str, start: int, end: int) -> bytearray | OSError:
        try:
            descriptor = self._descriptor(name)
            buffer = bytearray(max(0, min(end, os.fstat(descriptor).st_size) - start))
            view, done = memoryview(buffer), 0
            while done < len(view) and (read := os.preadv(descriptor, [view[done:]], start + done)):
                done += read
        except OSError as error:
            return error
        return buffer if done == len(view) else buffer[:done]

    def _descriptor(self, name: str) -> int:
        assert self.local is not None
        if name not in self._open:
            self._open[name] = open(self.local / name, "rb", buffering=0)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name].fileno()

    def make(self) -> None:
        """Creates the folder, and removes what killed writers left unfinished in it."""
        self.staging.mkdir(parents=True, exist_ok=True)
        if self.local is None:
            self.fs.makedirs(self._path, exist_ok=True)
        remove_stale(self.staging)

    def publish(self, name: str, data: bytes) -> None:
        """Writes a file that is either whole or absent, whenever the process dies."""
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
            with suppress(FileExistsError):
                os.link(path, self.local / name)
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
            self.fs.put_file(str(path), self.path(name))  # object stores show an object once it is whole


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
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # FUSE file systems, of which many have no folders that could be flushed
            raise
    finally:
        os.close(descriptor)


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
