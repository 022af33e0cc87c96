"""Pipeline folders made of other things: of a single-file checkpoint, or of a pipeline with LoRAs merged into it.

All else here reads pipeline folders and nothing else, so such a teacher becomes one, once, in a cache
(`DISTILL_CACHE`, else `~/.cache/distill`), and is found again as long as its files are what they were. What is hashed,
stored, copied and exported is then what computes: the merged weights.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CACHE = "DISTILL_CACHE"
SINGLE = ".safetensors"
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_VERSION = 1  # of what is made; another one is made anew
_OTHER_FORMATS = (".gguf",)


@dataclass(frozen=True)
class WeightedLoRA:
    """A LoRA's file, or a folder that holds one, and the weight with which it is added.

    As text it is `PATH:WEIGHT`, or `PATH` for a weight of 1.
    """

    path: str
    weight: float = 1.0

    @classmethod
    def read(cls, text: str) -> WeightedLoRA:
        """Reads `PATH:WEIGHT` or `PATH`; a colon that no number follows is part of the path.

        Raises:
            ValueError: no path, or a weight that is not finite.
        """
        path, colon, number = text.rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            path, weight = text, 1.0
        path = path if colon else text
        if not path or abs(weight) > 1e6 or weight != weight:
            raise ValueError(f"{text!r} is no LoRA with a weight: give PATH:WEIGHT, as in style.safetensors:0.8")
        return cls(os.path.expanduser(path), weight)

    @property
    def name(self) -> str:
        """For people: the file's name and, unless it is 1, the weight."""
        stem = Path(self.path).name.removesuffix(SINGLE)
        return stem if self.weight == 1 else f"{stem}@{self.weight:g}"


def is_single_file(path: str) -> bool:
    """Whether a teacher's path is that of one file, and not of a folder or on the hub.

    Raises:
        ValueError: a file that cannot be opened here, as it is a pickle or of another program's format.
    """
    suffix = Path(path).suffix.lower()
    if suffix in PICKLED and Path(path).is_file():
        raise ValueError(f"{path} is a pickle, which could run code and is not opened: take the model's {SINGLE} file")
    if suffix in _OTHER_FORMATS:
        raise ValueError(f"{path} holds quantized weights, which cannot be opened here: take the {SINGLE} file")
    return suffix == SINGLE


def made_once(name: str, facts: Mapping[str, Any], what: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, called `name`; it is made where there is none yet for these facts.

    Several processes may ask at once: one makes it, the others wait.

    Args:
        facts: all that decides what is made, as values of JSON.
        what: is being done, for the log.

    Raises:
        ValueError: the cache cannot be written to.
        Other errors: those of `make`; nothing is left behind.
    """
    digest = hashlib.sha256(json.dumps({"version": _VERSION, **facts}, sort_keys=True).encode()).hexdigest()[:16]
    place = cache() / "teachers" / digest
    folder = place / name
    if _complete(folder):
        return folder
    with _writing(place), _alone(place.with_name(f"{digest}.lock")):
        if _complete(folder):
            return folder
        from distill.models.files import share  # and with it torch, which settings do without

        log.info("%s, once, into %s", what, folder)
        aside = place.with_name(f"{digest}.{os.getpid()}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            (aside / name).mkdir(parents=True)
            make(aside / name)
            share(aside)
            _flush(aside)
            shutil.rmtree(place, ignore_errors=True)  # one with files that are gone
            with suppress(FileExistsError):  # on a file system without locks another process was faster
                aside.rename(place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def cache() -> Path:
    """Where such folders are kept."""
    found = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distill"
    return Path(found).expanduser()


def stated(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change) of files: what changes when they do, without reading them."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _complete(folder: Path) -> bool:
    """Whether a folder is there, with all that its links lead to."""
    return (folder / "model_index.json").is_file() and all(path.exists() for path in folder.rglob("*"))


def _flush(folder: Path) -> None:
    """Has all of a folder on the disk: after a power loss it is there whole, or not there and made again."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError:
                if not path.is_dir():  # some file systems have no folders that could be flushed
                    raise
            finally:
                os.close(descriptor)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise
        raise ValueError(
            f"a teacher's folder cannot be written to {place} ({error.strerror}): set the environment variable "
            f"{CACHE} to a folder with room for it"
        ) from None


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; on a file system without locks, all of them."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                raise
        yield
