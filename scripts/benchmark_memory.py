"""`python scripts/benchmark.py memory`: what the experiments hold, counted on networks without weights.

Weights, gradients, optimizer state and average are counted exactly; activations are the tensors that one sample's
forward pass saves for its backward pass, at the resolution of the teacher, in bfloat16. Temporary tensors come on top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.models.families import StableDiffusion, StableDiffusionXL, Teacher
from distill.models.full_size import build_unet, unet_config
from distill.training.config import CONFIGS, TrainSettings, build, load

SCHEDULE = NoiseSchedule.scaled_linear()
TOKENS, GIB = 77, 2**30


def table() -> None:
    """A row for each experiment at full size; GiB, activations of one sample."""
    names = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
    heads = "experiment, trained (M), states, on each of 8 (ZeRO-2), teacher beside it, activations, checkpointed"
    print("| " + heads.replace(", ", " | ") + " |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in names:
        cfg = load("train", TrainSettings, [f"experiment={name}", "data.store=STORE"])
        size = next((s for s in ("sd15", "ssd1b", "sdxl") if name.endswith(s)), None)
        if size is None:
            continue
        unet = student_of(cfg, size)
        trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in unet.parameters() if not p.requires_grad)
        alone, shared = (
            states(trained, frozen, cfg.ema_decay is not None, 1),
            states(trained, frozen, cfg.ema_decay is not None, 8),
        )
        teacher = 0 if frozen else 2 * trained
        plain, checkpointed = activations(unet, False), activations(unet, True)
        print(
            f"| `{name}` | {trained / 1e6:.1f} | {alone / GIB:.1f} | {shared / GIB:.1f} | +{teacher / GIB:.1f} "
            f"| {plain / GIB:.1f} | {checkpointed / GIB:.2f} |"
        )


def states(trained: int, frozen: int, average: bool, ranks: int) -> float:
    """Bytes a rank holds under ZeRO-2 in bf16: 2 a weight; 2 a trained weight's gradient; and of float32 master,
    accumulated gradient, two moments and average its share."""
    return 2 * frozen + (2 + 2) * trained + (4 + 4 + 8 + (4 if average else 0)) * trained / ranks


def student_of(cfg: TrainSettings, size: str) -> nn.Module:
    unet = build_unet(unet_config(size), device="meta", dtype=torch.bfloat16).requires_grad_(False)
    side = unet.config.sample_size
    family = StableDiffusion() if size == "sd15" else StableDiffusionXL()
    shape = (4, side, side)
    teacher = Teacher(family, SCHEDULE, Prediction.EPSILON, {}, size, 8 * side, shape, parts={"unet": unet})
    build(cfg.student).networks(teacher, 0, False)
    for p in teacher.unet.parameters():
        p.data = p.data.to(torch.bfloat16)
    return teacher.unet


def activations(unet: Any, checkpointing: bool) -> int:
    """Bytes that one sample's forward pass saves, weights not counted."""
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if (storage := x.untyped_storage())._cdata not in weights:
            kept[storage._cdata] = x
        return x

    config, side = unet.config, unet.config.sample_size
    with torch.device("meta"):
        x = torch.empty(1, 4, side, side, dtype=torch.bfloat16)
        text = torch.empty(1, TOKENS, config.cross_attention_dim, dtype=torch.bfloat16)
        added = {"text_embeds": torch.empty(1, 1280, dtype=torch.bfloat16), "time_ids": torch.empty(1, 6)}
        w = torch.empty(1, 256, dtype=torch.bfloat16) if config.time_cond_proj_dim else None
        t = torch.empty(1, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = unet.train()(
                x, t, text, timestep_cond=w, added_cond_kwargs=added if config.addition_embed_type else None
            ).sample
    total = sum(x.untyped_storage().nbytes() for x in kept.values())
    del out
    return total
