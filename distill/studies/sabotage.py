"""Runs that are set wrong: is the checkpoint that they choose without labels the one that is best?

distill study sabotage                 # about an hour on one CPU core; killed and started again, it resumes
distill study sabotage only=[lcm_rate,dmd2_dead]

Each run trains shortly on the toy, with `best.choose=true` and, so that its whole course is seen, without stopping;
when `best.stop` would have ended it is read from its metrics. Afterwards the toy's classifier, which no run knows of,
judges all checkpoints. A run ends well if what it chose is within one standard error of the best of them, or if an
alarm was raised.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.commands import trajectories
from distill.config.loading import ConfigError, check_components, load, suggest
from distill.config.settings import SabotageCaseSettings, SabotageSettings, TrainSettings
from distill.data.heldout import within
from distill.data.progress import Progress
from distill.evaluation.compare import FIRST_SEED, Setting, generate
from distill.evaluation.report import format_table
from distill.evaluation.students import load_student
from distill.evaluation.toy import JudgeScorer
from distill.methods.base import MEASURES
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.studies.compare_runs import FOLDER, SHARED, command_line
from distill.toy.judge import load_judge
from distill.toy.teacher import teacher_folder
from distill.training.assembly import train_run
from distill.training.best import STEP, WAITED
from distill.training.checkpoint import Checkpoints
from distill.training.ends import UNHEALTHY
from distill.training.export import export_run
from distill.training.run import checkpoints_of, finished
from distill.training.tracking import cpu_seconds_of, read_metrics, setup_logging

log = logging.getLogger("distill")
FOREVER = 10**6
Row = dict[str, Any]


def main(cfg: SabotageSettings) -> None:
    setup_logging()
    if unknown := [name for name in cfg.only or () if name not in cfg.cases]:
        raise ConfigError(
            f"only: no case {unknown[0]}{suggest(unknown[0], list(cfg.cases))}; allowed: {', '.join(cfg.cases)}"
        )
    study = Sabotage(cfg)
    study.write_stores()
    names = cfg.only or list(cfg.cases)
    progress, rows = Progress("cases", len(names), "cases"), []
    for name in names:
        rows.append(study.row(name))
        log.info("%s: %s", name, in_words(rows[-1]))
        progress.update(1)
    write(Path(cfg.output_dir), cfg, rows)
    print((Path(cfg.output_dir) / "report.md").read_text())


@dataclass(frozen=True)
class Sabotage:
    """The runs, and what judges them."""

    cfg: SabotageSettings

    @property
    def output(self) -> Path:
        return Path(self.cfg.output_dir)

    @property
    def store(self) -> str:
        return self.cfg.store or str(self.output / "store")

    def teacher(self) -> Teacher:
        """A teacher of its own for each student, whose LoRA is then on it."""
        return load_teacher(str(teacher_folder()), parts=("network", "text", "vae"))

    @cached_property
    def scorer(self) -> JudgeScorer:
        return JudgeScorer(load_judge())

    def write_stores(self) -> None:
        """The usual store, unless one is given, and the small one; both are measured on the held-out solves of one."""
        self._write(self.store, []) if self.cfg.store is None else None
        self._write(str(self.output / "small"), [f"data.num_samples={self.cfg.small_store}", "data.heldout_samples=0"])

    def _write(self, store: str, more: Sequence[str]) -> None:
        given = [f"experiment={SHARED}", f"data.store={store}", *more]
        with command_line("trajectories", given):
            trajectories.main(check_components(load("train", TrainSettings, given)))

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, name: str, given: Sequence[str], steps: int) -> int:
        """Trains a run to its end, killed or not; returns its exit code."""
        folder = self.output / "runs" / name
        given = [*given, "engine=single", f"max_train_steps={steps}", f"seed={self.cfg.seed}", f"output_dir={folder}"]
        if finished(folder, steps):
            return 0
        with command_line("train", given):
            return train_run(check_components(load("train", TrainSettings, given)))

    def start(self, method: str) -> Path:
        """The export of the student that others begin from."""
        export = self.output / "exports" / method
        if not export.exists():
            code = self.train(f"start-{method}", [*self._shared(method, self.store)], self.cfg.start_steps)
            if code:
                raise SystemExit(code)
            export_run(self.output / "runs" / f"start-{method}", export, formats=["diffusers"])
        return export

    def _shared(self, method: str, store: str) -> list[str]:
        return [f"experiment={FOLDER}/{method}", f"data.store={store}", *self.cfg.overrides]

    def overrides(self, case: SabotageCaseSettings, steps: int) -> list[str]:
        """What a case's run is given beside its length."""
        cfg = self.cfg
        given = self._shared(case.method, str(self.output / "small") if case.small else self.store)
        if case.small:
            given.append(f"data.heldout={within(self.store)}")
        every = cfg.max_train_steps // cfg.validations
        given += [f"validation_steps={every}", f"checkpointing_steps={every}", "checkpoints_total_limit=null"]
        given += ["validation_prompts=[red stripes,blue rings,green dots,purple checks]", "log_every=2"]
        given += ["validation_diversity_seeds=4", "health.logged_steps=10"]
        given += ["best.choose=true", "best.stop=true", f"best.patience={FOREVER}"]
        given += [] if case.start is None else [f"start={self.start(case.start)}"]
        return given + case.overrides

    # ---- judging -----------------------------------------------------------------------------------------------------

    def row(self, name: str) -> Row:
        """What came of a case; kept in its run's folder."""
        case, kept = self.cfg.cases[name], self.output / "results" / f"{name}.json"
        if kept.is_file():
            return dict(json.loads(kept.read_text()))
        steps = case.length * self.cfg.max_train_steps
        code = self.train(name, self.overrides(case, steps), steps)
        if code not in (0, UNHEALTHY):
            raise SystemExit(code)
        row = {"case": name, "what": case.what, "method": case.method, "code": code, **self.judged(name)}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(row, indent=1) + "\n")
        return row

    def judged(self, name: str) -> Row:
        """What the classifier finds of each checkpoint of a run, beside what the run measured itself."""
        folder = self.output / "runs" / name
        there = sorted(step for step, _ in Checkpoints(checkpoints_of(folder)).found())
        metrics, measured = read_metrics(folder, FOREVER), {step: self.measured(folder, step) for step in there}
        pictures = {step: found for step, found in measured.items() if found is not None}
        rows: list[Row] = [{"step": step, **self.scorer.summarise(found, "report")} for step, found in pictures.items()]
        for row in rows:
            row |= {key: one[key] for one in metrics if one["step"] == row["step"] for key in MEASURES if key in one}
        chosen = next((int(one[STEP]) for one in reversed(metrics) if STEP in one), None)
        best = int(min(rows, key=lambda row: row["frechet"])["step"]) if rows else None
        apart = {}
        if chosen in pictures and best is not None:
            apart = self.scorer.difference(pictures[chosen], pictures[best], "report")
        alarms = {key.removeprefix("alarm/"): 0 for one in metrics for key in one if key.startswith("alarm/")}
        raised = {key: [int(one["step"]) for one in metrics if one.get(f"alarm/{key}")] for key in alarms}
        waited = [int(one["step"]) for one in metrics if one.get(WAITED, 0) >= self.cfg.patience]
        return {
            "checkpoints": rows,
            "chosen": chosen,
            "best": best,
            "stops": waited[0] if waited else None,
            "apart": {key: apart[key] for key in ("frechet", "frechet_se") if key in apart},
            "alarms": {key: steps[0] for key, steps in raised.items() if steps},
            "skipped": sum(1 for one in metrics for key in one if key.endswith("skipped") and one[key]),
            "minutes": cpu_seconds_of(metrics) / 60,
        }

    def measured(self, run: Path, step: int) -> Mapping[str, Tensor] | None:
        """What the classifier measures of the samples of a checkpoint; None of one whose samples are not finite."""
        with tempfile.TemporaryDirectory() as scratch:
            export = export_run(run, Path(scratch) / "student", checkpoint=step, formats=["diffusers"])
            teacher = self.teacher()
            student = load_student(export, teacher)
        how, n = student.sampling, self.cfg.n
        setting = Setting("student", how.sampler, how.steps or self.cfg.steps, 1.0, how.spacing, gamma=how.gamma)
        seeds, prompts = [FIRST_SEED["report"] + i for i in range(n)], self.scorer.prompts("report", n)
        found: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for part in generate(teacher, student.denoiser, prompts, seeds, setting, self.cfg.batch_size):
                if not part.images.isfinite().all():
                    return None
                for key, values in self.scorer.measure(part.images, part.prompts).items():
                    found.setdefault(key, []).append(values)
        return {key: torch.cat(values) for key, values in found.items()}


