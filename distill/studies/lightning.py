"""Adversarial training beside mean squared error on the toy world, in 8, 4, 2 steps and 1, with several seeds:

distill study lightning            # about 200 CPU minutes; killed and started again, it resumes

A chain (configs/chain/lightning_compare.yaml) makes students by mean squared error until more of it gains little. Each
of them is continued, with each seed, in two or three ways that take about as long: more of the same, or adversarial
training. All sample the same prompts from the same noise, so that how far two of them are apart is known better than
how good each is; the report says both.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.config.settings import ShowSettings
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Comparison, ComparisonPlan, Row, Setting
from distill.evaluation.figures import GridRow, draw_grid
from distill.evaluation.report import all_columns, format_table
from distill.evaluation.toy import JudgeScorer
from distill.models.exported import open_export
from distill.models.families.loading import load_teacher
from distill.models.student import FullStudent
from distill.studies.seeds import difference, over_seeds
from distill.toy.judge import load_judge
from distill.toy.teacher import teacher_folder
from distill.training.tracking import setup_logging

CHAIN = "lightning_compare"
METRICS = ("caption_accuracy", "frechet", "sharpness", "diversity", "teacher_consistency")
PAIRED = ("caption_accuracy", "frechet", "sharpness", "teacher_consistency")
SETTING = ("steps", "guidance", "nfe", "sampler", "spacing", "n")
TITLES = {"m": "MSE, where they go on from", "e": "MSE, more", "v": "adversarial", "c": "adversarial, conditional"}
GRID_COLUMNS = 10


@dataclass(frozen=True)
class TrainedLink:
    """A link of the chain for each seed, named by how it was trained and its number of steps; "m" has one in all."""

    kind: str
    steps: int

    def link(self, seed: int) -> str:
        return f"{self.kind}{self.steps}" + (f"-{seed}" if self.kind != "m" else "")

    @property
    def setting(self) -> Setting:
        return Setting("student", "ddim", self.steps)


STUDENTS = [TrainedLink(kind, steps) for steps in (8, 4, 2, 1) for kind in "mevc" if kind != "c" or steps == 1]
Comparisons = dict[tuple[TrainedLink, int], Comparison]


def main(cfg: ShowSettings) -> None:
    setup_logging()
    output = Path(cfg.output_dir)
    run_chain(output, cfg.overrides)
    plan = ComparisonPlan(2.0, cfg.n, cfg.tuning_n, (8, 4, 2, 1), tuple(cfg.guidances), batch_size=cfg.batch_size)
    scorer = JudgeScorer(load_judge())
    comparisons = {(s, seed): comparison_of(output, s, seed, plan, scorer) for s in STUDENTS for seed in cfg.seeds}
    rows, apart = table(comparisons, cfg), differences(comparisons, scorer, cfg)
    write(output, cfg, rows, apart)
    picture(output / "grid.png", comparisons, cfg)
    print(f"report: {output}/report.md, with grid.png")


def run_chain(output: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "distill", "chain", f"chain={CHAIN}", f"output_dir={output / 'links'}"]
    command += ["overrides=[" + ",".join(f"'{override}'" for override in overrides) + "]"]
    if code := subprocess.run(command).returncode:
        sys.exit(f"error: the chain ended with exit code {code}: {shlex.join(command)}")


def comparison_of(
    output: Path, student: TrainedLink, seed: int, plan: ComparisonPlan, scorer: JudgeScorer
) -> Comparison:
    """The export of a link beside the teacher; all share what is known of the teacher."""
    teacher = load_teacher(teacher_folder(), parts=("network", "text", "vae"))
    export = open_export(output / "links" / student.link(seed) / "export")
    return Comparison(
        teacher=teacher,
        denoisers=FullStudent(guidance_embedding_dim=None).networks(teacher, start=export),
        hashes={"teacher": teacher.teacher_hash, "student": export.weights_hash},
        scorer=scorer,
        plan=plan,
        cache=Cache(output / "evaluation"),
    )


def table(comparisons: Comparisons, cfg: ShowSettings) -> list[Row]:
    """The teacher's rows, then every student's, over seeds."""
    one = next(iter(comparisons.values()))
    tuned = one.tune()
    rows = [{"title": "teacher", **one.row(one.plan.reference())}]
    for student in STUDENTS:
        if student.kind == "m":
            rows.append({"title": "teacher, best tuned", **one.row(tuned[student.steps])})
        found = [comparisons[student, seed].row(student.setting) for seed in cfg.seeds]
        shared = {key: found[0][key] for key in SETTING}
        rows.append({"title": TITLES[student.kind], **shared, **over_seeds(found, METRICS)})
    return rows


def differences(comparisons: Comparisons, scorer: JudgeScorer, cfg: ShowSettings) -> list[Row]:
    """The metrics of adversarial training less those of as much time of mean squared error; of the discriminators."""
    pairs = [(s, TrainedLink("e", s.steps)) for s in STUDENTS if s.kind in "vc"]
    pairs += [(TrainedLink("c", 1), TrainedLink("v", 1))]

    def apart(a: TrainedLink, b: TrainedLink, seed: int) -> Row:
        return difference(scorer, *(comparisons[s, seed].measured(s.setting) for s in (a, b)))

    return [
        {
            "title": f"{TITLES[a.kind]} − {TITLES[b.kind]}",
            "steps": a.steps,
            **over_seeds([apart(a, b, seed) for seed in cfg.seeds], PAIRED),
        }
        for a, b in pairs
    ]


def write(output: Path, cfg: ShowSettings, rows: list[Row], apart: list[Row]) -> None:
    title = {"title": ("", "{}")}
    columns = all_columns() | {"sharpness": ("sharpness", "{:.3f}")}
    text = format_table(rows, title | {k: columns[k] for k in ("steps", "nfe", *METRICS)})
    paired = format_table(apart, title | {k: columns[k] for k in ("steps", *PAIRED)})
    print(f"{text}\n\n{paired}")
    about = f"""n = {cfg.n} pictures per row and seed. The seeds, {len(cfg.seeds)}, are those of the training that is
