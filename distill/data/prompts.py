"""Prompts from a text file, JSON, JSONL, CSV, TSV, Parquet, or the captions of WebDataset shards."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from fsspec.core import OpenFile

from distill.data import tar
from distill.data.errors import short
from distill.data.remote import file_system
from distill.data.sizes import ImageSize, read_size
from distill.data.texts import (
    JSON,
    MAX_BYTES,
    PLAIN,
    caption_in,
    caption_in_files,
    caption_of,
    choose,
    coco_captions,
    decoded,
    entries_of,
    parsed,
)
from distill.data.words import counted

log = logging.getLogger(__name__)
Entry = tuple[str, ImageSize | None]
"""A prompt, and the size of its image where sizes are read."""
WIDTH, HEIGHT = "width", "height"


def read_prompts(source: str | Sequence[str], column: str | None = None) -> list[str]:
    """Reads every prompt of a source, in order; empty ones are left out. Sample i of a store has prompt i mod n.

    Args:
        source: a list of prompts, which may be empty texts, or one prompt; or a path or fsspec URL, read by its
            ending: `.txt` (a prompt per line), `.jsonl` (a string or an object per line), `.json` (a list, or COCO's
            captions), `.csv`, `.tsv` (which knows no quoting), `.parquet`, or `.tar` with captions as `KEY.txt`,
            `KEY.caption` or an entry of `KEY.json`. `*` and `?` match several files, read in order of their names.
        column: of objects and tables; by default the first there is of `prompt`, `caption` and `text`. In JSON and
            Parquet `caption.en` and `captions.0` reach into objects and lists.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a kind of file that is not known, no prompts in it, no such column (names those there are), or a
            prompt that is no text or too long (names the line).
    """
    if not isinstance(source, str) or (source.strip() and not _looks_like_a_path(source)):
        return _as_written([source] if isinstance(source, str) else source)
    return [text for text, _ in _read(source, column, sized=False)]


def read_sized_prompts(source: str | Sequence[str], column: str | None = None) -> tuple[list[str], list[ImageSize]]:
    """The same prompts, and of each the size of its image: whole numbers of pixels in its columns width and height.

    Args:
        source: `.jsonl`, `.json` (a list of objects), `.csv`, `.tsv` or `.parquet`.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`; or prompts without sizes, of which the first is named.
    """
    if not isinstance(source, str) or (source.strip() and not _looks_like_a_path(source)):
        raise ValueError("prompts that are written out have no sizes: columns width and height of a file have them")
    found = _read(source, column, sized=True)
    return [text for text, _ in found], [size for _, size in found if size is not None]


def _read(source: str, column: str | None, sized: bool) -> list[Entry]:
    """The prompts of files that are not empty."""
    kind = next((read for ending, read in READERS.items() if source.lower().endswith(ending)), None)
    if kind is None:
        written = f"""a prompt itself is written ["{source}"]"""
        raise ValueError(f"prompts in {source}: the name must end in one of {', '.join(READERS)}; {written}")
    prompts: list[Entry] = []
    for file in find_files(source):
        try:
            with file as stream:
                prompts += [entry for entry in kind(stream, column, file.path, sized) if entry[0]]
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(f"prompts in {file.path}: cannot be read ({error.strerror or error})") from None
    if not prompts:
        raise ValueError(f"no prompts in {source}")
    return prompts


def _as_written(prompts: Sequence[str]) -> list[str]:
    found = []
    for number, prompt in enumerate(prompts, 1):
        with _at(f"the list, number {number}"):
            found.append(caption_of(prompt))
    if not found:
        raise ValueError("no prompts: the list is empty")
    return found


def _looks_like_a_path(text: str) -> bool:
    """Whether a text names a file rather than being a prompt: one is there, or it is written as only paths are."""
    if text.lower().endswith(tuple(READERS)) or "://" in text or text.startswith(("/", "~", "./", "../")):
        return True
    if not re.search(r"\s", text) and re.search(r"[/\\]|\.\w{1,8}$", text):
        return True
    with suppress(OSError, ValueError):  # a long prompt is no name
        return os.path.exists(text)
    return False


def find_files(source: str, what: str = "prompts") -> Sequence[Any]:
    """The files (as fsspec opens them) at a path or URL with `*` and `?`, by name.

    Raises:
        FileNotFoundError: none, or one that is no file (names it).
        ValueError: a URL of a kind that cannot be opened here (names the package to install).
    """
    fs, path = file_system(source)
    pattern = any(mark in path for mark in "*?[") and not fs.isfile(path)
    found = sorted(map(str, fs.glob(path))) if pattern else [path]
    if missing := [name for name in found or [source] if not fs.isfile(name)]:
        why = "a folder; name its files, as in FOLDER/*.txt" if fs.isdir(missing[0]) else "no such file"
        raise FileNotFoundError(f"no {what} at {', '.join(missing)}: {why}")
    return [OpenFile(fs, name, "rb") for name in found]


def _text(stream: IO[bytes], column: str | None, path: str, sized: bool) -> Iterator[Entry]:
    _refuse_sizes(path, sized)
    for number, line in enumerate(_lines(stream, path), 1):
        with _at(f"{path}, line {number}"):
            text = caption_of(line)
        yield text, None


def _refuse_sizes(path: str, sized: bool) -> None:
    """Raises ValueError where sizes are wanted of a kind of file that has none."""
    if sized:
        kinds = ", ".join(ending for ending in READERS if ending not in (".txt", ".tar"))
        raise ValueError(f"prompts in {path} have no sizes: columns width and height are read of {kinds}")


def _size_in(entry: Any) -> ImageSize:
    """The size that an entry's width and height say. Raises ValueError: they are missing or no numbers of pixels."""
    said = [entry.get(name) if isinstance(entry, dict) else None for name in (WIDTH, HEIGHT)]
    whole = [str(value) if type(value) is int else value for value in said]
    if not all(isinstance(value, str) and value.strip().isdecimal() for value in whole):
        raise ValueError(
            f"width and height are {short(said[0])} and {short(said[1])}: whole numbers of pixels are needed"
        )
    return read_size("x".join(str(int(str(value))) for value in whole))


def _entry(row: Any, column: str | None, sized: bool) -> Entry:
    """The prompt of an entry of JSON, with its size if that is wanted and there is a prompt."""
    text = caption_in(row, column)
    return text, _size_in(row) if sized and text else None


def _jsonl(stream: IO[bytes], column: str | None, path: str, sized: bool) -> Iterator[Entry]:
    for number, line in enumerate(_lines(stream, path), 1):
        if line.strip():
            with _at(f"{path}, line {number}"):
                entry = _entry(parsed(line), column, sized)
            yield entry


def _json(stream: IO[bytes], column: str | None, path: str, sized: bool) -> Iterator[Entry]:
    with _at(path):
        content = parsed(stream.read())
        is_coco = isinstance(content, dict) and "annotations" in content
        entries = coco_captions(content)[0] if is_coco else entries_of(content)
    for number, row in enumerate(entries, 1):
        with _at(f"{path}, entry {number}"):
            entry = _entry(row, column, sized)
        yield entry


def _csv(stream: IO[bytes], column: str | None, path: str, sized: bool) -> Iterator[Entry]:
    """Captions of a CSV file, read strictly (RFC 4180): an open quotation mark would swallow the rest of the file."""
    rows = csv.reader(_lines(stream, path), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        while True:
            first = rows.line_num + 1
            try:
                yield first, next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"prompts in {path}, line {first}: {_csv_reason(str(error))}") from None

    usual = csv.field_size_limit(MAX_BYTES)
    try:
        yield from _cells(numbered(), column, path, sized, "a text with commas stands in quotation marks")
    finally:
        csv.field_size_limit(usual)


def _csv_reason(error: str) -> str:
    if error.startswith("unexpected end"):
        return "a quotation mark opens a text and none closes it"
    if error.startswith("field larger"):
        return f"a text of more than {MAX_BYTES:,} characters (is a quotation mark left open there?)"
    if "expected after" in error:
        return "something follows a closing quotation mark (within a text it is written twice)"
    return f"not CSV ({error})"


def _tsv(stream: IO[bytes], column: str | None, path: str, sized: bool) -> Iterator[Entry]:
    """Tabs and lines, and nothing else: quotation marks are part of a text."""
    rows = ((n, line.rstrip("\r\n").split("\t")) for n, line in enumerate(_lines(stream, path), 1))
    return _cells(rows, column, path, sized, "a text cannot have tabs")


def _cells(
    rows: Iterator[tuple[int, list[str]]], column: str | None, path: str, sized: bool, hint: str
) -> Iterator[Entry]:
    """The cells of one column of a table, whose first row is its header."""
    header = [name.strip() for name in next(rows, (1, []))[1]]
    with _at(path):
        at = header.index(choose(header, column))
        for name in (WIDTH, HEIGHT) if sized else ():
            choose(header, name)
    for line, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if at >= len(row) or any(cell.strip() for cell in row[len(header) :]):
            raise ValueError(
                f"prompts in {path}, line {line}: {counted(len(row), 'cell')}, the header has {len(header)}; {hint}"
            )
        with _at(f"{path}, line {line}"):
            text = caption_of(row[at])
            size = _size_in(dict(zip(header, row, strict=False))) if sized and text else None
        yield text, size


def _parquet(stream: IO[bytes], column: str | None, path: str, sized: bool) -> Iterator[Entry]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"prompts in {path}: reading Parquet needs pyarrow (pip install 'distill[parquet]')") from None
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        whole = column is None or column in names  # else it reaches into a column, as JSON's may
        with _at(path):
            top = choose(names, column if whole or column is None else column.partition(".")[0])
            more = [choose(names, name) for name in (WIDTH, HEIGHT) if sized]
        rows = table.read([top, *more]).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"prompts in {path}: not Parquet ({error})") from None
    for number, row in enumerate(rows, 1):
        if row[top] is not None:
            with _at(f"{path}, row {number}"):
                entry = _entry(row, top if whole else column, sized)
            yield entry


def _captions(stream: IO[bytes], column: str | None, path: str, sized: bool) -> Iterator[Entry]:
    """Captions of a WebDataset shard, read in place; everything else in it is skipped unread.

    As of pictures, those that cannot be read are left out and counted; if all cannot, it says why of the first.
    """
    _refuse_sizes(path, sized)
    files: dict[str, dict[str, tar.Member]] = {}
    with _at(path):
        members = list(tar.walk(stream))
    for member in members:
        stem, ending = os.path.splitext(member.name)
        if member.regular and ending.lower() in (*PLAIN, JSON):
            files.setdefault(stem, {})[ending.lower()] = member
    good, problems = 0, []
    for stem, own in files.items():
        try:
            text = caption_in_files(stem, {ending: _bytes(stream, one) for ending, one in own.items()}, column)
        except ValueError as error:
            problems.append(str(error))
            continue
        good += bool(text)
        yield text, None
    if problems and not good:
        raise ValueError(f"prompts in {path}, {problems[0]}")
    if problems:
        log.warning("%s: %d of %d captions left out; the first: %s", path, len(problems), len(files), problems[0])


def _bytes(stream: IO[bytes], member: tar.Member) -> bytes:
    """A member, as far as a caption may be long and one byte more."""
    stream.seek(member.start)
    return stream.read(min(member.size, MAX_BYTES + 1))


READERS: dict[str, Callable[[IO[bytes], str | None, str, bool], Iterable[Entry]]] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".tar": _captions,
}


def _lines(stream: IO[bytes], path: str) -> io.StringIO:
    with _at(path):
        return io.StringIO(decoded(stream.read()), newline="")


@contextmanager
def _at(where: str) -> Iterator[None]:
    """A ValueError of what is read inside says where it was."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"prompts in {where}: {error}") from None