def at(row: Row, step: int | None) -> Row | None:
    """The checkpoint of a step."""
    return next((one for one in row["checkpoints"] if one["step"] == step), None)


def within_error(row: Row) -> bool:
    """Whether what was chosen is within one standard error of the best."""
    chosen, best = at(row, row["chosen"]), at(row, row["best"])
    return chosen is not None and best is not None and chosen["frechet"] <= best["frechet"] + best["frechet_se"]


def in_words(row: Row) -> str:
    """What came of a case."""
    if within_error(row):
        return "ends at its best"
    said = " and ".join(f"{name} from step {step}" for name, step in row["alarms"].items())
    if row["code"] == UNHEALTHY:
        said = "the run ended itself with exit code 3"
    return f"missed; alarm {said}" if said else "missed"


COLUMNS = {
    "method": ("method", "{}"),
    "what": ("what is wrong", "{}"),
    "chosen": ("chosen", "{}"),
    "best": ("best", "{}"),
    "last": ("last", "{}"),
    "stops": ("would stop", "{}"),
    "of_chosen": ("Fréchet distance of the chosen", "{}"),
    "of_best": ("of the best", "{}"),
    "of_last": ("of the last", "{}"),
    "alarms": ("alarms", "{}"),
    "words": ("", "{}"),
}


