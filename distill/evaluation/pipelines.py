"""Plain diffusers pipelines for students and teachers: what a user of the exported files runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from torch import Tensor

from distill.diffusion.prediction import Prediction
from distill.diffusion.solver import milestone_times
from distill.methods.sampling import Sampling
from distill.models.exported import FACTS, read_export
from distill.models.lora import LORA_FILE
from distill.models.schedulers import make_scheduler


def load_pipeline(
    pretrained_model_name_or_path: str,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    revision: str | None = None,
    variant: str | None = None,
    own_scheduler: bool = False,
) -> Any:
    """The pipeline as diffusers loads it, with a LoRA file or folder if one is given.

    Instead of a LoRA, the export of a student that is a whole network (a folder with `unet`) replaces the pipeline's
    network. An export's scheduler is the one that it asks for; with `own_scheduler` a LoRA's stays the model's own.

    Raises:
        FileNotFoundError: no pipeline or no LoRA there.
        ValueError: an export that is not readable.
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
        draw_as_exported(pipeline, lora)
    elif lora is not None:
        named = {"weight_name": LORA_FILE} if (Path(lora) / LORA_FILE).is_file() else {}  # diffusers 0.38 asks offline
        pipeline.load_lora_weights(str(lora), adapter_name="student", **named)
        pipeline.set_adapters(["student"], [lora_scale])
        if not own_scheduler and sampling_of(lora):
            draw_as_exported(pipeline, lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _is_network(folder: Path) -> bool:
    return (folder / "unet").is_dir() and not list(folder.glob("*.safetensors"))


def sampling_of(folder: str | Path) -> Sampling | None:
    """How the student in an export's folder is drawn, of a whole pipeline's too; None for any other folder or file.

    Raises:
        ValueError: an export that is not readable.
    """
    return Sampling(**read_export(folder).sampling) if (Path(folder) / FACTS).is_file() else None


def draw_as_exported(pipeline: Any, folder: str | Path) -> None:
    """Gives the pipeline an exported student's scheduler: LCM's where nothing is said."""
    sampling = sampling_of(folder)
    if sampling is None:
        use_sampler(pipeline, "lcm", "lcm")
    else:
        use_sampler(pipeline, sampling.sampler, sampling.spacing, read_export(folder).prediction)


def use_sampler(pipeline: Any, sampler: str, spacing: str, prediction: Prediction | None = None) -> None:
    """Replaces the scheduler by that of `scheduler_settings`.

    For `milestones`, which no scheduler knows by name, `draw` has to be given `milestone_steps`.

    Raises:
        ValueError: a sampler or a spacing that is not known, or that do not go together.
    """
    Sampling(sampler, spacing)
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, sampler, spacing, prediction)


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
    """Whether a pipeline is a student as it was loaded: it has a LoRA, or comes with LCM's sampler.

    An export's folder says it for sure (`sampling_of`).
    """
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
