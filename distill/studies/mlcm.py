"""MLCM-LoRA beside LCM-LoRA and the teacher, on the toy world, with one budget of samples and several seeds:

distill study mlcm                 # about 40 CPU minutes; killed and started again, it resumes

Both learn from one store for as many steps of as many samples. The moving average is evaluated at the end, and for MLCM
after its first stage too, by both samplers. All sample the same prompts from the same noise: the report also has
differences between students, whose errors are less than two errors together.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distill.config.loading import checking, load
from distill.config.settings import ShowMLCMSettings, TrainSettings
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import make_times
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Comparison, ComparisonPlan, Row, Setting
from distill.evaluation.figures import GridRow, draw_grid, draw_lines
from distill.evaluation.report import all_columns, format_table
from distill.evaluation.toy import JudgeScorer
from distill.models.families.loading import load_teacher
from distill.models.folder import stored_tensors, weights_hash
from distill.models.lora import ADAPTER, load_lora
from distill.studies.seeds import difference, over_seeds
from distill.toy.judge import load_judge
from distill.toy.teacher import teacher_folder
from distill.training.export import export_run
from distill.training.run import finished
from distill.training.tracking import setup_logging

EXPERIMENT = "mlcm_toy"
LCM = ["method=lcm", "method.skip=200", "~method.stages", "~method.guidance"]
METRICS = ("caption_accuracy", "frechet", "sharpness", "teacher_consistency")
PAIRED = ("caption_accuracy", "frechet", "teacher_consistency")
SETTING = ("steps", "guidance", "nfe", "sampler", "spacing", "n")
DIFFERENCES = (("MLCM, chain", "LCM-LoRA"), ("MLCM, re-noising", "LCM-LoRA"))
GRID_COLUMNS = 10


@dataclass(frozen=True)
class ComparedStudent:
    """One line of the table: a method's runs at a checkpoint, and how they are sampled from."""

    title: str
    method: str
    step: int
    sampler: str
    spacing: str

    def setting(self, steps: int) -> Setting:
        return Setting("student", self.sampler, steps, 1.0, self.spacing)


def main(cfg: ShowMLCMSettings) -> None:
    setup_logging()
    output = Path(cfg.output_dir)
    overrides = [*cfg.overrides, f"data.store={output / 'store'}"]
    settings = load("train", TrainSettings, [f"experiment={EXPERIMENT}", *overrides])
    with checking("steps: "):
        for steps in cfg.steps:
            make_times("milestones", NoiseSchedule.scaled_linear().T, steps)
    launch("trajectories", *overrides)
    runs = {(name, seed): output / f"{name}-{seed}" for name in ("mlcm", "lcm") for seed in cfg.seeds}
    for (name, seed), run in runs.items():
        if not finished(run, settings.max_train_steps):
            launch("train", *overrides, *(LCM if name == "lcm" else []), f"seed={seed}", f"output_dir={run}")

    border, end = settings.method["stages"][0]["iterations"], settings.max_train_steps
    students = [
        ComparedStudent("LCM-LoRA", "lcm", end, "lcm", "lcm"),
        ComparedStudent("MLCM, stage 1, chain", "mlcm", border, "ddim", "milestones"),
        ComparedStudent("MLCM, stage 1, re-noising", "mlcm", border, "lcm", "milestones"),
        ComparedStudent("MLCM, chain", "mlcm", end, "ddim", "milestones"),
        ComparedStudent("MLCM, re-noising", "mlcm", end, "lcm", "milestones"),
    ]
    guidance = settings.data.guidance
    assert isinstance(guidance, float)
    plan = ComparisonPlan(
        guidance, cfg.n, cfg.tuning_n, tuple(cfg.steps), tuple(cfg.guidances), batch_size=cfg.batch_size
    )
    scorer = JudgeScorer(load_judge())
    comparisons = {
        (student.method, student.step, seed): comparison_of(
            output, runs[student.method, seed], student.step, plan, scorer
        )
        for student in students
        for seed in cfg.seeds
    }
    rows = table(students, comparisons, cfg)
    write(output, cfg, rows, differences(students, comparisons, scorer, cfg))
    picture(output / "grid.png", cfg, students, comparisons)
    print(f"report: {output}/report.md, with grid.png and curves.png")


def launch(name: str, *overrides: str) -> None:
    """Runs a command, which resumes where it was."""
    command = [sys.executable, "-m", "distill", name, f"experiment={EXPERIMENT}", *overrides]
    subprocess.run(command, check=True)


