"""The report of a comparison of methods: its tables and picture, and what they say in words, negative results too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config.settings import CompareSettings
from distill.data.words import counted
from distill.evaluation.compare import Row
from distill.evaluation.figures import draw_methods
from distill.evaluation.metrics import LEGEND, METRICS
from distill.evaluation.report import format_table
from distill.studies.compare_rows import ALIKE, WINNER, BestOf, MeasuredContestant

SHOWN_STEPS = 4
"""At which the second table and the picture's second panel look closer, where they were sampled."""
BUDGETS = {"samples": "Equal samples", "processing": "Equal processing"}
OF_DIVERSITY = ("recall", "diversity")
TRUTH = "precision"
"""Without which recall and variance are worth nothing: wrong images vary as well."""
SHARE_OF_TEACHER = 0.98
CPU_SECONDS = 60.0


@dataclass(frozen=True)
class ComparedFacts:
    """What all parts share: settings, the teacher at full steps and at its best few, and real pictures' own scores."""

    cfg: CompareSettings
    teacher: Row
    tuned: Mapping[int, Row]
    real: Mapping[str, float]

    @property
    def metric(self) -> str:
        return self.cfg.metric

    def family(self, method: str) -> str:
        return next((name for name, methods in self.cfg.families.items() if method in methods), "other")


@dataclass(frozen=True)
class BudgetResults:
    """One budget's results.

    Args:
        diverged: methods a run of which did not come to its end.
        minutes: processor minutes of a run, on average over seeds, its start's among them.
        apart: each method less the baseline, by the number of steps.
        reads: how many states of a solve a sample of each method is.
        networks: how many each method holds while it trains.
    """

    budget: str
    entries: Sequence[MeasuredContestant]
    diverged: Sequence[str]
    minutes: Mapping[str, float]
    apart: Mapping[str, Mapping[int, Row]]
    verdicts: Sequence[BestOf]
    reads: Mapping[str, int]
    networks: Mapping[str, int]

    @property
    def steps(self) -> list[int]:
        return sorted({steps for entry in self.entries for steps in entry.chosen})


def write(folder: Path, facts: ComparedFacts, parts: Sequence[BudgetResults]) -> None:
    """report.md, report.json and methods.png."""
    sections = ["# Methods compared", about(facts)]
    for part in parts:
        name = "methods.png" if len(parts) == 1 or part is parts[0] else f"methods-{part.budget}.png"
        draw(folder / name, facts, part)
        sections += [f"## {BUDGETS[part.budget]}", table(facts, part), *verdict_lines(facts, part)]
        sections += [f"![{BUDGETS[part.budget]}]({name})", *closer(facts, part), *paired(facts, part)]
        sections += ["### Goals", "\n".join(f"- {line}" for line in goals(facts, part))]
    (folder / "report.md").write_text("\n\n".join(sections) + "\n")
    found: dict[str, Any] = {
        "settings": facts.cfg.model_dump(mode="json"),
        "teacher": facts.teacher,
        "real": facts.real,
    }
    found |= {"tuned": facts.tuned, "parts": [as_json(part) for part in parts]}
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n")


def as_json(part: BudgetResults) -> dict[str, Any]:
    """A part for machines: every method's rows over seeds, what they took, and the verdicts."""
    rows = [
        {"method": entry.method, **entry.row(steps), "cpu_minutes": part.minutes[entry.method]}
        | {"train_steps": entry.contestant.steps, "flops": entry.contestant.flops}
        for entry in part.entries
        for steps in entry.chosen
    ]
    verdicts = [asdict(one) for one in part.verdicts]
    return {
        "budget": part.budget,
        "rows": rows,
        "apart": part.apart,
        "verdicts": verdicts,
        "diverged": list(part.diverged),
    }


def about(facts: ComparedFacts) -> str:
    """What is compared, and how."""
    cfg = facts.cfg
    seeds = ", ".join(map(str, cfg.seeds or []))
    quick = "This is the quick form: one seed and few images, so that only large differences show." if cfg.quick else ""
    return f"""{quick}
All students learn from one store, with one LoRA, one optimizer and one batch; settings of each
are `configs/experiment/compare/METHOD.yaml`. n = {cfg.n} images per row and seed; seeds of training: {seeds}. ± is the
standard error of the mean, over images or over seeds, whichever is greater. Each student has its row by the sampler
that was best by {METRICS[facts.metric].heading} on {cfg.tuning_n} images of other noise. Equal processing: the counted
FLOPs of {cfg.processing_steps} steps of {cfg.baseline}; equal samples: {cfg.samples_steps} steps; a method that begins
from another's student has that one's part counted. CPU min: processor minutes of a run's steps, which a busy machine
stretches. In bold: within {ALIKE:g} standard errors of the best, by differences in pairs. {LEGEND}"""


