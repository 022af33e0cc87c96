"""How good a student becomes with the number of teacher solves that it learns from, on the toy world:

distill study solves               # about an hour on one CPU core; killed and started again, it resumes

All students take the same steps; the store of the next one has more solves and begins with those of the one before.
The second teacher, "night", is the toy's own after a fine-tune on dark backgrounds, as `distill study plug_in` makes
it. A student is evaluated on noise that no solve of its store starts from, beside the teacher at 50 steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill.config.loading import load
from distill.config.settings import PlugInSettings, SolvesSettings, TrainSettings
from distill.data.words import counted
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Comparison, ComparisonPlan, Row, Setting
from distill.evaluation.figures import draw_lines
from distill.evaluation.report import all_columns, format_table
from distill.evaluation.toy import JudgeScorer
from distill.models.families.loading import load_teacher
from distill.models.folder import stored_tensors, weights_hash
from distill.models.lora import ADAPTER, load_lora
from distill.studies.plug_in import train_fine_tune, trained
from distill.studies.seeds import over_seeds
from distill.toy.judge import load_judge
from distill.toy.styles import NIGHT
from distill.toy.teacher import teacher_folder
from distill.toy.world import render
from distill.training.export import export_run
from distill.training.run import finished
from distill.training.tracking import setup_logging

EXPERIMENT = "quickstart"
METRICS = ("caption_accuracy", "frechet", "teacher_consistency")
SHARD = 32  # samples: the numbers of solves are mostly its multiples, so that a store that grows rewrites no shard
WORLDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"toy": render, "night": NIGHT.render}


def main(cfg: SolvesSettings) -> None:
    setup_logging()
    output = Path(cfg.output_dir)
    rows: dict[str, list[Row]] = {name: rows_of(name, cfg, output / name) for name in cfg.teachers}
    write(output, cfg, rows)
    print(f"report: {output}/report.md, with a picture of each teacher's curves")


def teacher_of(name: str, cfg: SolvesSettings, output: Path) -> Path:
    """The pipeline of a teacher, fine-tuned first if need be."""
    if name == "toy":
        return teacher_folder()
    tuning = load("plug_in", PlugInSettings, ["lora=none", f"output_dir={output}", *cfg.fine_tune])  # no student yet
    facts = {"pictures": tuning.pictures, "steps": tuning.fine_tune_steps, "seed": tuning.seed}
    output.mkdir(parents=True, exist_ok=True)
    return trained(output / "teacher", facts, lambda folder: train_fine_tune(tuning, folder))


def rows_of(name: str, cfg: SolvesSettings, output: Path) -> list[Row]:
    """The teacher's row, then one for each number of solves and of steps, over seeds."""
    pipeline = teacher_of(name, cfg, output)
    # The store grows from one number to the next, and a run resumes with what it began with.
    given = [*cfg.overrides, f"model.pretrained_model_name_or_path={pipeline}", f"data.store={output / 'store'}"]
    given += [f"data.samples_per_shard={SHARD}", "engine=single", "validation_prompts=null"]
    settings = load("train", TrainSettings, [f"experiment={EXPERIMENT}", *given])
    guidance = settings.data.guidance
    assert isinstance(guidance, float)
    scorer = JudgeScorer(load_judge(), WORLDS[name])
    plan = ComparisonPlan(guidance, cfg.n, 0, tuple(cfg.steps), (guidance,), batch_size=cfg.batch_size)
    rows: list[Row] = []
    for solves in sorted(cfg.solves):
        runs = [output / f"{solves}-{seed}" for seed in cfg.seeds]
        if not all(finished(run, settings.max_train_steps) for run in runs):
            launch("trajectories", *given, f"data.num_samples={solves}")
        for run, seed in zip(runs, cfg.seeds, strict=True):
            if not finished(run, settings.max_train_steps):
                launch("train", *given, f"seed={seed}", f"output_dir={run}")
        found = [comparison_of(pipeline, output, run, settings.max_train_steps, plan, scorer) for run in runs]
        rows = rows or [{"title": "teacher", **found[0].row(plan.reference())}]
        for steps in cfg.steps:
            there = [one.row(Setting("student", "lcm", steps, 1.0, "lcm")) for one in found]
            title = f"{solves} solves"
            rows.append({"title": title, "solves": solves, "steps": steps, **over_seeds(there, METRICS)})
    return rows


def launch(name: str, *overrides: str) -> None:
    """Runs a command, which resumes if it was begun."""
    subprocess.run([sys.executable, "-m", "distill", name, f"experiment={EXPERIMENT}", *overrides], check=True)


def comparison_of(
    pipeline: Path, output: Path, run: Path, step: int, plan: ComparisonPlan, scorer: JudgeScorer
) -> Comparison:
    """A run's exported student beside its teacher; all share the teacher's rows."""
    lora = output / "exports" / run.name
    if not lora.exists():
        export_run(run, lora, step, formats=["diffusers"])
    teacher = load_teacher(pipeline, parts=("network", "text", "vae"))
    denoiser = teacher.denoiser()
    load_lora(teacher.network, lora)
    student = weights_hash(stored_tensors([lora / "pytorch_lora_weights.safetensors"]))
    return Comparison(
        teacher=teacher,
        denoisers={"teacher": denoiser, "student": replace(denoiser, adapter=ADAPTER)},
        hashes={"teacher": teacher.teacher_hash, "student": student},
        scorer=scorer,
        plan=plan,
        cache=Cache(output / "evaluation"),
    )


def write(output: Path, cfg: SolvesSettings, rows: dict[str, list[Row]]) -> None:
    columns = {"title": ("", "{}")} | {key: all_columns()[key] for key in ("steps", *METRICS)}
    parts = ["# Quality over the number of solves", about(cfg)]
    for name, found in rows.items():
        table = format_table(found, columns)
        print(f"{name}\n\n{table}\n")
        lines: dict[str, list[Row]] = {}
        for row in found[1:]:
            lines.setdefault(counted(row["steps"], "step"), []).append(row)
        draw_lines(output / f"{name}.png", lines, "solves", METRICS, ("teacher, 50 steps", found[0]))
        parts += [f"## {name}", table, f"![curves]({name}.png)"]
    (output / "report.md").write_text("\n\n".join(parts) + "\n")
    (output / "report.json").write_text(json.dumps(rows, indent=1) + "\n")


def about(cfg: SolvesSettings) -> str:
    """What the tables show."""
    seeds = ", ".join(map(str, cfg.seeds))
    return f"""n = {cfg.n} pictures per row and seed; training seeds {seeds}. ± is the standard error of the mean, over
pictures or over seeds, whichever is greater. Teacher consistency: mean squared difference of the final
latents from the teacher's at 50 steps, from the same noise, which is in no store."""
