"""MLCM-LoRA beside LCM-LoRA and the teacher, on the toy world, with one budget of samples and several seeds:

python scripts/show_mlcm.py                 # about 40 CPU minutes; killed and started again, it goes on

Both learn from one store for as many steps of as many samples. What is judged is the moving average at the end, and for
MLCM after its first stage too, by both samplers.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from distill.evaluation.cache import Cache
from distill.evaluation.compare import Comparison, Plan, Row, Setting
from distill.evaluation.figures import GridRow, draw_grid
from distill.evaluation.report import COLUMNS, format_table
from distill.evaluation.toy import JudgeScorer
from distill.models.families import load_teacher
from distill.models.folder import stored_tensors, weights_hash
from distill.models.lora import load_lora
from distill.toy.judge import load_judge
from distill.toy.teacher import teacher_folder
from distill.training.config import ShowMLCMSettings, TrainSettings, load, run_script
from distill.training.export import export_run
from distill.training.run import finished
from distill.training.tracking import setup_logging

EXPERIMENT = "mlcm_toy"
LCM = ["method=lcm", "method.skip=200", "~method.stages", "~method.guidance"]
METRICS = ("caption_accuracy", "frechet", "sharpness", "teacher_consistency")
GRID_COLUMNS = 10


@dataclass(frozen=True)
class Student:
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
    launch("make_trajectories", *overrides)
    runs = {(name, seed): output / f"{name}-{seed}" for name in ("mlcm", "lcm") for seed in cfg.seeds}
    for (name, seed), run in runs.items():
        if not finished(run, settings.max_train_steps):
            launch("train", *overrides, *(LCM if name == "lcm" else []), f"seed={seed}", f"output_dir={run}")

    border, end = settings.method["stages"][0]["iterations"], settings.max_train_steps
    students = [
        Student("LCM-LoRA", "lcm", end, "lcm", "lcm"),
        Student("MLCM, stage 1, chain", "mlcm", border, "ddim", "milestones"),
        Student("MLCM, stage 1, re-noising", "mlcm", border, "lcm", "milestones"),
        Student("MLCM, chain", "mlcm", end, "ddim", "milestones"),
        Student("MLCM, re-noising", "mlcm", end, "lcm", "milestones"),
    ]
    guidance = settings.data.guidance
    assert isinstance(guidance, float)
    plan = Plan(guidance, cfg.n, cfg.tuning_n, tuple(cfg.steps), tuple(cfg.guidances), batch_size=cfg.batch_size)
    comparisons = {
        (student.method, student.step, seed): comparison_of(output, runs[student.method, seed], student.step, plan)
        for student in students
        for seed in cfg.seeds
    }
    rows = table(students, comparisons, cfg)
    write(output, cfg, rows, students, comparisons)


def launch(script: str, *overrides: str) -> None:
    """Runs one of the scripts, which goes on where it was."""
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), f"experiment={EXPERIMENT}", *overrides]
    subprocess.run(command, check=True)


def comparison_of(output: Path, run: Path, step: int, plan: Plan) -> Comparison:
    """The exported student of a run's checkpoint beside the teacher; all share what is known of the teacher."""
    lora = output / "exports" / f"{run.name}-{step}"
    if not lora.exists():
        export_run(run, lora, step, formats=["diffusers"])
    teacher = load_teacher(teacher_folder(), parts=("unet", "text", "vae"))
    denoiser = teacher.denoiser()
    load_lora(teacher.unet, lora)
    return Comparison(
        teacher=teacher,
        denoisers={"teacher": denoiser, "student": replace(denoiser, adapters=True)},
        hashes={
            "teacher": teacher.teacher_hash,
            "student": weights_hash(stored_tensors([lora / "pytorch_lora_weights.safetensors"])),
        },
        scorer=JudgeScorer(load_judge()),
        plan=plan,
        cache=Cache(output / "evaluation"),
    )


Comparisons = dict[tuple[str, int, int], Comparison]


def table(students: list[Student], comparisons: Comparisons, cfg: ShowMLCMSettings) -> list[Row]:
    """The teacher's rows, then every student's at every number of steps, over seeds."""
    one = next(iter(comparisons.values()))
    tuned = one.tune()
    rows = [{"title": "teacher", **one.row(one.plan.reference())}]
    for steps in cfg.steps:
        rows.append({"title": "teacher, best tuned", **one.row(tuned[steps])})
        for student in students:
            found = [comparisons[student.method, student.step, s].row(student.setting(steps)) for s in cfg.seeds]
            rows.append({"title": student.title, **over_seeds(found)})
    return rows


def over_seeds(rows: list[Row]) -> Row:
    """The mean of several seeds' rows; the standard error is of that mean, over pictures and over seeds together."""
    together: dict[str, Any] = {key: rows[0][key] for key in ("steps", "guidance", "nfe", "sampler", "spacing", "n")}
    for name in METRICS:
        values = [row[name] for row in rows]
        together[name] = mean(values)
        if f"{name}_se" in rows[0]:
            pictures = math.sqrt(sum(row[f"{name}_se"] ** 2 for row in rows)) / len(rows)
            seeds = stdev(values) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
            together[f"{name}_se"] = max(pictures, seeds)
    return together


def write(
    output: Path, cfg: ShowMLCMSettings, rows: list[Row], students: list[Student], comparisons: Comparisons
) -> None:
    columns = {"title": ("", "{}")} | {k: COLUMNS[k] for k in ("steps", "nfe", *METRICS)}
    text = format_table(rows, columns)
    print(text)
    about = f"""n = {cfg.n} pictures a row and seed, {len(cfg.seeds)} training seeds. ± is the standard error of the
mean, over pictures or over seeds, whichever is greater. Teacher consistency: mean squared difference of the final
latents from the teacher's at 50 steps, from the same noise. The tuned teacher's settings were chosen on other
pictures."""
    picture(output / "grid.png", cfg, students, comparisons)
    (output / "report.md").write_text(f"# MLCM-LoRA beside LCM-LoRA\n\n{about}\n\n{text}\n\n![pictures](grid.png)\n")
    (output / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"report: {output}/report.md, pictures: {output}/grid.png")


@torch.no_grad()
def picture(path: Path, cfg: ShowMLCMSettings, students: list[Student], comparisons: Comparisons) -> None:
    places, seed = range(GRID_COLUMNS), cfg.seeds[0]
    one = next(iter(comparisons.values()))
    groups = [[GridRow("teacher, 50 steps", "", one.pictures(one.plan.reference(), places))]]
    for steps in cfg.steps:
        group = []
        for student in students:
            comparison = comparisons[student.method, student.step, seed]
            drawn = comparison.pictures(student.setting(steps), places)
            group.append(GridRow(student.title, f"{steps} steps", drawn))
        groups.append(group)
    draw_grid(path, one.scorer.prompts("report", cfg.n)[:GRID_COLUMNS], groups)


if __name__ == "__main__":
    run_script(main, "show_mlcm", ShowMLCMSettings)