def comparison_of(output: Path, run: Path, step: int, plan: ComparisonPlan, scorer: JudgeScorer) -> Comparison:
    """The exported student of a run's checkpoint beside the teacher; all share what is known of the teacher."""
    lora = output / "exports" / f"{run.name}-{step}"
    if not lora.exists():
        export_run(run, lora, step, formats=["diffusers"])
    teacher = load_teacher(teacher_folder(), parts=("network", "text", "vae"))
    denoiser = teacher.denoiser()
    load_lora(teacher.network, lora)
    return Comparison(
        teacher=teacher,
        denoisers={"teacher": denoiser, "student": replace(denoiser, adapter=ADAPTER)},
        hashes={
            "teacher": teacher.teacher_hash,
            "student": weights_hash(stored_tensors([lora / "pytorch_lora_weights.safetensors"])),
        },
        scorer=scorer,
        plan=plan,
        cache=Cache(output / "evaluation"),
    )


Comparisons = dict[tuple[str, int, int], Comparison]


def table(students: list[ComparedStudent], comparisons: Comparisons, cfg: ShowMLCMSettings) -> list[Row]:
    """The teacher's rows, then every student's at every number of steps, over seeds."""
    one = next(iter(comparisons.values()))
    tuned = one.tune()
    rows = [{"title": "teacher", **one.row(one.plan.reference())}]
    for steps in cfg.steps:
        rows.append({"title": "teacher, best tuned", **one.row(tuned[steps])})
        for student in students:
            found = [comparisons[student.method, student.step, s].row(student.setting(steps)) for s in cfg.seeds]
            shared = {key: found[0][key] for key in SETTING}
            rows.append({"title": student.title, **shared, **over_seeds(found, METRICS)})
    return rows


def differences(
    students: list[ComparedStudent], comparisons: Comparisons, scorer: JudgeScorer, cfg: ShowMLCMSettings
) -> list[Row]:
    """One student's metrics less another's of the same seed, at all numbers of steps, with the differences' errors."""
    named = {student.title: student for student in students}

    def measured(title: str, steps: int, seed: int) -> dict[str, Tensor]:
        student = named[title]
        return comparisons[student.method, student.step, seed].measured(student.setting(steps))

    def apart(a: str, b: str, steps: int, seed: int) -> Row:
        return difference(scorer, measured(a, steps, seed), measured(b, steps, seed))

    return [
        {
            "title": f"{a} − {b}",
            "steps": steps,
            **over_seeds([apart(a, b, steps, seed) for seed in cfg.seeds], PAIRED),
        }
        for a, b in DIFFERENCES
        for steps in cfg.steps
    ]


def write(output: Path, cfg: ShowMLCMSettings, rows: list[Row], apart: list[Row]) -> None:
    title = {"title": ("", "{}")}
    text = format_table(rows, title | {k: all_columns()[k] for k in ("steps", "nfe", *METRICS)})
    paired = format_table(apart, title | {k: all_columns()[k] for k in ("steps", *PAIRED)})
    print(f"{text}\n\n{paired}")
    about = f"""n = {cfg.n} pictures per row and seed, {len(cfg.seeds)} training seeds. ± is the standard error of the
mean, over pictures or over seeds, whichever is greater. Teacher consistency: mean squared difference of the final
latents from the teacher's at 50 steps, from the same noise. The tuned teacher's settings were chosen on other
pictures."""
    of_differences = """Of two students that sample the same prompts from the same noise: what these do to both cancels,
and ± is the standard error of the difference."""
    lines: dict[str, list[Row]] = {}
    for row in rows[1:]:
        lines.setdefault(row["title"], []).append(row)
    draw_lines(output / "curves.png", lines, "steps", PAIRED, (f"teacher, {rows[0]['steps']} steps", rows[0]))
    parts = ["# MLCM-LoRA beside LCM-LoRA", about, text, "## Differences", of_differences, paired]
    parts += ["## Curves", "![curves](curves.png)", "## Pictures", "![pictures](grid.png)"]
    (output / "report.md").write_text("\n\n".join(parts) + "\n")
    (output / "report.json").write_text(json.dumps({"rows": rows, "differences": apart}, indent=1) + "\n")


@torch.no_grad()
def picture(path: Path, cfg: ShowMLCMSettings, students: list[ComparedStudent], comparisons: Comparisons) -> None:
    places, seed = range(GRID_COLUMNS), cfg.seeds[0]
    one = next(iter(comparisons.values()))
    groups = [[GridRow("teacher, 50 steps", "", one.pictures(one.plan.reference(), places))]]
    for steps in cfg.steps:
        group = []
        for student in students:
            comparison = comparisons[student.method, student.step, seed]
            pictures = comparison.pictures(student.setting(steps), places)
            group.append(GridRow(student.title, f"{steps} steps", pictures))
        groups.append(group)
    draw_grid(path, one.scorer.prompts("report", cfg.n)[:GRID_COLUMNS], groups)
