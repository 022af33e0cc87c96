"""Every setting of a command in a line: its key, its default, what it may be, and what it means.

The files of `configs/` are the one source: a key's value there is its default, and the comment beside it what it means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from distill.config.components import arguments_of
from distill.config.composition import CONFIGS, group_files, groups_of, yaml_of
from distill.config.loading import Settings
from distill.config.overrides import fields_of, kinds_of

_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w-]+):(?P<value>| .*)")
_WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    list: "list",
    dict: "group",
    Any: "",
}


@dataclass(frozen=True)
class Described:
    """A setting.

    Args:
        default: as it is written in the file; `???` has to be given.
        kind: what it may be, in words; nothing where it is not known.
        said: what it means.
    """

    key: str
    default: str
    kind: str
    said: str


def described(config_name: str, schema: type[Settings]) -> list[Described]:
    """The settings of a command: its own file's, then those of the files that its groups choose by default."""
    hints = fields_of(schema)
    found = list(_of_file(CONFIGS / f"{config_name}.yaml", "", hints))
    for entry in yaml_of(f"{config_name}.yaml").get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            found += _of_file(CONFIGS / f"{entry}.yaml", "", hints)
    for group in groups_of(config_name).values():
        if group.value not in (None, "???"):
            path = group_files(group.folder)[str(group.value)]
            known = hints | {f"{group.place}.{name}": hint for name, hint in _arguments(path).items()}
            found += _of_file(path, f"{group.place}.", known)
    return list({one.key: one for one in reversed(found)}.values())[::-1]


def _arguments(path: Path) -> Mapping[str, Any]:
    """Types of a component's arguments, as far as its source says them."""
    target = yaml_of(f"{path.parent.name}/{path.name}").get("_target_")
    return (arguments_of(target) or {}) if target else {}


def _of_file(path: Path, prefix: str, hints: Mapping[str, Any]) -> Iterator[Described]:
    """The settings of a file; those that only hand on another one's value are left out."""
    parents: list[tuple[int, str]] = []
    pending: Described | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if pending and (more := re.fullmatch(r" +# (.*)", line)):
            pending = Described(pending.key, pending.default, pending.kind, f"{pending.said} {more[1]}")
            continue
        written, _, said = line.partition(" # ")
        match = _LINE.fullmatch(written.rstrip())
        if not match:
            continue
        if pending:
            yield pending
            pending = None
        indent = len(match["indent"])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        key = prefix + ".".join([*(name for _, name in parents), match["key"]])
        value = match["value"].strip()
        if key.split(".")[0] == "defaults" or match["key"].startswith("_") or value.startswith("${"):
            if match["key"] == "defaults":
                parents.append((indent, "defaults"))
            continue
        if not value:
            parents.append((indent, match["key"]))
            continue
        pending = Described(key, value, kind_of(hints.get(key, Any)), said.strip())
    if pending:
        yield pending


def kind_of(hint: Any) -> str:
    """What values a type allows, in words."""
    names = named_values(hint)
    plain = [_WORDS[kind] for kind in (bool, int, float, str, list, dict) if kind in kinds_of(hint)]
    if "whole number" in plain and "number" in plain:
        plain.remove("whole number")
    return " or ".join(dict.fromkeys([*plain, *names]))


def named_values(hint: Any) -> list[str]:
    """The values of a type that have names."""
    return [name for name in _literals(hint) if isinstance(name, str)]


def _literals(hint: Any) -> list[Any]:
    origin = get_origin(hint)
    if origin is Literal:
        return list(get_args(hint))
    if origin is Annotated:
        return _literals(get_args(hint)[0])
    return [value for part in get_args(hint) for value in _literals(part)] if origin is not None else []
