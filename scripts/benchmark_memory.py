"""`python scripts/benchmark.py memory`: what the experiments hold, counted on networks without weights.

Weights, gradients, optimizer state and average are counted exactly; activations are the tensors that one sample's
forward pass saves for its backward pass, at the resolution of the teacher, in bfloat16. Temporary tensors come on top.
A second table is of games: a student, its teacher and a discriminator, whose turns follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.models.discriminator import CriticNetwork
from distill.models.families import StableDiffusion, StableDiffusionXL, Teacher
from distill.models.full_size import build_unet, unet_config
from distill.models.lora import TEACHING, add_lora
from distill.training.config import CONFIGS, TrainSettings, build, load

SCHEDULE = NoiseSchedule.scaled_linear()
TOKENS, GIB = 77, 2**30
RANKS = 8
STAGES = {"none": (0, 0), "1": (1, 1), "2": (2, 2), "3": (3, 3), "3, 2": (3, 2)}  # of the student, the discriminator
USABLE = 70  # GiB of a GPU of 80 GB, for states and activations


def table() -> None:
    """A row for each experiment that trains a student alone at full size; GiB, activations of one sample."""
    names = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
    heads = "experiment, trained (M), states, on each of 8 (ZeRO-2), teacher beside it, activations, checkpointed"
    print("| " + heads.replace(", ", " | ") + " |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in names:
        cfg = load("train", TrainSettings, [f"experiment={name}", "data.store=STORE"])
        size = next((s for s in ("sd15", "ssd1b", "sdxl") if name.endswith(s)), None)
        if size is None or build(cfg.method, schedule=SCHEDULE).trains != ("student",):
            continue
        unet = student_of(cfg, size)
        trained, frozen = counted(unet)
        alone, shared = (states(trained, frozen, cfg.ema_decay is not None, ranks) for ranks in (1, RANKS))
        teacher = 0 if frozen else 2 * trained
        plain, checkpointed = activations(unet, False), activations(unet, True)
        print(
            f"| `{name}` | {trained / 1e6:.1f} | {alone / GIB:.1f} | {shared / GIB:.1f} | +{teacher / GIB:.1f} "
            f"| {plain / GIB:.1f} | {checkpointed / GIB:.2f} |"
        )


def games(size: str = "sdxl") -> None:
    """A row for each kind of game; GiB on each of `RANKS` by ZeRO stage, and activations of one sample."""
    print("| student; teacher; discriminator | trained (M) | " + " | ".join(f"ZeRO {s}" for s in STAGES), end=" | ")
    print(f"activations | checkpointed | samples in {USABLE} GiB, ZeRO 2 |\n|---|{'--:|' * (len(STAGES) + 4)}")
    for taught, lora, conditional in (
        ("LoRA", True, True),
        ("LoRA", True, False),
        ("whole", True, False),
        ("whole", False, False),
    ):
        unet = build_unet(unet_config(size), device="meta", dtype=torch.bfloat16)
        side = unet.config.sample_size
        critic = CriticNetwork(unet, (side, side), conditional).to(torch.bfloat16)
        teacher = 2 * sum(p.numel() for p in unet.parameters()) if taught == "whole" else 0  # bytes; no engine cuts it
        if lora:
            for adapter in [TEACHING, "default"] if taught == "LoRA" else ["default"]:
                add_lora(unet, 64, 8, adapter=adapter)
            nn.Module.to(unet, torch.bfloat16)  # diffusers' own `to` warns of nothing
        student, judge = counted(unet), counted(critic)
        held = {
            name: teacher + states(*student, False, RANKS, a) + states(*judge, False, RANKS, b)
            for name, (a, b) in STAGES.items()
        }
        plain, checkpointed = (
            max(judged(critic, c, True), activations(unet, c) + judged(critic, c, False)) for c in (False, True)
        )
        print(
            f"| {'LoRA' if lora else 'whole'}; {taught}; {'' if conditional else 'un'}conditional "
            f"| {student[0] / 1e6:.0f} + {judge[0] / 1e6:.0f} | "
            + " | ".join(f"{n / GIB:.1f}" for n in held.values())
            + f" | {plain / GIB:.1f} | {checkpointed / GIB:.2f} "
            f"| {most(held['2'], plain)}, {most(held['2'], checkpointed)} |"
        )


def most(held: float, activations: int) -> int:
    return max(0, int((USABLE * GIB - held) // activations))


def counted(module: nn.Module) -> tuple[int, int]:
    """Weights that are trained, and that are not."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters()) - trained


def states(trained: int, frozen: int, average: bool, ranks: int, stage: int = 2) -> float:
    """Bytes a rank holds in bf16, of which ZeRO cuts a part into shares.

    Without it (stage 0): float32 weights, gradients and two moments, and the weights' copies that autocast makes. With
    it: 2 a weight; 2 a trained weight's gradient; float32 master, accumulated gradient, two moments and average. Stage
    1 cuts all of the latter but the gradient, 2 that too, and 3 everything: but up to 10^9 weights are whole at a time.
    """
    once = 4 if average else 0
    if stage == 0:
        return 2 * frozen + (4 + 4 + 8 + 2 + once) * trained
    weights, gradients, gradient32, optimizer = 2 * (frozen + trained), 2 * trained, 4 * trained, (12 + once) * trained
    if stage == 3:
        return (weights + gradients + gradient32 + optimizer) / ranks + 2 * min(frozen + trained, 10**9)
    return weights + gradients + (gradient32 if stage == 1 else gradient32 / ranks) + optimizer / ranks


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
    config = unet.config
    w = torch.empty(1, 256, dtype=torch.bfloat16, device="meta") if config.time_cond_proj_dim else None
    x, t, keywords = inputs(config, 1)
    return saved(unet, lambda: unet.train()(x, t, timestep_cond=w, **keywords).sample)


def judged(critic: CriticNetwork, checkpointing: bool, learns: bool) -> int:
    """The same of a discriminator: of a real and a fake where it `learns`, in the student's turn of the fake alone.

    A conditional one also sees the state that they were made from.
    """
    encoder: Any = critic.encoder
    (encoder.enable_gradient_checkpointing if checkpointing else encoder.disable_gradient_checkpointing)()
    shown = 1 + learns + critic.conditional
    x, t, keywords = inputs(encoder.config, shown)
    critic.train().requires_grad_(learns)
    total = saved(critic, lambda: critic(x.requires_grad_(not learns), t, shown, **keywords))
    critic.requires_grad_(True)
    return total


def inputs(config: Any, batch: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Latents, times, and what else a UNet is given."""
    with torch.device("meta"):
        x = torch.empty(batch, 4, config.sample_size, config.sample_size, dtype=torch.bfloat16)
        text = torch.empty(batch, TOKENS, config.cross_attention_dim, dtype=torch.bfloat16)
        added = {"text_embeds": torch.empty(batch, 1280, dtype=torch.bfloat16), "time_ids": torch.empty(batch, 6)}
        t = torch.empty(batch, dtype=torch.int64)
    return x, t, {"encoder_hidden_states": text, "added_cond_kwargs": added if config.addition_embed_type else None}


def saved(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that a forward pass saves for its backward pass, without the module's weights."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if (storage := x.untyped_storage())._cdata not in weights:
            kept[storage._cdata] = x
        return x

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    total = sum(x.untyped_storage().nbytes() for x in kept.values())
    del out
    return total
