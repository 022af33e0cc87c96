"""How a caption is read, in whatever file it stands: bytes to text, JSON to values, a value to one caption.

Prompts, pictures' captions and evaluations read by these rules, so that a file means the same everywhere.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

COLUMNS = ("prompt", "caption", "text")
PLAIN, JSON = (".txt", ".caption"), ".json"
"""Endings of the files that hold a picture's caption beside it. (`.caption` is how sd-scripts writes them.)"""
MAX_BYTES = 1 << 20
"""The most bytes of a file that holds one caption, such as `KEY.txt` or `KEY.json`."""
MAX_CHARACTERS = 10_000
"""The most characters of a caption: text encoders read 77 tokens, and tokenizing megabytes takes minutes."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NoColumn(ValueError):
    """What should hold a caption has no such column."""


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in what a byte order mark at its start says: UTF-16 as Windows saves it, UTF-32.

    Raises:
        ValueError: it is not; says in which line.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"not {encoding.removesuffix('-sig').upper()} in line {line} (byte {data[error.start]:#04x})"
        raise ValueError(f"{what}: save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"not text: a zero byte in line {line} (UTF-16 without its mark?): save it as UTF-8")
    return text


def parsed(text: str | bytes) -> Any:
    """JSON. Raises ValueError: it is not, or it is nested too deeply."""
    try:
        return json.loads(decoded(text) if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None


def choose(available: Sequence[str], column: str | None) -> str:
    """The column to read: the one that is named, or the first there is of `COLUMNS`. Raises NoColumn."""
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in available:
            return name
    raise NoColumn(f"no column {' or '.join(wanted)}; there are: {_some(available) or 'none'}")


def caption_in(entry: Any, column: str | None) -> str:
    """The caption of an entry of JSON: a text, or an object with a column.

    Args:
        column: its key; `caption.en` and `captions.0` reach into objects and lists. By default the first of `COLUMNS`
            that is there and not empty.

    Raises:
        ValueError: no such column, or what it holds is no caption; see `caption_of`.
    """
    if isinstance(entry, str):
        return caption_of(entry)
    if not isinstance(entry, dict):
        raise ValueError(f"a string or an object is needed, got {type(entry).__name__}")
    if column is None:
        there = [name for name in COLUMNS if name in entry] or [choose(list(entry), None)]
        column = next((name for name in there if not _empty(entry[name])), there[0])
    return caption_of(_value(entry, column), column)


def caption_of(value: Any, column: str = "caption") -> str:
    """One caption: a text, without blanks around it, or a list of one text.

    Nothing and a list of nothing are the empty caption. Half a surrogate pair, which JSON can hold and no encoder
    takes, becomes a question mark.

    Raises:
        ValueError: several texts, among which only the user can choose; another type, which is never made a text; or a
            text longer than `MAX_CHARACTERS`.
    """
    if isinstance(value, bytes):
        value = decoded(value)
    if isinstance(value, list) and all(one is None or isinstance(one, str) for one in value):
        texts = [number for number, one in enumerate(value) if not _empty(one)]
        if len(texts) > 1:
            remedy = f"name one of them, as in data.prompt_column={column}.{texts[0]}"
            raise ValueError(f"{column} is a list of {len(texts)} texts: {remedy}")
        value = value[texts[0]] if texts else None
    if value is None:
        return ""
    if isinstance(value, dict) and value:
        which = f"{column} is an object ({_some(list(value))})"
        raise ValueError(f"{which}: name one of its keys, as in data.prompt_column={column}.{next(iter(value))}")
    if not isinstance(value, str):
        raise ValueError(f"{column} is {_kind(value)}; allowed are a text, or a list of one")
    text = value.encode("utf-8", "replace").decode().strip()
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the caption has {len(text):,} characters; allowed: {MAX_CHARACTERS:,}")
    return text


def caption_in_files(stem: str, files: Mapping[str, bytes], column: str | None) -> str:
    """The caption among the files beside a picture, by their endings: what is written in `.txt` or `.caption`, or else
    in an entry of `.json`. With a column it is `.json`'s alone. Empty where there is none.

    Args:
        stem: their name without the ending.

    Raises:
        ValueError: a file that cannot be read, or is too large (names it); NoColumn: `.json` is without the column.
    """
    for ending in PLAIN if column is None else ():
        if ending in files and (text := _of_file(stem + ending, files[ending], lambda data: caption_of(decoded(data)))):
            return text
    if JSON not in files:
        return ""
    return _of_file(stem + JSON, files[JSON], lambda data: caption_in(parsed(data), column))


def _of_file(name: str, data: bytes, read: Callable[[bytes], str]) -> str:
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: a caption's file has at most {MAX_BYTES >> 20} MiB")
    try:
        return read(data)
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from None


def coco_captions(content: Any) -> tuple[list[str], list[str]]:
    """The first caption of each picture of a file in the layout of COCO's captions, and the pictures' file names.

    Raises:
        ValueError: another layout, or a caption that is none.
    """
    first: dict[Any, str] = {}
    try:
        names: Mapping[Any, Any] = {image["id"]: image["file_name"] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            try:
                text = caption_of(annotation["caption"])
            except ValueError as error:
                raise ValueError(f"annotation {number}: {error}") from None
            if text:
                first.setdefault(annotation["image_id"], " ".join(text.split()))
        pictures = [names[key] for key in first]
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"not in the layout of COCO's captions ({reason})") from None
    if wrong := [name for name in pictures if not isinstance(name, str)]:
        raise ValueError(f"not in the layout of COCO's captions (file_name is {_kind(wrong[0])})")
    return list(first.values()), pictures


def entries_of(content: Any) -> list[Any]:
    """The entries of a JSON file: of a list, or the values of an object of objects, as MJHQ-30K has them.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        content = list(content.values())
    if not isinstance(content, list):
        raise ValueError("a list of texts or objects is needed, an object of objects, or COCO's captions")
    return content


def _value(entry: Mapping[str, Any], column: str) -> Any:
    if column in entry:
        return entry[column]
    value: Any = entry
    for step in column.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        elif value is None:
            return None
        else:
            there = list(value) if isinstance(value, dict) else []
            raise NoColumn(f"no column {column}; there are: {_some(there) or 'none'}")
    return value


def _empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _some(names: Sequence[Any]) -> str:
    """A few of many names."""
    shown = [name if len(name) <= 40 else name[:40] + "…" for name in map(str, names[:10])]
    return ", ".join(shown) + (", …" if len(names) > 10 else "")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return f"a number ({str(value)[:20]})"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({_word(one) for one in value})) or 'nothing'}"
    return _word(value)


def _word(value: Any) -> str:
    words = {str: "texts", dict: "objects", list: "lists", bool: "booleans", int: "numbers", float: "numbers"}
    return "null" if value is None else words.get(type(value), type(value).__name__)
