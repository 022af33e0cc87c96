"""The students of a comparison of methods beside each other: each by the sampler that suits it, and all in pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean
from typing import Any, TypeVar

from distill.commands.evaluate import stated
from distill.config.settings import CompareSettings
from distill.diffusion.samplers import SAMPLERS
from distill.diffusion.solver import make_times
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Comparison, ComparisonPlan, Row, Scorer, Setting
from distill.evaluation.metrics import METRICS
from distill.evaluation.pipelines import sampling_of
from distill.evaluation.students import load_student, parse_sampler
from distill.evaluation.toy import JudgeScorer
from distill.methods.sampling import Sampling
from distill.models.devices import own_device
from distill.models.exported import FACTS
from distill.models.families.loading import load_teacher
from distill.models.folder import read_json
from distill.studies.compare_runs import Contestant, Runs
from distill.studies.seeds import difference, over_seeds
from distill.training.teacher import inference_dtype

log = logging.getLogger("distill")
SHARED = ("steps", "guidance", "nfe", "sampler", "spacing", "gamma", "n", "protocol", "judged_by")
T = TypeVar("T")
WINNER, ALIKE = 3.0, 2.0
"""Standard errors of a paired difference: from which one is named the winner, and up to which two count as alike."""


@dataclass(frozen=True)
class MethodsBench:
    """What students are measured with, and the students of every contestant and seed.

    Args:
        scorer: of the protocol; it also compares two students pair by pair.
        seeds: of training.
    """

    runs: Runs
    plan: ComparisonPlan
    scorer: Scorer
    seeds: Sequence[int]

    @property
    def cfg(self) -> CompareSettings:
        return self.runs.cfg

    @cached_property
    def cache(self) -> Cache:
        return Cache(self.runs.output / "evaluation")

    def open(self, one: Contestant | None = None, seed: int = 0) -> Comparison:
        """A contestant's student beside the teacher, or the teacher alone; all share what is known of the teacher."""
        device = own_device()
        dtype = inference_dtype("auto", device)
        teacher = load_teacher(
            self.runs.teacher, parts=("network", "text", "vae"), dtype=dtype, allow_distilled=one is not None
        )
        denoisers, hashes = {"teacher": teacher.denoiser()}, {"teacher": stated(teacher.teacher_hash, dtype)}
        plan = self.plan
        if one is not None:
            student = load_student(self.runs.export_folder(one, seed), teacher)
            student.denoiser.module.to(device)
            denoisers["student"], hashes["student"] = student.denoiser, stated(student.weights, dtype)
            guidance = plan.guidance if student.embedded else 1.0
            plan = replace(plan, student_guidance=guidance, student_embedded=student.embedded)
        return Comparison(teacher.to(device), denoisers, hashes, self.scorer, plan, self.cache)

    def settings(self, one: Contestant) -> dict[int, list[Setting]]:
        """All ways to sample a contestant's students, by the number of steps, its own first."""
        export = self.runs.export_folder(one, self.seeds[0])
        own, embedded = sampling_of(export) or Sampling(), bool(read_json(export, FACTS).get("takes_guidance"))
        plan = replace(self.plan, student_guidance=self.plan.guidance if embedded else 1.0, student_embedded=embedded)
        last = self.runs.schedule.T
        found: dict[int, list[Setting]] = {}
        for steps in [own.steps] if own.steps else self.plan.steps:
            for sampling in samplings(own, self.cfg.samplers):
                if fits(sampling, last, steps):
                    how: dict[str, Any] = {
                        "sampler": sampling.sampler,
                        "spacing": sampling.spacing,
                        "gamma": sampling.gamma,
                    }
                    found.setdefault(steps, []).append(replace(plan.student(steps), **how))
        return found

    def tried(self, one: Contestant, settings: Sequence[Setting]) -> dict[Setting, float]:
        """The metric of ways to sample a contestant's students, on other noise, on average over seeds."""
        found: dict[Setting, list[float]] = {setting: [] for setting in settings}
        for seed in self.seeds if settings else ():
            opened = self.open(one, seed)
            for setting in settings:
                found[setting].append(opened.tuning_row(setting)[self.cfg.metric])
        return {setting: mean(values) for setting, values in found.items()}

    def chosen(self, one: Contestant) -> dict[int, Setting]:
        """The best way at each number of steps, by the metric on other noise, over all seeds."""
        ways = self.settings(one)
        tried = self.tried(one, [way for several in ways.values() if len(several) > 1 for way in several])
        return {
            steps: best(several, self.cfg.metric, lambda way: tried[way]) if len(several) > 1 else several[0]
            for steps, several in ways.items()
        }

    def entry(self, one: Contestant) -> MeasuredContestant:
        """A contestant's rows by the chosen ways, at every number of steps, of all seeds."""
        chosen, comparisons, rows = self.chosen(one), [], []
        for seed in self.seeds:
            opened = self.open(one, seed)
            rows.append({steps: opened.row(setting) for steps, setting in chosen.items()})
            comparisons.append(replace(opened, denoisers={}))  # what is measured is in the cache
        return MeasuredContestant(one, chosen, comparisons, rows)

    def teacher_rows(self) -> tuple[Row, dict[int, Row]]:
        """The teacher at full steps, and at its best few steps."""
        alone = self.open()
        return alone.row(self.plan.reference()), {steps: alone.row(way) for steps, way in alone.tune().items()}

    def real(self) -> dict[str, float]:
        """What other real images score, where the world makes them."""
        return self.scorer.real_pictures(self.plan.n) if isinstance(self.scorer, JudgeScorer) else {}

    def apart(self, a: MeasuredContestant, b: MeasuredContestant, steps: int) -> Row:
        """The metrics of `a` less those of `b` at as many steps, over seeds, with the errors of these differences."""
        found = []
        for of_a, of_b in zip(a.comparisons, b.comparisons, strict=True):
            pair = [(one, entry.chosen[steps]) for one, entry in ((of_a, a), (of_b, b))]
            facts = {"difference": [one.facts(setting) for one, setting in pair]}
            measure = lambda pair=pair: difference(self.scorer, *(one.measured(way) for one, way in pair))  # noqa: E731
            found.append(self.cache.value(facts, measure))
        return {"steps": steps, **over_seeds(found, measured_names(found[0]))}


