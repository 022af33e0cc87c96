"""Plain diffusers pipelines for students and teachers: what a user of the exported files runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

SCHEDULERS = {
    "lcm": LCMScheduler,
    "ddim": DDIMScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}


def load_pipeline(
    pretrained_model_name_or_path: str,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """The pipeline as diffusers loads it, with a LoRA file or folder if one is given.

    Raises:
        FileNotFoundError: no pipeline or no LoRA there.
    """
    if lora is not None and not Path(lora).exists() and str(lora).count("/") != 1:
        raise FileNotFoundError(f"lora={lora}: no such file or folder")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            pretrained_model_name_or_path, revision=revision, variant=variant, use_safetensors=True, safety_checker=None
        )
    except OSError as error:
        raise FileNotFoundError(
            f"model.pretrained_model_name_or_path={pretrained_model_name_or_path}: {error}"
        ) from None
    if lora is not None:
        pipeline.load_lora_weights(str(lora), adapter_name="student")
        pipeline.set_adapters(["student"], [lora_scale])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use_sampler(pipeline: Any, sampler: str, spacing: str) -> None:
    """Replaces the scheduler. Chains end at clean data, as they do in training; `lcm` has times of its own."""
    config = pipeline.scheduler.config
    if sampler == "lcm":
        pipeline.scheduler = LCMScheduler.from_config(config)
    elif sampler == "ddim":
        pipeline.scheduler = DDIMScheduler.from_config(
            config, timestep_spacing=spacing, set_alpha_to_one=True, clip_sample=False
        )
    else:
        pipeline.scheduler = SCHEDULERS[sampler].from_config(config, timestep_spacing=spacing)


@torch.no_grad()
def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float = 1.0,
    resolution: int | None = None,
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1], one for each prompt, each from a CPU generator of its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        prompt=list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        height=resolution,
        width=resolution,
        output_type="pt",
    ).images
