"""What a power cut leaves of files that were being written: only what was flushed to the disk with fsync.

    with Disk(folder) as disk:
        write_something()
    for cut in disk.cuts():
        cut.lay_out(elsewhere)          # what may be found there after a power cut at that moment

A file's content is on the disk as it was at its last `os.fsync`; one that was never flushed is empty. A name (of a new
file, of a renamed or removed one, of a new folder) is on the disk once its folder was flushed after it: so each moment
is laid out twice, with the names that were flushed and, as a disk may be quicker than it was asked to be, with all of
them. `cuts(thorough=True)` lays out more of what may be: the names of one folder alone, or of all but one, were
quicker; and what was not flushed of a file is zeros, as many bytes as it has, or was quicker too. Moments are those
just before and after a rename, link, removal, new folder or fsync, and the end.

What nobody has flushed is thus never there, whoever wrote it. `Disk(folder, ignoring=kind)` is a disk that takes no
notice of one kind of flush, such as that of `step-#.tmp/student/ema.safetensors`: a test that passes on it, too, would
not notice if that flush were missing. `kinds` has those that were made.

Only the process that enters is watched, and of it what Python's own `os` does: `os.fsync`, `os.rename`, `os.replace`,
`os.link`, `os.remove`, `os.mkdir`, `os.rmdir`, and what pathlib and shutil make of them. Content may be written by
anything, in C or through a memory map: it is looked at when it is flushed.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

EVENTS = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")
Names = Mapping[int, Mapping[str, int]]
"""The entries of folders: number of an inode by name, by number of the folder's inode."""


@dataclass(frozen=True)
class Cut:
    """A power cut: which names and which contents there are. `where` says when, for people."""

    where: str
    root: int
    names: Names
    contents: Mapping[int, bytes]
    folders: frozenset[int]
    otherwise: Mapping[int, bytes] = field(default_factory=dict)

    def lay_out(self, target: Path) -> Path:
        """Makes the folder as it is found after the cut; gives it back."""
        target.mkdir(parents=True)
        self._lay_out(self.root, target)
        return target

    def _lay_out(self, number: int, target: Path) -> None:
        for name, inode in self.names.get(number, {}).items():
            if inode in self.folders:
                (target / name).mkdir()
                self._lay_out(inode, target / name)
            else:
                (target / name).write_bytes(self.contents.get(inode, self.otherwise.get(inode, b"")))


class Disk:
    """Watches what this process does to the files below `folder`, which is there and durable when it is entered."""

    def __init__(self, folder: Path, ignoring: str | None = None) -> None:
        self.folder, self.ignoring = Path(folder), ignoring
        self.kinds: list[str] = []
        self._on = False
        self._held: dict[int, int] = {}  # descriptors that keep the numbers of inodes from being used again
        self._contents: dict[int, bytes] = {}
        self._flushed: dict[int, dict[str, int]] = {}
        self._folders: set[int] = set()
        self._moments: list[tuple[str, dict[int, dict[str, int]], dict[int, dict[str, int]], dict[int, bytes]]] = []
        self._unflushed: list[
            dict[int, bytes]
        ] = []  # of each moment, what files hold that were not flushed as they are
        self.events: list[str] = []

    def __enter__(self) -> Disk:
        for folder, names in self._listing().items():
            self._flushed[folder] = names
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as file:
                    self._flush_file(file.fileno())
        self._fsync, self._on = os.fsync, True
        os.fsync = self._synced
        sys.addaudithook(self._audit)  # one cannot be removed, only silenced
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._note("the end")
        self._on = False
        os.fsync = self._fsync
        for descriptor in self._held.values():
            os.close(descriptor)

    def cuts(self, thorough: bool = False) -> Iterator[Cut]:
        """A power cut at each moment: with the names that were flushed, and with all."""
        root, folders = os.stat(self.folder).st_ino, frozenset(self._folders)
        for (where, flushed, all_names, contents), more in zip(self._moments, self._unflushed, strict=True):
            yield Cut(f"{where}, flushed names", root, flushed, contents, folders)
            yield Cut(f"{where}, all names", root, all_names, contents, folders)
            if thorough:
                zeros = {number: bytes(len(data)) for number, data in more.items()}
                unsynced = {number: data for number, data in contents.items() if number not in more}
                yield Cut(f"{where}, all names, zeros", root, all_names, unsynced, folders, zeros)
                yield Cut(f"{where}, all names, all contents", root, all_names, unsynced, folders, more)
                for quick in (number for number in all_names if all_names[number] != flushed.get(number)):
                    names = {**flushed, quick: all_names[quick]}
                    yield Cut(f"{where}, names of one folder", root, names, contents, folders)
                    names = {**all_names, quick: flushed.get(quick, {})}
                    yield Cut(f"{where}, names of all but one folder", root, names, contents, folders)

    def at_the_end(self) -> Cut:
        """A power cut after everything: what was promised to be there must be."""
        where, flushed, _, contents = self._moments[-1]
        return Cut(where, os.stat(self.folder).st_ino, flushed, contents, frozenset(self._folders))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._on and event in EVENTS:
            self._on = False  # looking around has events of its own
            self._note(f"before {event} {' '.join(str(x) for x in arguments if isinstance(x, (str, os.PathLike)))}")
            self._on = True

    def _synced(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        if not self._on or not Path(path).is_relative_to(self.folder.resolve()):
            return self._fsync(descriptor)
        self._on = False
        self._note(f"before fsync {path}")
        self._fsync(descriptor)
        kind = re.sub(r"[0-9a-f]{12}|\d+", "#", str(Path(path).relative_to(self.folder.resolve())))
        self.kinds.append(kind)
        if kind == self.ignoring:
            self._on = True
            return
        if stat.S_ISDIR(os.fstat(number).st_mode):
            self._flushed[self._hold(number)] = self._names(Path(path))
        else:
            self._flush_file(number)
        self._note(f"after fsync {path}")
        self._on = True

    def _flush_file(self, descriptor: int) -> None:
        self._contents[self._hold(descriptor)] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _hold(self, descriptor: int) -> int:
        number = os.fstat(descriptor).st_ino
        if number not in self._held:
            self._held[number] = os.dup(descriptor)
        return number

    def _note(self, where: str) -> None:
        self.events.append(where)
        flushed = {folder: dict(names) for folder, names in self._flushed.items()}
        self._moments.append((where, flushed, self._listing(), dict(self._contents)))
        self._unflushed.append(self._changed())

    def _changed(self) -> dict[int, bytes]:
        """What files hold that is not what was flushed of them."""
        found = {}
        for number, descriptor in self._held.items():
            if number not in self._folders and os.fstat(descriptor).st_size < 1 << 16:
                if (data := Path(f"/proc/self/fd/{descriptor}").read_bytes()) != self._contents.get(number):
                    found[number] = data
        return found

    def _listing(self) -> dict[int, dict[str, int]]:
        """The names in the folder and in those below it, as they are now."""
        found = {}
        for path, _, _ in os.walk(self.folder):
            descriptor = os.open(path, os.O_RDONLY)
            number = self._hold(descriptor)
            os.close(descriptor)
            self._folders.add(number)
            found[number] = self._names(Path(path))
        return found

    def _names(self, folder: Path) -> dict[str, int]:
        """Names and inodes; links to elsewhere are left out."""
        found = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    continue
                found[entry.name] = entry.inode()
                if entry.is_file(follow_symlinks=False) and entry.inode() not in self._held:
                    try:
                        self._held[entry.inode()] = os.open(entry.path, os.O_RDONLY)
                    except OSError:  # it was removed meanwhile
                        del found[entry.name]
        return found
