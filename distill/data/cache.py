"""What was read of a remote store and found to be right, on a local disk: bounded, shared by all processes of a node.

An entry is one part of a sample, named by the hash of the shard that it is of, so that it stays right wherever the
store lies and however it grows. It is written aside and renamed, and begins with a checksum of its own; what is read
from it is compared with the checksums of the store as well, like what comes from afar. One that does not fit is dropped
and fetched anew. The entries that were not used for longest are removed first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distill.data.checksums import chained
from distill.data.errors import StoreError
from distill.data.storage import make_folder, remove_stale, temporary

log = logging.getLogger(__name__)

MAGIC = b"dst1"
HEAD = struct.Struct("<4sIQ")
"""Before the bytes of an entry: the magic, their CRC-32 begun from its name's, and how many they are."""
BLOCK = 4096
"""What a file takes on the disk is counted in such blocks."""
ENTRY = re.compile("[0-9a-f]{40}")
STEPS = 16
"""A 16th of the limit is left free; each process looks for it after it has written its share of that."""


def name_of(shard_sha256: str, file: str, begin: int, size: int) -> str:
    """The name of the entry for so many bytes of a file of a shard."""
    return hashlib.sha256(f"{shard_sha256} {file} {begin} {size}".encode()).hexdigest()[:40]


class ReadCache:
    """Entries by name, below `FOLDER/parts`. Nothing else in the folder is touched.

    Args:
        folder: a local one, the same for all processes of a node, and for any number of stores and runs.
        gib: the most that all entries together take. An eighth of it is freed at once.

    Raises:
        StoreError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str], gib: float) -> None:
        self.folder, self.limit = Path(folder), int(gib * 2**30)
        self._parts, self._staging = self.folder / "parts", self.folder / "staging"
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._step = self.limit // (STEPS * max(1, processes))
        self._written, self._refused = 0, False
        try:
            make_folder(self._parts)
            make_folder(self._staging)
            remove_stale(self._staging)
            with temporary(self._staging, "probe"):
                pass
        except OSError as error:
            raise StoreError(f"data.cache={folder} cannot be used: [Errno {error.errno}] {error.strerror}") from None
        self.trim()

    def fill(self, name: str, buffers: Sequence[memoryview]) -> bool:
        """Reads an entry into buffers that are as long as it is; whether there was one, and it was whole."""
        head, size = bytearray(HEAD.size), sum(map(len, buffers))
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY)
        except OSError:  # there is none, or it cannot be read: then it is fetched
            return False
        try:
            whole = os.preadv(descriptor, [head, *buffers], 0) == HEAD.size + size
            whole = whole and os.fstat(descriptor).st_size == HEAD.size + size
            whole = whole and bytes(head) == _head_of(name, buffers)
            if whole:
                os.utime(descriptor)
        except OSError:
            whole = False
        finally:
            os.close(descriptor)
        if not whole:
            self.drop(name)
        return whole

    def add(self, name: str, buffers: Sequence[memoryview]) -> None:
        """Keeps an entry. Where that is not possible, one warning says so, and the store is read as without a cache."""
        size = HEAD.size + sum(map(len, buffers))
        if self._refused or 8 * size > self.limit:
            return
        target = self._path(name)
        try:
            with temporary(self._staging, name) as (path, file):
                file.write(_head_of(name, buffers))
                for buffer in buffers:
                    file.write(buffer)
                file.flush()
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
        except OSError as error:
            self._refused = True
            log.warning(
                "data.cache=%s takes no more (%s); what is not in it is fetched each time",
                *(self.folder, f"[Errno {error.errno}] {error.strerror}"),
            )
        self._written += _on_disk(size)
        if self._written > self._step:
            self.trim()

    def drop(self, name: str) -> None:
        """Removes an entry, if there is one."""
        with suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def trim(self) -> None:
        """Removes the entries that were not used for longest, if there is no room for what all processes may add."""
        self._written = 0
        with suppress(OSError), open(self.folder / "lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another process does it
                return
            entries = self._entries()
            total = sum(size for _, size, _ in entries)
            if total <= self.limit - self.limit // STEPS:
                return
            for _, size, path in sorted(entries):
                if total <= self.limit - 2 * self.limit // STEPS:
                    break
                with suppress(OSError):
                    os.unlink(path)
                    total -= size

    def _entries(self) -> list[tuple[int, int, str]]:
        """When each was used last, in nanoseconds, what it takes, and where it is."""
        found = []
        for folder in os.scandir(self._parts):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                with suppress(OSError):  # another process may have removed it
                    if ENTRY.fullmatch(entry.name):
                        facts = entry.stat(follow_symlinks=False)
                        found.append((facts.st_mtime_ns, _on_disk(facts.st_size), entry.path))
        return found

    def _path(self, name: str) -> Path:
        return self._parts / name[:2] / name


def _on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _head_of(name: str, buffers: Sequence[memoryview]) -> bytes:
    start = chained([memoryview(name.encode())], 0)
    return HEAD.pack(MAGIC, chained(buffers, start), sum(map(len, buffers)))
