"""`distill benchmark lcm`: LCM-LoRA's step here, from either source, beside the step of the usual scripts.

The usual step (diffusers' examples/consistency_distillation, written here from its description) encodes the raw picture
and the prompt, calls a second copy of the UNet with the prompt and without it one after the other, and then trains.
Each variant runs in processes of its own, in turn, so that its peak memory is its own. Networks are of the real sizes,
with random weights; pictures are in memory already, so that reading and decoding them costs the usual step nothing.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from distill.benchmarks.common import SCHEDULE, machine, peak_memory, random_store, timed, toy_unet
from distill.benchmarks.networks import MODELS
from distill.data.loader import make_loader
from distill.diffusion.prediction import Prediction
from distill.methods.lcm import LCM
from distill.models.denoiser import NetworkDenoiser
from distill.models.devices import own_device
from distill.models.families.loading import load_teacher
from distill.models.families.unet import LCM_LORA_TARGETS
from distill.models.full_size import build_unet, unet_config
from distill.models.lora import ADAPTER, add_lora
from distill.toy.teacher import teacher_folder
from distill.training.engine import EngineSettings
from distill.training.trained_network import TrainingRecipe

VARIANTS = ("recipe", "noised", "trajectory")
TARGETS = {"noised": 1.25, "trajectory": 1.8}
SIZES: dict[str, dict[str, Any]] = {
    "toy": {"latent": 8, "pixels": 32, "tokens": 8, "batch_size": 64, "repeats": 20, "rank": 64},
    "sd15": {"latent": 32, "pixels": 256, "tokens": 77, "batch_size": 1, "repeats": 3, "rank": 64},
}


def compare(size: str, rounds: int, repeats: int) -> None:
    """Runs the variants in turn, `rounds` times, and prints the table."""
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            command = [sys.executable, "-m", "distill.benchmarks.lcm_recipe", variant, size, str(repeats)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
    B, side = SIZES[size]["batch_size"], SIZES[size]["latent"]
    (device,) = {run["device"] for runs in found.values() for run in runs}  # one, or nothing is compared
    where = f"{rounds} x {repeats} steps, medians, {machine(device)}"
    print(f"{size}, batch {B}, latents {side} x {side}, float32, {where}")
    print("| step | samples/s | times the recipe's | peak memory, GiB | of the recipe's | outside the networks |")
    print("|---|--:|--:|--:|--:|--:|")
    recipe = summary(found["recipe"])
    for variant in VARIANTS:
        mine = summary(found[variant])
        speed, memory = recipe["seconds"] / mine["seconds"], mine["peak_gib"] / recipe["peak_gib"]
        goal = f" (goal {TARGETS[variant]})" if size == "sd15" and variant in TARGETS else ""
        outside = "" if variant == "recipe" else f"{100 * mine['outside']:.1f} %"
        print(
            f"| {variant} | {B / mine['seconds']:.3f} | {speed:.2f}{goal} | {mine['peak_gib']:.2f} "
            f"| {memory:.2f} | {outside} |"
        )


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    steps = [step for run in runs for step in run["steps"]]
    return {
        "seconds": median(step["seconds"] for step in steps),
        "outside": median(step["outside"] / step["seconds"] for step in steps),
        "peak_gib": max(run["peak_gib"] for run in runs),
    }


def run(variant: str, size: str, repeats: int) -> None:
    """Takes the steps of one variant; prints each one's seconds, those outside the networks, and the peak memory."""
    what = SIZES[size]
    unet = toy_unet() if size == "toy" else build_unet(unet_config("sd15"))
    with peak_memory() as on_gpu, clocked(unet) as inside, steps_of(variant, size, unet, what) as step:
        steps = []
        for i in range(repeats + 1):
            inside[0] = 0.0
            took, _ = timed(partial(step, i))
            steps.append({"seconds": took, "outside": took - inside[0]})
    peak = on_gpu.get("peak_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)
    device = str(next(unet.parameters()).device)
    print(json.dumps({"steps": steps[1:], "peak_gib": peak, "device": device}))  # the first one allocates


@contextmanager
def clocked(*modules: nn.Module) -> Iterator[list[float]]:
    """Adds up the seconds inside the forward of `modules` and inside backward passes; on a GPU it waits for each."""
    seconds = [0.0]

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            took, result = timed(partial(work, *args, **kwargs))
            seconds[0] += took
            return result

        return call

    before = torch.autograd.backward
    for module in modules:
        module.forward = counted(module.forward)
    torch.autograd.backward = counted(before)
    try:
        yield seconds
    finally:
        torch.autograd.backward = before


@contextmanager
def steps_of(
    variant: str, size: str, unet: UNet2DConditionModel, what: dict[str, Any]
) -> Iterator[Callable[[int], None]]:
    if variant == "recipe":
        yield recipe_of(size, unet, what, own_device()).step
        return
    side, B = what["latent"], what["batch_size"]
    add_lora(unet, rank=what["rank"], alpha=what["rank"])
    views = {"student": ADAPTER, "teacher": None}
    networks = {n: NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON, adapter=a) for n, a in views.items()}
    method = LCM(SCHEDULE, variant)
    engine = EngineSettings(kind="single").start()
    engine.prepare(networks, {"student": TrainingRecipe(partial(torch.optim.AdamW, lr=1e-4, fused=True))})
    (turn,) = method.turns(0)
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(folder, dict(unet.config), (side, side), what["tokens"], samples=max(64, B))
        batches = iter(make_loader(store, method.reads, seed=0, global_batch_size=B, micro_batch_size=B, num_workers=1))

        def step(number: int) -> None:
            engine.updated(turn, [next(batches)], number)

        yield step


