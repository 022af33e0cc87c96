"""From a command line to composed settings: files of `configs/`, chosen by groups, and single keys over them.

Hydra composes the files. The keys are set here, each value read as its key's type wants it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.components import allow, arguments_of
from distill.config.mistakes import MAX_LINE, ConfigError, checking, first_line, suggest
from distill.config.overrides import Argument, kinds_of, parse, value_of
from distill.data.errors import short

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)
"""The files that come with the package: within it where it is installed, beside it in a checkout."""
CONFIG_DIRS = "DISTILL_CONFIG_DIR"
"""The environment variable that names folders of further files, as `--config-dir` does, for commands started by it."""

MOVED = {
    "report_to": "set tracking=wandb, tensorboard or wandb_tensorboard; metrics.jsonl is always written",
    "wandb": "set tracking=wandb tracking.wandb.project=... (entity, group, tags, mode)",
}
"""Keys of before, each with what to type now."""
INSTEAD = {"gradient_accumulation_steps": "micro_batch_size"}
"""Keys that say the same thing in two ways: one that is typed takes the place of the other, if a file has set that."""

OmegaConf.register_new_resolver("toy", lambda name: str(_bundled(name)), replace=True)
OmegaConf.register_new_resolver("part", lambda total, i, *weights: _part(int(total), int(i), weights), replace=True)
OmegaConf.register_new_resolver("multiple", lambda value, of: int(value) // int(of) * int(of), replace=True)
OmegaConf.register_new_resolver("by", lambda choice, table, usual: table.get(choice, usual), replace=True)


def composed_of(
    config_name: str,
    fields: Mapping[str, Any],
    known: Sequence[str],
    overrides: Sequence[str],
    note: Callable[[str], None],
) -> DictConfig:
    """`configs/<config_name>.yaml` with the overrides, interpolations not yet resolved.

    Args:
        fields: the keys that may be set, with dots, and their types.
        known: keys to suggest in the place of unknown ones.
        note: is given a line about what the overrides leave out.

    Raises:
        ConfigError: one line about the first mistake.
    """
    groups = groups_of(config_name)
    choices, others = _taken_apart(overrides, groups, fields, known)
    composed = _compose(config_name, choices, groups)
    _allow_targets(OmegaConf.to_container(composed))
    replaced = _replace_what_is_for_others(config_name, composed, dict(choices), groups, note)
    try:
        for one in sorted(others, key=lambda one: not one.key.endswith("._target_")):  # a target says what it takes
            _set(composed, one, fields, groups, replaced)
        keys = {one.key for one in others}
        for typed, other in INSTEAD.items():
            if typed in keys and other not in keys and composed.get(other) is not None:
                note(f"{other}={composed[other]} of the files is left out: {typed} is set")
                composed[other] = None
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_line(error)) from None
    return composed


def chosen_files(
    config_name: str, fields: Mapping[str, Any], known: Sequence[str], overrides: Sequence[str]
) -> list[str]:
    """What Hydra is given to compose the files of a command line. Raises ConfigError."""
    groups = groups_of(config_name)
    return _hydra_overrides(_taken_apart(overrides, groups, fields, known)[0], groups)


def _taken_apart(
    overrides: Sequence[str], groups: Mapping[str, Group], fields: Mapping[str, Any], known: Sequence[str]
) -> tuple[list[tuple[str, str | None]], list[Argument]]:
    """Choices of files, and single keys. Raises ConfigError."""
    given = [parse(override) for override in overrides]
    choices = [choice for one in given if (choice := _choice(one, groups, fields))]
    others = [one for one in given if not _choice(one, groups, fields)]
    for one in others:
        _check_known(one.key, fields, known)
    return choices, others


def _allow_targets(node: Any) -> None:
    """What files that the user has chosen name may be built, from other packages too."""
    for key, value in node.items():
        if key == "_target_":
            allow(value)
        elif isinstance(value, dict):
            _allow_targets(value)


@dataclass(frozen=True)
class Group:
    """A group of `configs/`, in the place where `defaults` put it; `value` is the file without overrides."""

    folder: str
    place: str
    value: str | None

    @property
    def key(self) -> str:
        """What Hydra calls it in an override."""
        return self.folder if self.folder == self.place else f"{self.folder}@{self.place}"

    @property
    def options(self) -> list[str]:
        return sorted(group_files(self.folder))


def groups_of(config_name: str) -> dict[str, Group]:
    """The groups that a file of `configs/` takes, by their places."""
    found: dict[str, Group] = {}
    for entry in yaml_of(f"{config_name}.yaml").get("defaults", []):
        if isinstance(entry, str):
            found |= {} if entry == "_self_" else groups_of(entry)
            continue
        ((name, value),) = entry.items()
        folder, _, place = name.removeprefix("override ").lstrip("/").partition("@")
        found[place or folder] = Group(folder, place or folder, value)
    return found


def config_dirs() -> list[Path]:
    """Where files of groups are looked for: the package's own, those of `--config-dir`, and `./configs`."""
    given = [Path(name).absolute() for name in os.environ.get(CONFIG_DIRS, "").split(os.pathsep) if name]
    found = [CONFIGS]
    for folder in (*given, Path("configs").absolute()):
        if folder.is_dir() and not any(folder.samefile(other) for other in found):
            found.append(folder)
    return found


