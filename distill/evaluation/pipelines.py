"""Plain diffusers pipelines for students and teachers: what a user of the exported files runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from distill.diffusion.solver import milestone_times

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

    Instead of a LoRA, the export of a student that is a whole network (a folder with `unet`) replaces the pipeline's
    network, and the sampler becomes LCM's.

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
    if lora is not None and _is_network(Path(lora)):
        pipeline.register_modules(unet=UNet2DConditionModel.from_pretrained(lora, subfolder="unet"))
        use_sampler(pipeline, "lcm", "lcm")
    elif lora is not None:
        pipeline.load_lora_weights(str(lora), adapter_name="student")
        pipeline.set_adapters(["student"], [lora_scale])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _is_network(folder: Path) -> bool:
    return (folder / "unet").is_dir() and not list(folder.glob("*.safetensors"))


def use_sampler(pipeline: Any, sampler: str, spacing: str) -> None:
    """Replaces the scheduler. Chains end at clean data, as they do in training; `lcm` has times of its own.

    For `milestones`, which no scheduler knows by name, `draw` has to be given `milestone_steps`.
    """
    config = pipeline.scheduler.config
    if sampler == "ddim" and spacing == "milestones":  # the same steps, by a scheduler that takes times from outside
        pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="leading")
        return
    if sampler == "lcm":
        pipeline.scheduler = LCMScheduler.from_config(config)
    elif sampler == "ddim":
        pipeline.scheduler = DDIMScheduler.from_config(
            config, timestep_spacing=spacing, set_alpha_to_one=True, clip_sample=False
        )
    else:
        pipeline.scheduler = SCHEDULERS[sampler].from_config(config, timestep_spacing=spacing)


def milestone_steps(pipeline: Any, steps: int) -> list[int]:
    """The `timesteps` of MLCM's samplers, as a diffusers pipeline wants them: network indices, which are one less."""
    return [t - 1 for t in milestone_times(pipeline.scheduler.config.num_train_timesteps, steps)[:-1]]


def use_adapters(pipeline: Any, weights: Mapping[str, float]) -> None:
    """Switches on these LoRAs, by adapter name and with these weights, and no others; without any, the bare network
    computes as if none had been loaded, to the bit."""
    if weights:
        pipeline.enable_lora()
        pipeline.set_adapters(list(weights), list(weights.values()))
    elif pipeline.get_list_adapters():
        pipeline.disable_lora()


def is_student(pipeline: Any) -> bool:
    """Whether a pipeline is a student as it was loaded: it has a LoRA, or comes with LCM's sampler."""
    return bool(pipeline.get_list_adapters()) or isinstance(pipeline.scheduler, LCMScheduler)


def embeds_guidance(pipeline: Any) -> bool:
    """Whether guidance is an input of the network: then it costs nothing, and a negative prompt does nothing."""
    return pipeline.unet.config.get("time_cond_proj_dim") is not None


@torch.no_grad()
def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float = 1.0,
    resolution: int | None = None,
    negative_prompt: str | None = None,
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1], one for each prompt, each from a CPU generator of its own seed.

    `timesteps` take the place of the scheduler's own.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    times = {} if timesteps is None else {"timesteps": list(timesteps)}
    return pipeline(
        prompt=list(prompts),
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        height=resolution,
        width=resolution,
        output_type="pt",
        **times,
    ).images