@dataclass(frozen=True)
class MeasuredContestant:
    """A contestant's part of the tables.

    Args:
        chosen: how its students are sampled, by the number of steps.
        comparisons: of each seed, without networks.
        rows: of each seed, by the number of steps.
    """

    contestant: Contestant
    chosen: Mapping[int, Setting]
    comparisons: Sequence[Comparison]
    rows: Sequence[Mapping[int, Row]]

    @property
    def method(self) -> str:
        return self.contestant.method

    def row(self, steps: int) -> Row:
        """Its metrics over seeds, at a number of steps."""
        found = [rows[steps] for rows in self.rows]
        return {key: found[0][key] for key in SHARED if key in found[0]} | over_seeds(found, measured_names(found[0]))


@dataclass(frozen=True)
class BestOf:
    """What a number of steps comes to.

    Args:
        best: the method of the best metric; alike: those within two errors of it, itself among them.
        winner: the best, if it is three errors from every other; None: none is named.
        apart: each other method less the best, and the standard error of that difference.
    """

    steps: int
    best: str
    alike: Sequence[str]
    winner: str | None
    apart: Mapping[str, tuple[float, float]]


def verdict(bench: MethodsBench, entries: Sequence[MeasuredContestant], steps: int) -> BestOf | None:
    """Which methods are best at a number of steps, by paired differences; None where there are not two."""
    there = [entry for entry in entries if steps in entry.chosen]
    if len(there) < 2:
        return None
    metric = bench.cfg.metric
    first = best(there, metric, lambda entry: entry.row(steps)[metric])
    apart = {}
    for entry in there:
        if entry is not first:
            row = bench.apart(entry, first, steps)
            apart[entry.method] = row[metric], row[f"{metric}_se"]
    alike = [first.method, *(name for name, (value, error) in apart.items() if abs(value) <= ALIKE * error)]
    clear = all(abs(value) >= WINNER * error for value, error in apart.values())
    return BestOf(steps, first.method, alike, first.method if clear else None, apart)


def best(of: Sequence[T], metric: str, value: Callable[[T], float]) -> T:
    """Which has the best value of a metric."""
    return (max if METRICS[metric].better == "higher" else min)(of, key=value)


def measured_names(row: Mapping[str, object]) -> list[str]:
    """The metrics of a row."""
    return [metric.name for metric in METRICS.values() if isinstance(row.get(metric.name), (int, float))]


def samplings(own: Sampling, wanted: Sequence[str]) -> list[Sampling]:
    """How a student can be sampled: as it is made for, and by other samplers; one of a fixed number of steps only at
    its own times."""
    found = [own]
    for text in wanted:
        other = parse_sampler(text, own)
        if own.steps is not None:
            if own.spacing not in SAMPLERS.find(other.sampler).schedulers:
                continue
            other = replace(other, spacing=own.spacing, steps=own.steps)
        found.append(other)
    return list(dict.fromkeys(found))


def fits(sampling: Sampling, last: int, steps: int) -> bool:
    """Whether there are so many times."""
    try:
        make_times(sampling.spacing, last, steps)
    except ValueError:
        return False
    return True
