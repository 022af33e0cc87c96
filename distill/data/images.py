"""Pictures with captions, from WebDataset shards or a folder: which of them a store is made of.

They are listed before anything is made of them, in an order that depends on names alone, from headers and captions
only. The listing stays in the store's folder, a part for each source file: processes share the work without talking,
and a restart lists what is not listed yet. Of a picture that is left out it says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import fsspec

from distill.data import tar
from distill.data.index import SCHEMA, StoreMismatch
from distill.data.pictures import BadPicture, size_of
from distill.data.progress import Progress
from distill.data.prompts import COLUMNS, MAX_CAPTION_BYTES, find_files
from distill.data.record import StoreError
from distill.data.storage import Folder

log = logging.getLogger(__name__)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
CAPTION_ENDINGS = (".txt", ".json")
METADATA = "metadata.jsonl"
HEADER_BYTES = (1 << 12, 1 << 16)
"""How much of a picture is read to find its size, before all of it is."""
MAX_PICTURE_BYTES = 1 << 28


class Picture(NamedTuple):
    """`size` bytes from `start` of the file at `path`; `name` is for people."""

    path: str
    name: str
    start: int
    size: int
    caption: str


@dataclass(frozen=True)
class Accept:
    """Which pictures are taken.

    Args:
        min_size: pixels of the shorter side, at least.
        max_aspect_ratio: longer over shorter side, at most.
        column: entry of `KEY.json` or `metadata.jsonl` that is the caption; by default `KEY.txt`, or else the first
            there is of `prompt`, `caption` and `text`.
    """

    min_size: int
    max_aspect_ratio: float = 2.0
    column: str | None = None

    def __post_init__(self) -> None:
        if self.min_size < 1 or not self.max_aspect_ratio >= 1:
            raise ValueError(f"min_size and max_aspect_ratio must be at least 1, got {asdict(self)}")

    def check(self, width: int, height: int) -> None:
        """Raises _Dropped."""
        if min(width, height) < self.min_size:
            raise _Dropped("too small", f"{width} x {height} pixels")
        if max(width, height) > self.max_aspect_ratio * min(width, height):
            raise _Dropped("aspect ratio", f"{width} x {height} pixels")


@dataclass(frozen=True)
class Listing:
    """The pictures of a store, in its order. `sha256` is of all that decides which they are, and their captions."""

    fs: Any
    pictures: Sequence[Picture]
    sha256: str

    @property
    def captions(self) -> list[str]:
        return [picture.caption for picture in self.pictures]

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The files of these pictures; remote ones in parallel.

        Raises:
            StoreError: one is not there any more, or shorter than it was; names it.
        """
        wanted = [self.pictures[i] for i in indices]
        starts, ends = [p.start for p in wanted], [p.start + p.size for p in wanted]
        found = self.fs.cat_ranges([p.path for p in wanted], starts, ends, on_error="return")
        for picture, data in zip(wanted, found, strict=True):
            if isinstance(data, Exception):
                raise StoreError(f"picture {shown(picture.name)} cannot be read: {type(data).__name__} {data}")
            if len(data) != picture.size:
                raise StoreError(f"picture {shown(picture.name)} has changed since it was listed")
        return found


def list_pictures(source: str, store: str, accept: Accept, *, rank: int = 0, world_size: int = 1) -> Listing:
    """Lists the pictures of a source in the store's folder, or reads there what has been listed.

    Args:
        source: a path or fsspec URL. Either WebDataset shards, `*.tar` (`*` and `?` match several), with
            `KEY.jpg|jpeg|png|webp` and its caption in `KEY.txt` or `KEY.json`: ordered by shard, then key. Or a folder
            with pictures, at any depth, and their captions in `NAME.txt` beside them or in a `metadata.jsonl` with
            `file_name` (relative to it) and a caption: ordered by name.
        store: folder or URL of the store that is made of them.
        rank, world_size: this process among those that list; each starts elsewhere.

    Raises:
        FileNotFoundError: nothing at `source`.
        StoreMismatch: the store was begun over other files, or with other filters; names what differs.
        ValueError: a damaged archive or `metadata.jsonl`, no picture is left, or the store is within `source`.
    """
    fs, sources = _sources(source)
    if any(isinstance(s, _PictureFolder) and s.holds(store) for s in sources):
        raise ValueError(f"the store {store} lies among the pictures of {source}: give it a folder of its own")
    folder = Folder(store)
    folder.make()
    heads = [_head(s, accept) for s in sources]
    first, there = rank * len(sources) // world_size, folder.sizes()
    todo = [n for n in [*range(first, len(sources)), *range(first)] if _part_name(n) not in there]
    work = sum(sources[n].work for n in todo)
    progress = Progress(f"listing pictures, rank {rank}", work, sources[0].unit, bar=rank == 0)
    for n in todo:
        if _part_name(n) in folder.sizes():  # another process came here first
            progress.update(sources[n].work)
            continue
        lines = [heads[n], *sources[n].scan(accept, progress.update)]
        folder.publish(_part_name(n), "".join(json.dumps(line) + "\n" for line in lines).encode())
    return _read_listing(folder, fs, source, sources, heads)


