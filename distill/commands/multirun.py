"""Sweeps: `distill train -m learning_rate=1e-4,2e-4 lora_rank=8,64 output_dir=runs/sweep`.

Every combination of the values runs as a command of its own, one after another, in a folder of its own below
`output_dir`; a sweep that is run again leaves what is finished and resumes the rest. `range(1,4)`, `choice(a,b)` and
`a,b` give values; quotes around a value keep its commas. At the end `output_dir/index.html` compares the runs.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from distill.config.loading import Settings, load
from distill.config.mistakes import ConfigError
from distill.config.overrides import parse

FLAGS = ("-m", "--multirun")
MOST = 1000  # combinations; more are a mistake
STOPPED = (2, 75, 130)  # a mistake, and what a person has asked for: what follows would end likewise


def multirun(name: str, config: str, settings: type[Settings], arguments: Sequence[str]) -> int:
    """Runs a command with every combination of what its arguments sweep over; returns the first exit code but 0.

    Raises:
        ConfigError: nothing is swept over, or the command writes no folder.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("-m starts processes of its own: leave the launcher out, or use distill submit -m")
    if "output_dir" not in settings.model_fields:
        raise ConfigError(f"-m is for commands that write a folder of their own, and {name} has no output_dir")
    if any(argument.startswith("output_dir=") and len(values_of(argument)) > 1 for argument in arguments):
        raise ConfigError("output_dir is the folder of the whole sweep: give one")
    combinations = combined(arguments)
    if len(combinations) < 2:
        raise ConfigError("-m is set, and nothing has several values: key=a,b or key=range(1,4)")
    checked = [load(config, settings, [*overrides]) for overrides, _ in combinations]  # before the first one starts
    base = Path(checked[0].output_dir)  # type: ignore[attr-defined]
    folders = {label(chosen): base / label(chosen) for _, chosen in combinations}
    code = 0
    for number, (overrides, chosen) in enumerate(combinations, 1):
        print(f"run {number} of {len(combinations)}: {label(chosen)}", flush=True)
        command = [sys.executable, "-m", "distill", name, *overrides, f"output_dir={folders[label(chosen)]}"]
        ended = subprocess.run(command).returncode
        code = code or ended
        if ended in STOPPED or ended < 0:
            print(f"the sweep ends here, with exit code {ended}; the same command resumes it", file=sys.stderr)
            break
    compare(base, folders, {label(chosen): chosen for _, chosen in combinations})
    return code if code >= 0 else 128 - code


def compare(base: Path, folders: dict[str, Path], chosen: dict[str, dict[str, str]]) -> None:
    """Writes the page of a sweep of runs that train; other commands have pages of their own."""
    if not any((folder / "metrics.jsonl").is_file() for folder in folders.values()):
        return
    from distill.evaluation.runs import runs_page  # matplotlib, which a sweep starts without

    runs_page(base / "index.html", base.name, folders, chosen)
    print(f"comparison: {base / 'index.html'}")


def combined(arguments: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The overrides of every run, `output_dir` left to be added, and of these those that differ between runs."""
    several = {argument: values_of(argument) for argument in arguments if not argument.startswith("~")}
    swept = {argument: values for argument, values in several.items() if len(values) > 1}
    count = 1
    for values in swept.values():
        count *= len(values)
    if count > MOST:
        raise ConfigError(f"the sweep has {count} combinations: at most {MOST} are allowed")
    fixed = [argument for argument in arguments if argument not in swept]
    keys = [parse(argument).key for argument in swept]
    found = []
    for combination in itertools.product(*swept.values()):
        chosen = dict(zip(keys, combination, strict=True))
        found.append(([*fixed, *(f"{key}={value}" for key, value in chosen.items())], chosen))
    return found


def values_of(argument: str) -> list[str]:
    """What an argument sweeps over, as it would be typed; what is no sweep is one value."""
    one = parse(argument)
    try:
        override = OverridesParser.create().parse_override(f"x={one.value}")
    except (HydraException, ValueError, RecursionError):  # a text with other characters: taken as it is
        return [one.value]
    return list(map(str, override.sweep_string_iterator())) if override.is_sweep_override() else [one.value]


def label(chosen: dict[str, str]) -> str:
    """A run's folder: what makes it different, in letters that every file system has."""
    return re.sub(r"[^\w=.,+-]+", "-", ",".join(f"{key}={value}" for key, value in chosen.items()))[:200]
