"""Runs training cases in real processes: `python -m tests.training.engine_worker cases.json`, under a launcher or not.

A case is a small run of a tiny SDXL-shaped UNet; what it computed is written by rank 0 for the test to compare.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.diffusion.losses import l2
from distill.diffusion.noise import Noise
from distill.diffusion.prediction import Prediction
from distill.diffusion.random import Context, generator
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch, CleanEnd, Reads
from distill.methods.base import Losses, Method, Networks, Turn
from distill.methods.dmd2 import DMD2
from distill.methods.flash import Flash
from distill.methods.lcm import LCM
from distill.methods.lightning import LightningAdversarial, LightningMSE
from distill.methods.mlcm import MLCM
from distill.methods.pcm import PCM
from distill.methods.rcm import RCM, SCM
from distill.methods.rectified import Rectified
from distill.methods.sid import SiD
from distill.methods.tcd import TCD
from distill.models.denoiser import NetworkDenoiser
from distill.models.discriminator import CriticNetwork, Discriminator, LatentDiscriminator
from distill.models.fake_score import FakeScore
from distill.models.families.sdxl import StableDiffusionXL
from distill.models.families.teacher import Teacher
from distill.models.latent_reward import LatentReward
from distill.models.lora import TEACHING, add_lora
from distill.models.quantized import quantize
from distill.models.shared import part_from
from distill.models.student import LoRAStudent
from distill.training.checkpoint import Checkpoints
from distill.training.engine import Engine, EngineSettings
from distill.training.learning_rate import LearningRate
from distill.training.preemption import Preemption
from distill.training.processes import Processes
from distill.training.rank_writes import WriteError
from distill.training.tracking import open_trackers
from distill.training.trained_network import TrainingRecipe
from distill.training.validation import Validation, teacher_ends, validation_seeds
from tests.tiny import CHANNELS, tiny_conditioning, tiny_pipeline, tiny_unet

GLOBAL_BATCH = 8
KEYS = tuple(tiny_conditioning("sdxl", 1, 0))
SCHEDULE = NoiseSchedule.scaled_linear()
# Two levels are enough here, and ZeRO-3 gathers each weight of each level by itself.
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
}
# Consistency alone; then its critics join, whose optimizers have not taken a step when all of them are reset.
STAGES: list[Any] = [
    {"segments": 1, "skip": 20, "iterations": 2},
    {"segments": 1, "grid": 8, "skip": 125, "source": "student", "student_steps": 2, "iterations": 4}
    | {"matching": 0.5, "adversarial": 0.5, "fresh_optimizer": True},
]
# Stored pairs; the student's own samples, at another rate and with a new optimizer; and these with a reward.
OWN: dict[str, Any] = {"segments": 1, "grid": 8, "skip": 125, "source": "student", "student_steps": 2, "iterations": 2}
REWARDED: list[Any] = [
    {"segments": 2, "skip": 20, "iterations": 2},
    OWN | {"fresh_optimizer": True, "learning_rate": 5e-4},
    OWN | {"reward": 0.5, "reward_target": 3.0},
]

# The teacher solves from noise to times of which each sample has its own: a network that is cut is called by all ranks.
ROLLOUT: list[Any] = [{"segments": 4, "skip": 125, "grid": 8, "source": "rollout", "iterations": 6}]

# Of one network and its teacher's encoder with heads, which join in the second stage.
TCD_STAGES: list[Any] = [
    {"segments": 1, "iterations": 2},
    {"segments": 1, "iterations": 4, "adversarial": 0.5, "fresh_optimizer": True},
]

# The distance alone; then the game and the student as its own fake score, which calls networks that first rested.
FLASH_STAGES: list[Any] = [
    {"iterations": 2, "odds": [1.0, 1.0]},
    {"iterations": 4, "odds": [1.0, 1.0], "matching": 0.5, "adversarial": 0.5},
]

# By what they keep: two moments and their steps; one moment; a sum that is there before the first step.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01),
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adagrad": partial(torch.optim.Adagrad, lr=5e-3, initial_accumulator_value=0.01),
}


def tiny_batch(step: int, first: int, size: int) -> Batch:
    """Samples `first` ... of the global batch of a step: the same ones however they are dealt out."""
    positions = range(step * GLOBAL_BATCH + first, step * GLOBAL_BATCH + first + size)
    following = [step * GLOBAL_BATCH + (first + i + 1) % GLOBAL_BATCH for i in range(size)]
    draws = [generator("sample", p) for p in positions]
    times = torch.stack([20 * torch.randint(1, 51, (), generator=g) for g in draws])
    conditioning = [tiny_conditioning("sdxl", 1, p) for p in positions]
    return Batch(
        states=torch.stack([torch.randn(2, CHANNELS, 8, 8, generator=g) for g in draws]),
        times=torch.stack([times, times - 20], 1),
        conditioning={key: torch.cat([c[key] for c in conditioning]) for key in conditioning[0]},
        unconditional={},
        guidance=torch.tensor([1.0 + p % 8 for p in positions]),
        keys=tuple(f"sample-{p}" for p in positions),
        positions=tuple(positions),
        prompts=tuple(prompt_of(p) for p in positions),
        next_prompts=tuple(prompt_of(p) for p in following),
    )


def prompt_of(position: int) -> str:
    """In pairs, so that half of the samples have the prompt of the next one."""
    return f"prompt {position // 2 % 3}"


def micro_batches(engine: Engine, step: int) -> list[Batch]:
    size = GLOBAL_BATCH // engine.processes.world_size // engine.settings.gradient_accumulation_steps
    mine = engine.processes.rank * size * engine.settings.gradient_accumulation_steps
    return [tiny_batch(step, mine + i * size, size) for i in range(engine.settings.gradient_accumulation_steps)]


class Duel(Method):
    """Two trained networks that need each other's gradients, as an adversarial method has them."""

    trains = ("student", "discriminator")

    def reads(self) -> Reads:
        return CleanEnd()

    def turns(self, step: int) -> Iterable[Turn]:
        return (Turn("discriminator", self.judge), Turn("student", self.draw))

    def judge(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        real = batch.states[:, 1]
        with torch.no_grad():
            fake = self.fake(networks, batch)
        return self.losses(self.score(networks, real, batch) - self.score(networks, fake, batch))

    def draw(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        return self.losses(self.score(networks, self.fake(networks, batch), batch))

    def fake(self, networks: Networks, batch: Batch) -> torch.Tensor:
        return networks["student"](batch.states[:, 0], batch.times[:, 0], batch.conditioning).x0

    def score(self, networks: Networks, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        t = torch.full((len(x),), 100, device=x.device)
        return networks["discriminator"](x, t, batch.conditioning).eps

    def losses(self, difference: torch.Tensor) -> Losses:
        loss = torch.nn.functional.softplus(difference).mean()
        return Losses(loss, {"margin": difference.mean()})


class Distance(Method):
    """The student's distance to its teacher (itself without adapters): two views of one module in one loss."""

    def __init__(self, poison: dict[int, list[int]] | None = None) -> None:
        self.poison = poison or {}

    def reads(self) -> Reads:
        return CleanEnd()

    def turns(self, step: int) -> Iterable[Turn]:
        return (Turn("student", self.loss),)

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        x, t, c = batch.states[:, 0], batch.times[:, 0], batch.conditioning
        with torch.no_grad():
            target = networks["teacher"](x, t, c).x0 + batch.states[:, 1]
        d = l2(networks["student"](x, t, c).x0, target)
        bad = [p % GLOBAL_BATCH in self.poison.get(context.step, []) for p in batch.positions]
        d = torch.where(torch.tensor(bad, device=d.device), torch.nan, d)
        return Losses(d.mean(), {"l2": d.mean()})


class Taste(nn.Module):
    """Likes pictures [B, 3, H, W] in the colour of their prompts: [B]."""

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        colours = torch.stack([torch.randn(3, generator=generator("colour", p)) for p in prompts]).to(images)
        return 10 * (images.mean((2, 3)) * colours).sum(1)


class Restarted(LCM):
    """LCM whose optimizer begins anew in the middle of the run."""

    def resets(self, step: int) -> bool:
        return step == 4


def student(lora: bool, dropout: float = 0.0, taught: bool = False, **changes: Any) -> dict[str, NetworkDenoiser]:
    """A network trained whole; or one with adapters that change something, and its teacher on the same module.

    That is the module without them or, where it is `taught`, with further ones.
    """
    view = NetworkDenoiser(tiny_unet("sdxl", **TWO_LEVELS, **changes), SCHEDULE, Prediction.EPSILON)
    if not lora:
        return {"student": view}
    if taught:
        add_lora(view.module, rank=2, alpha=4, adapter=TEACHING)
    add_lora(view.module, rank=4, alpha=4, dropout=dropout)
    for name, p in view.module.named_parameters():  # B starts at zero, which would leave A without a gradient
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=generator("B", name))
    return {"student": view, "teacher": replace(view, adapter=TEACHING if taught else None)}


def game(networks: dict[str, NetworkDenoiser]) -> dict[str, Any]:
    """Beside a student a discriminator that has an opinion from the first step on, and a teacher if it has none."""
    critic = CriticNetwork(tiny_unet("sdxl", seed=1, **TWO_LEVELS), (8, 8), conditional=True)
    critic.head.logit.weight.data.normal_(0, 0.5, generator=generator("logit"))
    teacher = NetworkDenoiser(tiny_unet("sdxl", seed=2, **TWO_LEVELS), SCHEDULE, Prediction.EPSILON)
    return {"teacher": teacher, **networks, "discriminator": Discriminator(critic)}


def on_one_network(quantized: str | None = None, parted: bool = False, **critic: Any) -> dict[str, Any]:
    """Four networks as adapters and a head on the weights of one; `parted`, each on a copy of its own."""
    teacher = tiny_teacher({"network": tiny_unet("sdxl", **TWO_LEVELS).requires_grad_(False)})
    if quantized is not None:
        quantize(teacher.network, quantized)
    networks: dict[str, Any] = {
        "discriminator": LatentDiscriminator(conditional=True, **(critic or {"rank": 2, "alpha": 4})).network(teacher),
        "fake_score": FakeScore(rank=3, alpha=3).network(teacher),
        **LoRAStudent(rank=4, alpha=4).networks(teacher),
    }
    for name, p in networks["discriminator"].module.head.named_parameters():
        if name.endswith("logit.weight"):
            p.data.normal_(0, 0.5, generator=generator("logit"))
    for network, view in networks.items():
        for name, p in view.module.named_parameters():
            if "lora_B" in name and network != "teacher":
                p.data.normal_(0, 0.05, generator=generator("B", network, name))
        if parted:
            part_from(view.module, [other.module for other in networks.values()])
    return networks


def teacher_with_decoder() -> Teacher:
    """What a reward of latents needs of a teacher."""
    return tiny_teacher({"vae": tiny_pipeline("sdxl").vae.eval()})


def tiny_teacher(parts: dict[str, Any]) -> Teacher:
    return Teacher(
        family=StableDiffusionXL(),
        schedule=SCHEDULE,
        prediction=Prediction.EPSILON,
        noise=Noise(),
        teacher_id="tiny",
        resolution=16,
        latent_shape=(CHANNELS, 8, 8),
        parts=parts,
    )


def along_solves(method: str) -> tuple[dict[str, Any], Method] | None:
    """Networks and method of those that learn from two states of a stored solve; None for another method."""
    in_one_step: dict[str, Any] = {"student_steps": 1, "teacher_steps": 1, "source": "trajectory"}
    if method in ("scm", "kd"):
        return student(lora=True), SCM(SCHEDULE) if method == "scm" else LightningMSE(SCHEDULE, **in_one_step)
    if method == "rcm":
        rcm = RCM(SCHEDULE, guidance=2.0, every=2, simulated_steps=2)
        return on_one_network(), rcm
    if method in ("flash", "ladd"):
        played: Method = Flash(SCHEDULE, FLASH_STAGES, times=[1000, 500])
        if method == "ladd":
            played = LightningAdversarial(SCHEDULE, **in_one_step, adversarial_loss="hinge")
        return on_one_network(trained="heads"), played
    return None


def build(case: dict[str, Any]) -> tuple[Engine, Method]:
    """A prepared engine and its method for a case."""
    engine = EngineSettings(**case["engine"]).start()
    networks: dict[str, Any] = student(
        case["method"] in ("distance", "critics", "rollout", "dmd2", "sid"), case.get("dropout", 0.0)
    )
    method: Method = LCM(SCHEDULE)
    if case["method"] == "lcm-ema":  # in every step the average takes the weights' place, and gives it back
        networks = student(lora=False, time_cond_proj_dim=6)
        method = Restarted(SCHEDULE, target="ema")
    if case["method"] == "distance":
        method = Distance({int(k): v for k, v in case.get("poison", {}).items()})
    if case["method"] == "rollout":
        method = MLCM(SCHEDULE, ROLLOUT, guidance=1.0)
    if case["method"] in ("tcd", "pcm"):
        networks = on_one_network(trained="heads", levels="all")
        method = TCD(SCHEDULE, stages=TCD_STAGES) if case["method"] == "tcd" else PCM(SCHEDULE, skip=20)  # type: ignore[arg-type]
    if case["method"] == "duel":
        method = Duel()
        networks["discriminator"] = NetworkDenoiser(
            tiny_unet("sdxl", seed=1, **TWO_LEVELS), SCHEDULE, Prediction.EPSILON
        )
    if case["method"] in ("game", "game-lora"):
        method = LightningAdversarial(SCHEDULE, student_steps=4, teacher_steps=8, r1=1.0)
        networks = game(student(lora=case["method"] == "game-lora", taught=True))
    if case["method"] == "one-network":
        method = MLCM(SCHEDULE, STAGES, guidance=2.0, r1=1.0)
        networks = on_one_network()
    if case["method"] == "rectified":
        method = Rectified(SCHEDULE, 50, loss="l2")  # whose milestones are the times of the batches
    if case["method"] in ("critics", "dmd2", "sid"):
        method = {
            "critics": MLCM(SCHEDULE, STAGES, guidance=2.0, r1=1.0),
            "dmd2": DMD2(SCHEDULE, 2, guidance=2.0, every=3, adversarial=0.5, r1=1.0),
            "sid": SiD(SCHEDULE, 2, every=2),
        }[case["method"]]
        networks["discriminator"] = Discriminator(CriticNetwork(tiny_unet("sdxl", seed=1, **TWO_LEVELS), (8, 8)))
        networks["fake_score"] = NetworkDenoiser(tiny_unet("sdxl", seed=2, **TWO_LEVELS), SCHEDULE, Prediction.EPSILON)
    networks, method = along_solves(case["method"]) or (networks, method)
    helpers: dict[str, nn.Module] = {}
    if case["method"] == "rewarded":
        networks = student(lora=True)
        method = MLCM(SCHEDULE, [{**stage, **case.get("stages", {})} for stage in REWARDED], guidance=2.0)
        helpers["reward"] = LatentReward(teacher_with_decoder(), Taste(), slice_size=2)
    rate = LearningRate("cosine", warmup_steps=2, total_steps=20)
    plan = TrainingRecipe(
        OPTIMIZERS[case.get("optimizer", "adamw")],
        lambda step: rate(step) * ((method.learning_rate(step) or 1e-3) / 1e-3),
        ema_decay=0.9,
        multipliers={"cond_proj": 10.0} if case["method"] == "lcm-ema" else {},
    )
    given = {name: trained_copies(networks[name].module) for name in method.trains}
    engine.prepare(networks, dict.fromkeys(method.trains, plan), helpers)
    for name in method.trains:
        for ema in (False, True):
            for weight, value in engine.export_weights(name, ema).items():
                assert torch.equal(value, given[name][weight]), f"{weight} of the {name} is not what was given"
    return engine, method


def trained_copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def run(case: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """Trains a case to its end, or until a signal; all there is to compare is complete on rank 0 only."""
    engine, method = build(case)
    folder = Path(case["run"]) if "run" in case else None
    checkpoints = Checkpoints(folder / "checkpoints") if folder else None
    resumed = checkpoints.resume(engine, case["resume"]) if checkpoints and "resume" in case else None
    step = resumed.step if resumed else 0
    rows: list[dict[str, float]] = []
    unwritten: list[str] = []
    with Preemption(folder or Path(), writes=folder is not None and engine.processes.is_main) as preemption:
        while step < case["steps"] and not (stop := engine.processes.any(preemption.requested)):
            if method.resets(step):
                engine.reset_optimizers()
            row: dict[str, float] = {}
            for turn in method.turns(step):
                row |= engine.updated(turn, micro_batches(engine, step), step)
            rows.append(row)
            step += 1
            if case.get("signal") == [engine.processes.rank, step]:
                os.kill(os.getpid(), signal.SIGTERM)
            if checkpoints and step in case.get("save_at", []):
                try:
                    with unwritable(case.get("unwritable") == [engine.processes.rank, step]):
                        checkpoints.save(engine, step, {"note": f"after {step}"})
                except WriteError as error:
                    unwritten.append(str(error))
        if checkpoints and step < case["steps"] and stop:
            checkpoints.save(engine, step, {"note": "preempted"})
            preemption.mark(step)
    return engine, {
        "scalars": rows,
        "start": resumed.step if resumed else 0,
        "state": dict(resumed.state) if resumed else {},
        "weights": {name: engine.export_weights(name) for name in method.trains},
        "ema": {name: engine.export_weights(name, ema=True) for name in method.trains},
        "ema_output": ema_output(engine),
        "validated": validated(engine) if case.get("validate") else {},
        "cut": cut(engine),
        "unwritten": engine.processes.gathered(unwritten),
        "said": said(engine.processes),
        "engine_state": engine.state_dict(),
    }


def said(processes: Processes) -> list[tuple[bool, bool, bool]]:
    """What the ranks agree on: of a flag on one of them, on all, on none."""
    return [(f(processes.rank == 1), f(True), f(False)) for f in (processes.any, processes.all_agree)]


@contextmanager
def unwritable(on: bool) -> Iterator[None]:
    """Inside, this process cannot write more than a few bytes to any file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def validated(engine: Engine) -> dict[str, float]:
    """What five pictures are worth, which two ranks cannot share evenly; and how three of each prompt differ."""
    conditioning = {key: torch.cat([tiny_conditioning("sdxl", 1, i)[key] for i in range(5)]) for key in KEYS}
    prompts = [f"prompt {i}" for i in range(5)]
    teacher = teacher_with_decoder()
    with engine.inference("student") as denoiser:  # its network without the LoRA, which the ranks share as it is
        base = replace(denoiser, adapter=None)  # type: ignore[type-var]
        ends = teacher_ends(teacher, base, conditioning, validation_seeds(0, 5), 2, engine.processes)
    draws = Validation(teacher, prompts, conditioning, 2, 0, 3, ends=ends, reward=lambda x, p: x.mean((1, 2, 3)))
    return draws(engine, open_trackers({}, Path(), {}, main=False), 1)


def cut(engine: Engine) -> float:
    """The share of the student's trained weights that this rank does not hold whole between steps: ZeRO-3's point."""
    with engine.inference("student") as denoiser:
        weights = [p for p in denoiser.module.parameters() if p.requires_grad]  # type: ignore[attr-defined]
    return sum(p.numel() == 0 for p in weights) / len(weights)


def ema_output(engine: Engine) -> torch.Tensor:
    """What the student's average answers: shows that it reached the network, not only the masters."""
    batch = tiny_batch(0, 0, 2)
    with engine.inference("student", ema=True) as denoiser:
        return denoiser(batch.states[:, 0], batch.times[:, 0], {**batch.conditioning, "guidance": batch.guidance}).eps


def relative_distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all tensors together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return math.sqrt(difference / sum(float(b[name].double().square().sum()) for name in b))


def main(path: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    plan = json.loads(Path(path).read_text())
    for name, case in plan["cases"].items():
        engine, result = run(case)
        if engine.processes.is_main:
            torch.save(result, Path(plan["out"]) / f"{name}.pt")
        engine.close() if engine.processes.world_size == 1 else engine.release()
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