def write(output: Path, cfg: SabotageSettings, rows: Sequence[Row]) -> None:
    """report.md and report.json."""
    shown = [shown_row(row) for row in rows]
    good = sum(within_error(row) for row in rows)
    warned = sum(not within_error(row) and in_words(row) != "missed" for row in rows)
    minutes = sum(row["minutes"] for row in rows)
    text = f"""Of {len(rows)} runs {good} end within one standard error of their best checkpoint, {warned} of the others
say by an alarm what is wrong, and {len(rows) - good - warned} do neither. n = {cfg.n} images of each checkpoint, seed
{cfg.seed}; training took {minutes:.0f} minutes of one core. Steps are those of checkpoints; `would stop` is where
`best.stop` with `patience={cfg.patience}` would have ended the run."""
    report = "\n\n".join(["# Runs that are set wrong", text, format_table(shown, COLUMNS)]) + "\n"
    (output / "report.md").write_text(report)
    (output / "report.json").write_text(json.dumps(rows, indent=1) + "\n")


def shown_row(row: Row) -> Row:
    """A case as the table has it."""
    last = row["checkpoints"][-1] if row["checkpoints"] else None
    values = {"of_chosen": at(row, row["chosen"]), "of_best": at(row, row["best"]), "of_last": last}
    written = {key: f"{one['frechet']:.3f} ± {one['frechet_se']:.3f}" if one else "—" for key, one in values.items()}
    alarms = ", ".join(f"{name} from {step}" for name, step in row["alarms"].items()) or "—"
    shared = {key: row[key] if row[key] is not None else "—" for key in ("method", "what", "chosen", "best", "stops")}
    return {**shared, "last": last["step"] if last else "—", **written, "alarms": alarms, "words": in_words(row)}
