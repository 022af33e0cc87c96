"""Scores every checkpoint of toy runs twice, by the reward and by the toy's classifier, trained apart from it:

distill study score_reward run=runs/toy-reward output_dir=outputs/reward        # or run=[runs/a,runs/b]

A reward can be pleased by pictures that are no better: then its score keeps rising while the classifier's Fréchet
distance rises too. `rows.json` holds a row for each run and checkpoint, first the oldest, and the last one is of real
pictures; `reward.png` plots them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.config.loading import ConfigError, build
from distill.config.settings import ScoreRewardSettings, TrainSettings
from distill.data.progress import Progress
from distill.diffusion.random import generator
from distill.evaluation.compare import WORK, Advance, Row, Setting, generate, seeds_of
from distill.evaluation.figures import draw_lines
from distill.evaluation.metrics import METRICS
from distill.evaluation.report import format_table
from distill.evaluation.statistics import mean_with_error
from distill.evaluation.toy import JudgeScorer
from distill.models.denoiser import NetworkDenoiser
from distill.models.families.loading import load_teacher
from distill.models.rewards import Reward
from distill.toy.judge import load_judge
from distill.toy.world import balanced_labels, render
from distill.training.checkpoint import Checkpoints, read_weights
from distill.training.run import checkpoints_of, read_run, write_atomically
from distill.training.tracking import setup_logging
from distill.training.watchdog import watched

COLUMNS = {  # row key: heading, format
    "run": ("run", "{}"),
    "step": ("step", "{}"),
    "reward": METRICS["reward"].column,
    "caption_accuracy": METRICS["caption_accuracy"].column,
    "frechet": METRICS["frechet"].column,
    "sharpness": ("sharpness", "{:.3f}"),
}
PANELS = ("reward", "frechet", "caption_accuracy")


@watched
def main(cfg: ScoreRewardSettings) -> None:
    setup_logging()
    runs = runs_of(cfg)
    steps = {name: steps_of(run) for name, run in runs.items()}
    settings = {name: read_run(run) for name, run in runs.items()}
    reward, scorer = build(cfg.reward), JudgeScorer(load_judge())
    work = cfg.n * Setting("student", "lcm", cfg.steps).work
    advance = Progress("checkpoints", work * sum(map(len, steps.values())), WORK).update

    rows: list[Row] = []
    for name, run in runs.items():
        pictures = pictures_of(run, settings[name], steps[name], scorer, cfg, advance)
        rows += [{"run": name, "step": step, **scored(images, scorer, reward)} for step, images in pictures]
    real = scored(render(balanced_labels(cfg.n), generator("real pictures", "other")), scorer, reward)

    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    lines = {name: [row for row in rows if row["run"] == name] for name in runs}
    draw_lines(output / "reward.png", lines, "step", PANELS, ("real pictures", real), begins(settings))
    rows.append({"run": "real pictures", **real})
    write_atomically(output / "rows.json", json.dumps(rows, indent=1) + "\n")
    print(format_table(rows, COLUMNS))


def runs_of(cfg: ScoreRewardSettings) -> dict[str, str]:
    """The folders of the runs by their last names, which name their lines."""
    folders = [cfg.run] if isinstance(cfg.run, str) else cfg.run
    named = {Path(folder).name: folder for folder in folders}
    if len(named) < len(folders):
        raise ConfigError(f"run={','.join(folders)}: the last names of these folders must differ")
    return named


def steps_of(run: str) -> list[int]:
    """The steps at which the run has checkpoints."""
    found = sorted(step for step, _ in Checkpoints(checkpoints_of(run)).found())
    if not found:
        raise ConfigError(f"run={run} has no checkpoint yet")
    return found


def begins(settings: Mapping[str, TrainSettings]) -> dict[str, float]:
    """The step from which runs are rewarded, if it is the same one in all that are."""
    starts = set()
    for cfg in settings.values():
        stages = cfg.method.get("stages", [])
        rewarded = [i for i, stage in enumerate(stages) if stage.get("reward", 0) > 0]
        starts |= {sum(stage["iterations"] for stage in stages[:i]) for i in rewarded[:1]}
    return {"rewarded from here on": starts.pop()} if len(starts) == 1 else {}


def pictures_of(
    run: str,
    settings: TrainSettings,
    steps: Sequence[int],
    scorer: JudgeScorer,
    cfg: ScoreRewardSettings,
    advance: Advance,
) -> Iterator[tuple[int, Tensor]]:
    """The step of each checkpoint and the pictures [n, 3, H, W] of its student's average."""
    prompts, seeds = scorer.prompts("report", cfg.n), seeds_of("report", cfg.n)
    teacher = load_teacher(settings.model.pretrained_model_name_or_path, parts=("network", "text", "vae"))
    student: NetworkDenoiser = build(settings.student).networks(teacher, keep_teacher=False)["student"]
    embedded = student.takes_guidance
    guidance = settings.validation_guidance if embedded else 1.0
    setting = Setting("student", "lcm", cfg.steps, guidance, spacing="lcm", embedded=embedded)
    for step in steps:
        _, weights = read_weights(checkpoints_of(run), "student", step)
        student.module.load_state_dict(weights, strict=False)  # of a LoRA, the adapters alone
        batches = generate(teacher, student, prompts, seeds, setting, cfg.batch_size, advance)
        yield step, torch.cat([batch.images for batch in batches])


@torch.no_grad()
def scored(images: Tensor, scorer: JudgeScorer, reward: Reward) -> Row:
    """What both say of pictures [n, 3, H, W] in [-1, 1] of the scorer's prompts; standard errors are `*_se`."""
    prompts = scorer.prompts("report", len(images))
    value, error = mean_with_error(reward((images + 1) / 2, prompts))
    return {"reward": value, "reward_se": error} | scorer.summarise(scorer.measure(images, prompts), "report")
