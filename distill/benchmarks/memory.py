"""`distill benchmark memory`: what the experiments hold, counted on networks without weights.

Weights, gradients, optimizer state and average are those of `distill.planning.estimates`; activations are what lives at
once beside them in a turn of a step, of one sample at the resolution of the teacher, in bfloat16. A second table is of
adversarial training: a student, its teacher and a discriminator, which take turns. Each row takes a minute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.config.loading import CONFIGS, build, load
from distill.config.settings import TrainSettings
from distill.diffusion.random import Context, generator
from distill.methods.base import Method
from distill.planning.counting import PUBLISHED, architecture, batch_of, cast, count, networks_of
from distill.planning.estimates import Counted, Held, counted, frozen, held, most_samples
from distill.training.assembly import others_of
from distill.training.trained_network import optimizer_bytes

GIB = 2**30
RANKS = 8
STAGES = {  # of the student, the discriminator
    "none": ("ddp", "ddp"),
    "1": ("zero1", "zero1"),
    "2": ("zero2", "zero2"),
    "3": ("zero3", "zero3"),
    "3, 2": ("zero3", "zero2"),
}
USABLE = 70  # GiB of a GPU of 80 GB, for states and activations
BUCKET = 50_000_000  # of configs/engine
ADVERSARIAL = {  # student; teacher; discriminator
    "LoRA; LoRA; conditional": ["student=lora", "teacher=lora", "networks.discriminator.conditional=true"],
    "LoRA; LoRA; unconditional": ["student=lora", "teacher=lora"],
    "LoRA; full; unconditional": ["student=lora", "teacher=whole"],
    "full; full; unconditional": ["student=full_unguided", "teacher=whole"],
}


@dataclass(frozen=True)
class Walked:
    """A run's weights and activations (bytes per sample, at most over its turns: kept, recomputed)."""

    cfg: TrainSettings
    method: Method
    trained: dict[str, Counted]
    beside: int
    activations: tuple[float, float]

    def held(self, engines: dict[str, str], ranks: int) -> Held:
        """Bytes on each of `ranks`, with the trained networks under these engines; in bfloat16."""
        total, state = frozen(Counted(0, self.beside), bf16=True), optimizer_bytes(build(self.cfg.optimizer))
        for name, weights in self.trained.items():
            averaged = self.cfg.ema_decay is not None and name == "student"
            settings: dict[str, Any] = {"bf16": True, "optimizer": state, "averaged": averaged, "bucket": BUCKET}
            total += held(weights, engines[name], ranks, **settings)
        return total


def walked(*overrides: str) -> Walked:
    cfg = load("train", TrainSettings, [*overrides, "data.store=STORE"])
    built = architecture(cfg.model)
    method: Method = build(cfg.method, schedule=built.teacher.schedule)
    networks = networks_of(cfg, built.teacher, method.requires, others_of(cfg, method))
    networks |= {f"{name}_ema": networks[name] for name in method.trains if f"{name}_ema" in method.requires}
    cast(networks, method.trains, bf16=True, masters=True)
    batch = batch_of(built, len(method.reads().pick(range(built.teacher.schedule.T, -1, -1), generator("memory"))))
    context = Context(cfg.seed, 0, batch.positions)
    repeated: dict[str, Any] = {}
    plain, again = (
        max(
            count(turn, networks, batch, context, checkpointed=c, repeated=repeated).activations(1)
            for turn in method.turns(0)
        )
        for c in (False, True)
    )
    own = {name: networks[name].module for name in method.trains}
    beside = {id(n.module): n.module for n in networks.values() if not any(n.module is m for m in own.values())}
    still = sum(p.numel() for module in beside.values() for p in module.parameters())
    return Walked(cfg, method, {name: counted(module) for name, module in own.items()}, still, (plain, again))


def table() -> None:
    """A row for each experiment that trains a student alone at full size; GiB, activations of one sample."""
    heads = "experiment, trained (M), states, on each of 8 (ZeRO-2), teacher beside it, activations, checkpointed"
    print("| " + heads.replace(", ", " | ") + " |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")):
        if not name.endswith(PUBLISHED) or name.startswith("lightning"):
            continue
        run = walked(f"experiment={name}")
        student = run.trained["student"]
        alone, shared = (run.held({"student": "zero2"}, ranks).states / GIB for ranks in (1, RANKS))
        teacher = 0 if student.frozen else 2 * student.trained / GIB
        plain, again = (x / GIB for x in run.activations)
        print(
            f"| `{name}` | {student.trained / 1e6:.1f} | {alone:.1f} | {shared:.1f} | +{teacher:.1f} "
            f"| {plain:.1f} | {again:.2f} |",
            flush=True,
        )


def adversarial(size: str = "sdxl") -> None:
    """A row for each kind of pair; GiB on each of `RANKS` by ZeRO stage, and activations of one sample."""
    print("| student; teacher; discriminator | trained (M) | " + " | ".join(f"ZeRO {s}" for s in STAGES), end=" | ")
    print(f"activations | checkpointed | samples in {USABLE} GiB, ZeRO 2 |\n|---|{'--:|' * (len(STAGES) + 4)}")
    for name, overrides in ADVERSARIAL.items():
        run = walked(f"experiment=lightning_{size}", *overrides)
        by_stage = {
            stage: run.held(dict(zip(("student", "discriminator"), engines, strict=True)), RANKS)
            for stage, engines in STAGES.items()
        }
        student, discriminator = (run.trained[n].trained / 1e6 for n in ("student", "discriminator"))
        most = [most_samples(USABLE * GIB, by_stage["2"], x) for x in run.activations]
        print(
            f"| {name} | {student:.0f} + {discriminator:.0f} | "
            + " | ".join(f"{h.total(0) / GIB:.1f}" for h in by_stage.values())
            + f" | {run.activations[0] / GIB:.1f} | {run.activations[1] / GIB:.2f} | {most[0]}, {most[1]} |",
            flush=True,
        )
