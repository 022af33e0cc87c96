"""Records by name: those of this package, and those that installed packages add."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Generic, Protocol, TypeVar

PLUGINS = "distill.plugins"
"""The group of entry points that name the modules of other packages; importing such a module registers its records."""


class UnknownName(ValueError):
    """There is no record of that name."""


class Named(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)


class Registry(Mapping[str, R], Generic[R]):
    """Records in the order in which they were registered.

    Args:
        what: what a record is, as messages call it: "sampler".
        records: those of this package.
    """

    def __init__(self, what: str, records: Iterable[R] = ()) -> None:
        self.what = what
        self._records: dict[str, R] = {}
        for record in records:
            self.register(record)

    def register(self, record: R) -> R:
        """Adds a record, and returns it.

        Raises:
            ValueError: there is one of that name.
        """
        if record.name in self._records:
            raise ValueError(f"there is a {self.what} {record.name!r} already: register it under another name")
        self._records[record.name] = record
        return record

    def find(self, name: str) -> R:
        """The record of a name. Where it is not one of this package's, the modules of plug-ins are imported first.

        Raises:
            UnknownName: there is none of that name.
            ValueError: a plug-in cannot be imported.
        """
        if name not in self._records:
            import_plugins()
        if name not in self._records:
            raise UnknownName(f"{self.what} {name!r} is not known; allowed: {', '.join(self._records)}")
        return self._records[name]

    def __getitem__(self, name: str) -> R:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


@cache
def import_plugins() -> None:
    """Imports what installed packages name in the group `PLUGINS`, once.

    Raises:
        ValueError: an import fails.
    """
    for point in entry_points(group=PLUGINS):
        try:
            importlib.import_module(point.module)
        except Exception as error:  # whatever a module does when it is imported
            raise ValueError(
                f"the plug-in {point.name} ({point.module}) cannot be imported: {type(error).__name__} {error}"
            ) from error


def resolved(path: str) -> Any:
    """What a dotted name stands for: `package.module.function`. It is imported only now."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
