"""What is the flow teacher's own in `distill study toy_teacher`: its VAE, its loss and how it is sampled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from distill.diffusion.random import generator
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.toy.teacher import Pipeline
from distill.toy.teacher_flow import SHIFT, T5_TOKENS, build_flow_pipeline, encode_for_flow, fold_quant_convs
from distill.toy.world import CAPTIONS, balanced_labels, render

PROMPTS = [*CAPTIONS, ""]  # the last is what a dropped caption becomes
LONGEST = 256  # T5 tokens that a stock pipeline reads unless it is told otherwise
SCHEDULE = NoiseSchedule.linear(SHIFT)


@torch.no_grad()
def untrained_flow_pipeline(vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """The untrained pipeline around a trained VAE. Its shift and scale are measured: scaled latents have mean 0 and
    variance 1."""
    folded = fold_quant_convs(vae)
    latents = folded.encode(render(balanced_labels(2000), generator(seed, "scale"))).latent_dist.mean
    folded.register_to_config(
        shift_factor=round(latents.mean().item(), 5), scaling_factor=round(1 / latents.std().item(), 5)
    )
    return build_flow_pipeline(folded)


def random_times(count: int, random: torch.Generator) -> Tensor:
    """Times [count] in 1 ... T, stratified: half of them even in t, for both ends, and half logit-normal in sigma."""
    even = count // 2
    share = (torch.arange(even) + torch.rand(even, generator=random)) / even
    rest = (torch.arange(count - even) + torch.rand(count - even, generator=random)) / (count - even)
    sigma = torch.special.ndtri(rest.double().clamp(1e-6, 1 - 1e-6)).sigmoid().float()
    share = torch.cat([share, sigma / (SHIFT - (SHIFT - 1) * sigma)])
    return (share * SCHEDULE.T).long().clamp(max=SCHEDULE.T - 1) + 1


def flow_matching_loss(pipeline: Pipeline, clean: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
    """Squared error of v = eps - x_0; a tenth of the captions is dropped to the encoded empty one, as SD3 does.

    SD3's transformer attends to the T5's padding. So that pictures do not depend on its length, one step in sixteen
    reads some other length than the toy's own, on a quarter of the batch.
    """
    tokens = T5_TOKENS
    if torch.rand((), generator=random) < 1 / 16:
        tokens = int(torch.randint(T5_TOKENS, LONGEST + 1, (), generator=random))
        clean, labels = clean[::4], labels[::4]
    count = len(clean)
    times = random_times(count, random)
    noise = torch.randn(clean.shape, generator=random)
    dropped = torch.rand(count, generator=random) < 0.1
    learning = next(pipeline.text_encoder.parameters()).requires_grad
    with torch.set_grad_enabled(learning and torch.is_grad_enabled()):
        prompt, pooled = encode_for_flow(pipeline, PROMPTS, tokens)  # all of them: there are few
    chosen = torch.where(dropped, len(CAPTIONS), labels)
    noisy = add_noise(SCHEDULE, clean, noise, times)
    return F.mse_loss(velocity(pipeline, noisy, SCHEDULE.told(times), prompt[chosen], pooled[chosen]), noise - clean)


def velocity(pipeline: Pipeline, x: Tensor, told: Tensor, prompt: Tensor, pooled: Tensor) -> Tensor:
    """What the transformer predicts at x [B, 4, 8, 8]; `told` [B] is 1000 sigma."""
    return pipeline.transformer(x, prompt, pooled, told).sample


@torch.no_grad()
def generate_flow_images(
    pipeline: Pipeline, count: int, seed: int, steps: int, spacing: str, guidance: float
) -> Tensor:
    """Pictures [count, 3, 32, 32] of balanced captions by Euler, the pipeline's own arithmetic without its overhead.

    `spacing` is trailing, sigmas of 1, 1 - 1/steps … shifted once, or default, the scheduler's own grid, which it
    shifts twice.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    trailing = [1 - i / steps for i in range(steps)] if spacing == "trailing" else None
    prompt, pooled = encode_for_flow(pipeline, PROMPTS)
    labels = balanced_labels(count)
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    pictures = []
    for latents, part in zip(noise.split(250), labels.split(250), strict=True):
        scheduler.set_timesteps(steps, sigmas=trailing)
        none = torch.full_like(part, len(CAPTIONS))
        for timestep in scheduler.timesteps:
            told = timestep.expand(len(part))
            estimate = velocity(pipeline, latents, told, prompt[part], pooled[part])
            if guidance != 1.0:
                bare = velocity(pipeline, latents, told, prompt[none], pooled[none])
                estimate = bare + guidance * (estimate - bare)
            latents = scheduler.step(estimate, timestep, latents).prev_sample
        config = pipeline.vae.config
        latents = latents / config["scaling_factor"] + config["shift_factor"]
        pictures.append(pipeline.vae.decode(latents).sample.clamp(-1, 1))
    return torch.cat(pictures)
