"""Scores every checkpoint of a toy run twice, by the reward and by the judge, which was trained apart from it:

python scripts/score_reward.py run=runs/toy-reward output_dir=outputs/reward

A reward can be pleased by pictures that are no better: then its score goes on rising while the judge's Fréchet distance
rises too. `rows.json` holds a row for each checkpoint, first the oldest, and the last one is of real pictures.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from distill.data.progress import Progress
from distill.diffusion.random import generator
from distill.evaluation.compare import WORK, Row, Setting, generate, seeds_of
from distill.evaluation.report import format_table
from distill.evaluation.toy import JudgeScorer
from distill.models.denoiser import NetworkDenoiser
from distill.models.families import load_teacher
from distill.models.rewards import Reward
from distill.toy.judge import load_judge
from distill.toy.world import balanced_labels, render
from distill.training.checkpoint import Checkpoints, read_weights
from distill.training.config import ConfigError, ScoreRewardSettings, build, run_script
from distill.training.run import checkpoints_of, read_run, write_atomically
from distill.training.tracking import setup_logging

COLUMNS = {  # row key: heading, format
    "checkpoint": ("checkpoint", "{}"),
    "reward": ("reward", "{:.2f}"),
    "caption_accuracy": ("captions right", "{:.3f}"),
    "frechet": ("Fréchet", "{:.3f}"),
    "sharpness": ("sharpness", "{:.3f}"),
}


def main(cfg: ScoreRewardSettings) -> None:
    setup_logging()
    settings, reward = read_run(cfg.run), build(cfg.reward)
    found = sorted(step for step, _ in Checkpoints(checkpoints_of(cfg.run)).found())
    if not found:
        raise ConfigError(f"run={cfg.run} has no checkpoint yet")
    scorer = JudgeScorer(load_judge())
    prompts, seeds = scorer.prompts("report", cfg.n), seeds_of("report", cfg.n)
    teacher = load_teacher(settings.model.pretrained_model_name_or_path, parts=("unet", "text", "vae"))
    student: NetworkDenoiser = build(settings.student).networks(teacher, keep_teacher=False)["student"]
    embedded = student.guidance_embedding_dim is not None
    guidance = settings.validation_guidance if embedded else 1.0
    setting = Setting("student", "lcm", cfg.steps, guidance, spacing="lcm", embedded=embedded)
    progress = Progress("checkpoints", len(found) * cfg.n * setting.work, WORK)

    rows = []
    for step in found:
        _, weights = read_weights(checkpoints_of(cfg.run), "student", step)
        student.module.load_state_dict(weights, strict=False)  # of a LoRA, the adapters alone
        drawn = generate(teacher, student, prompts, seeds, setting, cfg.batch_size, progress.update)
        rows.append(scored(str(step), torch.cat([batch.images for batch in drawn]), scorer, reward))
    real = render(balanced_labels(cfg.n), generator("real pictures", "other"))
    rows.append(scored("real pictures", real, scorer, reward))
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "rows.json", json.dumps(rows, indent=1) + "\n")
    print(format_table(rows, COLUMNS))


@torch.no_grad()
def scored(name: str, images: Tensor, scorer: JudgeScorer, reward: Reward) -> Row:
    """What both say of pictures [n, 3, H, W] in [-1, 1] of the scorer's prompts; standard errors are `*_se`."""
    prompts = scorer.prompts("report", len(images))
    scores = reward((images + 1) / 2, prompts)
    error = float(scores.std()) / math.sqrt(len(scores))
    row = {"checkpoint": name, "reward": float(scores.mean()), "reward_se": error}
    return row | scorer.summarise(scorer.measure(images, prompts), "report")


if __name__ == "__main__":
    run_script(main, "score_reward", ScoreRewardSettings)
