"""Tar archives, strictly: what the store writes, and a walk over the archives of others.

Readers of tar archives, Python's among them, take a damaged header for the end of the archive. Here an archive ends at
its end mark, two blocks of zeros and nothing but zeros after them, and anything else is an error that names the place.
Nothing is ever unpacked.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

BLOCK = 512
END = bytes(2 * BLOCK)
_NAME_BYTES, _CHECKSUM = 100, slice(148, 155)  # of the name's field, which comes first, and where the sum of all is
EXTRA_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE)
MAX_EXTRA_BYTES = 1 << 20


def header(name: str, size: int) -> bytes:
    """The USTAR header block of a regular file; the same name and size give the same 512 bytes."""
    plain = name.encode()
    if len(plain) > _NAME_BYTES or not plain.isascii():
        return _header(name, size)
    block = bytearray(_header("", size))  # a reader compares one with each sample: tarfile takes a while to make it
    block[: len(plain)] = plain
    block[_CHECKSUM] = b"%06o\0" % (sum(plain) + int(block[_CHECKSUM][:6], 8))
    return bytes(block)


@lru_cache(maxsize=256)
def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> int:
    """Bytes of zeros after a member of `size` bytes."""
    return -size % BLOCK


def member(name: str, data: bytes) -> bytes:
    """One member as it stands in the archive: header, data, padding."""
    return header(name, len(data)) + data + bytes(padding(len(data)))


@dataclass(frozen=True)
class Member:
    """A member of an archive: `size` bytes from `start`."""

    name: str
    start: int
    size: int
    regular: bool


def parse_header(block: bytes, start: int) -> Member:
    """Reads the header block that precedes `start`.

    Raises:
        ValueError: it is cut short, or its checksum does not fit.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ValueError(f"no tar header at byte {start - BLOCK} ({error})") from None
    if info.size < 0:
        raise ValueError(f"member {info.name!r} at byte {start - BLOCK} has size {info.size}")
    return Member(info.name, start, info.size, info.type in (tarfile.REGTYPE, tarfile.AREGTYPE))


def walk(file: IO[bytes]) -> Iterator[Member]:
    """The members of an archive from its start to its end mark; extended headers other than of paths are ignored.

    Only headers are read: `file` must be seekable.

    Raises:
        ValueError: a damaged header, a member cut short, or no end mark; says at which byte.
    """
    end, start = file.seek(0, 2), 0
    long_name = None
    while True:
        file.seek(start)
        block = file.read(BLOCK)
        if len(block) == BLOCK and not any(block):
            return _check_end(file, start)
        found = parse_header(block, start + BLOCK)
        start = found.start + found.size + padding(found.size)
        if start > end:
            raise ValueError(f"member {found.name!r} is cut short: it needs {start} bytes, the archive has {end}")
        if block[156:157] in EXTRA_TYPES:
            long_name = _path_record(file.read(_bounded(found))) or long_name
            continue
        if block[156:157] == tarfile.GNUTYPE_LONGNAME:
            long_name = file.read(_bounded(found)).rstrip(b"\0").decode("utf-8", "surrogateescape")
            continue
        yield Member(long_name or found.name, found.start, found.size, found.regular)
        long_name = None


def _check_end(file: IO[bytes], start: int) -> None:
    """Whether what follows a block of zeros is the end mark: a header that was overwritten has files behind it."""
    at = start + BLOCK
    while chunk := file.read(1 << 16):
        if any(chunk):
            raise ValueError(f"zeros at byte {start}, where a header should be: they are not the end")
        at += len(chunk)
    if at < start + len(END):
        raise ValueError(f"no end mark at byte {start}")


def _bounded(found: Member) -> int:
    if found.size > MAX_EXTRA_BYTES:
        raise ValueError(f"extended header at byte {found.start - BLOCK} has {found.size} bytes")
    return found.size


def _path_record(records: bytes) -> str | None:
    for record in records.split(b"\n"):
        if (at := record.find(b" path=")) > 0 and record[:at].isdigit():
            return record[at + 6 :].decode("utf-8", "surrogateescape")
    return None
