"""Judges a student of the toy teacher beside it and writes a report:

python scripts/evaluate.py run=outputs/quickstart/run lora=outputs/quickstart/lora output_dir=outputs/quickstart

Killed and started again, it goes on; finished rows are not drawn twice.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from distill.evaluation.cache import Cache
from distill.evaluation.compare import Comparison, Plan, seeds_of
from distill.evaluation.proof import plain_pipeline_agrees
from distill.evaluation.report import format_table, write_report
from distill.evaluation.toy import JudgeScorer
from distill.models.families import load_teacher
from distill.models.folder import stored_tensors, weights_hash
from distill.models.lora import load_lora
from distill.toy.judge import load_judge
from distill.training.config import ConfigError, EvaluateSettings, run_script
from distill.training.run import read_run
from distill.training.tracking import setup_logging

PROVEN = 20  # pictures that a plain pipeline draws too
REPRODUCE = "bash scripts/quickstart.sh"


def main(cfg: EvaluateSettings) -> None:
    setup_logging()
    settings = read_run(cfg.run)
    if isinstance(settings.data.guidance, tuple):
        raise ConfigError("data.guidance of the run is a range; the teacher to compare with needs one number")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_teacher(settings.model.pretrained_model_name_or_path, parts=("unet", "text", "vae"))
    denoiser = teacher.denoiser()
    lora = Path(cfg.lora)
    load_lora(teacher.unet, lora)
    teacher.to(device)
    comparison = Comparison(
        teacher=teacher,
        denoisers={"teacher": denoiser, "student": replace(denoiser, adapters=True)},
        hashes={
            "teacher": teacher.teacher_hash,
            "student": weights_hash(stored_tensors([lora / "pytorch_lora_weights.safetensors"])),
        },
        scorer=JudgeScorer(load_judge().to(device)),
        plan=Plan(
            guidance=settings.data.guidance,
            n=cfg.n,
            tuning_n=cfg.tuning_n,
            steps=tuple(cfg.steps),
            guidances=tuple(cfg.guidances),
            batch_size=cfg.batch_size,
        ),
        cache=Cache(Path(cfg.output_dir) / "evaluation"),
    )
    rows = write_report(
        Path(cfg.output_dir),
        comparison,
        about=_about(cfg.run),
        reproduce=REPRODUCE,
        real=comparison.scorer.real_pictures(cfg.n),
        metrics_file=Path(cfg.run) / "metrics.jsonl",
        agreement=_agreement(comparison, settings.model.pretrained_model_name_or_path, lora),
    )
    print(format_table(rows))
    print(f"report: {cfg.output_dir}/report.md, pictures: {cfg.output_dir}/grid.png")


def _agreement(comparison: Comparison, pretrained: str, lora: Path) -> float:
    """How far a plain diffusers pipeline with the exported LoRA is from our own pictures; raises if it is far."""
    steps = 4
    expected = comparison.pictures(comparison.plan.student(steps), range(PROVEN))
    prompts, seeds = comparison.scorer.prompts("report", PROVEN), seeds_of("report", PROVEN)
    difference = plain_pipeline_agrees(pretrained, lora, prompts, seeds, steps, expected)
    if difference > 1e-2:
        raise RuntimeError(
            f"a plain diffusers pipeline draws other pictures: greatest difference {difference:.3g} of 2"
        )
    return difference


def _about(run: str) -> str:
    settings = read_run(run)
    return (
        f"An LCM-LoRA of rank {settings.lora_rank} for the toy teacher: {settings.max_train_steps} steps of "
        f"{settings.global_batch_size} samples from {settings.data.num_samples} stored trajectories of "
        f"{settings.data.solver_steps} steps with guidance {settings.data.guidance:g}."
    )


if __name__ == "__main__":
    run_script(main, "evaluate", EvaluateSettings)
