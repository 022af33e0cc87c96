"""What a command line with `-m` sweeps over, and the runs that follow from it.

`learning_rate=1e-4,2e-4`, `seed=range(1,4)`, `lora_rank=choice(8,64)` and `method=glob(lcm*)` have several values, and
every combination of them is a run. `learning_rate=interval(1e-5,1e-3)` is for a search: `hydra/sweeper=optuna`. The
grammar is Hydra's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from pydantic import Field

from distill.config.composition import groups_of
from distill.config.loading import Settings, load, validated
from distill.config.mistakes import ConfigError
from distill.config.overrides import fields_of, kinds_of, parse
from distill.data.errors import short

MOST = 1000  # runs of a sweep; more are a mistake
LABEL = 200  # characters of a folder's name
SWEEPERS = ("basic", "optuna")
INSTEAD = {
    "hydra.sweep.dir": "the folder of a sweep is output_dir: write output_dir=FOLDER",
    "hydra.sweep.subdir": "each run has a folder in output_dir, called by what makes it different: leave it out",
    "hydra.run.dir": "the folder of a run is output_dir: write output_dir=FOLDER",
    "hydra.searchpath": "folders of further files are given as --config-dir DIR",
    "hydra.sweeper.sampler": "what is tried is chosen by TPE: write hydra.sweeper.seed=0 for another order",
    "hydra.sweeper.params": "values are given with their keys: learning_rate=interval(1e-5,1e-3)",
    "hydra/launcher": "distill submit -m runs a sweep as a SLURM array; without it, its runs follow one another",
}
"""What is written for settings of Hydra that this command line has in another form."""


class Search(Settings):
    """`hydra.sweeper.…` of `hydra/sweeper=optuna`: how values are looked for.

    Args:
        n_trials: runs in all, those of an earlier call with the same settings included.
        direction: which way `metric` is better.
        metric: the scalar of a run's `metrics.jsonl` to optimise.
        seed: of what is tried.
    """

    n_trials: int = Field(20, ge=1, le=MOST)
    direction: Literal["minimize", "maximize"] = "minimize"
    metric: str = "loss"
    seed: int = Field(0, ge=0, lt=1 << 32)


@dataclass(frozen=True)
class SweptRun:
    """A run of a sweep.

    Args:
        folder: its `output_dir`, within that of the sweep.
        overrides: its command line, `output_dir` included.
        chosen: what makes it different from the others.
    """

    folder: Path
    overrides: tuple[str, ...]
    chosen: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Interval:
    """Any number from `low` to `high`; with `log` each order of magnitude is tried as often."""

    low: float
    high: float
    log: bool
    integer: bool


@dataclass(frozen=True)
class Swept:
    """A command line, taken apart.

    Args:
        fixed: the arguments that are the same for all runs.
        choices: the values of each key that has several, as they would be typed.
        intervals: those of keys with an interval.
        search: settings of the search, if there is one.
    """

    fixed: list[str]
    choices: dict[str, list[str]]
    intervals: dict[str, Interval]
    search: Search | None

    def run(self, base: Path, chosen: Mapping[str, str], name: str = "") -> SweptRun:
        """The run with these values, in a folder below `base`."""
        folder = base / (name or label(chosen))
        fixed = [argument for argument in self.fixed if not argument.startswith("output_dir=")]
        return SweptRun(folder, (*fixed, *typed(chosen), f"output_dir={folder}"), chosen)


def runs_of(config: str, settings: type[Settings], arguments: Sequence[str]) -> list[SweptRun]:
    """Every combination of what a command line sweeps over, as runs whose settings are checked.

    Raises:
        ConfigError: one line about the first mistake of any of them.
    """
    swept = swept_of(config, settings, arguments)
    if swept.search is not None:
        raise ConfigError(
            "hydra/sweeper=optuna needs the results of earlier runs for the next: it is for distill train -m"
        )
    return combinations(config, settings, swept)


def combinations(config: str, settings: type[Settings], swept: Swept) -> list[SweptRun]:
    """The runs of a sweep without a search. Raises ConfigError."""
    if key := next(iter(swept.intervals), None):
        raise ConfigError(f"{key}=interval(...) has no end of values: add hydra/sweeper=optuna, or use range or choice")
    count = prod(map(len, swept.choices.values()))
    if count > MOST:
        raise ConfigError(f"the sweep has {count} combinations: at most {MOST} are allowed")
    found = [dict(zip(swept.choices, values, strict=True)) for values in itertools.product(*swept.choices.values())]
    base = folder_of(config, settings, swept, found)
    names = distinct(map(label, found))
    return [swept.run(base, chosen, name) for chosen, name in zip(found, names, strict=True)]


def folder_of(config: str, settings: type[Settings], swept: Swept, found: Sequence[Mapping[str, str]]) -> Path:
    """The `output_dir` of a sweep; the settings of every combination are checked for it. Raises ConfigError."""
    checked = [load(config, settings, [*swept.fixed, *typed(chosen)]) for chosen in found]
    folders = {one.output_dir for one in checked}  # type: ignore[attr-defined]
    if len(folders) > 1:
        raise ConfigError("the runs have several output_dirs: set output_dir=FOLDER for the whole sweep")
    return Path(folders.pop())


def swept_of(config: str, settings: type[Settings], arguments: Sequence[str]) -> Swept:
    """Takes a command line apart.

    Raises:
        ConfigError: nothing has several values, or what has cannot.
    """
    if "output_dir" not in settings.model_fields:
        raise ConfigError("-m is for commands that write a folder of their own, and this one has no output_dir")
    own, search = without_hydra(arguments)
    hints = fields_of(settings)
    fixed: list[str] = []
    choices: dict[str, list[str]] = {}
    intervals: dict[str, Interval] = {}
    for argument in own:
        override = sweep_of(argument)
        key = parse(argument).key
        if override is None:
            fixed.append(argument)
        elif key == "output_dir":
            raise ConfigError("output_dir is the folder of the whole sweep: give one")
        elif override.is_interval_sweep():
            intervals[key] = _interval(key, override.value(), hints.get(key, Any))
        else:
            choices[key] = _values(config, key, override.value())
    if not choices and not intervals:
        raise ConfigError("-m is set, and nothing has several values: key=a,b or key=range(1,4)")
    return Swept(fixed, choices, intervals, search)


def sweep_of(argument: str) -> Override | None:
    """What an argument sweeps over, as Hydra reads it; None for what is one value."""
    one = parse(argument)
    if one.removes:
        return None
    try:
        override = OverridesParser.create().parse_override(f"x={one.value}")
    except (HydraException, ValueError, RecursionError):  # a text with other characters: taken as it is
        return None
    return override if override.is_sweep_override() else None


def _values(config: str, key: str, sweep: Any) -> list[str]:
    """The values of a choice, a range or a pattern, as they would be typed. Raises ConfigError."""
    if isinstance(sweep, Glob):
        group = groups_of(config).get(key.partition("@")[2] or key)
        if group is None:
            raise ConfigError(f"{key}=glob(...): patterns are for groups, {', '.join(groups_of(config))}")
        found = sweep.filter(group.options)
        if not found:
            raise ConfigError(f"{key}=glob(...) matches none of {', '.join(group.options)}")
        return found
    assert isinstance(sweep, (ChoiceSweep, RangeSweep))
    values = sweep.list if isinstance(sweep, ChoiceSweep) else list(itertools.islice(sweep.range(), MOST + 1))
    if not values:
        raise ConfigError(f"{key}=range(...) is empty")
    texts = [f"{value:.12g}" if type(value) is float else Override._get_value_element_as_str(value) for value in values]
    return list(dict.fromkeys(texts))


def _interval(key: str, sweep: Any, hint: Any) -> Interval:
    """Raises ConfigError for an interval that has no inside, or no logarithm."""
    assert isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.end is not None
    kinds, log = kinds_of(hint), "log" in sweep.tags
    integer = type(sweep.start) is int or (int in kinds and float not in kinds)
    low, high = (int(end) if integer else end for end in (sweep.start, sweep.end))
    if low >= high or (log and low <= 0):
        raise ConfigError(f"{key}=interval({low},{high}): the first number is the smaller one{', above 0' * log}")
    return Interval(low, high, log, integer)


def without_hydra(arguments: Sequence[str]) -> tuple[list[str], Search | None]:
    """The command's own arguments, and what `hydra/sweeper` and `hydra.sweeper` say. Raises ConfigError."""
    own = [argument for argument in arguments if not re.match(r"[+~]*hydra[./]", argument)]
    given = {one.key: one.value for one in map(parse, (argument for argument in arguments if argument not in own))}
    for key in given:
        if line := next((line for name, line in INSTEAD.items() if re.match(rf"{name}\b", key)), None):
            raise ConfigError(f"{key}: {line}")
    sweeper = given.pop("hydra/sweeper", "basic")
    if sweeper not in SWEEPERS:
        raise ConfigError(f"hydra/sweeper={short(sweeper)}: allowed are {' and '.join(SWEEPERS)}")
    if unknown := [key for key in given if not key.startswith("hydra.sweeper.")]:
        allowed = ", ".join(f"hydra.sweeper.{name}" for name in Search.model_fields)
        raise ConfigError(f"{unknown[0]} is no setting here; allowed with -m: hydra/sweeper, {allowed}")
    if given and sweeper == "basic":
        raise ConfigError(f"{next(iter(given))} is without effect: add hydra/sweeper=optuna")
    return own, _search(given) if sweeper == "optuna" else None


def _search(given: Mapping[str, str]) -> Search:
    values: dict[str, Any] = {key.removeprefix("hydra.sweeper."): value for key, value in given.items()}
    try:
        return validated(values, Search)
    except ConfigError as error:
        raise ConfigError(f"hydra.sweeper: {error}") from None


def typed(chosen: Mapping[str, str]) -> list[str]:
    """Values as arguments of a command line."""
    return [f"{key}={value}" for key, value in chosen.items()]


def label(chosen: Mapping[str, str]) -> str:
    """A run's folder: what makes it different, in letters that every file system has."""
    return re.sub(r"[^\w=.,+-]+", "-", ",".join(typed(chosen)))[:LABEL]


def distinct(names: Any) -> list[str]:
    """The names; those that came before get a number after them."""
    found: dict[str, None] = {}
    for name in names:
        again = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}-{n}") not in found)
        found[name if again == 1 else f"{name}-{again}"] = None
    return list(found)
