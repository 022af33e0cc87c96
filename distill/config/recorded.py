"""What a run was made with against what it is given now: which settings differ, by the names that people set."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from distill.config.loading import Settings, defaults_of

Differences = dict[str, tuple[Any, Any]]
"""Dotted keys, each with the value that was recorded and the one that is given."""


def differences(recorded: Mapping[str, Any], given: Mapping[str, Any], schema: type[Settings]) -> Differences:
    """The settings that differ, without those that follow from a default that was not there when it was recorded.

    Args:
        recorded, given: as a model of `schema` dumps them, as JSON.
    """
    fields = schema.model_fields.items()
    before = {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}
    return _differing("", before | dict(recorded), given)


def _differing(prefix: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    before, now = _with_defaults(before), _with_defaults(now)
    found: Differences = {}
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= _differing(f"{prefix}{key}.", old, new)
        elif old != new:
            found[f"{prefix}{key}"] = old, new
    return found


def _with_defaults(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A component with the arguments that it leaves to its target: an older version may not have listed them."""
    return {**defaults_of(node["_target_"]), **node} if "_target_" in node else node


FOR_ANY = "++"
"""The prefix of a `key=value` for whatever reads it: a run that does not read the key does not refuse it."""


def given_keys(arguments: Sequence[str] | None = None, for_any: bool = True) -> list[str]:
    """The keys that a command line (this one's by default) sets.

    Args:
        for_any: with those of `++key=value`, which are for whatever reads them.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    given = [argument for argument in arguments if "=" in argument and (for_any or not argument.startswith(FOR_ANY))]
    return [argument.lstrip("+~").partition("=")[0] for argument in given]


def for_any(argument: str) -> str:
    """An argument as one that is for whatever reads it."""
    return argument if argument.startswith(("+", "~", "-")) else FOR_ANY + argument


def chief(differing: Differences, keys: Sequence[str]) -> str:
    """The one to name: what a person has set rather than what follows from it; short keys rather than long ones."""

    def rank(key: str) -> int:
        if key in keys:
            return 0
        return 1 if any(key.startswith(f"{given}.") for given in keys) else 2

    return min(differing, key=lambda key: (rank(key), key.count("."), list(differing).index(key)))
