"""Trials for a comparison of methods, equal for all: by them the files of configs/experiment/compare/ are set.

Each method has as many runs, with several learning rates and two values of one setting of its own, a seed that no row
has and half of the budget. What counts is the metric at a few steps on the noise that nothing is reported of.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from distill.config.loading import load
from distill.config.settings import TrainSettings
from distill.evaluation.metrics import METRICS
from distill.evaluation.report import format_table
from distill.studies.compare_rows import MethodsBench, best
from distill.studies.compare_runs import FOLDER, Contestant, Runs

log = logging.getLogger("distill")
SEED, SHARE, STEPS = 100, 0.5, 4
"""Of training; of the budget; and of sampling, where a student leaves its number of steps open."""


@dataclass(frozen=True)
class Trial:
    """A run with other settings than its method's file has, and the metric that came of it; None: it diverged."""

    contestant: Contestant
    changed: tuple[str, ...]
    value: float | None = None


def trials(runs: Runs, method: str) -> list[Trial]:
    """A method's trials, which have not been run."""
    own = load("train", TrainSettings, [f"experiment={FOLDER}/{method}", *runs.shared()])
    knobs: Sequence[str | None] = runs.cfg.knobs.get(method) or [None]
    found = []
    for number, (factor, knob) in enumerate(product(runs.cfg.rates, knobs)):
        changed = (f"learning_rate={own.learning_rate * factor:g}", *([knob] if knob else []))
        one = runs.contestant(method, "processing", SHARE, changed)
        found.append(Trial(replace(one, budget=f"trial{number}"), changed))
    return found


def run_trials(bench: MethodsBench) -> list[Trial]:
    """All trials of all methods, run and measured; those that were run already are not run again."""
    runs, done = bench.runs, []
    bench = replace(bench, seeds=[SEED])
    for method in bench.cfg.methods:
        planned = trials(runs, method)
        runs.train([trial.contestant for trial in planned], [SEED])
        for trial in planned:
            done.append(replace(trial, value=measured(bench, trial.contestant)))
            log.info("%s with %s: %s", method, " ".join(trial.changed), done[-1].value)
    return done


def measured(bench: MethodsBench, one: Contestant) -> float | None:
    """The metric by the best sampler at `STEPS`, or at the only number of steps that the student has."""
    if bench.runs.diverged(one, bench.seeds):
        return None
    ways = bench.settings(one)
    tried = bench.tried(one, ways.get(STEPS) or next(iter(ways.values())))
    return best(list(tried.values()), bench.cfg.metric, float)


def write_trials(bench: MethodsBench, done: Sequence[Trial]) -> str:
    """tuning.md and tuning.json, which say what to write into each method's file; returns the former."""
    metric, rows = bench.cfg.metric, []
    for method in bench.cfg.methods:
        own = [trial for trial in done if trial.contestant.method == method]
        there = [trial for trial in own if trial.value is not None]
        top = best(there, metric, lambda trial: trial.value or 0.0) if there else None
        for trial in own:
            mark = "best" if trial is top else "diverged" if trial.value is None else ""
            changed = " ".join(trial.changed)
            rows.append({"method": method, "changed": changed, metric: trial.value, "mark": mark})
    columns = {
        "method": ("method", "{}"),
        "changed": ("with", "{}"),
        metric: METRICS[metric].column,
        "mark": ("", "{}"),
    }
    text = "\n\n".join(["# Trials", *about(bench), format_table(rows, columns)]) + "\n"
    (bench.runs.output / "tuning.md").write_text(text)
    (bench.runs.output / "tuning.json").write_text(json.dumps(rows, indent=1) + "\n")
    return text


def about(bench: MethodsBench) -> Iterator[str]:
    cfg = bench.cfg
    yield f"""Seed {SEED}, {SHARE:g} of the counted FLOPs of {cfg.processing_steps} steps of {cfg.baseline},
{METRICS[cfg.metric].heading} at {STEPS} steps by the best sampler on {cfg.tuning_n} images of other noise. The best of
each method belongs into configs/experiment/{FOLDER}/METHOD.yaml."""
