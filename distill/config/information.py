"""What settings are composed of, as `--info` prints it: where files are looked for, and which ones are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from distill.config.components import OTHERS, PLUGINS, TARGETS, targets
from distill.config.composition import CONFIGS, chosen_files, config_dirs
from distill.config.loading import Settings, keys_of, load
from distill.config.overrides import fields_of

KINDS = ("all", "config", "defaults", "defaults-tree", "searchpath", "plugins")
"""Hydra's words."""


def information(kind: str, config: str, schema: type[Settings], arguments: Sequence[str]) -> str:
    """What `--info KIND` prints of a command line. Raises ConfigError for a mistake in it."""
    parts: dict[str, Callable[[], str]] = {
        "config": lambda: yaml.safe_dump(load(config, schema, arguments).model_dump(mode="json"), sort_keys=False),
        "defaults": lambda: table(
            ("file", "its keys go to", "chosen by", "read from"), defaults(_list(config, schema, arguments))
        ),
        "defaults-tree": lambda: "\n".join(tree(_list(config, schema, arguments).defaults_tree)),
        "searchpath": lambda: table(("given by", "folder"), searchpath()),
        "plugins": lambda: table(("settings may name", "because of"), plugins()),
    }
    titles = {
        "config": "Settings",
        "defaults": "Defaults list",
        "defaults-tree": "Defaults tree",
        "searchpath": "Search path, the first file of a name counts",
        "plugins": f"Plug-ins, by the entry points {PLUGINS}",
    }
    if kind != "all":
        return parts[kind]()
    return "\n\n".join(f"{titles[name]}\n{'-' * len(titles[name])}\n{part().rstrip()}" for name, part in parts.items())


def searchpath() -> list[tuple[str, str]]:
    """Folders in which files of groups are looked for, and who has named them."""
    here = Path("configs").absolute()
    given = {here: "./configs", CONFIGS: "the package"}
    return [(given.get(folder, "--config-dir"), str(folder)) for folder in config_dirs()]


def plugins() -> list[tuple[str, str]]:
    """What the `_target_` of settings may begin with, and why."""
    installed = {
        f"{point.value.partition(':')[0]}.": f"entry point {point.name}" for point in entry_points(group=PLUGINS)
    }
    reasons = dict.fromkeys(TARGETS, "part of distill, or of torch") | installed
    return [(f"{name}*", reasons.get(name, f"the environment variable {OTHERS}")) for name in targets()]


def _list(config: str, schema: type[Settings], arguments: Sequence[str]) -> Any:
    """Hydra's own list of what it composes."""
    fields: Mapping[str, Any] = fields_of(schema)
    overrides = chosen_files(config, fields, keys_of(schema), arguments)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return loader.compute_defaults_list(config, overrides, RunMode.RUN)


def defaults(found: Any) -> list[tuple[str, str, str, str]]:
    """Every file that is composed, in the order in which the later ones overwrite: its package, parent and path."""
    rows = []
    for one in found.defaults:
        if one.config_path and not one.config_path.startswith("hydra/") and one.config_path != "_dummy_empty_config_":
            path = next((root / f"{one.config_path}.yaml" for root in config_dirs() if _has(root, one)), None)
            rows.append((one.config_path, one.package or "the top", one.parent or "", str(path or "")))
    return rows


def _has(root: Path, one: Any) -> bool:
    return (root / f"{one.config_path}.yaml").is_file()


def tree(node: Any, depth: int = 0) -> list[str]:
    """A line for each file, below the one that names it; groups with the file that is chosen of each."""
    inner, children = getattr(node, "node", node), getattr(node, "children", None) or []
    path = inner.get_config_path() if not inner.is_virtual() else "<root>"
    if path is None or path.startswith("hydra/") or path == "hydra/config":
        return []
    if hasattr(inner, "get_name") and hasattr(inner, "group"):
        path = f"{inner.get_override_key()}: {inner.get_name() or 'null'}"
    return [f"{'  ' * depth}{path}", *(line for child in children for line in tree(child, depth + 1))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns for people."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )
