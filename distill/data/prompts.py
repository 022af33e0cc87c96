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
from distill.data.storage import file_system
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
    kind = next((read for ending, read in READERS.items() if source.lower().endswith(ending)), None)
    if kind is None:
        written = f"""a prompt itself is written ["{source}"]"""
        raise ValueError(f"prompts in {source}: the name must end in one of {', '.join(READERS)}; {written}")
    prompts: list[str] = []
    for file in find_files(source):
        try:
            with file as stream:
                prompts += [text for text in kind(stream, column, file.path) if text]
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


def _text(stream: IO[bytes], column: str | None, path: str) -> Iterator[str]:
    for number, line in enumerate(_lines(stream, path), 1):
        with _at(f"{path}, line {number}"):
            text = caption_of(line)
        yield text


def _jsonl(stream: IO[bytes], column: str | None, path: str) -> Iterator[str]:
    for number, line in enumerate(_lines(stream, path), 1):
        if line.strip():
            with _at(f"{path}, line {number}"):
                text = caption_in(parsed(line), column)
            yield text


def _json(stream: IO[bytes], column: str | None, path: str) -> Iterator[str]:
    with _at(path):
        content = parsed(stream.read())
        is_coco = isinstance(content, dict) and "annotations" in content
        entries = coco_captions(content)[0] if is_coco else entries_of(content)
    for number, entry in enumerate(entries, 1):
        with _at(f"{path}, entry {number}"):
            text = caption_in(entry, column)
        yield text


def _csv(stream: IO[bytes], column: str | None, path: str) -> Iterator[str]:
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
        yield from _cells(numbered(), column, path, "a text with commas stands in quotation marks")
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


def _tsv(stream: IO[bytes], column: str | None, path: str) -> Iterator[str]:
    """Tabs and lines, and nothing else: quotation marks are part of a text."""
    rows = ((n, line.rstrip("\r\n").split("\t")) for n, line in enumerate(_lines(stream, path), 1))
    return _cells(rows, column, path, "a text cannot have tabs")


def _cells(rows: Iterator[tuple[int, list[str]]], column: str | None, path: str, hint: str) -> Iterator[str]:
    """The cells of one column of a table, whose first row is its header."""
    header = [name.strip() for name in next(rows, (1, []))[1]]
    with _at(path):
        at = header.index(choose(header, column))
    for line, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if at >= len(row) or any(cell.strip() for cell in row[len(header) :]):
            raise ValueError(
                f"prompts in {path}, line {line}: {counted(len(row), 'cell')}, the header has {len(header)}; {hint}"
            )
        with _at(f"{path}, line {line}"):
            text = caption_of(row[at])
        yield text


def _parquet(stream: IO[bytes], column: str | None, path: str) -> Iterator[str]:
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
        cells = table.read([top])[top].to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"prompts in {path}: not Parquet ({error})") from None
    for number, cell in enumerate(cells, 1):
        if cell is not None:
            with _at(f"{path}, row {number}"):
                text = caption_in({top: cell}, top if whole else column)
            yield text


def _captions(stream: IO[bytes], column: str | None, path: str) -> Iterator[str]:
    """Captions of a WebDataset shard, read in place; everything else in it is skipped unread.

    As of pictures, those that cannot be read are left out and counted; if all cannot, it says why of the first.
    """
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
        yield text
    if problems and not good:
        raise ValueError(f"prompts in {path}, {problems[0]}")
    if problems:
        log.warning("%s: %d of %d captions left out; the first: %s", path, len(problems), len(files), problems[0])


def _bytes(stream: IO[bytes], member: tar.Member) -> bytes:
    """A member, as far as a caption may be long and one byte more."""
    stream.seek(member.start)
    return stream.read(min(member.size, MAX_BYTES + 1))


READERS: dict[str, Callable[[IO[bytes], str | None, str], Iterable[str]]] = {
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
