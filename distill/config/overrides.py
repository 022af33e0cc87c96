"""What a command line says: `key=value`, each value read as the type of its key wants it.

A text is taken as it was written, whatever its characters: `output_dir=runs/lr=1e-4(1)`. Quotes around all of it
are left out, and `${other.key}` in it is filled in. Numbers, lists and dictionaries are read by Hydra's grammar.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic import BaseModel

from distill.config.mistakes import MAX_LINE, ConfigError, suggest
from distill.data.errors import short

MAX_OVERRIDE = 20_000
MAX_NESTING = 20
KEY = re.compile(r"[\w-]+(\.[\w-]+|\[\d+\])*")


@dataclass(frozen=True)
class Argument:
    """An argument of the command line.

    Attributes:
        removes: it is `~key`: the key is to be taken out.
        value: what was written after the first `=`.
    """

    key: str
    value: str
    removes: bool = False


def parse(argument: str) -> Argument:
    """Raises ConfigError for what is no `key=value`, or would take minutes to read."""
    _check_size(argument)
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{short(repr(argument))} is not UTF-8: rename what has such a name") from None
    key, equals, value = argument.partition("=")
    removes, key = key.startswith("~"), key.lstrip("+~")
    if not equals and not removes:
        hint = ", and one with spaces is put into quotes" if re.fullmatch(r"[^\[{]*[\]}]", argument) else ""
        raise ConfigError(f"{short(repr(argument))} is no setting: settings are given as key=value{hint}")
    if not KEY.fullmatch(key.partition("@")[0].replace("/", ".")):
        raise ConfigError(f"{short(repr(argument))} is no setting: {short(repr(key))} cannot be the name of one")
    return Argument(key, value, removes)


def _check_size(argument: str) -> None:
    depth = deepest = 0
    for character in argument:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    if len(argument) > MAX_OVERRIDE or deepest > MAX_NESTING:
        found = f"{len(argument)} characters, {deepest} brackets deep"
        raise ConfigError(
            f"{short(argument)} is too much for a setting ({found}): allowed are {MAX_OVERRIDE} and {MAX_NESTING}"
        )


def switches_of(schema: type[BaseModel]) -> list[str]:
    """The keys that are true or false."""
    return [key for key, hint in fields_of(schema).items() if kinds_of(hint) == {bool}]


def check_flags(arguments: Sequence[str], known: Sequence[str], switches: Sequence[str] = ()) -> None:
    """Raises ConfigError for `--key=value` and `--key value`, as other scripts take them: it says what to type."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):  # without arguments one is longer
        if not argument.startswith("-"):
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not equals and following and "=" not in following and not following.startswith("-"):
            value = following
        if name in switches and value not in ("true", "false"):
            value = "true"
        meant = f"{name}={value or '...'}" if name in known else "key=value"
        raise ConfigError(
            short(f"unknown flag {short(argument)}: settings have no dashes, write {meant}", MAX_LINE)
            + ("" if name in known else suggest(name, known) or "; --cfg prints them")
        )


def value_of(key: str, written: str, hint: Any) -> Any:
    """The value that was written, read as far as the type `hint` wants it; what does not fit is left to be refused.

    Raises:
        ConfigError: a list without its brackets, or with one of them.
    """
    raw, kinds = written.strip(), kinds_of(hint)
    if raw == "null":
        return None
    if (quoted := _unquoted(raw)) is not None:
        return quoted
    if raw.startswith("[") and kinds & {list, Any}:
        return _list(key, raw, hint)
    if str in kinds and not kinds & {int, float, bool}:
        return raw
    found = _read(raw)
    if kinds & {str, Literal} and type(found) not in kinds | {bool}:
        if "," not in raw or str in kinds or list not in kinds:
            return raw
    scalars = kinds & {str, Literal, int, float, bool, dict, Any}
    if found is SEVERAL or (list in kinds and not scalars and not raw.startswith("${")):
        remedy = f"a list has brackets, {key}=[{short(raw)}]" if kinds & {list, Any} else "one value is wanted"
        raise ConfigError(f"{key}={short(raw)}: {remedy}")
    return raw if found is UNREADABLE else found


SEVERAL, UNREADABLE = object(), object()


def _read(raw: str) -> Any:
    """A value of Hydra's grammar: a number, true, null, a list, a dictionary, or else a text."""
    try:
        read = OverridesParser.create().parse_override(f"x={raw}")
        return SEVERAL if read.is_sweep_override() else read.value()
    except (HydraException, ValueError, RecursionError):
        return UNREADABLE


def _list(key: str, raw: str, hint: Any) -> Any:
    if not raw.endswith("]"):
        quoted = f"a setting with spaces is put into quotes, '{key}=[...]'"
        raise ConfigError(f"{key}={short(raw)}: its bracket is not closed ({quoted})")
    if kinds_of(_element(hint)) == {str}:
        return [_text(part) for part in _split(raw[1:-1])]
    found = _read(raw)
    return raw if found in (SEVERAL, UNREADABLE) else found


def _text(written: str) -> str | None:
    raw = written.strip()
    quoted = _unquoted(raw)
    return None if raw == "null" else raw if quoted is None else quoted


def _unquoted(raw: str) -> str | None:
    """What stands between quotes, if they are around all of it; `\\'` in it is a quote."""
    if len(raw) < 2 or raw[0] not in "'\"" or raw[-1] != raw[0]:
        return None
    quote, inner = raw[0], raw[1:-1]
    if re.search(rf"(?<!\\){quote}", inner) or re.search(r"(?<!\\)\\$", inner):
        return None
    return inner.replace(f"\\{quote}", quote)


def _split(inner: str) -> list[str]:
    """The entries of a list: what is between commas that no quotes or brackets are around."""
    parts, start, depth, quote = [], 0, 0, ""
    for at, character in enumerate(inner):
        begins = not inner[start:at].strip()
        if quote:
            quote = "" if character == quote and inner[at - 1] != "\\" else quote
        elif character in "'\"" and begins:
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth <= 0:
            parts.append(inner[start:at])
            start = at + 1
    if quote or depth > 0:  # no quotes or brackets, but characters of a text
        return inner.split(",")
    return [*parts, inner[start:]] if inner.strip() else []


def kinds_of(hint: Any) -> set[Any]:
    """Which kinds of values a type allows: str, Literal, int, float, bool, list, dict, and Any for all others."""
    origin = get_origin(hint)
    if origin is Annotated:
        return kinds_of(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(kinds_of, get_args(hint)))
    if origin is Literal:
        return {Literal if isinstance(value, str) else type(value) for value in get_args(hint)}
    if hint in (str, int, float, bool):
        return {hint}
    if hint is type(None):
        return set()
    plain = origin or hint
    if isinstance(plain, type) and plain is not object:
        if issubclass(plain, (Mapping, BaseModel)):
            return {dict}
        if issubclass(plain, Iterable):
            return {list}
    return {Any}


def _element(hint: Any) -> Any:
    """What a list of this type is made of."""
    arguments = get_args(hint)
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        return next((_element(inner) for inner in arguments if kinds_of(inner) == {list}), Any)
    return arguments[0] if arguments else Any


def fields_of(schema: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every key of a schema, with dots, and the type of its value; a group's own keys stand for the group."""
    found: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields_of(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.annotation
    return found