def shown(name: str) -> str:
    """A name on one line, whatever bytes it was made of."""
    return " ".join(name.encode("utf-8", "replace").decode().split())


class _Dropped(Exception):
    """A picture that is not taken: the reason it is counted under, and more about it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class _Candidate:
    """A picture before anything is known of it. `read(start, end)` gives bytes of its file, `caption` its caption."""

    name: str
    size: int
    read: Callable[[int, int], bytes]
    caption: Callable[[], str]
    start: int = 0
    problem: str = ""

    def facts(self, accept: Accept) -> dict[str, Any]:
        """Its line of the listing."""
        try:
            if self.problem:
                raise _Dropped(self.problem)
            if self.size > MAX_PICTURE_BYTES:
                raise _Dropped("too many bytes", f"{self.size}; allowed: {MAX_PICTURE_BYTES}")
            caption = self.caption().encode("utf-8", "replace").decode().strip()
            if not caption:
                raise _Dropped("no caption")
            width, height = self.measured()
            accept.check(width, height)
        except _Dropped as dropped:
            return {"name": self.name, "dropped": dropped.reason, "why": dropped.detail}
        place = {"start": self.start, "bytes": self.size, "width": width, "height": height}
        return {"name": self.name, **place, "caption": caption}

    def measured(self) -> tuple[int, int]:
        """(width, height), from as little of the file as will do."""
        for most in (*HEADER_BYTES, self.size):
            try:
                return size_of(self.read(0, min(most, self.size)))
            except BadPicture as error:
                if most >= self.size:
                    raise _Dropped("header unreadable", str(error)) from None
        raise AssertionError("the last attempt reads all")


@dataclass(frozen=True)
class _Shard:
    """A WebDataset shard."""

    file: Any
    bytes: int
    unit = "MiB"

    @property
    def work(self) -> int:
        return -(-self.bytes >> 20)

    @property
    def name(self) -> str:
        return _basename(self.file.path)

    def locate(self, name: str) -> tuple[str, str]:
        """Path, and name for people, of a picture of this source."""
        return self.file.path, f"{self.name}/{name}"

    def scan(self, accept: Accept, seen: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        """Lines of the listing, in the order of keys."""
        told = 0
        with self.file as stream:
            try:
                members = list(tar.walk(stream))
            except ValueError as error:
                raise ValueError(f"pictures in {self.file.path}: {error}") from None
            for candidate in sorted(_candidates(stream, members, accept.column), key=lambda c: (c.name, c.start)):
                yield candidate.facts(accept)
                if (done := (candidate.start + candidate.size) >> 20) > told:  # keys mostly rise as places do
                    seen(done - told)
                    told = done
        seen(self.work - told)


@dataclass(frozen=True)
class _PictureFolder:
    """A folder of pictures; `files` are the sizes in bytes of them and of what holds captions, by relative name."""

    fs: Any
    path: str
    files: Mapping[str, int]
    unit = "files"

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def work(self) -> int:
        return len(self.files)

    @property
    def name(self) -> str:
        return _basename(self.path)

    def locate(self, name: str) -> tuple[str, str]:
        return f"{self.path}/{name}", name

    def holds(self, url: str) -> bool:
        """Whether that is a folder within this one, or this one."""
        return f"{fsspec.core.url_to_fs(url)[1]}/".startswith(f"{self.path}/")

    def scan(self, accept: Accept, seen: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        told = self._told(accept.column)
        for name in sorted({*self.files, *told}):
            if _ending(name) in ENDINGS or name in told:
                yield self._candidate(name, told.get(name)).facts(accept)
            if name in self.files:
                seen(1)

    def _candidate(self, name: str, told: str | None) -> _Candidate:
        problem = "" if name in self.files else "no such file"
        if _ending(name) not in ENDINGS:
            problem = f"not {', '.join(ENDINGS)}"
        path, text = f"{self.path}/{name}", str(PurePosixPath(name).with_suffix(".txt"))

        def caption() -> str:
            if told is not None or self.files.get(text, MAX_CAPTION_BYTES + 1) > MAX_CAPTION_BYTES:
                return told or ""
            return _caption(None, {".txt": self.fs.cat_file(f"{self.path}/{text}")})

        def read(start: int, end: int) -> bytes:
            return self.fs.cat_file(path, start, end)

        return _Candidate(name, self.files.get(name, 0), read, caption, problem=problem)

    def _told(self, column: str | None) -> dict[str, str]:
        """Captions by relative name, from every metadata.jsonl."""
        found: dict[str, str] = {}
        for file in sorted(self.files):
            if _basename(file) != METADATA:
                continue
            for number, line in enumerate(self.fs.cat_file(f"{self.path}/{file}").splitlines(), 1):
                if line.strip():
                    where = f"{self.path}/{file}, line {number}"
                    name, caption = _metadata_row(line, column, where)
                    found[str(PurePosixPath(file).parent / name)] = caption
        return found


def _sources(source: str) -> tuple[Any, list[_Shard] | list[_PictureFolder]]:
    if source.lower().endswith(".tar"):
        files = find_files(source, "pictures")
        return files[0].fs, [_Shard(file, file.fs.size(file.path)) for file in files]
    fs, path = fsspec.core.url_to_fs(source)
    path = path.rstrip("/")
    if not fs.isdir(path):
        raise FileNotFoundError(f"no pictures at {source}: it must be a folder, or end in .tar")
    found = {name[len(path) :].lstrip("/"): info["size"] for name, info in fs.find(path, detail=True).items()}
    read = {n: int(size) for n, size in found.items() if _ending(n) in (*ENDINGS, ".txt") or _basename(n) == METADATA}
    return fs, [_PictureFolder(fs, path, read)]


def _candidates(stream: IO[bytes], members: Iterable[tar.Member], column: str | None) -> Iterator[_Candidate]:
    """The pictures of an archive with what belongs to each."""
    texts: dict[str, dict[str, tar.Member]] = {}
    pictures = []
    for member in members:
        key, ending = member.name[: -len(_ending(member.name)) or None], _ending(member.name)
        if ending in ENDINGS:
            pictures.append((key, member))
        elif ending in CAPTION_ENDINGS and member.regular and member.size <= MAX_CAPTION_BYTES:
            texts.setdefault(key, {})[ending] = member
    used: set[str] = set()
    for key, member in pictures:
        problem = "a second picture of its key" if key in used else _tar_problem(member)
        used.add(key)
        yield _member_candidate(stream, member, texts.get(key, {}), column, problem)


def _member_candidate(
    stream: IO[bytes], member: tar.Member, texts: Mapping[str, tar.Member], column: str | None, problem: str
) -> _Candidate:
    def read(start: int, end: int) -> bytes:
        stream.seek(member.start + start)
        return stream.read(end - start)

    def caption() -> str:
        found = {}
        for ending, text in texts.items():
            stream.seek(text.start)
            found[ending] = stream.read(text.size)
        return _caption(column, found)

    return _Candidate(member.name, member.size, read, caption, member.start, problem)


def _tar_problem(member: tar.Member) -> str:
    if not member.regular:
        return "not a regular file"
    return "" if _inside(member.name) else "unsafe name"


def _inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in re.split(r"[/\\]", name) and "\0" not in name


def _basename(path: str) -> str:
    return path.rpartition("/")[2]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _caption(column: str | None, texts: Mapping[str, bytes]) -> str:
    """The caption among `KEY.txt` and `KEY.json`, or nothing. Raises _Dropped: they are not text."""
    try:
        plain = texts.get(".txt", b"").decode("utf-8-sig").strip() if column is None else ""
        return plain or (_named(json.loads(texts[".json"]), column) if ".json" in texts else "")
    except ValueError as error:
        raise _Dropped("caption unreadable", str(error)) from None


def _named(entry: Any, column: str | None) -> str:
    if not isinstance(entry, dict):
        return ""
    found = (entry.get(name) for name in (COLUMNS if column is None else (column,)))
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


def _metadata_row(line: bytes, column: str | None, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        name = row["file_name"]
        if not isinstance(name, str) or not _inside(name):
            raise ValueError(f"file_name {name!r} is outside its folder")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"pictures in {where}: an object with file_name is needed ({error})") from None
    return name, _named(row, column)


def _head(source: _Shard | _PictureFolder, accept: Accept) -> dict[str, Any]:
    """The first line of a part of the listing: what it is of. Without folders' names, so that data may be moved."""
    return {"schema": SCHEMA, "file": source.name, "file_bytes": source.bytes, **asdict(accept)}


