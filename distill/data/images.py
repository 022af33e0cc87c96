"""Pictures with captions, from WebDataset shards or a folder: which of them a store is made of.

They are listed before anything is made of them, in an order that depends on names alone, from headers and captions
only. The listing stays in the store's folder, a part for each source file: processes share the work without talking,
and a restart lists what is not listed yet. Of a picture that is left out it says why.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from distill.data import tar
from distill.data.errors import ReadError, StoreError
from distill.data.index import SCHEMA, StoreMismatch
from distill.data.pictures import BadPicture, size_of, upright_size_of
from distill.data.progress import Progress
from distill.data.prompts import find_files
from distill.data.remote import file_system
from distill.data.retries import Patience
from distill.data.sizes import ImageSize, covers, nearest, read_sizes
from distill.data.storage import Folder
from distill.data.texts import JSON, MAX_BYTES, PLAIN, NoColumn, caption_in, caption_in_files, decoded, parsed
from distill.data.words import counted

log = logging.getLogger(__name__)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
CAPTION_ENDINGS = (*PLAIN, JSON)
METADATA = "metadata.jsonl"
HEADER_BYTES = (1 << 12, 1 << 16)
"""How much of a picture is read to find its size, before all of it is."""
MAX_PICTURE_BYTES = 1 << 28
LIMIT = MAX_BYTES + 1
"""Bytes that are read of a caption's file: one more than it may have."""
GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What makes one file unreadable for good. Other errors may pass: the listing stops, and is taken up again."""

_Caption = Callable[[], str]


class File(NamedTuple):
    """A file of a folder: its size in bytes, and why it cannot be read if it cannot."""

    size: int
    problem: str = ""


NOT_THERE = File(0)


class Picture(NamedTuple):
    """`size` bytes from `start` of the file at `path`; `name` is for people. `width` and `height` are in pixels."""

    path: str
    name: str
    start: int
    size: int
    caption: str
    width: int
    height: int

    @property
    def size_in_pixels(self) -> ImageSize:
        return ImageSize(self.height, self.width)


@dataclass(frozen=True)
class Accept:
    """Which pictures are taken.

    Args:
        min_size: pixels of the shorter side, at least; 0, with `sizes`, takes those that need not be enlarged.
        max_aspect_ratio: longer over shorter side, at most.
        column: entry of `KEY.json` or `metadata.jsonl` that is the caption (`caption.en` and `captions.0` reach into
            objects and lists); by default `KEY.txt` or `KEY.caption`, or else the first there is of `prompt`, `caption`
            and `text`.
        sizes: what pictures are cut to, as WIDTHxHEIGHT, where that is not one square: each to the size whose aspect
            ratio is nearest to that of the upright picture.
    """

    min_size: int
    max_aspect_ratio: float = 2.0
    column: str | None = None
    sizes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_size < (0 if self.sizes else 1) or not self.max_aspect_ratio >= 1:
            raise ValueError(f"min_size and max_aspect_ratio must be at least 1, got {asdict(self)}")

    def check(self, width: int, height: int) -> None:
        """Raises _Dropped."""
        if min(width, height) < self.min_size:
            raise _Dropped("too small", f"{width} x {height} pixels")
        if self.sizes and not self.min_size:
            image, sizes = ImageSize(height, width), read_sizes(self.sizes)
            if not covers(image, size := sizes[nearest(image, sizes)]):
                raise _Dropped("too small", f"{width} x {height} pixels, for {size}")
        if max(width, height) > self.max_aspect_ratio * min(width, height):
            raise _Dropped("aspect ratio", f"{width} x {height} pixels")


@dataclass(frozen=True)
class Listing:
    """The pictures of a store, in its order. `sha256` is of all that decides which they are, and their captions;
    `root` is the folder or the first archive that they are read from."""

    fs: Any
    root: str
    pictures: Sequence[Picture]
    sha256: str

    @property
    def captions(self) -> list[str]:
        return [picture.caption for picture in self.pictures]

    def read(self, indices: Sequence[int]) -> list[bytes | BadPicture]:
        """The files of these pictures, remote ones in parallel; or why one that is gone or has changed is left out.

        Raises:
            ReadError: the shard or folder itself is gone, or cannot be read for a while; names it.
        """
        wanted, patience = [self.pictures[i] for i in indices], Patience()
        starts, ends = [p.start for p in wanted], [p.start + p.size for p in wanted]
        while True:
            found = self.fs.cat_ranges([p.path for p in wanted], starts, ends, on_error="return")
            failed = [at for at, data in enumerate(found) if isinstance(data, Exception) and not isinstance(data, GONE)]
            if not failed:
                patience.over()
                return [self._checked(picture, data) for picture, data in zip(wanted, found, strict=True)]
            patience.after(found[failed[0]], f"picture {shown(wanted[failed[0]].name)}")

    def _checked(self, picture: Picture, data: bytes | OSError) -> bytes | BadPicture:
        if isinstance(data, OSError):
            if not self.fs.exists(self.root):
                raise ReadError(f"picture {shown(picture.name)} cannot be read: {self.root} is gone")
            return BadPicture(f"cannot be read any more ({_reason(data)})")
        if len(data) != picture.size:
            return BadPicture("has changed since it was listed")
        return data


def list_pictures(source: str, store: str, accept: Accept, *, rank: int = 0, world_size: int = 1) -> Listing:
    """Lists the pictures of a source in the store's folder, or reads there what has been listed.

    Args:
        source: a path or fsspec URL. Either WebDataset shards, `*.tar` (`*` and `?` match several), with
            `KEY.jpg|jpeg|png|webp` and its caption in `KEY.txt`, `KEY.caption` or `KEY.json`: ordered by shard, then
            key. A key ends at the last dot, or as in WebDataset at the first: `KEY.image.jpg` has `KEY.txt`. Or a
            folder with pictures, at any depth, and their captions beside them in the same way or in a `metadata.jsonl`
            with `file_name` (relative to it) and a caption: ordered by name.
        store: folder or URL of the store that is made of them.
        rank, world_size: this process among those that list; each starts elsewhere.

    Raises:
        FileNotFoundError: nothing at `source`.
        StoreMismatch: the store was begun over other files, or with other filters; names what differs.
        ValueError: a damaged archive or `metadata.jsonl`, no picture is left, or the store is within `source`.
    """
    fs, root, sources = _sources(source)
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
    return _read_listing(folder, fs, root, source, sources, heads)


def shown(name: str) -> str:
    """A name on one line, whatever bytes it was made of."""
    return " ".join(name.encode("utf-8", "replace").decode().split())


class _Dropped(Exception):
    """A picture that is not taken: the reason it is counted under, and more about it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class _Candidate:
    """A picture before anything is known of it. `read(start, end)` gives bytes of its file, `caption` its caption,
    empty or a ValueError if there is none; `looked_for` says where a caption may be."""

    name: str
    size: int
    read: Callable[[int, int], bytes]
    caption: Callable[[], str]
    looked_for: str
    start: int = 0
    problem: str = ""
    detail: str = ""

    def facts(self, accept: Accept) -> dict[str, Any]:
        """Its line of the listing."""
        try:
            if self.problem:
                raise _Dropped(self.problem, self.detail)
            if self.size > MAX_PICTURE_BYTES:
                raise _Dropped("too many bytes", f"{self.size}; allowed: {MAX_PICTURE_BYTES}")
            caption = self._caption()
            width, height = self.measured(upright_size_of if accept.sizes else size_of)
            accept.check(width, height)
        except _Dropped as dropped:
            return {"name": self.name, "dropped": dropped.reason, "why": dropped.detail}
        except GONE as error:
            return {"name": self.name, "dropped": "cannot be read", "why": _reason(error)}
        except OSError as error:
            raise ReadError(f"picture {shown(self.name)} cannot be read: {type(error).__name__} {error}") from None
        place = {"start": self.start, "bytes": self.size, "width": width, "height": height}
        return {"name": self.name, **place, "caption": caption}

    def _caption(self) -> str:
        try:
            if caption := self.caption():
                return caption
        except NoColumn as error:
            raise _Dropped("no caption", str(error)) from None
        except GONE as error:
            raise _Dropped("caption unreadable", _reason(error)) from None
        except ValueError as error:
            raise _Dropped("caption unreadable", str(error)) from None
        raise _Dropped("no caption", f"looked for: {self.looked_for}")

    def measured(self, measure: Callable[[bytes], tuple[int, int]]) -> tuple[int, int]:
        """(width, height), from as little of the file as will do."""
        for most in (*HEADER_BYTES, self.size):
            try:
                return measure(self.read(0, min(most, self.size)))
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
        """The path of a picture of this source, and its name for people."""
        return self.file.path, f"{self.name}/{name}"

    def scan(self, accept: Accept, seen: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        """Lines of the listing, in the order of keys."""
        reported = 0
        with self.file as stream:
            try:
                members = list(tar.walk(stream))
            except ValueError as error:
                raise ValueError(f"pictures in {self.file.path}: {error}") from None
            for candidate in sorted(_candidates(stream, members, accept.column), key=lambda c: (c.name, c.start)):
                yield candidate.facts(accept)
                if (done := (candidate.start + candidate.size) >> 20) > reported:  # keys mostly rise as places do
                    seen(done - reported)
                    reported = done
        yield from _unread(member.name for member in members)
        seen(self.work - reported)


@dataclass(frozen=True)
class _PictureFolder:
    """A folder of pictures; `files` are those at any depth, by relative name."""

    fs: Any
    path: str
    files: Mapping[str, File]
    unit = "files"

    @property
    def bytes(self) -> int:
        """Bytes of the pictures and of the files that hold captions."""
        return sum(file.size for name, file in self.files.items() if _is_read(name))

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
        return f"{file_system(url)[1]}/".startswith(f"{self.path}/")

    def scan(self, accept: Accept, seen: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        listed, texts = self._captions_of_metadata(accept.column), dict[str, dict[str, str]]()
        for name in self.files:
            if _ending(name) in CAPTION_ENDINGS:
                texts.setdefault(_stem(name), {})[_ending(name)] = name
        for name in sorted({*self.files, *listed}):
            if _ending(name) in ENDINGS or name in listed:
                yield self._candidate(name, listed.get(name), texts.get(_stem(name), {}), accept.column).facts(accept)
            if name in self.files:
                seen(1)
        yield from _unread(name for name in self.files if name not in listed)

    def _candidate(
        self, name: str, listed: _Caption | None, texts: Mapping[str, str], column: str | None
    ) -> _Candidate:
        file = self.files.get(name, NOT_THERE)
        problem, path = (
            ("no such file" if file is NOT_THERE else file.problem and "cannot be read"),
            f"{self.path}/{name}",
        )
        if _ending(name) not in ENDINGS:
            problem = f"not {', '.join(ENDINGS)}"

        def caption() -> str:
            if listed is not None:
                return listed()
            found = {ending: self.fs.cat_file(f"{self.path}/{text}", 0, LIMIT) for ending, text in texts.items()}
            return caption_in_files(_basename(_stem(name)), found, column)

        def read(start: int, end: int) -> bytes:
            return self.fs.cat_file(path, start, end)

        looked_for = "its line of metadata.jsonl" if listed is not None else ", ".join(_beside(name))
        return _Candidate(name, file.size, read, caption, looked_for, problem=problem, detail=file.problem)

    def _captions_of_metadata(self, column: str | None) -> dict[str, _Caption]:
        """What reads their captions, by relative name, from every metadata.jsonl."""
        found: dict[str, _Caption] = {}
        for file in sorted(self.files):
            if _basename(file) != METADATA:
                continue
            where = f"pictures in {self.path}/{file}"
            try:
                lines = io.StringIO(decoded(self.fs.cat_file(f"{self.path}/{file}")), newline="")
            except (OSError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from None
            for number, line in enumerate(lines, 1):
                if line.strip():
                    name, row = _metadata_row(line, f"{where}, line {number}")
                    found[str(PurePosixPath(file).parent / name)] = partial(caption_in, row, column)
        return found


def files_in(fs: Any, root: str) -> dict[str, File]:
    """The files of a folder at any depth, by relative name. Linked files and folders are followed, none twice."""
    if isinstance(fs, LocalFileSystem):
        return dict(_local_files(root, ""))
    found = fs.find(root, detail=True).items()
    return {name[len(root) :].lstrip("/"): File(int(info["size"] or 0)) for name, info in found}


def _local_files(root: str, under: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, File]]:
    """`above`: the folders that this one is in, by device and inode: a link to one of them is not followed."""
    here = os.path.join(root, under)
    identity = (os.stat(here).st_dev, os.stat(here).st_ino)
    if identity in above:
        return
    for name in sorted(os.listdir(here)):
        path = f"{under}{name}"
        try:
            status = os.stat(os.path.join(root, path))
            if stat.S_ISDIR(status.st_mode):
                yield from _local_files(root, f"{path}/", (*above, identity))
                continue
            yield path, File(status.st_size, "" if stat.S_ISREG(status.st_mode) else "not a regular file")
        except OSError as error:
            yield path, File(0, _reason(error))


def _sources(source: str) -> tuple[Any, str, list[_Shard] | list[_PictureFolder]]:
    if source.lower().endswith(".tar"):
        files = find_files(source, "pictures")
        return files[0].fs, files[0].path, [_Shard(file, file.fs.size(file.path)) for file in files]
    fs, path = file_system(source)
    path = path.rstrip("/")
    if not fs.isdir(path):
        raise FileNotFoundError(f"no pictures at {source}: it must be a folder, or end in .tar")
    return fs, path, [_PictureFolder(fs, path, files_in(fs, path))]


def _candidates(stream: IO[bytes], members: Iterable[tar.Member], column: str | None) -> Iterator[_Candidate]:
    """The pictures of an archive with what belongs to each."""
    texts: dict[str, dict[str, tar.Member]] = {}
    of_keys: dict[str, dict[str, tar.Member]] = {}
    pictures = []
    for member in members:
        ending = _ending(member.name)
        if ending in ENDINGS:
            pictures.append(member)
        elif ending in CAPTION_ENDINGS and member.regular:
            stem, key = _stem(member.name), webdataset_key(member.name)
            texts.setdefault(stem, {})[ending] = member
            if stem == key or ending not in of_keys.get(key, {}):  # KEY.txt rather than KEY.caption.txt
                of_keys.setdefault(key, {})[ending] = member
    used: set[str] = set()
    for member in pictures:
        stem, key = _stem(member.name), webdataset_key(member.name)
        own, group = (of_keys[key], key) if stem not in texts and key in of_keys else (texts.get(stem, {}), stem)
        problem = "a second picture of its key" if group in used else _tar_problem(member)
        used.add(group)
        yield _member_candidate(stream, member, own, column, problem)


def webdataset_key(name: str) -> str:
    """The key that WebDataset gives a file: its name up to the first dot, with its folders."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0] or file}"


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
            found[ending] = stream.read(min(text.size, LIMIT))
        return caption_in_files(_basename(_stem(member.name)), found, column)

    keys = dict.fromkeys((_stem(member.name), webdataset_key(member.name)))
    looked_for = ", ".join(_basename(name) for key in keys for name in _beside(f"{key}."))
    return _Candidate(member.name, member.size, read, caption, looked_for, member.start, problem)


def _beside(name: str) -> list[str]:
    """The files that may hold a picture's caption."""
    return [f"{_stem(name)}{ending}" for ending in CAPTION_ENDINGS]


def _unread(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A line of the listing about files that are neither pictures nor captions: how many of each ending, and one."""
    found: dict[str, tuple[int, str]] = {}
    for name in sorted(names):
        if not _is_read(name):
            count, example = found.get(_ending(name), (0, name))
            found[_ending(name)] = (count + 1, example)
    if found:
        yield {"unread": found}


def _is_read(name: str) -> bool:
    return _ending(name) in (*ENDINGS, *CAPTION_ENDINGS) or _basename(name) == METADATA


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


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _metadata_row(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        row = parsed(line)
        name = row["file_name"]
        if not isinstance(name, str) or not _inside(name):
            raise ValueError(f"file_name {name!r} is outside its folder")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: an object with file_name is needed ({error})") from None
    return name, row


def _reason(error: OSError) -> str:
    """Why a file cannot be read, without its name."""
    return error.strerror or type(error).__name__


def _head(source: _Shard | _PictureFolder, accept: Accept) -> dict[str, Any]:
    """The first line of a part of the listing: what it is of. Without folders' names, so that data may be moved."""
    accepted = {name: value for name, value in asdict(accept).items() if name != "sizes"}
    accepted |= {"sizes": list(accept.sizes)} if accept.sizes else {}
    return {"schema": SCHEMA, "file": source.name, "file_bytes": source.bytes, **accepted}


def _part_name(n: int) -> str:
    return f"pictures-{n:06d}.jsonl"


def _read_listing(
    folder: Folder,
    fs: Any,
    root: str,
    source: str,
    sources: Sequence[_Shard | _PictureFolder],
    heads: Sequence[dict[str, Any]],
) -> Listing:
    digest, dropped, pictures, unread = hashlib.sha256(), Counter[str](), [], dict[str, tuple[int, str]]()
    first = ""
    for n, (one, expected) in enumerate(zip(sources, heads, strict=True)):
        data = folder.read(_part_name(n))
        digest.update(data)
        head, *lines = map(json.loads, data.splitlines())
        if differ := [name for name in expected if head.get(name) != expected[name]]:
            said = "; ".join(f"{name} is {head.get(name)!r} there and {expected[name]!r} in the run" for name in differ)
            raise StoreMismatch(f"{folder.name} was begun over other pictures (write to a new folder): {said}")
        for line in lines:
            if "dropped" in line and not first:
                why = f" ({line['why']})" if line["why"] else ""
                first = f"; the first: {shown(line['name'])}, {line['dropped']}{why}"
            if "unread" in line:
                for ending, (count, example) in line["unread"].items():
                    so_far, one_of_them = unread.get(ending, (0, example))
                    unread[ending] = (so_far + count, one_of_them)
            elif "dropped" in line:
                dropped[line["dropped"]] += 1
            else:
                place = *one.locate(line["name"]), line["start"], line["bytes"]
                pictures.append(Picture(*place, line["caption"], line["width"], line["height"]))
    if unread:
        what = ", ".join(f"{end or 'no ending'}: {n}, such as {shown(one)}" for end, (n, one) in sorted(unread.items()))
        log.warning("files in %s that are not read: %s", source, what)
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
    said = (
        f"{counted(len(pictures), 'picture')} in {source}, {dropped.total()} left out{f' ({counts})' if counts else ''}"
    )
    if not pictures:
        raise StoreError(f"no pictures to make a store of: {said}{first}")
    log.info("%s; pictures-*.jsonl of %s name them", said, folder.name)
    return Listing(fs, root, pictures, digest.hexdigest())
