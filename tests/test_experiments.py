"""Every experiment at the size it is meant for: on the meta device always, with random weights where it is asked for.

A step at full size runs in a process of its own, whose peak memory is then the step's.
"""

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
from torch import nn

from distill.config.loading import CONFIGS, build, load
from distill.config.settings import TrainSettings
from distill.diffusion.prediction import Prediction
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch
from distill.methods.base import Method
from distill.models.denoiser import NetworkDenoiser
from distill.models.families.base import DEFAULT_PIXELS
from distill.models.families.registry import FAMILIES, published
from distill.models.families.teacher import Teacher
from distill.models.full_size import build_network
from distill.training.engine import EngineSettings
from distill.training.learning_rate import LearningRate
from distill.training.trained_network import TrainingRecipe
from tests.forked import python

ROOT = Path(__file__).resolve().parents[1]
SCHEDULE = NoiseSchedule.scaled_linear()
WRITTEN = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
EXPERIMENTS = [name for name in WRITTEN if name != "quickstart" and not name.endswith("_toy")]
# LCM-LoRA (arXiv 2311.05556) says 67.5 M, 105 M, 197 M; a full network has 256 inputs for w beside its teacher's.
TRAINED = {
    "lcm_lora_sd15": 67_252_224,
    "lcm_lora_ssd1b": 104_902_656,
    "lcm_lora_sdxl": 196_751_360,
    "mlcm_sd15": 67_252_224,
    "mlcm_sdxl": 196_751_360,
    "lightning_sd15": 67_252_224,
    "lightning_sdxl": 196_751_360,
    "lcm_lora_sd3": 83_755_008,
    "lcm_lora_sd35_medium": 93_978_624,
    "lcm_lora_sd35_large": 211_058_688,
    "mlcm_sd35_medium": 93_978_624,
    "lightning_sd35_medium": 93_978_624,
    "lcm_lora_flux_dev": 261_488_640,
    "mlcm_flux_dev": 261_488_640,
    "lightning_flux_dev": 261_488_640,
    "lcm_lora_flux2_klein": 96_337_920,
    "lcm_lora_z_image": 158_760_960,
    "flash_sdxl": 92_897_280,
    "scm_sdxl": 196_751_360,
    "rcm_sdxl": 196_751_360,
    "dmd2_sd15": 859_520_964,
    "dmd2_sdxl": 196_751_360,
    "sid_sd15": 859_520_964,
    "rectified_sd15": 859_520_964,
    "rectified_phased_sdxl": 2_567_463_684,
    "lcm_sd15": 859_520_964 + 256 * 320,
    "lcm_ssd1b": 1_331_334_404 + 256 * 320,
    "lcm_sdxl": 2_567_463_684 + 256 * 320,
    "tcd_sdxl": 196_751_360,
    "tcd_stages_sdxl": 196_751_360,
    "tcd_stages_sd15": 67_252_224,
    "pcm_sdxl": 196_751_360,
    "pcm_sd15": 67_252_224,
}
# Masters, gradients, average and two moments in float32 are 20 bytes a weight: 24 GB hold them for SD 1.5 alone.
GRADIENT_ONLY = ("lcm_ssd1b", "lcm_sdxl")
GIGABYTES = {
    "lcm_lora_sd15": 7.0,
    "lcm_lora_ssd1b": 7.0,
    "lcm_lora_sdxl": 11.0,
    "lcm_sd15": 22.0,
    "lcm_ssd1b": 8.0,
    "lcm_sdxl": 14.0,
}


def settings_of(experiment: str, *overrides: str) -> TrainSettings:
    return load("train", TrainSettings, [f"experiment={experiment}", "data.store=STORE", *overrides])


def published_of(experiment: str) -> str:
    """The published model of an experiment, whose name ends with its name."""
    sizes = [name for family in FAMILIES.values() for name in family.full_size]
    return max((size for size in sizes if experiment.endswith(f"_{size}")), key=len)