def add_config_dir(folder: str) -> None:
    """Has this process, and those that it starts, look for files of groups in a folder. Raises ConfigError."""
    if not os.path.isdir(os.path.expanduser(folder)):
        raise ConfigError(f"--config-dir {folder}: there is no such folder")
    added = os.path.abspath(os.path.expanduser(folder))
    os.environ[CONFIG_DIRS] = os.pathsep.join([added, *filter(None, [os.environ.get(CONFIG_DIRS)])])


def group_files(folder: str) -> dict[str, Path]:
    """The files of a group, by the names that choose them; of two with one name, the package's own.

    A file in a folder of the group is chosen by both names, as compare/lcm of experiment.
    """
    found: dict[str, Path] = {}
    for root in config_dirs():
        for path in sorted((root / folder).rglob("*.yaml")):
            found.setdefault(path.relative_to(root / folder).with_suffix("").as_posix(), path)
    return found


def yaml_of(path: str) -> dict[str, Any]:
    """What a file of `configs/` says, read once; {} for one that is not there."""
    return next((_read(str(root / path)) for root in config_dirs() if (root / path).is_file()), {})


@cache
def _read(path: str) -> dict[str, Any]:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: it is not YAML for settings: {first_line(error)}") from None


def _choice(one: Argument, groups: Mapping[str, Group], fields: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """(place, file) if an argument chooses a file for a group, or None in its place; a dictionary is merged instead."""
    folder, _, place = one.key.partition("@")
    group = groups.get(place or folder)
    if group is None or (place and folder != group.folder) or one.value.startswith("{"):
        return None
    if one.removes:
        return group.place, None
    value = value_of(one.key, one.value, str)
    if value is not None and value not in group.options:
        said = f"unknown {folder}={short(value)}{suggest(value, group.options)}; allowed: {', '.join(group.options)}"
        raise ConfigError(short(said, MAX_LINE - 60) + _path_hint(group.place, value, fields))
    if value is not None:
        _check_one(f"{group.folder}/{value}.yaml")
    return group.place, value


def _check_one(file: str) -> None:
    """Raises ConfigError for a user's file with the name of one that comes with the package: which is meant?"""
    own, *others = [root / file for root in config_dirs() if (root / file).is_file()]
    yaml_of(file)
    if others:
        raise ConfigError(f"{others[0]} has the name of {own}: give it another name")


def _path_hint(place: str, value: str, fields: Mapping[str, Any]) -> str:
    """A hint where a path is given for the name of a group's file: the key that takes paths."""
    key = {"model": "model.pretrained_model_name_or_path", "data": "data.store"}.get(place)
    return f" (a folder is {key}=...)" if key in fields and "/" in value else ""


def _check_known(key: str, fields: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ConfigError for a key that no such settings have. Those of components are their targets' to know."""
    inside = [name for name, hint in fields.items() if kinds_of(hint) & {dict, list} and re.match(rf"{name}[.\[]", key)]
    above = any(name.startswith(f"{key}.") for name in fields)
    if moved := next((line for name, line in MOVED.items() if re.match(rf"{name}(\.|$)", key)), None):
        raise ConfigError(f"{key} is set elsewhere now: {moved}")
    if key not in fields and not inside and not above:
        raise ConfigError(f"unknown key {short(repr(key))}{suggest(key, known)}")


def _compose(config_name: str, choices: Sequence[tuple[str, str | None]], groups: Mapping[str, Group]) -> DictConfig:
    composed = deepcopy(_files_composed(config_name, tuple(_hydra_overrides(choices, groups))))
    OmegaConf.set_struct(composed, False)
    return composed


def _hydra_overrides(choices: Sequence[tuple[str, str | None]], groups: Mapping[str, Group]) -> list[str]:
    chosen = dict(choices)
    for group in groups.values():
        if group.value == "???" and not chosen.get(group.place):
            options = ", ".join(group.options)
            raise ConfigError(
                short(f"{group.place} has no value: set {group.place}=NAME; allowed: {options}", MAX_LINE)
            )
    removed = [groups[place] for place, name in chosen.items() if name is None]
    overrides = [f"{groups[place].key}={name}" for place, name in chosen.items() if name is not None]
    overrides += [f"~{group.key}" for group in removed if group.value is not None]
    if further := config_dirs()[1:]:
        overrides.append("hydra.searchpath=[" + ",".join(f"'file://{folder}'" for folder in further) + "]")
    return overrides


@cache
def _files_composed(config_name: str, overrides: tuple[str, ...]) -> DictConfig:
    """What Hydra makes of the files; the links of a chain choose the same ones many times."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return compose(config_name, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:  # of files, not of what was typed
            where = ", ".join(map(str, config_dirs()))
            raise ConfigError(f"{where}: the files cannot be composed: {first_line(error)}") from None


def _replace_what_is_for_others(
    config_name: str,
    composed: DictConfig,
    chosen: Mapping[str, str | None],
    groups: Mapping[str, Group],
    note: Callable[[str], None],
) -> set[str]:
    """An experiment's values for a component are arguments of the one that it chooses: for another they are left out.

    Where both are of one class, those stay that do not follow from the choice: of keys that both files set alike.

    Returns the places of those components.
    """
    experiment = chosen.get("experiment")
    if experiment is None:
        return set()
    own = yaml_of(f"experiment/{experiment}.yaml")
    intended = {place: group.value for place, group in groups.items()}
    for entry in own.get("defaults", []):
        if isinstance(entry, str):  # another experiment, on which this one builds
            continue
        ((name, value),) = entry.items()
        folder, _, place = name.removeprefix("override ").lstrip("/").partition("@")
        intended[place or folder] = value
    replaced = set()
    for place, value in own.items():
        other = chosen.get(place, intended.get(place))
        if place not in groups or other in (None, intended[place]) or "_target_" not in composed[place]:
            continue
        alone = _compose(config_name, [(p, v) for p, v in chosen.items() if p != "experiment"], groups)[place]
        mine, its = (yaml_of(f"{groups[place].folder}/{name}.yaml") for name in (intended[place], other))
        alike = mine.get("_target_") == its.get("_target_")
        kept = {key: value[key] for key in value if alike and key in its and mine.get(key) == its[key]}
        OmegaConf.update(composed, place, OmegaConf.merge(alone, kept), merge=False)
        if left := ", ".join(f"{place}.{key}" for key in value if key not in kept):
            note(f"experiment={experiment} sets {left} for {place}={intended[place]}: left out with {place}={other}")
        replaced.add(place)
    return replaced


def _set(
    composed: DictConfig, one: Argument, fields: Mapping[str, Any], groups: Mapping[str, Group], replaced: set[str]
) -> None:
    """Sets, or removes, one key of composed settings."""
    if one.removes:
        _remove(composed, one.key, replaced)
        return
    hint = fields[one.key] if one.key in fields else _inner_hint(composed, one.key, fields, groups)
    place = one.key.partition(".")[0]
    if place in groups and one.key in fields and one.key.partition(".")[2] not in (composed.get(place) or {}).keys():
        _check_group_has(one.key, groups[place])
    value = value_of(one.key, one.value, hint)
    if one.key.endswith("._target_"):
        allow(value)
    try:
        OmegaConf.update(composed, one.key, value, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError, IndexError, AttributeError) as error:
        if "${" in one.value:
            raise ConfigError(f"{one.key}={short(one.value)}: ${{...}} holds the name of another key") from None
        raise ConfigError(f"{one.key}={short(one.value)}: there is no place for it ({first_line(error)})") from None


def _remove(composed: DictConfig, key: str, replaced: set[str]) -> None:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed, parent) if parent else composed
    if isinstance(node, DictConfig) and name in node:
        del node[name]
    elif key.partition(".")[0] not in replaced:
        raise ConfigError(f"~{key}: there is nothing to remove")


def _inner_hint(composed: DictConfig, key: str, fields: Mapping[str, Any], groups: Mapping[str, Group]) -> Any:
    """The type of a key within a component: of an argument of its target, or unknown."""
    names = key.split(".")
    for depth in range(1, len(names)):
        place = ".".join(names[:depth])
        node = OmegaConf.select(composed, place)
        if node is None and place in groups:
            options = ", ".join(groups[place].options)
            raise ConfigError(f"{key} is of no use while {place} is null: set {groups[place].key}=NAME ({options})")
        if isinstance(node, DictConfig) and "_target_" in node and depth == len(names) - 1:
            with checking(f"{place}: "):
                hints = arguments_of(node["_target_"])
            if hints is not None and names[depth] not in (*hints, "_target_", "_partial_"):
                known = [f"{place}.{name}" for name in hints]
                allowed = f"{suggest(key, known)}; allowed: {', '.join(known)}"
                raise ConfigError(short(f"unknown key {short(repr(key))}{allowed}", MAX_LINE))
            return (hints or {}).get(names[depth], Any)
    return Any


def _check_group_has(key: str, group: Group) -> None:
    """Raises ConfigError for a key that only other files of its group have: it would be without effect."""
    name = key.partition(".")[2]
    having = [option for option in group.options if name in yaml_of(f"{group.folder}/{option}.yaml")]
    if having:
        raise ConfigError(f"{key} belongs to {group.key}={having[0]}, which is not chosen: add {group.key}={having[0]}")


def omegaconf_line(error: OmegaConfBaseException) -> str:
    named = re.search(r"'([^']*)'", str(error))
    what = f"{named[1]!r} in it" if named else "a name in it"
    where = error.full_key or "a setting"
    return short(
        f"{where}: it has ${{...}}, which is filled in with another key's value, and {what} cannot be", MAX_LINE
    )


def _part(total: int, i: int, weights: Sequence[float]) -> int:
    """${part:TOTAL,I,W0,W1,…}: the I-th part of a whole number in the ratio of the weights; the parts add up to it."""
    edges = [round(total * sum(weights[:k]) / sum(weights)) for k in range(len(weights) + 1)]
    return edges[i + 1] - edges[i]


def _bundled(name: str) -> Path:
    """${toy:teacher} and ${toy:prompts.txt}: what comes with the package."""
    return Path(__file__).resolve().parents[1] / "toy" / name
