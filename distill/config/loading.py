"""From a command line to checked settings, and from settings to built objects.

Hydra composes `configs/`; pydantic checks the flat keys against the classes below, and every node with a `_target_`
against the signature of what it names. A mistake is one line that names the key, the value and what is allowed, and
exit code 2, before any network is built.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from distill.config.components import check_component, defaults_of
from distill.config.composition import CONFIGS, composed_of, group_files, omegaconf_line, yaml_of
from distill.config.mistakes import MAX_LINE, ConfigError, checking, first_line, rule, shown, suggest
from distill.config.overrides import fields_of
from distill.data.errors import short

__all__ = [
    "CONFIGS",
    "ConfigError",
    "Settings",
    "build",
    "check_component",
    "checking",
    "defaults_of",
    "load",
    "suggest",
]

MAX_SETTINGS_BYTES = 1 << 18


class Settings(BaseModel):
    """A group of settings; a key that it does not list is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


S = TypeVar("S", bound=Settings)


def keys_of(schema: type[Settings]) -> list[str]:
    """The keys of settings, for suggestions; of components, those that the files of their groups have."""
    found = list(fields_of(schema))
    for name in found:
        for path in group_files(name).values() if "." not in name else ():
            found += [f"{name}.{key}" for key in yaml_of(f"{name}/{path.name}") if not key.startswith("_")]
    return list(dict.fromkeys(found))


def check_components(settings: S) -> S:
    """The settings with every component checked against the real signature of its target, which is imported.

    Raises:
        ConfigError: one line about the first mistake.
    """
    return settings.model_copy(
        update={name: _nodes(name, getattr(settings, name)) for name in type(settings).model_fields}
    )


def _nodes(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {key: _nodes(f"{name}.{key}", inner) for key, inner in value.items()}
    importlib.import_module("torch")  # so that it is the signature that counts
    with checking(f"{name}: "):
        return check_component(dict(value))


def load(
    config_name: str, schema: type[S], overrides: Sequence[str], note: Callable[[str], None] = lambda line: None
) -> S:
    """Composes `configs/<config_name>.yaml` with the overrides and checks it.

    Args:
        note: is given a line about what the overrides leave out.

    Raises:
        ConfigError: one line about the first mistake.
    """
    composed = composed_of(config_name, fields_of(schema), keys_of(schema), overrides, note)
    return check(composed, schema)


def check(composed: DictConfig, schema: type[S]) -> S:
    """The composed config as checked settings; interpolations resolved.

    Raises:
        ConfigError: one line about the first mistake.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} has no value: set {missing[0]}=...")
        return validated(OmegaConf.to_container(composed, resolve=True), schema)
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_line(error)) from None
    except RecursionError:
        raise ConfigError("the settings are nested too deeply") from None


def validated(settings: Any, schema: type[S]) -> S:
    """Raises ConfigError: one line about the first mistake."""
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_validation_line(error, schema)) from None
    except RecursionError:
        raise ConfigError("the settings are nested too deeply") from None


def read_settings(path: str | Path, schema: type[S]) -> S:
    """Settings from a file that has all of them, as `--cfg` prints them and a run's folder holds them.

    Raises:
        ConfigError: one line about the first mistake.
        FileNotFoundError: no such file.
    """
    try:
        return validated(read_yaml(path), schema)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says, be it anyone's.

    Raises:
        ConfigError: it is not YAML, too long, nested too deeply, or says a key twice.
        FileNotFoundError: no such file.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_SETTINGS_BYTES + 1)
    if len(data) > MAX_SETTINGS_BYTES:
        raise ConfigError(f"it has more than the {MAX_SETTINGS_BYTES} bytes that are allowed for settings")
    try:
        return yaml.load(data, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"it is not YAML for settings: {first_line(error)}") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML in which nothing is said twice, and without aliases, with which a short text fills any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [name for name, following in pairwise(sorted(names)) if name == following]:
            raise yaml.YAMLError(f"{short(repr(repeated[0]))} is said twice")
        return super().construct_mapping(node, deep)


def given(arguments: Sequence[str], config_name: str, schema: type[S]) -> S:
    """The settings of a command line: overrides of a config, or `settings=FILE`, which has them all.

    Raises:
        ConfigError: one line about the first mistake.
        FileNotFoundError: no such file.
    """
    files = [
        os.path.expanduser(argument.removeprefix("settings="))
        for argument in arguments
        if argument.startswith("settings=")
    ]
    if not files:
        return load(config_name, schema, arguments, note=_note)
    if len(arguments) > 1:
        raise ConfigError(f"settings={files[0]} is all of the settings: nothing may be given beside it")
    return read_settings(files[0], schema)


def _note(line: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {line}", file=sys.stderr)


def build(node: Mapping[str, Any], **objects: Any) -> Any:
    """Instantiates a node; `objects` are the arguments that are built things.

    Raises:
        ConfigError: what the constructor, which checks its own ranges and opens its own files, had to say.
    """
    try:
        return instantiate(dict(node), _convert_="all", **objects)
    except InstantiationException as error:
        if isinstance(error.__cause__, (ValueError, FileNotFoundError, ImportError)):
            raise ConfigError(str(error.__cause__)) from None
        raise


def _validation_line(error: ValidationError, schema: type[Settings]) -> str:
    # A wrong flat key is wrong in the nodes that take it over too: say the one that was set.
    first = min(error.errors(), key=lambda e: e["type"] == "value_error")
    # Names of union members and the like stand in `loc` beside keys; only keys help the reader.
    path = [str(part) for part in first["loc"] if re.fullmatch(r"[a-z_]\w*|\d+", str(part)) and part not in _KINDS]
    key = short(".".join(path) or "all of it")
    if first["type"] == "extra_forbidden":
        key = short(".".join(map(str, first["loc"])))
        return f"unknown key {key!r}{suggest(key, keys_of(schema))}"
    if first["type"] == "missing":
        return f"{key} has no value: set {key}=..."
    if first["type"] == "value_error":
        return short(f"{key}: {rule(first)}", MAX_LINE)
    same = [e for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
    allowed = "; or ".join(dict.fromkeys(map(rule, same)))
    return short(f"{key}={shown(first['input'])}: {allowed}", MAX_LINE)


_KINDS = {"int", "float", "str", "bool", "constrained", "none", "tuple", "list", "literal"}