def full_size_teacher(experiment: str, device: str, dtype: torch.dtype = torch.float32) -> Teacher:
    """A teacher of the experiment's architecture with random weights, or with none."""
    size = published_of(experiment)
    family, known = published(size)
    network = build_network(family.network.kind, known.network, device=device, dtype=dtype).requires_grad_(False)
    factor = family.latents.factor(known.vae)
    side = family.network.side(network.config) or DEFAULT_PIXELS // factor
    noise = family.noise(known.noise, (side // family.network.patch(network.config)) ** 2)
    return Teacher(
        family=family,
        schedule=NoiseSchedule.of(noise),
        prediction=Prediction(noise.prediction_type),
        noise=noise,
        teacher_id=size,
        resolution=factor * side,
        latent_shape=(family.latents.channels(known.vae), side, side),
        second_pass=family.guidance.form(network.config, {}) == "cfg",
        parts={"network": network},
    )


def networks_of(cfg: TrainSettings, teacher: Teacher) -> tuple[Method, dict[str, NetworkDenoiser]]:
    method: Method = build(cfg.method, schedule=teacher.schedule)
    return method, build(cfg.student).networks(teacher, cfg.seed, "teacher" in method.requires)


def is_lora(cfg: TrainSettings) -> bool:
    return str(cfg.student["_target_"]).endswith("LoRAStudent")


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def test_no_experiment_is_without_its_number() -> None:
    assert TRAINED.keys() == set(EXPERIMENTS)


@pytest.mark.parametrize(
    ("method", "experiment"),
    [
        *((None, name) for name in EXPERIMENTS),
        *(("lcm_noised", name) for name in EXPERIMENTS if name.startswith("lcm")),
    ],
)
def test_an_experiment_builds_at_full_size_and_trains_what_it_says(experiment: str, method: str | None) -> None:
    # an experiment of a method with stages takes as many steps as they do: with another, it is to be told how many
    other = [f"method={method}", "max_train_steps=1000"] if method else []
    cfg = settings_of(experiment, *other)
    asked, networks = networks_of(cfg, full_size_teacher(experiment, "meta"))
    assert networks.keys() >= {"student", *(name for name in asked.requires if not name.endswith("_ema"))}
    assert sum(p.numel() for p in trained(networks["student"].module).values()) == TRAINED[experiment]
    assert cfg.ema_decay is not None or "student_ema" not in asked.requires
    build(cfg.engine)
    LearningRate(cfg.lr_scheduler, cfg.lr_warmup_steps, cfg.max_train_steps)
    assert asked.steps in (None, cfg.max_train_steps)
    if "teacher" in networks and not is_lora(cfg):  # the teacher is another network, and none of it is trained
        assert networks["teacher"].module is not networks["student"].module
        assert not trained(networks["teacher"].module)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", GIGABYTES)
def test_an_experiment_takes_a_step_at_full_size(experiment: str) -> None:
    command = f"from tests.test_experiments import step; step({experiment!r})"
    done = subprocess.run([python(), "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(experiment, report)  # shown by -rP
    assert math.isfinite(report["loss"]) and report["gradients"] == 1
    assert report["peak_gb"] < GIGABYTES[experiment]


def step(experiment: str) -> None:
    """One step at batch 1, latents 32 x 32, in bf16; what it cost, as JSON. LoRA takes the noised source."""
    lora = is_lora(settings_of(experiment))
    cfg = settings_of(experiment, f"method={'lcm_noised' if lora else 'lcm'}", "engine=single", "mixed_precision=bf16")
    gradient_only = experiment in GRADIENT_ONLY
    dtype = torch.bfloat16 if lora or gradient_only else torch.float32
    teacher = full_size_teacher(experiment, "cpu", dtype)
    method, networks = networks_of(cfg, teacher)
    batch = full_size_batch(teacher.network.config, states=1 if lora else 2)
    (turn,) = method.turns(0)
    parameters = trained(networks["student"].module)
    start = time.perf_counter()
    if gradient_only:
        average = {"student_ema": networks["student"]}  # at the first step they are equal
        losses = turn.loss({**networks, **average}, batch, Context(0, 0, batch.positions))
        losses.total.backward()
        loss = losses.total.item()
        reached = [p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters.values()]
    else:
        engine = EngineSettings(mixed_precision="bf16", max_grad_norm=cfg.max_grad_norm).start()
        engine.prepare(networks, {"student": TrainingRecipe(build(cfg.optimizer), ema_decay=cfg.ema_decay)})
        before = [p.detach().flatten()[:4].clone() for p in parameters.values()]
        result = engine.updated(turn, [batch], 0)
        loss = result["loss"]
        moved = [not torch.equal(p.flatten()[:4], b) for p, b in zip(parameters.values(), before, strict=True)]
        # the gradient of a LoRA's A is zero while its B is; cond_proj's inputs may be zero where sin is
        reached = moved[1::2] if lora else moved
        assert result["skipped"] == 0
    report: dict[str, Any] = {
        "loss": loss,
        "gradients": sum(reached) / len(reached),
        "seconds": round(time.perf_counter() - start, 1),
        "trained": sum(p.numel() for p in parameters.values()),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2),
    }
    print(json.dumps(report))


GAMES = {"networks=critics": 11, "networks=adapters": 6}
"""GB at most, of SD 1.5's game with the networks on two UNets, and on one."""


@pytest.mark.slow
@pytest.mark.parametrize("networks", GAMES)
def test_both_turns_of_a_game_are_taken_at_full_size(networks: str) -> None:
    """SD 1.5's LoRA and a conditional discriminator: a link of configs/chain/lightning_sd15.yaml, and for one GPU."""
    command = f"from tests.test_experiments import game; game({networks!r})"
    done = subprocess.run([python(), "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(networks, report)
    assert report["skipped"] == [0, 0]
    # of a LoRA every B: the gradient of an A is zero while its B is
    assert report["moved"]["student"] == 0.5
    assert report["moved"]["discriminator"] == pytest.approx(1 if networks == "networks=critics" else 0.5, abs=0.05)
    assert report["peak_gb"] < GAMES[networks]


def game(group: str) -> None:
    """The discriminator's turn and the student's at batch 1, latents 32 x 32, in bf16; what they cost, as JSON."""
    link = ["method.teacher_steps=8", "method.student_steps=4", "networks.discriminator.conditional=true"]
    cfg = settings_of("lightning_sd15", group, "gradient_checkpointing=true", *link)
    teacher = full_size_teacher("lightning_sd15", "cpu", torch.bfloat16)
    method: Method = build(cfg.method, schedule=SCHEDULE)
    critic = build(cfg.networks["discriminator"]).network(teacher, cfg.seed)
    random = torch.Generator().manual_seed(0)
    nn.init.normal_(critic.module.head.logit.weight, std=0.02, generator=random)  # or only that would move
    networks = {"discriminator": critic, **build(cfg.student).networks(teacher, cfg.seed)}
    engine = EngineSettings(mixed_precision="bf16", gradient_checkpointing=cfg.gradient_checkpointing).start()
    engine.prepare(networks, dict.fromkeys(method.trains, TrainingRecipe(build(cfg.optimizer))))
    parameters = {name: list(trained(networks[name].module).values()) for name in method.trains}
    before = {name: [p.detach().flatten()[:16].clone() for p in ps] for name, ps in parameters.items()}
    batch = full_size_batch(teacher.network.config, states=1)
    start, scalars = time.perf_counter(), {}
    for turn in method.turns(0):
        scalars |= engine.updated(turn, [batch], 0)
    moved = {
        name: [not torch.equal(p.flatten()[:16], b) for p, b in zip(ps, before[name], strict=True)]
        for name, ps in parameters.items()
    }
    report: dict[str, Any] = {
        "losses": [scalars["discriminator/loss"], scalars["student/loss"]],
        "skipped": [scalars["discriminator/skipped"], scalars["student/skipped"]],
        "moved": {name: sum(flags) / len(flags) for name, flags in moved.items()},
        "trained": {name: sum(p.numel() for p in ps) for name, ps in parameters.items()},
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2),
    }
    print(json.dumps(report))


def full_size_batch(config: Any, states: int) -> Batch:
    """A clean latent or a pair, 77 tokens, and for the XL networks pooled embeddings and time ids."""
    random = torch.Generator().manual_seed(0)
    text = {"encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim, generator=random)}
    sizes = {}
    if config.addition_embed_type:
        text["text_embeds"] = torch.randn(1, 1280, generator=random)
        sizes["time_ids"] = torch.tensor([[256.0, 256, 0, 0, 256, 256]])
    return Batch(
        states=torch.randn(1, states, config.in_channels, 32, 32, generator=random),
        times=torch.tensor([[500, 400]])[:, 2 - states :],
        conditioning=text | sizes,
        unconditional={key: torch.zeros_like(tensor) for key, tensor in text.items()},
        guidance=torch.tensor([7.5]),
        positions=(0,),
    )