def _part_name(n: int) -> str:
    return f"pictures-{n:06d}.jsonl"


def _read_listing(
    folder: Folder, fs: Any, source: str, sources: Sequence[_Shard | _PictureFolder], heads: Sequence[dict[str, Any]]
) -> Listing:
    digest, dropped, pictures = hashlib.sha256(), Counter[str](), []
    for n, (one, expected) in enumerate(zip(sources, heads, strict=True)):
        data = folder.read(_part_name(n))
        digest.update(data)
        head, *lines = map(json.loads, data.splitlines())
        if differ := [name for name in expected if head.get(name) != expected[name]]:
            said = "; ".join(f"{name} is {head.get(name)!r} there and {expected[name]!r} in the run" for name in differ)
            raise StoreMismatch(f"{folder.url} was begun over other pictures (write to a new folder): {said}")
        for line in lines:
            if "dropped" in line:
                dropped[line["dropped"]] += 1
            else:
                pictures.append(Picture(*one.locate(line["name"]), line["start"], line["bytes"], line["caption"]))
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
    said = f"{len(pictures)} pictures in {source}, {dropped.total()} left out{f' ({counts})' if counts else ''}"
    if not pictures:
        raise StoreError(f"no pictures to make a store of: {said}")
    log.info("%s; pictures-*.jsonl of %s name them", said, folder.url)
    return Listing(fs, pictures, digest.hexdigest())
