"""The second bundled toy in training: each method learns on it as on the first, and on any number of ranks alike."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.commands import trajectories
from distill.config.loading import build, load
from distill.config.settings import TrainSettings
from distill.data.reader import open_store
from distill.training.assembly import train_run
from distill.training.checkpoint import read_weights
from distill.training.heldout import TRAINING
from distill.training.run import checkpoints_of
from distill.training.teacher import open_teacher
from tests.forked import python

ROOT = Path(__file__).parents[2]
TOYS = ("toy", "toy_flow")
USUAL = ["data.num_samples=8", "data.solver_steps=8", "data.samples_per_shard=8", "data.heldout_samples=8"]
USUAL += ["global_batch_size=4", "micro_batch_size=null", "lr_scheduler=constant", "lr_warmup_steps=0", "log_every=1"]
USUAL += ["validation_prompts=null", "dataloader_num_workers=0", "mixed_precision=no"]
METHODS = {
    "lcm": ["experiment=quickstart", "method.skip=125", "learning_rate=1e-3"],
    "mlcm": ["experiment=mlcm_toy", "learning_rate=3e-4",
             "method.stages=[{segments: 4, skip: 125, iterations: 30, learning_rate: 3e-4}]"],
    "mse": ["experiment=lightning_toy", "method=lightning_mse", "method.teacher_steps=8", "method.student_steps=4",
            "student=lora", "learning_rate=3e-4"],
    "pcm": ["experiment=pcm_toy", "learning_rate=3e-4", "method.skip=125", "method.adversarial=0"],
}  # fmt: skip
"""How each method is run here."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


@cache
def store(place: Path, toy: str) -> str:
    given = ["experiment=quickstart", f"model={toy}", *USUAL, f"data.store={place}/{toy}", "data.guidance=2"]
    trajectories.main(load("train", TrainSettings, given))
    return f"{place}/{toy}"


def settings(place: Path, toy: str, method: str, folder: Path, *more: str) -> list[str]:
    how = [*METHODS[method], f"model={toy}", *USUAL, f"data.store={store(place, toy)}", "data.guidance=2"]
    return [*how, "ema_decay=null", "checkpointing_steps=1000", f"output_dir={folder}", *more]


def train(given: list[str]) -> list[dict[str, Any]]:
    cfg = load("train", TrainSettings, given)
    assert train_run(cfg) == 0
    return [json.loads(line) for line in (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses_of(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "toy"), [("lcm", "toy"), *((m, toy) for m in ("mlcm", "mse", "pcm") for toy in TOYS)]
)
def test_a_method_lowers_its_loss_in_30_steps(method: str, toy: str, place: Path, tmp_path: Path) -> None:
    """Measured at the same states and noise each time.

    LCM's loss on `toy_flow` is left out: its target is the student itself, which moves away faster at first; what it
    learns is measured below. So is adversarial training, whose student is still its teacher's equal then: there is
    nothing to tell apart.
    """
    steps = ["max_train_steps=30", "validation_steps=5"]
    rows = train(settings(place, toy, method, tmp_path / "run", "engine=single", *steps))
    losses = [row[TRAINING] for row in rows if TRAINING in row]
    print(method, toy, losses)
    assert len(losses) == 6 and losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
def test_lcm_comes_nearer_to_where_solves_end_on_flow_matching(place: Path, tmp_path: Path) -> None:
    """From noise in one step, on solves of other noises than those it learns from: the exact student has no error.

    LCM's own loss says nothing of it, as both of its sides are the student's answers: it rose from .11 to .16 here.

    Measured: .71 to .50. At times below 750 the error grows first, before what is learned has come down from there.
    """
    more = ["data.num_samples=64", "data.samples_per_shard=64", "data.heldout_samples=0", "engine=single"]
    given = settings(place, "toy_flow", "lcm", tmp_path / "run", *more, "global_batch_size=16", "max_train_steps=100")
    given = [text for text in given if not text.startswith("data.store=")]
    cfg = load("train", TrainSettings, [*given, f"data.store={tmp_path}/store"])
    trajectories.main(cfg)
    others = [f"data.store={tmp_path}/others", "data.num_samples=32", "data.samples_per_shard=32", "seed=7"]
    trajectories.main(load("train", TrainSettings, [*given, *others]))
    assert train_run(cfg) == 0

    samples = [*map(open_store(f"{tmp_path}/others").read, range(32))]
    x_T, x_0 = (torch.stack([sample.states[i] for sample in samples]).float() for i in (0, -1))
    c = {key: torch.stack([sample.conditioning[key] for sample in samples]) for key in samples[0].conditioning}
    student = build(cfg.student).networks(open_teacher(cfg.model, parts=("network",)), cfg.seed)["student"]
    t = torch.full((32,), 1000)
    errors = []
    for weights in ({}, read_weights(checkpoints_of(tmp_path / "run"), "student")[1]):
        for name, value in weights.items():
            student.module.get_parameter(name).data.copy_(value)
        with torch.no_grad():
            errors.append(float((student(x_T, t, c).x0 - x_0).square().mean()))
    print(errors)
    assert errors[1] < 0.85 * errors[0]


def test_a_run_on_flow_matching_resumes_to_the_bit(place: Path, tmp_path: Path) -> None:
    whole = settings(place, "toy_flow", "lcm", tmp_path / "whole", "engine=single", "global_batch_size=2")
    parts = settings(place, "toy_flow", "lcm", tmp_path / "parts", "engine=single", "global_batch_size=2")
    losses = losses_of(train([*whole, "max_train_steps=3"]))
    train([*parts, "max_train_steps=2", "checkpointing_steps=2"])
    assert losses_of(train([*parts, "max_train_steps=3", "checkpointing_steps=2"])) == losses and len(losses) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 2), ("ddp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_ranks_compute_on_flow_matching_what_one_does(engine: str, ranks: int, place: Path, tmp_path: Path) -> None:
    steps = ["max_train_steps=3", "checkpointing_steps=3", "global_batch_size=8"]
    alone = train(settings(place, "toy_flow", "lcm", tmp_path / "one", "engine=single", *steps))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    given = settings(place, "toy_flow", "lcm", tmp_path / "many", f"engine={engine}", *steps)
    start = [python(), "-m", "distill", "launch", "--num_processes", str(ranks), "train"]
    subprocess.run([*start, *given], cwd=ROOT, env=environment, check=True, timeout=600)
    together = [json.loads(line) for line in (tmp_path / "many/metrics.jsonl").read_text().splitlines()]
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-3) and len(losses_of(alone)) == 3
    files = [tmp_path / name / "checkpoints/step-00000003/student/weights.safetensors" for name in ("one", "many")]
    one, many = map(load_file, files)
    assert one.keys() == many.keys()
    moved = sum(float((one[name] - many[name]).float().square().sum()) for name in one if "lora_B" in name)
    size = sum(float(one[name].float().square().sum()) for name in one if "lora_B" in name)  # they start at zero
    print(engine, ranks, (moved / size) ** 0.5)
    assert size > 0 and moved <= 1e-3**2 * size