compared; of one number of steps all begin with one student, of 2 steps a LoRA of rank 1. ± is the standard error of the
mean, over pictures or over seeds, whichever is greater. Sharpness: high-frequency energy relative to real pictures.
Diversity: variance of features within a caption, relative to real pictures. Teacher consistency: mean squared
difference of the final latents from the teacher's at 50 steps, from the same noise."""
    of_differences = """Of two students that sample the same prompts from the same noise: what these do to both cancels,
and ± is the standard error of the difference."""
    parts = ["# Adversarial training beside mean squared error", about, text, "## Differences", of_differences, paired]
    parts += ["## Pictures", "![pictures](grid.png)"]
    (output / "report.md").write_text("\n\n".join(parts) + "\n")
    (output / "report.json").write_text(json.dumps({"rows": rows, "differences": apart}, indent=1) + "\n")


@torch.no_grad()
def picture(path: Path, comparisons: Comparisons, cfg: ShowSettings) -> None:
    places, one = range(GRID_COLUMNS), next(iter(comparisons.values()))
    groups = [[GridRow("teacher, 50 steps", "", one.pictures(one.plan.reference(), places))]]
    for steps in (8, 4, 2, 1):
        students = [student for student in STUDENTS if student.steps == steps and student.kind != "m"]
        pictures = [comparisons[student, cfg.seeds[0]].pictures(student.setting, places) for student in students]
        kinds = [(TITLES[student.kind], f"{steps} steps" if steps > 1 else "1 step") for student in students]
        groups.append([GridRow(*kind, images) for kind, images in zip(kinds, pictures, strict=True)])
    draw_grid(path, one.scorer.prompts("report", cfg.n)[:GRID_COLUMNS], groups)
