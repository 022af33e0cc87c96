"""Searches: `distill train -m hydra/sweeper=optuna learning_rate=tag(log,interval(1e-5,1e-3)) output_dir=runs/search`.

Optuna proposes the values of each run by the results of those before (TPE). What it proposes follows from the seed and
from those results alone, so that a search that is run again goes the same way: runs that are finished are left, the
one that was stopped is resumed, and the rest follows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.commands.sweep_runs import Start, SweepRunner, compare
from distill.config.loading import Settings
from distill.config.mistakes import ConfigError
from distill.config.packages import require
from distill.config.sweeps import Search, Swept, SweptRun, folder_of

RESULTS = "optimization_results.yaml"


def search(
    command: Sequence[str], config: str, settings: type[Settings], swept: Swept, start: Start | None = None
) -> int:
    """Runs a search; returns its exit code. `output_dir` gets a page with every run, and the best values as YAML.

    Raises:
        ConfigError: there is no optuna, or the settings of a run are wrong; nothing has been started.
    """
    assert swept.search is not None
    if "log_every" not in settings.model_fields:
        raise ConfigError("hydra/sweeper=optuna is for distill train: other commands have no metric to optimise")
    require("hydra/sweeper=optuna", "optuna")
    base = folder_of(config, settings, swept, ends(swept))
    values: dict[str, float] = {}
    runs: dict[str, SweptRun] = {}
    study, space = study_of(swept.search), space_of(swept)
    with SweepRunner(command, base, start) as sweep:
        for number in range(1, swept.search.n_trials + 1):
            trial = study.ask(space)
            run = swept.run(base, {key: as_typed(value) for key, value in trial.params.items()})
            if run.name not in runs:  # the same values again have the same result
                print(f"run {number} of {swept.search.n_trials}: {run.name}", flush=True)
                runs[run.name] = run
                if sweep.run(run) == 0:
                    values[run.name] = value_of(run.folder, swept.search.metric)
                if sweep.stopped:
                    break
            study.tell(trial, *outcome(values.get(run.name, math.nan)))
    more = {name: {f"last {swept.search.metric}": f"{value:.6g}"} for name, value in values.items()}
    compare(base, [*runs.values()], sweep.codes, more)
    say_best(base, swept.search, runs, values)
    return sweep.code()


def study_of(settings: Search) -> Any:
    """An empty study, whose proposals follow from the seed and from the results reported to it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction=settings.direction, sampler=optuna.samplers.TPESampler(seed=settings.seed))


def space_of(swept: Swept) -> dict[str, Any]:
    """What is swept over, as optuna's distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space: dict[str, Any] = {key: CategoricalDistribution(values) for key, values in swept.choices.items()}
    for key, interval in swept.intervals.items():
        if interval.integer:
            space[key] = IntDistribution(int(interval.low), int(interval.high), log=interval.log)
        else:
            space[key] = FloatDistribution(interval.low, interval.high, log=interval.log)
    return space


def outcome(value: float) -> tuple[Any, Any]:
    """What is reported of a trial: its value, or that it failed."""
    from optuna.trial import TrialState

    return (None, TrialState.FAIL) if math.isnan(value) else (value, TrialState.COMPLETE)


def as_typed(value: Any) -> str:
    """A proposed value as an argument of the run, which six digits are enough for."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def ends(swept: Swept) -> list[dict[str, str]]:
    """Combinations in which each value of a choice, and each end of an interval, occurs: to be checked before a run."""
    values = swept.choices | {key: [as_typed(one.low), as_typed(one.high)] for key, one in swept.intervals.items()}
    first = {key: several[0] for key, several in values.items()}
    return [{**first, key: value} for key, several in values.items() for value in several]


def value_of(folder: Path, metric: str) -> float:
    """What a finished run has come to: its last losses' mean, or the last value of another scalar.

    Raises:
        ConfigError: it has measured no such scalar.
    """
    from distill.evaluation.runs import scalars, summary

    rows = scalars(folder)
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    last |= summary(rows)
    if metric not in last:
        known = ", ".join(name for name in last if name not in ("step", "steps"))
        raise ConfigError(f"hydra.sweeper.metric={metric}: {folder} has measured none; it has {known}")
    return float(last[metric])


def say_best(base: Path, settings: Search, runs: Mapping[str, SweptRun], values: Mapping[str, float]) -> None:
    """Prints the run with the best value, and writes its settings down."""
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    if not known:
        print("no run has a value: there is no best one", file=sys.stderr)
        return
    best = (min if settings.direction == "minimize" else max)(known, key=lambda name: known[name])
    found = {"name": "optuna", "best_params": dict(runs[best].chosen), "best_value": known[best]}
    (base / RESULTS).write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    print(f"best of {len(known)}: {best}, {settings.metric} {known[best]:.6g}; {base / RESULTS}")
