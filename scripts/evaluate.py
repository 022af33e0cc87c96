"""Judges a student of the toy teacher beside it and writes a report:

python scripts/evaluate.py run=outputs/quickstart/run lora=outputs/quickstart/lora output_dir=outputs/quickstart

Killed and started again, it goes on; finished rows are not drawn twice.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from distill.evaluation.cache import Cache
from distill.evaluation.compare import Comparison, Plan, seeds_of
from distill.evaluation.proof import plain_pipeline_agrees
from distill.evaluation.report import format_table, write_report
from distill.evaluation.toy import JudgeScorer
from distill.models.denoiser import NetworkDenoiser
from distill.models.exported import FACTS, read_export
from distill.models.families import Teacher, load_teacher
from distill.models.folder import stored_tensors, weight_files, weights_hash
from distill.models.lora import ADAPTER, load_lora
from distill.toy.judge import load_judge
from distill.training.config import ConfigError, EvaluateSettings, run_script
from distill.training.run import read_run
from distill.training.tracking import setup_logging

PROVEN = 20  # pictures that a plain pipeline draws too
REPRODUCE = "bash scripts/quickstart.sh"


def main(cfg: EvaluateSettings) -> None:
    setup_logging()
    settings = read_run(cfg.run)
    guidance = settings.data.guidance if cfg.guidance is None else cfg.guidance
    if not isinstance(guidance, float):
        raise ConfigError(f"data.guidance of the run is {guidance}: set guidance=W, for the teacher to compare with")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_teacher(settings.model.pretrained_model_name_or_path, parts=("unet", "text", "vae"))
    denoiser = teacher.denoiser()
    student, student_hash = student_of(Path(cfg.lora), teacher)
    embedded = student.guidance_embedding_dim is not None
    student.module.to(device)
    teacher.to(device)
    comparison = Comparison(
        teacher=teacher,
        denoisers={"teacher": denoiser, "student": student},
        hashes={"teacher": teacher.teacher_hash, "student": student_hash},
        scorer=JudgeScorer(load_judge().to(device)),
        plan=Plan(
            guidance=guidance,
            student_guidance=guidance if embedded else 1.0,
            student_embedded=embedded,
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
        about=_about(cfg.run, guidance),
        reproduce=REPRODUCE,
        real=comparison.scorer.real_pictures(cfg.n),
        metrics_file=Path(cfg.run) / "metrics.jsonl",
        agreement=_agreement(comparison, settings.model.pretrained_model_name_or_path, cfg.lora),
    )
    print(format_table(rows))
    print(f"report: {cfg.output_dir}/report.md, pictures: {cfg.output_dir}/grid.png")


def student_of(export: Path, teacher: Teacher) -> tuple[NetworkDenoiser, str]:
    """The exported student and the hash of its weights: a LoRA, which is put onto the teacher's network, or a UNet."""
    if not (export / "unet").is_dir():
        load_lora(teacher.unet, export)
        return replace(teacher.denoiser(), adapter=ADAPTER), weights_hash(
            stored_tensors([export / "pytorch_lora_weights.safetensors"])
        )
    unet = UNet2DConditionModel.from_pretrained(export / "unet").eval().requires_grad_(False)
    prediction = (read_export(export).prediction if (export / FACTS).is_file() else None) or teacher.prediction
    student = NetworkDenoiser(unet, teacher.schedule, prediction)
    return student, weights_hash(stored_tensors(weight_files(export, "unet")))


def _agreement(comparison: Comparison, pretrained: str, lora: str) -> float:
    """How far a plain diffusers pipeline with the exported student is from our own pictures; raises if it is far."""
    steps = 4
    expected = comparison.pictures(comparison.plan.student(steps), range(PROVEN))
    prompts, seeds = comparison.scorer.prompts("report", PROVEN), seeds_of("report", PROVEN)
    guidance = comparison.plan.student_guidance
    difference = plain_pipeline_agrees(pretrained, lora, prompts, seeds, steps, expected, guidance)
    if difference > 1e-2:
        raise RuntimeError(
            f"a plain diffusers pipeline draws other pictures: greatest difference {difference:.3g} of 2"
        )
    return difference


def _about(run: str, guidance: float) -> str:
    settings = read_run(run)
    kind = str(settings.student["_target_"]).rpartition(".")[2]
    what = f"An LCM-LoRA of rank {settings.lora_rank}" if kind == "LoRAStudent" else "A full network"
    return (
        f"{what} for the toy teacher: {settings.max_train_steps} steps of {settings.global_batch_size} samples from "
        f"{settings.data.num_samples} stored trajectories of {settings.data.solver_steps} steps; guidance {guidance:g}."
    )


if __name__ == "__main__":
    run_script(main, "evaluate", EvaluateSettings)
