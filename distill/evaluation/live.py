"""Runs as they go by, from what lies in their folders: read on from where the last look ended, and thinned for a page.

Nothing here writes to a run's folder, holds a file open, or waits for a run. Lines may be torn, files cut by a run that
resumes, and folders gone: what is there is shown.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

POINTS = 300
"""Of a curve: where there are more rows, each point is their mean, with the least and the greatest of them."""
MOST_RUNS, MOST_PICTURES, DEPTH = 40, 16, 3
BLOCK = 8 << 20  # bytes of metrics that are read at once
SILENT = 600.0  # seconds without a word after which a run that seems to be running is said to be silent
ALARM = "alarm/"
LEFT_OUT = {"checkpoints", "samples", "evaluation", "export", "tensorboard", "wandb", "slurm"}
_RANK = re.compile(r"(?:^|[/_.])rank[_.]?(\d+)(?=$|[/_.])")
_STEP = re.compile(r"step-(\d+)")
_PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.png")


class Metrics:
    """The rows of a metrics.jsonl, a column of steps and one of values for each scalar; `update` reads what is new."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._forget()

    def _forget(self) -> None:
        self.columns: dict[str, tuple[array[int], array[float]]] = {}
        self.last: dict[str, float] = {}  # the newest value of each scalar
        self.step, self.rows, self.changed = 0, 0, 0.0
        self._file: tuple[int, int] | None = None
        self._at, self._torn = 0, b""

    def update(self) -> None:
        """Reads the lines that have been added; all of them anew, if the file is another one or was cut."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._at:
                    self._forget()
                    self._file = found.st_dev, found.st_ino
                self.changed = found.st_mtime
                file.seek(self._at)
                while data := file.read(BLOCK):
                    self._at += len(data)
                    self._take(data)
        except OSError:
            self._forget()

    def _take(self, data: bytes) -> None:
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            self.rows, self.step = self.rows + 1, max(self.step, step)
            for name, value in row.items():
                number = _number(value)
                if name != "step" and number is not None:
                    steps, values = self.columns.setdefault(str(name), (array("q"), array("d")))
                    steps.append(step)
                    values.append(number)
                    self.last[str(name)] = number

    def curve(self, name: str, points: int = POINTS) -> list[list[float]]:
        """[step, mean, least, greatest] of at most so many points; what is not finite is left out."""
        if name not in self.columns:
            return []
        steps, values = (np.array(column, dtype=np.float64) for column in self.columns[name])
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if len(values) <= points:
            return [[step, value, value, value] for step, value in zip(steps.tolist(), values.tolist(), strict=True)]
        edges = np.linspace(0, len(values), points + 1).astype(np.int64)
        starts, counts = edges[:-1], np.diff(edges)
        mean, least = np.add.reduceat(values, starts) / counts, np.minimum.reduceat(values, starts)
        columns = steps[edges[1:] - 1], mean, least, np.maximum.reduceat(values, starts)
        return np.stack(columns, axis=1).tolist()


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        with suppress(OverflowError):
            return float(value)
        return None
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value) if isinstance(value, str) else None


@dataclass
class WatchedRun:
    """A run's folder, and what has been read of it.

    Args:
        folder: its place; `name`: what it is called on the page.
    """

    folder: Path
    name: str
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.folder / "metrics.jsonl")

    def look(self, now: float | None = None) -> dict[str, Any]:
        """What the page shows of it, as values of JSON; numbers that JSON has no word for are None."""
        self.metrics.update()
        now, last, config = time.time() if now is None else now, self.metrics.last, self._config()
        planned = config.get("max_train_steps")
        ranks = _ranks(last)
        shown = [name for name in self.metrics.columns if not name.startswith(ALARM) and not _RANK.search(name)]
        return {
            "name": self.name,
            "folder": str(self.folder),
            "state": self._state(now),
            "step": self.metrics.step,
            "planned": planned if isinstance(planned, int) else None,
            "method": str(_of(config, "method", "_target_")).rpartition(".")[2],
            "eta": _finite(last.get("eta_seconds")) if not self._done() else None,
            "ago": max(0.0, now - self.metrics.changed) if self.metrics.changed else None,
            "alarms": sorted(name.removeprefix(ALARM) for name, on in last.items() if name.startswith(ALARM) and on),
            "skipped": self._skipped(),
            "best": _finite(last.get("best/step")),
            "last": {name: _finite(last[name]) for name in shown},
            "curves": {name: self.metrics.curve(name) for name in shown},
            "ranks": ranks,
            "pictures": self.pictures(),
        }

    def _config(self) -> Mapping[str, Any]:
        try:
            found = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _done(self) -> str:
        try:
            return (self.folder / "DONE").read_text(encoding="utf-8", errors="replace").strip("\0 \r\n\t")[:60]
        except OSError:
            return ""

    def _state(self, now: float) -> str:
        if not self.folder.is_dir():
            return "gone"
        if done := self._done():
            return f"ended early, at step {done}" if " of " in done else "finished"
        if (self.folder / "LOCK").exists():
            silent = self.metrics.changed and now - self.metrics.changed > SILENT
            return f"running, silent for {(now - self.metrics.changed) / 60:.0f} minutes" if silent else "running"
        if (self.folder / "PREEMPTED").exists():
            return "stopped, to be resumed"
        return "not running" if self.metrics.rows else "not begun"

    def _skipped(self) -> int:
        try:
            return (self.folder / "skipped_batches.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def pictures(self) -> dict[str, list[str]]:
        """The names of the pictures of each step, in order; of the last steps only, where there are many."""
        found: dict[str, list[str]] = {}
        for folder in sorted(_entries(self.folder / "samples"), key=_step_of)[-60:]:
            if _STEP.fullmatch(folder.name):
                names = sorted(path.name for path in _entries(folder) if _PICTURE.fullmatch(path.name))
                found[folder.name] = names[:MOST_PICTURES]
        return {step: names for step, names in found.items() if names}

    def picture(self, step: str, name: str) -> bytes | None:
        """A picture of its samples; None for anything else, whatever it is called or linked to."""
        if not _STEP.fullmatch(step) or not _PICTURE.fullmatch(name):
            return None
        samples = self.folder / "samples"
        try:
            path = (samples / step / name).resolve(strict=True)
            if not path.is_relative_to(samples.resolve(strict=True)) or not path.is_file():
                return None
            data = path.read_bytes()
        except OSError:
            return None
        return data if data.startswith(b"\x89PNG\r\n\x1a\n") else None


def _of(config: Mapping[str, Any], *keys: str) -> Any:
    found: Any = config
    for key in keys:
        found = found.get(key, "") if isinstance(found, Mapping) else ""
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _step_of(folder: Path) -> int:
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else -1


def _ranks(last: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """The newest value of each scalar of single ranks, by the scalar and the rank: of names with a `rank3` in them."""
    found: dict[str, dict[str, float | None]] = {}
    for name, value in last.items():
        if rank := _RANK.search(name):
            scalar = (name[: rank.start()] + name[rank.end() :]).strip("/_.") or "value"
            found.setdefault(scalar, {})[rank[1]] = _finite(value)
    return found


class Watched:
    """Runs beside each other: those in the given folders, which may be runs, sweeps, chains, or folders of any of them.

    Runs that begin later are found at the next look.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.runs: dict[str, WatchedRun] = {}

    def look(self, now: float | None = None) -> dict[str, Any]:
        """What the page shows, as values of JSON."""
        there = [found for folder in self.folders for found in runs_in(folder)]
        shown = there[:MOST_RUNS]
        for folder in shown:
            if str(folder) not in self.runs:
                self.runs[str(folder)] = WatchedRun(folder, self._name(folder))
        return {
            "at": time.time() if now is None else now,
            "left_out": len(there) - len(shown),
            "runs": [run.look(now) for run in self.runs.values()],
        }

    def _name(self, folder: Path) -> str:
        above = next((one for one in self.folders if folder.is_relative_to(one)), folder)
        inner = folder.relative_to(above)
        own = above.name or above.resolve().name
        return own if inner == Path(".") else str(inner) if len(self.folders) == 1 else f"{own}/{inner}"

    def picture(self, run: int, step: str, name: str) -> bytes | None:
        """A picture of the run of that number on the page."""
        runs = list(self.runs.values())
        return runs[run].picture(step, name) if 0 <= run < len(runs) else None


def runs_in(folder: Path) -> list[Path]:
    """The folders of runs in a folder, itself if it is one: in order of their names."""
    return list(_runs_in(folder, DEPTH))


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / name).is_file() for name in ("metrics.jsonl", "run_id")):
        yield folder
    elif depth:
        for inner in sorted(path for path in _entries(folder) if path.name not in LEFT_OUT):
            if inner.is_dir() and not inner.name.startswith("."):
                yield from _runs_in(inner, depth - 1)
