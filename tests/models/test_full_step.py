"""Real steps of LoRAs on the published transformers with random weights, on a CPU; see tests/test_experiments.py."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config.loading import build, load
from distill.config.settings import TrainSettings
from distill.diffusion.random import Context
from distill.diffusion.trajectory import Batch
from distill.methods.lcm import LCM
from distill.models.families.registry import published
from distill.models.families.teacher import Teacher
from distill.models.full_size import build_network
from distill.models.lora import adapters
from tests.forked import python

ROOT = Path(__file__).resolve().parents[2]
SIDE, TOKENS = 16, 96  # of a state, and of a prompt
STEPS: dict[str, tuple[dict[str, int], float]] = {
    "sd35_medium": ({}, 9.0),
    "flux2_klein": ({"num_layers": 2, "num_single_layers": 4}, 6.0),
    "flux_dev": ({"num_layers": 2, "num_single_layers": 4}, 8.0),
}
"""What of a network's config is changed, and GiB that a step may take."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_lora_step_of_a_published_transformer_is_finite_and_fits(name: str) -> None:
    command = f"from tests.models.test_full_step import step; step({name!r})"
    done = subprocess.run([python(), "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(name, report)  # shown by -rP
    assert math.isfinite(report["loss"]) and report["loss"] > 0
    assert report["reached"] == 1
    assert report["peak_gib"] < STEPS[name][1]


def step(name: str) -> None:
    """One loss of LCM-LoRA with its gradient at batch 1, in bf16; what it cost, as JSON."""
    family, known = published(name)
    config = {**known.network, **STEPS[name][0]}
    network = build_network(family.network.kind, config, "cpu", torch.bfloat16).requires_grad_(False)
    teacher = Teacher.of(family, network.config, known.vae, known.noise, name)
    teacher.parts["network"] = network
    cfg = load("train", TrainSettings, ["experiment=lcm_lora_sdxl", "data.store=STORE"])
    networks = build(cfg.student).networks(teacher, 0, True)
    method: Any = LCM(teacher.schedule)
    batch = batch_of(teacher)
    (turn,) = method.turns(0)
    start = time.perf_counter()
    average = {"student_ema": networks["student"]}
    losses = turn.loss({**networks, **average}, batch, Context(0, 0, batch.positions))
    losses.total.backward()
    grads = [p.grad for key, p in adapters(networks["student"].module).items() if "lora_B" in key]
    reached = [grad is not None and bool(grad.isfinite().all()) for grad in grads]
    report = {
        "loss": losses.total.item(),
        "reached": sum(reached) / len(reached),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(report))


def batch_of(teacher: Teacher) -> Batch:
    """A pair of random states with random texts."""
    random = torch.Generator().manual_seed(0)
    channels = teacher.latent_shape[0]
    shapes = teacher.family.text.shapes(teacher.network_config, TOKENS)
    text = {key: torch.randn(1, *shape, generator=random) for key, shape in shapes.items()}
    return Batch(
        states=torch.randn(1, 2, channels, SIDE, SIDE, generator=random),
        times=torch.tensor([[500, 480]]),
        conditioning=text,
        unconditional=text if teacher.second_pass else {},
        guidance=torch.tensor([3.5]),
        keys=("",),
        positions=(0,),
        prompts=("",),
        next_prompts=("",),
    )
