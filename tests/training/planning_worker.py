"""Real training steps in a process of their own, whose tensors are counted by torch's profiler as they come and go.

The profiler hears of every block that the CPU allocator gives out, those inside of operators too, and to the byte.
Resident memory would hold the libraries, and what the allocator of the C library keeps.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from distill.diffusion.noise import Noise
from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch
from distill.methods.lcm import LCM
from distill.methods.mlcm import MLCM
from distill.models.discriminator import LatentDiscriminator
from distill.models.fake_score import FakeScore
from distill.models.families.sd15 import StableDiffusion
from distill.models.families.sdxl import StableDiffusionXL
from distill.models.families.teacher import Teacher
from distill.models.full_size import build_unet
from distill.models.quantized import quantize
from distill.models.student import FullStudent, LoRAStudent
from distill.training.engine import EngineSettings
from distill.training.trained_network import TrainingRecipe
from tests.tiny import CHANNELS, UNETS

SCHEDULE = NoiseSchedule.scaled_linear()
# Wide and large enough that weights and activations are megabytes each.
WIDTHS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (64, 128), "norm_num_groups": 8, "attention_head_dim": (2, 4)},
    "sdxl": {"block_out_channels": (48, 96, 192), "norm_num_groups": 8, "attention_head_dim": (2, 4, 8)},
}
TOKENS = 11


def teacher_of(family: str, device: str, side: int) -> Teacher:
    """A wider relative of `tests.tiny`'s, with random weights or on the meta device with none."""
    unet = build_unet(UNETS[family] | WIDTHS[family], device=device).requires_grad_(False)
    return Teacher(
        family=StableDiffusion() if family == "sd15" else StableDiffusionXL(),
        schedule=SCHEDULE,
        prediction=Prediction.EPSILON,
        noise=Noise(),
        teacher_id=family,
        resolution=8 * side,
        latent_shape=(CHANNELS, side, side),
        parts={"network": unet},
    )


def student_of(kind: str) -> LoRAStudent | FullStudent:
    return LoRAStudent(16, 16) if kind == "lora" else FullStudent(None)


def batch_of(teacher: Teacher, samples: int, states: int = 2) -> Batch:
    """Random states and conditioning, on the CPU."""
    random = torch.Generator().manual_seed(0)
    config: Any = teacher.network.config
    text = {"encoder_hidden_states": torch.randn(samples, TOKENS, config.cross_attention_dim, generator=random)}
    sizes = {}
    if config.addition_embed_type:
        text["text_embeds"] = torch.randn(samples, 28, generator=random)
        sizes["time_ids"] = torch.zeros(samples, 6)
    return Batch(
        states=torch.randn(samples, states, *teacher.latent_shape, generator=random),
        times=torch.tensor([[500, 400]])[:, 2 - states :].repeat(samples, 1),
        conditioning=text | sizes,
        unconditional={key: torch.zeros_like(tensor) for key, tensor in text.items()},
        guidance=torch.full((samples,), 7.5),
        positions=tuple(range(samples)),
    )


adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)


CRITICS: list[Any] = [
    {"segments": 1, "grid": 8, "skip": 125, "source": "student", "student_steps": 2, "iterations": 2}
    | {"matching": 1.0, "adversarial": 1.0}
]


def game_of(teacher: Teacher, quantized: str | None) -> tuple[MLCM, dict[str, Any]]:
    """A method with all critics, and its networks as adapters and a head on the teacher's weights."""
    if quantized is not None:
        quantize(teacher.network, quantized)
    others = {"discriminator": LatentDiscriminator(rank=8), "fake_score": FakeScore(rank=8)}
    networks: dict[str, Any] = {name: other.network(teacher) for name, other in others.items()}
    return MLCM(SCHEDULE, CRITICS, guidance=2.0), networks | LoRAStudent(16, 16).networks(teacher)


def measure_game(family: str, samples: int, side: int, quantized: str | None) -> dict[str, float]:
    """`measure`, of all three turns of a step of `game_of`, with checkpointing."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        teacher = teacher_of(family, "cpu", side)
        method, networks = game_of(teacher, quantized)
        running = EngineSettings(gradient_checkpointing=True).start()
        running.prepare(networks, dict.fromkeys(method.trains, TrainingRecipe(adamw)))
        batch = batch_of(teacher, samples, states=1)
        for step in range(2):
            with torch.profiler.record_function(f"measured step {step}"):
                for turn in method.turns(step):
                    scalars = running.updated(turn, [batch], step)
                    assert scalars[f"{turn.updates}/skipped"] == 0
    found = peaks(profiler)
    running.close()
    return found


def measure(
    family: str,
    student: str,
    method: dict[str, Any],
    samples: int,
    side: int,
    checkpointed: bool,
    ema: bool,
    saved: str | None = None,
    **engine: Any,
) -> dict[str, float]:
    """Two steps of a real engine: the most bytes of tensors that were there at once in the second, and before it.

    With `saved`, the engine is saved to that folder, and its size is told.
    """
    lcm = LCM(SCHEDULE, **method)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        teacher = teacher_of(family, "cpu", side)
        networks = student_of(student).networks(teacher, keep_teacher="teacher" in lcm.requires)
        plan = TrainingRecipe(adamw, ema_decay=0.9 if ema else None)
        running = EngineSettings(gradient_checkpointing=checkpointed, **engine).start()
        running.prepare(networks, {"student": plan})
        batch = batch_of(teacher, samples, states=1 if "teacher" in lcm.requires else 2)
        (turn,) = lcm.turns(0)
        for step in range(2):
            with torch.profiler.record_function(f"measured step {step}"):
                assert running.updated(turn, [batch], step)["skipped"] == 0
    found = peaks(profiler)
    if saved is not None:
        Path(saved).mkdir(parents=True)
        running.save(Path(saved))
        found["saved"] = sum(p.stat().st_size for p in Path(saved).rglob("*") if p.is_file())
    running.close()
    return found


def peaks(profiler: profile) -> dict[str, float]:
    """What was allocated at most in the last step, and when it began; bytes."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    begin, end = next((e.start_ns(), e.end_ns()) for e in events if e.name() == "measured step 1")
    blocks = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now, before, most = 0, 0, 0
    for at, size in blocks:
        now += size
        if at < begin:
            before = now
        elif at <= end:
            most = max(most, now)
    return {"peak": most, "before": before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = []
    for step in json.loads(sys.argv[1]):
        found.append(measure_game(**step) if "quantized" in step else measure(**step))
        gc.collect()
    print(json.dumps(found))
