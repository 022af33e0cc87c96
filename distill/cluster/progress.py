"""How far work is, by what lies on disk: a run by its checkpoints, a store by its shards."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

STEP = re.compile(r"step-(\d{8,})")
"""The folder of a checkpoint; one without a `manifest.json` is not complete."""


def checkpoints_of(folder: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(folder) / "checkpoints"


def steps_taken(folder: Path) -> int:
    """Steps of a run by its newest checkpoint, or by `DONE`; 0 for a new one."""
    manifests = checkpoints_of(folder).glob("step-*/manifest.json")
    found = [int(match[1]) for path in manifests if (match := STEP.fullmatch(path.parent.name))]
    return max([*found, steps_done(folder)])


def finished(folder: Path, max_train_steps: int, stops: bool = True) -> bool:
    """Whether the run in `folder` has taken so many steps, or was to and has ended before, for it no longer got better.

    Args:
        stops: whether it is to end for that; else it has steps to take.
    """
    taken, planned = _done(folder)
    return taken >= max_train_steps or (stops and planned == max_train_steps)


def steps_done(folder: Path) -> int:
    """The steps of a run that has finished; 0 of one that has not."""
    return _done(folder)[0]


def _done(folder: Path) -> tuple[int, int]:
    """Steps taken, and those that were to be, by `DONE`, which says `300`, or `300 of 1000`; 0 of both without one."""
    try:
        text = (folder / "DONE").read_bytes().strip(b"\0 \r\n\t")
    except FileNotFoundError:
        return 0, 0
    found = re.fullmatch(rb"(\d+)(?: of (\d+))?", text)  # emptied by a power loss, it is written again
    return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)


def of_run(folder: str) -> str:
    """A training run: the step that it would resume from."""
    steps = steps_taken(Path(folder))
    return f"step {steps}" if steps else "no checkpoint"


def of_store(url: str) -> str:
    """A store: the shards that all of its writers have finished."""
    from distill.data.storage import Folder  # fsspec, which nothing else here needs

    names = Folder(url).sizes()
    return f"{sum(name.startswith('shard-') and name.endswith('.json') for name in names)} shards"


def of_files(folder: str) -> str:
    """What writes piece after piece: the files that it has made."""
    return f"{sum(path.is_file() and path.suffix != '.tmp' for path in Path(folder).rglob('*'))} files"


KINDS: dict[str, Callable[[str], str]] = {"run": of_run, "store": of_store, "files": of_files}


def progress(kind: str, where: str) -> str:
    """How far work is, in words that differ once it has got further.

    Args:
        kind: one of `KINDS`.
        where: the folder of a run or of files, or the store's URL.
    """
    try:
        return KINDS[kind](where)
    except (OSError, ValueError) as error:  # a file system that is away must not take the job along
        return f"unknown: {' '.join(str(error).split())}"