def table(facts: ComparedFacts, part: BudgetResults) -> str:
    """A row a method: what it is, what it took, and the metric and captions at each number of steps."""
    metric, alike = facts.metric, {one.steps: one.alike for one in part.verdicts}
    lines: list[Row] = [teacher_line(facts, part)]
    for entry in part.entries:
        name = entry.method
        line: Row = {"method": name, "family": facts.family(name), "reads": part.reads[name]}
        line |= {"networks": part.networks[name], "minutes": part.minutes[name]}
        line |= {"steps_taken": entry.contestant.steps}
        for steps in entry.chosen:
            row = entry.row(steps)
            bold = entry.method in alike.get(steps, ())
            line[f"at{steps}"] = cell(row, metric, bold) + f" ({sampler_of(row)})"
            if "caption_accuracy" in row:
                line[f"captions{steps}"] = row["caption_accuracy"]
        lines.append(line)
    lines += [{"method": f"{name}: diverged"} for name in part.diverged]
    columns = {"method": ("method", "{}"), "family": ("family", "{}"), "reads": ("states read", "{}")}
    columns |= {"networks": ("networks", "{}"), "steps_taken": ("steps", "{}"), "minutes": ("CPU min", "{:.1f}")}
    heading = METRICS[metric].column[0]
    for steps in part.steps:
        columns[f"at{steps}"] = f"{heading}, {counted(steps, 'step')}", "{}"
        columns[f"captions{steps}"] = "captions", "{:.3f}"
    return format_table(lines, columns)


def teacher_line(facts: ComparedFacts, part: BudgetResults) -> Row:
    line: Row = {"method": "teacher, best tuned"}
    for steps, row in facts.tuned.items():
        if steps in part.steps:
            line[f"at{steps}"] = cell(row, facts.metric) + f" (w {row['guidance']:g})"
            line |= {f"captions{steps}": row["caption_accuracy"]} if "caption_accuracy" in row else {}
    return line


def sampler_of(row: Row) -> str:
    """By which sampler a row was made, and with which share of fresh noise."""
    return f"{row['sampler']}, γ {row['gamma']:g}" if "gamma" in row else str(row["sampler"])


def cell(row: Row, name: str, bold: bool = False) -> str:
    """A metric with its error."""
    pattern = METRICS[name].pattern
    text = pattern.format(row[name])
    text += f" ± {pattern.format(row[f'{name}_se'])}" if f"{name}_se" in row else ""
    return f"**{text}**" if bold else text


def closer(facts: ComparedFacts, part: BudgetResults) -> Iterator[str]:
    """Diversity and truth at one number of steps, and at one step."""
    for steps in dict.fromkeys([SHOWN_STEPS if SHOWN_STEPS in part.steps else part.steps[-1], part.steps[0]]):
        names = [name for name in METRICS if name in facts.teacher and name != facts.metric]
        rows = [{"method": f"teacher, {counted(facts.teacher['steps'], 'step')}", **facts.teacher}]
        rows += [{"method": entry.method, **entry.row(steps)} for entry in part.entries if steps in entry.chosen]
        columns = {"method": ("", "{}")} | {name: METRICS[name].column for name in names}
        keep = {"method", *names, *(f"{name}_se" for name in names)}
        yield f"### Truth and diversity at {counted(steps, 'step')}"
        yield format_table([{key: value for key, value in row.items() if key in keep} for row in rows], columns)


def paired(facts: ComparedFacts, part: BudgetResults) -> Iterator[str]:
    """Differences from the baseline, in pairs."""
    if not part.apart:
        return
    names = [facts.metric, "caption_accuracy", "teacher_consistency", "recall", "diversity"]
    rows = [{"method": method, **row} for method, found in part.apart.items() for row in found.values()]
    columns = {"method": ("", "{}"), "steps": ("steps", "{}")}
    columns |= {name: METRICS[name].column for name in dict.fromkeys(names) if any(name in row for row in rows)}
    yield f"### Less {facts.cfg.baseline}, in pairs"
    yield """Both sample the same prompts from the same noise, seed by seed: what these do to both cancels, and ± is the
standard error of the difference."""
    yield format_table(rows, columns)


def verdict_lines(facts: ComparedFacts, part: BudgetResults) -> Iterator[str]:
    """What the table says at each number of steps."""
    said = []
    for one in part.verdicts:
        others = [name for name in one.alike if name != one.best]
        line = f"{counted(one.steps, 'step')}: best is {one.best}"
        if one.winner:
            line += f", the winner: {WINNER:g} standard errors or more from every other"
        elif others:
            line += f"; within {ALIKE:g} standard errors of it: {', '.join(others)}. No winner is named"
        else:
            line += (
                f"; nearest to it: {nearest(one)}. No winner is named, for which it takes {WINNER:g} standard errors"
            )
        said.append(f"- {line}.")
    yield "\n".join(said)


