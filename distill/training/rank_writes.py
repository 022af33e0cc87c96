"""Files that ranks write together: a rank that cannot write its own must not leave the others waiting for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

T = TypeVar("T")

_ERRORS = (OSError, RuntimeError, SafetensorError)  # what a full disk is to files, to torch.save, to safetensors


class WriteError(OSError):
    """Something could not be written; one line."""


class Writes:
    """Calls that write, of which the first failure is kept until all that the ranks do together is done."""

    def __init__(self) -> None:
        self._problem: str | None = None

    def __call__(self, write: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Calls `write`, unless one has failed: what follows would be of no use."""
        if self._problem is None:
            try:
                write(*args, **kwargs)
            except _ERRORS as error:
                self._problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def finish(self) -> None:
        """Raises WriteError if one has failed."""
        if self._problem is not None:
            raise WriteError(self._problem)


def together(gathered: Callable[[str | None], list[str | None]], write: Callable[[], T]) -> T:
    """What `write` gives, if it fails on no rank.

    Args:
        gathered: gives every rank's value to all of them.

    Raises:
        WriteError: on all ranks alike, when it raises an OSError on any.
    """
    value: list[T] = []
    problem = None
    try:
        value.append(write())
    except OSError as error:
        problem = str(error) if isinstance(error, WriteError) else f"{type(error).__name__}: {error}"
    for rank, found in enumerate(gathered(problem)):
        if found is not None:
            raise WriteError(f"rank {rank}: {found}")
    return value[0]


def free_space(folder: Path) -> str:
    """How full a disk is, for the line about a file that could not be written: some libraries do not say why."""
    free = shutil.disk_usage(folder).free / 2**20
    return "the disk is full" if free < 1 else f"{free:.0f} MiB free"
