"""Prompts from a text file, JSONL, CSV, Parquet, or the captions of WebDataset shards."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any

import fsspec

from distill.data import tar

COLUMNS = ("prompt", "caption", "text")
MAX_CAPTION_BYTES = 1 << 20


def read_prompts(source: str, column: str | None = None) -> list[str]:
    """Reads every prompt of a source, in order; empty ones are left out. Sample i of a store has prompt i mod n.

    Args:
        source: a path or fsspec URL, told apart by its ending: `.txt` (a prompt a line), `.jsonl` (a string or an
            object a line), `.csv`, `.tsv`, `.parquet`, or `.tar` with captions as `KEY.txt` or, if a column is named,
            as an entry of `KEY.json`. `*` and `?` match several files, which are read in order of their names.
        column: of objects and tables; by default the first there is of `prompt`, `caption` and `text`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a kind of file that is not known, no prompts in it, or no such column (names those there are).
    """
    kind = next((read for ending, read in READERS.items() if source.lower().endswith(ending)), None)
    if kind is None:
        raise ValueError(f"prompts in {source}: the name must end in one of {', '.join(READERS)}")
    found: list[str] = []
    for file in find_files(source):
        with file as stream:
            found += kind(stream, column, file.path)
    prompts = [text for text in (p.strip() for p in found) if text]
    if not prompts:
        raise ValueError(f"no prompts in {source}")
    return prompts


def find_files(source: str, what: str = "prompts") -> Sequence[Any]:
    """The files (as fsspec opens them) at a path or URL with `*` and `?`, by name. Raises FileNotFoundError: none."""
    try:
        found = fsspec.open_files(source, "rb")
        missing = [file.path for file in found if not file.fs.isfile(file.path)]
    except FileNotFoundError:
        found, missing = [], [source]
    if missing or not found:
        raise FileNotFoundError(f"no {what} at {', '.join(missing) or source}: no such file")
    return sorted(found, key=lambda file: str(file.path))


def _text(stream: IO[bytes], column: str | None, path: str) -> list[str]:
    return list(_decoded(stream, path))


def _jsonl(stream: IO[bytes], column: str | None, path: str) -> list[str]:
    found = []
    for number, line in enumerate(_decoded(stream, path), 1):
        if line.strip():
            found.append(_prompt(_json(line, f"{path}, line {number}"), column, f"{path}, line {number}"))
    return found


def _csv(delimiter: str) -> Callable[[IO[bytes], str | None, str], list[str]]:
    def read(stream: IO[bytes], column: str | None, path: str) -> list[str]:
        rows = csv.DictReader(_decoded(stream, path), delimiter=delimiter)
        name = _choose(rows.fieldnames or (), column, path)
        return [row[name] or "" for row in rows]

    return read


def _parquet(stream: IO[bytes], column: str | None, path: str) -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"prompts in {path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        name = _choose(table.schema_arrow.names, column, path)
        return [str(text or "") for text in table.read([name])[name].to_pylist()]
    except pyarrow.ArrowException as error:
        raise ValueError(f"prompts in {path}: not Parquet ({error})") from None


def _captions(stream: IO[bytes], column: str | None, path: str) -> list[str]:
    """Captions of a WebDataset shard, read in place; everything else in it is skipped unread."""
    ending, found = ".txt" if column is None else ".json", []
    try:
        for member in tar.walk(stream):
            if not member.regular or not member.name.endswith(ending):
                continue
            if member.size > MAX_CAPTION_BYTES:
                raise ValueError(f"member {member.name!r} has {member.size} bytes; a caption has at most 1 MiB")
            stream.seek(member.start)
            text = stream.read(member.size).decode("utf-8")
            where = f"{path}, {member.name}"
            found.append(text if column is None else _prompt(_json(text, where), column, where))
    except ValueError as error:
        raise ValueError(f"prompts in {path}: {error}") from None
    return found


READERS: dict[str, Callable[[IO[bytes], str | None, str], Iterable[str]]] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
    ".parquet": _parquet,
    ".tar": _captions,
}


def _decoded(stream: IO[bytes], path: str) -> io.StringIO:
    try:
        return io.StringIO(stream.read().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts in {path}: not UTF-8 ({error})") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"prompts in {where}: not JSON ({error})") from None


def _prompt(entry: Any, column: str | None, where: str) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"prompts in {where}: a string or an object is needed, got {type(entry).__name__}")
    return str(entry[_choose(list(entry), column, where)] or "")


def _choose(available: Sequence[str], column: str | None, where: str) -> str:
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in available:
            return name
    raise ValueError(
        f"prompts in {where}: no column {' or '.join(wanted)}; there are: {', '.join(available) or 'none'}"
    )
