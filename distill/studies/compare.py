"""Students of many methods beside each other: one teacher, one store, one LoRA, one optimizer, one judge, one budget:

distill study compare                          # hours; killed at any time, the same command goes on
distill study compare quick=true               # one seed, few images, a third of the processing: under an hour
distill study compare methods=[lcm,rectified] seeds=[0]
distill study compare tune=true                # trials, equal for all, by which the methods' files are set
distill study compare model=DIR protocol=coco2017-5k metric=fid overrides=[data.prompts=prompts.txt] ...

Two budgets are compared: equal numbers of training samples, and equal processing, which is counted (FLOPs of a step by
`distill plan`, on average over a run) and not timed. Each method's settings are a file of
configs/experiment/compare/. Every student is sampled by every sampler that suits it, and has its row by the one that
was best on other noise. Runs are ordinary runs: one that was trained elsewhere, by the command that runs.txt has for
it, is taken as it is, and a method that is added later adds its own runs only.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from typing import Any

from distill.commands.evaluate import check_metrics, scorer_of
from distill.config.loading import ConfigError, checking
from distill.config.settings import CompareSettings
from distill.data.words import counted
from distill.diffusion.random import generator
from distill.diffusion.solver import make_times
from distill.evaluation.compare import ComparisonPlan
from distill.evaluation.metrics import plotted
from distill.models.devices import own_device
from distill.models.families.loading import load_teacher
from distill.studies.compare_report import BudgetResults, ComparedFacts, write
from distill.studies.compare_rows import MeasuredContestant, MethodsBench, verdict
from distill.studies.compare_runs import Contestant, Runs, check_methods
from distill.studies.compare_tuning import run_trials, write_trials
from distill.training.tracking import setup_logging

log = logging.getLogger("distill")
FULL: dict[str, Any] = {
    "budgets": ["processing", "samples"],
    "processing_steps": 3900,
    "seeds": [0, 1, 2],
    "n": 1000,
    "tuning_n": 400,
}
QUICK: dict[str, Any] = {"budgets": ["processing"], "processing_steps": 1300, "seeds": [0], "n": 300, "tuning_n": 200}


def main(cfg: CompareSettings) -> None:
    setup_logging()
    cfg = settled(cfg)
    check_methods(cfg)
    check_metrics(cfg.protocol, cfg.weights)
    if cfg.metric not in plotted():
        raise ConfigError(f"metric={cfg.metric} is not known; allowed: {', '.join(plotted())}")
    runs = Runs(cfg)
    bench = bench_of(runs)
    contestants = {budget: runs.contestants(budget) for budget in cfg.budgets or []}
    write_commands(runs, contestants)
    runs.write_store()
    if cfg.tune:
        print(write_trials(bench, run_trials(bench)))
        return print(f"trials: {runs.output}/tuning.md and tuning.json")
    parts = []
    for budget, students in contestants.items():
        log.info("equal %s: %s of %s", budget, counted(len(students), "method"), counted(len(bench.seeds), "seed"))
        runs.train(students, bench.seeds)
        parts.append(part_of(bench, budget, students))
    write(runs.output, ComparedFacts(cfg, *bench.teacher_rows(), bench.real()), parts)
    print((runs.output / "report.md").read_text())
    print(f"report: {runs.output}/report.md, with report.json and methods.png")


def settled(cfg: CompareSettings) -> CompareSettings:
    """The settings with what `quick` or its absence leaves to be taken."""
    usual = QUICK if cfg.quick else FULL
    return cfg.model_copy(update={key: value for key, value in usual.items() if getattr(cfg, key) is None})


def bench_of(runs: Runs) -> MethodsBench:
    """What students are measured with.

    Raises:
        ConfigError: a store of several guidances, or a metric that cannot be measured.
    """
    cfg, guidance = runs.cfg, runs.base.data.guidance
    if not isinstance(guidance, float | int):
        raise ConfigError(f"overrides: data.guidance={guidance}: a comparison has one, set overrides=[data.guidance=W]")
    assert cfg.n is not None and cfg.tuning_n is not None and cfg.seeds is not None
    with checking():
        teacher = load_teacher(runs.teacher, parts=())
        scorer = scorer_of(cfg.protocol, cfg.n, cfg.weights, teacher, runs.output / "evaluation", str(own_device()))
    if cfg.metric in scorer.left_out:
        raise ConfigError(f"metric={cfg.metric} cannot be measured: {scorer.left_out[cfg.metric]}")
    plan = ComparisonPlan(
        guidance=float(guidance),
        n=cfg.n,
        tuning_n=cfg.tuning_n,
        steps=tuple(sorted(cfg.steps)),
        guidances=tuple(cfg.guidances),
        teacher_steps=cfg.teacher_steps,
        batch_size=cfg.batch_size,
        teacher_embedded=teacher.takes_guidance,
        tuned_by=cfg.metric,
    )
    return MethodsBench(runs, plan, scorer, cfg.seeds)


def write_commands(runs: Runs, contestants: Mapping[Any, list[Contestant]]) -> None:
    """runs.txt: every run as the command that trains it, for those who train some of them elsewhere."""
    lines = []
    for students in contestants.values():
        for one, seed in runs.in_order(students, runs.cfg.seeds or []):
            lines.append("distill train " + shlex.join(runs.overrides(one, seed)))
    runs.output.mkdir(parents=True, exist_ok=True)
    (runs.output / "runs.txt").write_text("\n".join(lines) + "\n")


def part_of(bench: MethodsBench, budget: str, students: list[Contestant]) -> BudgetResults:
    """All that one budget comes to."""
    runs, seeds = bench.runs, bench.seeds
    diverged = [one.method for one in students if runs.diverged(one, seeds)]
    entries: list[MeasuredContestant] = []
    for number, one in enumerate(students, 1):
        if one.method not in diverged:
            log.info("measuring %s, %d of %d", one.name, number, len(students))
            entries.append(bench.entry(one))
    minutes = {
        one.method: sum(runs.cpu_minutes(one, seed) for seed in seeds) / len(seeds)
        for one in students
        if one.method not in diverged
    }
    first = next((entry for entry in entries if entry.method == bench.cfg.baseline), None)
    apart = {
        entry.method: {steps: bench.apart(entry, first, steps) for steps in entry.chosen if steps in first.chosen}
        for entry in entries
        if first is not None and entry is not first
    }
    all_steps = sorted({steps for entry in entries for steps in entry.chosen})
    verdicts = [found for steps in all_steps if (found := verdict(bench, entries, steps))]
    reads, networks = facts_of_methods(runs, [one.method for one in students])
    return BudgetResults(budget, entries, diverged, minutes, apart, verdicts, reads, networks)


def facts_of_methods(runs: Runs, names: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """How many states of a solve a sample of each method is, and how many networks each holds while it trains."""
    times = make_times("trailing", runs.schedule.T, runs.base.data.solver_steps)
    methods = {name: runs.method(name) for name in names}
    reads = {name: len(method.reads().pick(tuple(times), generator("compare"))) for name, method in methods.items()}
    # Of a LoRA the teacher is the student's own network, with the adapter off.
    whole = runs.base.student["_target_"].endswith("FullStudent")
    beside = {name: {*method.trains, *(["teacher"] if whole else [])} for name, method in methods.items()}
    called = {name: {*method.trains, *method.requires} & beside[name] for name, method in methods.items()}
    return reads, {name: len(found) for name, found in called.items()}
