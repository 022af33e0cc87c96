"""The real sizes, with random weights: one LCM-LoRA step of a published UNet on a CPU."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.diffusion.prediction import Prediction
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch
from distill.methods.lcm import LCM
from distill.models.denoiser import NetworkDenoiser
from distill.models.full_size import build_unet, unet_config
from distill.models.lora import add_lora
from tests.tiny import SDXL_UNET, tiny_conditioning

ROOT = Path(__file__).resolve().parents[2]


def test_a_cheap_fill_is_reproducible_and_keeps_activations_in_range():
    first, again, other = (build_unet(SDXL_UNET, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    c = tiny_conditioning("sdxl", 2)
    added = {"text_embeds": c["text_embeds"], "time_ids": c["time_ids"]}
    with torch.no_grad():
        out = first(torch.randn(2, 5, 8, 8), 500, c["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert 0.1 < out.std() < 10


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="UNet 'sd3' is not known; allowed: sd15, sdxl, ssd1b"):
        unet_config("sd3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "gigabytes"), [("sd15", "float32", 7.0), ("ssd1b", "bfloat16", 6.0), ("sdxl", "bfloat16", 9.0)]
)
def test_one_lcm_lora_step_at_full_size(name, dtype, gigabytes):
    """In a process of its own, whose peak memory is then this step's."""
    command = f"from tests.models.test_full_size import step; step({name!r}, {dtype!r})"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(name, dtype, report)  # shown by -rP
    assert math.isfinite(report["loss"])
    assert report["teacher_moved"] == 0
    assert report["peak_gb"] < gigabytes


def step(name: str, dtype: str) -> None:
    """Builds, takes one step of the noised recipe at batch 1 and latents 32 x 32, and prints what it cost as JSON."""
    report: dict[str, Any] = {}
    clock = time.perf_counter()

    def lap(key: str) -> None:
        nonlocal clock
        report[key], clock = round(time.perf_counter() - clock, 2), time.perf_counter()

    schedule = NoiseSchedule.scaled_linear()
    unet = build_unet(unet_config(name), dtype=getattr(torch, dtype)).requires_grad_(False)
    lap("build_s")
    trained = add_lora(unet, rank=64, alpha=64)
    student = NetworkDenoiser(unet, schedule, Prediction.EPSILON)
    teacher = NetworkDenoiser(unet, schedule, Prediction.EPSILON, adapters=False)
    lap("lora_s")

    batch = full_size_batch(unet.config)
    with torch.no_grad():
        before = teacher(batch.states[:, 0], torch.tensor([500]), batch.conditioning).x0
        lap("forward_s")
    context = Context(seed=0, step=0, positions=(0,))
    losses = LCM(schedule, source="noised").loss({"student": student, "teacher": teacher}, batch, context)
    lap("loss_s")
    losses.total.backward()
    lap("backward_s")
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
    assert all(p.grad.any() for p in trained[1::2])  # B; the gradient of A is zero while B is
    assert all(p.grad is None for p in unet.parameters() if not p.requires_grad)
    torch.optim.SGD(trained, lr=1.0).step()
    with torch.no_grad():
        after = teacher(batch.states[:, 0], torch.tensor([500]), batch.conditioning).x0
        moved = (student(batch.states[:, 0], torch.tensor([500]), batch.conditioning).x0 - before).abs().max()
    assert moved > 0

    report |= {
        "loss": losses.total.item(),
        "trained": sum(p.numel() for p in trained),
        "teacher_moved": (after - before).abs().max().item(),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2),
    }
    print(json.dumps(report))


def full_size_batch(config: Any) -> Batch:
    """One clean latent, 77 tokens, and for the XL networks pooled embeddings and time ids."""
    random = torch.Generator().manual_seed(0)
    text = {"encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim, generator=random)}
    sizes = {}
    if config.addition_embed_type:
        text["text_embeds"] = torch.randn(1, 1280, generator=random)
        sizes["time_ids"] = torch.tensor([[256.0, 256, 0, 0, 256, 256]])
    return Batch(
        states=torch.randn(1, 1, config.in_channels, 32, 32, generator=random),
        times=torch.zeros(1, 1, dtype=torch.int64),
        conditioning=text | sizes,
        unconditional={key: torch.zeros_like(tensor) for key, tensor in text.items()},
        guidance=torch.ones(1),
        positions=(0,),
    )