class Recipe:
    """The usual script's step: everything that it does between reading a batch and the next one.

    Args:
        unet: which gets the LoRA that is trained.
        teacher: a second copy of it.
        vae, encoders: of the pictures and the prompts; all networks are on one device, which everything else follows.
        batch_size, pixels, tokens: of what they are shown.
        rank: of the LoRA.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        vae: AutoencoderKL,
        encoders: Sequence[nn.Module],
        batch_size: int,
        pixels: int,
        tokens: int,
        rank: int,
    ) -> None:
        self.teacher, self.vae, self.encoders = teacher, vae, encoders
        self.batch_size, self.pixels, self.tokens = batch_size, pixels, tokens
        self.device, self.dtype = unet.device, unet.dtype
        for module in (self.teacher, unet, self.vae, *self.encoders):
            module.requires_grad_(False)
        known = [t for t in LCM_LORA_TARGETS if any(f".{n}".endswith(f".{t}") for n, _ in unet.named_modules())]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=known)
        self.student = get_peft_model(unet, config)  # type: ignore[arg-type]
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)
        self.abar = SCHEDULE.alphas_cumprod[1:].float().to(self.device)  # by network index
        self.times = torch.arange(1, 51, device=self.device) * 20 - 1
        self.abar_before = torch.cat([self.abar[:1], self.abar[self.times[:-1]]])
        self.empty = self.encode(torch.zeros(1, tokens, dtype=torch.int64, device=self.device))

    def step(self, i: int) -> None:
        B, side, device = self.batch_size, self.pixels, self.device
        pictures = (torch.rand(B, 3, side, side) * 2 - 1).to(device, self.vae.dtype)
        tokens = torch.randint(1, 60, (B, self.tokens)).to(device)
        with torch.no_grad():
            parts = [self.vae.encode(few).latent_dist.sample() for few in pictures.split(8)]
            z0 = torch.cat(parts).float() * self.vae.config["scaling_factor"]
            text = self.encode(tokens)
        index = torch.randint(0, 50, (B,)).to(device)
        start, end = self.times[index], (self.times[index] - 20).clamp(min=0)
        w = (12 * torch.rand(B) + 3)[:, None, None, None].to(device)
        alpha, sigma = self.wide(self.abar[start].sqrt()), self.wide((1 - self.abar[start]).sqrt())
        z = alpha * z0 + sigma * torch.randn_like(z0)

        prediction = self.consistency(z, start, text)
        with torch.no_grad():
            cond = self.call(self.teacher, z, start, text)
            empty = {k: v.expand(B, *v.shape[1:]) for k, v in self.empty.items()}
            uncond = self.call(self.teacher, z, start, empty)
            eps = cond + w * (cond - uncond)
            x0 = (z - sigma * eps) / alpha
            before = self.wide(self.abar_before[index])
            target = self.consistency(before.sqrt() * x0 + (1 - before).sqrt() * eps, end, text)
        loss = (((prediction - target) ** 2 + 0.001**2).sqrt() - 0.001).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item())

    def consistency(self, z: Tensor, index: Tensor, text: dict[str, Tensor]) -> Tensor:
        scaled = self.wide(10.0 * index.float())
        alpha, sigma = self.wide(self.abar[index].sqrt()), self.wide((1 - self.abar[index]).sqrt())
        x0 = (z - sigma * self.call(self.student, z, index, text)) / alpha
        return 0.25 / (scaled**2 + 0.25) * z + scaled / (scaled**2 + 0.25).sqrt() * x0

    def call(self, unet: nn.Module, z: Tensor, index: Tensor, text: dict[str, Tensor]) -> Tensor:
        added = {k: v for k, v in text.items() if k != "encoder_hidden_states"}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = unet(z.to(self.dtype), index, text["encoder_hidden_states"], added_cond_kwargs=added or None)
        return found.sample.float()

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        if len(outputs) == 1:
            return {"encoder_hidden_states": outputs[0].last_hidden_state}
        side = float(self.pixels)
        return {
            "encoder_hidden_states": torch.cat([o.hidden_states[-2] for o in outputs], dim=-1),
            "text_embeds": outputs[-1].text_embeds,
            "time_ids": torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(len(tokens), 1).to(self.device),
        }

    def wide(self, x: Tensor) -> Tensor:
        return x[:, None, None, None]


def recipe_of(size: str, unet: UNet2DConditionModel, what: dict[str, Any], device: torch.device) -> Recipe:
    """The usual step with networks of a size, all of them on the device that the other variants train on."""
    if size == "toy":
        parts = load_teacher(teacher_folder(), parts=("network", "text", "vae")).to(device)
        teacher, vae = parts.network, parts.vae
        encoders: list[nn.Module] = [tower.encoder for tower in parts.text]
    else:
        model = MODELS[size]
        teacher = model.build_unet(device, torch.float32)
        vae, encoders = model.build_vae(device, torch.float32), model.build_encoders(device, torch.float32)
    nn.Module.to(unet, device)
    shown = {name: what[name] for name in ("batch_size", "pixels", "tokens", "rank")}
    return Recipe(unet, teacher, vae, encoders, **shown)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