def nearest(one: BestOf) -> str:
    """The method that is the fewest errors from the best, and how many."""
    name = min(one.apart, key=lambda name: abs(one.apart[name][0]) / max(one.apart[name][1], 1e-12))
    value, error = one.apart[name]
    return f"{name}, {abs(value) / max(error, 1e-12):.1f} standard errors away"


def goals(facts: ComparedFacts, part: BudgetResults) -> Iterator[str]:
    """What was aimed at, reached or missed."""
    metric = facts.metric
    if METRICS[metric].better == "lower":
        yield monotone(facts, part)
    yield diverse(facts, part)
    yield as_good_as_the_teacher(facts, part)


def monotone(facts: ComparedFacts, part: BudgetResults) -> str:
    """One student for all numbers of steps, which is better with each more and nowhere behind a specialist."""
    metric, open_ended = facts.metric, [one for one in part.entries if len(one.chosen) > 1]
    reached, missed = [], []
    for entry in open_ended:
        rows = [entry.row(steps) for steps in sorted(entry.chosen)]
        falls = all(b[metric] <= a[metric] + a[f"{metric}_se"] for a, b in zip(rows, rows[1:], strict=False))
        behind = []
        for row in rows:
            there = [other.row(row["steps"]) for other in part.entries if row["steps"] in other.chosen]
            top = min(there, key=lambda one: one[metric])
            if row[metric] > top[metric] + row[f"{metric}_se"]:
                behind.append(str(row["steps"]))
        if falls and not behind:
            reached.append(entry.method)
        else:
            why = ["it does not fall with every doubling"] if not falls else []
            why += [f"behind the best at {', '.join(behind)}"] if behind else []
            missed.append(f"{entry.method} ({'; '.join(why)})")
    what = (
        f"One student whose {METRICS[metric].heading} falls with every doubling of steps within a standard error, and "
    )
    what += "is nowhere more than one behind the best: "
    return what + (f"reached by {', '.join(reached)}." if reached else f"missed: {', '.join(missed) or 'none to see'}.")


def diverse(facts: ComparedFacts, part: BudgetResults) -> str:
    """A one-step student as diverse as its teacher."""
    what = f"A one-step student with recall and diversity at {SHARE_OF_TEACHER:g} of the teacher's or more: "
    names = (*OF_DIVERSITY, TRUTH)
    there = [entry for entry in part.entries if 1 in entry.chosen and set(names) <= entry.row(1).keys()]
    if not there or not set(names) <= facts.teacher.keys():
        return what + "not measured."
    shares = {one.method: {name: one.row(1)[name] / facts.teacher[name] for name in names} for one in there}
    letter = {name: min(of[key] for key in OF_DIVERSITY) for name, of in shares.items()}
    reached = [name for name, share in letter.items() if share >= SHARE_OF_TEACHER]
    if true := [name for name in reached if shares[name][TRUTH] >= SHARE_OF_TEACHER]:
        return what + f"reached by {', '.join(true)}."
    name = max(reached or shares, key=lambda one: min(letter[one], shares[one][TRUTH]))
    said = ", ".join(f"{key} {value:.2f}" for key, value in shares[name].items())
    if reached:
        return what + f"reached by numbers alone: of {name} the variance is that of wrong images (shares: {said})."
    return what + f"missed; the nearest is {name} (shares: {said})."


def as_good_as_the_teacher(facts: ComparedFacts, part: BudgetResults) -> str:
    """Four steps as good as fifty, after a minute."""
    metric, steps = facts.metric, SHOWN_STEPS
    what = f"At {steps} steps within a standard error of the teacher's {facts.teacher['steps']} in {CPU_SECONDS:g} "
    what += "processor seconds of training: "
    there = [entry for entry in part.entries if steps in entry.chosen]
    if not there or METRICS[metric].better != "lower":
        return what + "not measured."
    limit = facts.teacher[metric] + facts.teacher.get(f"{metric}_se", 0.0)
    good = {one.method: part.minutes[one.method] * 60 for one in there if one.row(steps)[metric] <= limit}
    if quick := [name for name, seconds in good.items() if seconds <= CPU_SECONDS]:
        return what + f"reached by {', '.join(quick)}."
    if good:
        name = min(good, key=lambda one: good[one])
        return (
            what + f"missed; as good are {', '.join(good)}, of which {name} took the least, {good[name]:.0f} seconds."
        )
    return what + "missed; none is as good."


def draw(path: Path, facts: ComparedFacts, part: BudgetResults) -> None:
    """methods.png."""
    lines = {
        (facts.family(entry.method), entry.method): [entry.row(steps) for steps in sorted(entry.chosen)]
        for entry in part.entries
    }
    levels = {f"teacher, {counted(facts.teacher['steps'], 'step')}": facts.teacher.get(facts.metric)}
    levels |= {"real images": facts.real.get(facts.metric)}
    at = SHOWN_STEPS if SHOWN_STEPS in part.steps else part.steps[-1]
    draw_methods(path, lines, facts.metric, "teacher_consistency", at, levels)
