"""Components: nodes of the settings with a `_target_`, which name what is to be built, and with which arguments."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from functools import cache
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distill.config import signatures
from distill.config.mistakes import rule, shown, suggest
from distill.config.packages import EXTRAS, install_line, is_installed
from distill.data.errors import short
from distill.diffusion.registry import PLUGINS

TARGETS = (
    "distill.methods.",
    "distill.models.",
    "distill.toy.",
    "distill.training.engine.",
    "distill.training.best.",
    "distill.training.health.",
    "distill.training.spikes.",
    "distill.training.tracking.",
    "torch.optim.",
    "bitsandbytes.optim.",
)
"""Where what settings may build is defined. A run's settings may be another person's: they must not call anything."""
RENAMED = {"distill.training.engine.Engine": "distill.training.engine.EngineSettings"}
"""What settings of earlier versions name, and what it is called now."""
OTHERS = "DISTILL_TARGETS"
"""The environment variable that names further packages, for settings that were recorded in a run's folder."""


def targets() -> tuple[str, ...]:
    """Beginnings of the names that settings may have: this project's, plug-ins' and those that the user has named."""
    return (*TARGETS, *(f"{name}." for name in [*_plugins(), *os.environ.get(OTHERS, "").split()]))


@cache
def _plugins() -> tuple[str, ...]:
    return tuple(sorted({point.value.partition(":")[0] for point in entry_points(group=PLUGINS)}))


def allow(path: object) -> None:
    """Lets settings name what the package of `path` defines: the user has named it, not a file of somebody else.

    Processes that this one starts inherit it. The standard library, much of which acts on its arguments, is left out.
    """
    package, _, name = str(path).partition(".")
    closed = {*sys.stdlib_module_names, "distill", "torch"}
    if name and package.isidentifier() and package not in closed and not str(path).startswith(targets()):
        os.environ[OTHERS] = " ".join([*os.environ.get(OTHERS, "").split(), package])


def check_component(node: dict[str, Any]) -> dict[str, Any]:
    """Checks a node's keys and value types against the signature of its `_target_`.

    Arguments without a value in the node are left to be passed as built objects. Where torch is not loaded yet, the
    signature is read from the source, and what is not seen there is left to `check_components`.

    Raises:
        ValueError: a target that does not exist or is not for settings to name, an argument it does not take, or a
            value of the wrong type.
    """
    target = node.get("_target_")
    if isinstance(target, str) and target in RENAMED:
        node["_target_"] = target = RENAMED[target]
    hints = arguments_of(target)
    for key, value in node.items():
        if key == "_target_" or (key == "_partial_" and isinstance(value, bool)):
            continue
        if hints is not None and key not in hints:
            raise ValueError(f"unknown key {short(repr(key))}{suggest(key, list(hints))}; allowed: {', '.join(hints)}")
        if _instructs(value):
            raise ValueError(f"{key}={shown(value)}: only a node itself has a _target_ and the like")
        if isinstance(value, str) and value.startswith("~/"):
            value = os.path.expanduser(value)
        node[key] = _checked(key, value, (hints or {}).get(key, Any))
    return node


def arguments_of(target: object) -> dict[str, Any] | None:
    """The arguments that a `_target_` takes, each with its type; None if they cannot be read without importing it.

    Raises:
        ValueError: it does not exist, or is not for settings to name.
    """
    if "torch" not in sys.modules:
        return _read_arguments(target)
    found = _target(target)
    hints = get_type_hints(found.__init__ if inspect.isclass(found) else found, include_extras=True)
    return {name: hints.get(name, Any) for name in inspect.signature(found).parameters}


def defaults_of(target: object) -> dict[str, Any]:
    """The arguments that a `_target_` has values for, where a node gives none; it is imported. {} if it is gone."""
    try:
        parameters = inspect.signature(_target(target)).parameters.values()
    except ValueError:
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty and not callable(p.default)}


def _read_arguments(path: object) -> dict[str, Any] | None:
    module, name = _allowed_target(path)
    try:
        home = signatures.defining_module(module, name)
        found = signatures.parameters(module, name)
    except signatures.NoSuchName:
        raise ValueError(f"_target_ {short(repr(path))} does not exist") from None
    if not f"{home}.".startswith(targets()):
        raise ValueError(f"_target_ {short(repr(path))} is no class or function of its own module")
    return found


def _target(path: object) -> Any:
    """The class or function that a node names: one that this package, or torch.optim, defines for that."""
    module, name = _allowed_target(path)
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"_target_ {short(repr(path))} does not exist") from None
    if not (inspect.isclass(target) or inspect.isfunction(target)) or not f"{target.__module__}.".startswith(targets()):
        raise ValueError(f"_target_ {short(repr(path))} is no class or function of its own module")
    return target


def _allowed_target(path: object) -> tuple[str, str]:
    """The module and the name."""
    path = RENAMED.get(str(path), path)
    module, _, name = str(path).rpartition(".")
    if path is None:
        raise ValueError("it has no _target_, which names what is to be built")
    if not str(path).startswith(targets()):
        allowed = ", ".join(f"{start}*" for start in targets())
        hint = f"; {OTHERS}=PACKAGE allows those of a package that you trust" if "." in str(path) else ""
        raise ValueError(f"_target_ {short(repr(path))} is not one of {allowed}{hint}")
    package = module.partition(".")[0]
    if package in EXTRAS and not is_installed(package):
        raise ValueError(f"_target_ {path} needs the package {package}, which is not there: {install_line(package)}")
    return module, name


def _instructs(value: Any) -> bool:
    """Whether a node within a node would make Hydra call something."""
    if isinstance(value, dict):
        return any(str(key).startswith("_") for key in value) or any(map(_instructs, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_instructs, value))


def _checked(key: str, value: Any, hint: Any) -> Any:
    """The value of an argument; a whole number for one may be written 20.0, but not "20" or true."""
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        found = TypeAdapter(hint, config=config).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{key}={shown(value)}: {rule(error.errors()[0])}") from None
    if isinstance(value, (bool, str)) and isinstance(found, (bool, int, float)) and type(found) is not type(value):
        wanted = {bool: "true or false", int: "an integer", float: "a number"}[type(found)]
        raise ValueError(f"{key}={shown(value)}: must be {wanted}")
    return found if type(found) is int and type(value) is float else value
