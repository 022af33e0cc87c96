"""Plain diffusers pipelines for students and teachers: what a user of the exported files runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler
from torch import Tensor, nn

from distill.diffusion.noise import AnyNoise, FlowNoise
from distill.diffusion.prediction import Prediction
from distill.methods.sampling import Sampling
from distill.models.derived import WeightedLoRA
from distill.models.exported import FACTS, read_export
from distill.models.families.base import DEFAULT_PIXELS, Family, Size
from distill.models.families.loading import load_network, open_pipeline
from distill.models.families.registry import FAMILIES, family_of_network, network_of
from distill.models.families.teacher import DECODED_PIXELS
from distill.models.lora_files import put_lora, use_weights
from distill.models.schedulers import make_scheduler, noise_of, sigmas_for, timesteps_for

SIDES = 8
"""The pipelines of diffusers take sides that are multiples of it, whatever their autoencoder makes of them."""

_BESIDE = "beside"  # how adapters are called that are no student's


def load_pipeline(
    pretrained_model_name_or_path: str,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    revision: str | None = None,
    variant: str | None = None,
    own_scheduler: bool = False,
    beside: Sequence[WeightedLoRA] = (),
) -> Any:
    """A stock diffusers pipeline of the folder's or repository's parts, with a LoRA file or folder if one is given.

    Its networks are frozen: torch multiplies in another way, which rounds otherwise, where a weight could be trained,
    and diffusers freezes a network when it loads a LoRA into it. So, with the LoRA off, it is the same to the bit.

    Instead of a LoRA, the export of a student that is a full network (a folder with `unet` or `transformer`) replaces
    the pipeline's network. An export's scheduler is the one that it names; with `own_scheduler` a LoRA's stays the
    model's own. Further LoRAs, `beside` it, have weights of their own and no say in how the pipeline samples.

    Raises:
        FileNotFoundError: no pipeline or no LoRA there.
        ValueError: a pipeline that `check_pipeline` refuses, an export that is not readable, or a LoRA or a network of
            another model.
    """
    if lora is not None and not Path(lora).exists() and str(lora).count("/") != 1:
        raise FileNotFoundError(f"lora={lora}: no such file or folder")
    pipeline, described = open_pipeline(str(pretrained_model_name_or_path), revision, variant)
    if lora is not None and _is_network(Path(lora)):
        use_network(pipeline, Path(lora), described.family)
        use_export_sampler(pipeline, lora)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    weights = {}
    if lora is not None and not _is_network(Path(lora)):
        put_lora(pipeline, lora, described.family, "student")
        weights["student"] = lora_scale
        if not own_scheduler and sampling_of(lora):
            use_export_sampler(pipeline, lora)
    for i, one in enumerate(beside):
        put_lora(pipeline, one.path, described.family, f"{_BESIDE}{i}", "loras")
        weights[f"{_BESIDE}{i}"] = one.weight
    if weights:
        use_weights(pipeline, weights)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use_network(pipeline: Any, folder: Path, family: Family) -> None:
    """Puts an export's whole network in the place of a pipeline's.

    Raises:
        FileNotFoundError, ValueError: see `load_network`.
    """
    network = load_network(folder, family, network_of(pipeline).config, torch.float32)
    pipeline.register_modules(**{family.network.folder: network})


def _is_network(folder: Path) -> bool:
    there = any((folder / family.network.folder).is_dir() for family in FAMILIES.values())
    return there and not list(folder.glob("*.safetensors"))


def sampling_of(folder: str | Path) -> Sampling | None:
    """How the student in an export's folder is sampled, that of a pipeline too; None for any other folder or file.

    Raises:
        ValueError: an export that is not readable.
    """
    return Sampling(**read_export(folder).sampling) if (Path(folder) / FACTS).is_file() else None


def use_export_sampler(pipeline: Any, folder: str | Path) -> None:
    """Gives the pipeline an exported student's scheduler: LCM's where nothing is said."""
    sampling = sampling_of(folder)
    if sampling is None:
        use_sampler(pipeline, "lcm", "lcm")
    else:
        said = read_export(folder)
        use_sampler(pipeline, sampling.sampler, sampling.spacing, said.prediction, sampling.steps, said.shift)


def use_sampler(
    pipeline: Any,
    sampler: str,
    spacing: str,
    prediction: Prediction | None = None,
    steps: int | None = None,
    shift: float | None = None,
    size: Size | int | None = None,
) -> None:
    """Replaces the scheduler by that of `scheduler_settings`, which keeps the noise of the old one and nothing else.

    With `steps` it is for that number alone; without, for any. `shift` takes the place of flow matching's own; where
    that depends on the picture's size, `size`, (height, width) or a square's side, says which one it is, and None is
    the pipeline's own. A call of the pipeline has to be given `arguments_of`.

    Raises:
        ValueError: a sampler or a spacing that is not known, that do not go together, or not on this noise.
    """
    noise = noise_of(pipeline.scheduler).at(shift=shift)
    if isinstance(noise, FlowNoise) and noise.shift is None:
        noise = _settled(pipeline, noise, size)
    pipeline.scheduler = make_scheduler(noise, sampler, spacing, prediction, steps)


def _settled(pipeline: Any, noise: FlowNoise, size: Size | int | None) -> AnyNoise:
    """The noise of pictures of a size, whose shift depends on that."""
    network = network_of(pipeline)
    family, side = family_of_network(network), size or _side(pipeline)
    height, width = (side, side) if isinstance(side, int) else side
    token = family.latents.factor(pipeline.vae.config) * family.network.patch(network.config)
    return family.noise(noise, (height // token) * (width // token))


def arguments_of(
    pipeline: Any, spacing: str, steps: int, max_tokens: int | None = None, gamma: float = 0.0
) -> dict[str, Any]:
    """What a call of the pipeline needs beside the number of steps after `use_sampler` with this spacing, if anything:
    `timesteps`, or `sigmas` of flow matching; `eta`, the sampler's `gamma`; and the length of a prompt, if that is not
    the pipeline's own.

    Raises:
        ValueError: more steps than the spacing has times; `max_tokens` that the pipeline does not take.
    """
    family = family_of_network(network_of(pipeline))
    times = {
        "timesteps": timesteps_for(pipeline.scheduler, spacing, steps),
        "sigmas": sigmas_for(pipeline.scheduler, spacing, steps),
        "eta": gamma or None,  # 0 is what pipelines take where nothing is said
        "max_sequence_length": None if max_tokens is None else family.text.prompt_tokens(max_tokens),
    }
    return {name: value for name, value in times.items() if value is not None}


def use_adapters(pipeline: Any, weights: Mapping[str, float]) -> None:
    """Switches on these LoRAs, by adapter name and with these weights, and no others; without any, the bare network
    computes as if none had been loaded, to the bit."""
    if weights:
        pipeline.enable_lora()
        pipeline.set_adapters(list(weights), list(weights.values()))
    elif pipeline.get_list_adapters():
        pipeline.disable_lora()


def is_student(pipeline: Any) -> bool:
    """Whether a pipeline is a student as it was loaded: it has a student's LoRA, or comes with LCM's sampler.

    An export's folder says it for sure (`sampling_of`).
    """
    adapters = {name for names in pipeline.get_list_adapters().values() for name in names}
    own = any(not name.startswith(_BESIDE) for name in adapters)
    return own or isinstance(pipeline.scheduler, (LCMScheduler, FlowMatchLCMScheduler))


def embeds_guidance(pipeline: Any) -> bool:
    """Whether guidance is an input of the network: then it costs nothing, and a negative prompt does nothing."""
    network = network_of(pipeline)
    return family_of_network(network).guidance.taken(network.config)


def images_at_once(resolution: int) -> int:
    """How many guided pictures of `resolution` a GPU of 24 GB generates at once in float16; at most 100."""
    return max(1, min(100, 4 * 1024**2 // resolution**2))


@torch.no_grad()
def generate_images(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float = 1.0,
    resolution: int | tuple[int, int] | None = None,
    negative_prompt: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1], one for each prompt, each from a CPU generator of its own seed.

    `resolution` is the side of a square or (height, width), in pixels; None takes the pipeline's own. `arguments`
    are those of `arguments_of`. Large pictures are decoded one after another.

    Where the scheduler adds noise by torch's global generator, because its pipeline hands it no other, that one is set
    by the first seed for the call.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution or (None, None)
    own = _side(pipeline)
    if len(prompts) * (height or own) * (width or own) > DECODED_PIXELS:
        pipeline.vae.enable_slicing()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scale = family_of_network(network_of(pipeline)).guidance.to_pipeline(guidance)
    negative = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * len(prompts)}
    with _global_noise(pipeline, seeds[0]):
        return pipeline(
            prompt=list(prompts),
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=generators,
            height=height,
            width=width,
            output_type="pt",
            **negative,
            **(arguments or {}),
        ).images


@contextmanager
def _global_noise(pipeline: Any, seed: int) -> Iterator[None]:
    """Where a scheduler of flow matching adds noise, its pipeline hands it no generator."""
    if not isinstance(pipeline.scheduler, FlowMatchLCMScheduler):
        yield
        return
    device = pipeline.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def takes_negative_prompts(pipeline: Any) -> bool:
    """Whether a pipeline can be called with a negative prompt; that of FLUX.2 klein cannot."""
    return "negative_prompt" in signature(type(pipeline).__call__).parameters


def side_multiple(pipeline: Any) -> int:
    """Of which whole number of pixels the sides of its pictures are multiples."""
    network = network_of(pipeline)
    family = family_of_network(network)
    return math.lcm(SIDES, family.latents.factor(pipeline.vae.config) * family.network.patch(network.config))


def _side(pipeline: Any) -> int:
    """Of the pictures that a pipeline generates by itself, in pixels."""
    network = network_of(pipeline)
    side = family_of_network(network).network.side(network.config)
    return DEFAULT_PIXELS if side is None else side * pipeline.vae_scale_factor


def plain_pipeline_agrees(
    pretrained_model_name_or_path: str,
    lora: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    expected: Tensor,
    guidance: float = 1.0,
    max_tokens: int | None = None,
) -> float:
    """The greatest difference of any pixel between our sampler's pictures and those of diffusers' own pipeline: the
    proof that exported files are right.

    `expected` [B, 3, H, W] in [-1, 1] are ours; the pipeline samples with the scheduler that the export names, or with
    LCMScheduler, after `load_lora_weights(lora)` or with the network of an export. `guidance` is for one that
    takes it as an input, `max_tokens` for prompts of another length than the pipeline's own.

    Raises:
        ValueError: not one prompt and seed per picture, or pictures of another size.
    """
    if not len(prompts) == len(seeds) == len(expected):
        raise ValueError(
            f"{len(expected)} pictures need as many prompts and seeds, got {len(prompts)} and {len(seeds)}"
        )
    pipeline = load_pipeline(str(pretrained_model_name_or_path), lora)
    sampling = sampling_of(lora)
    if sampling is None:
        use_sampler(pipeline, "lcm", "lcm")
    how = Sampling() if sampling is None else sampling
    arguments = arguments_of(pipeline, how.spacing, steps, max_tokens, how.gamma)
    images = generate_images(pipeline, prompts, seeds, steps, guidance, arguments=arguments) * 2 - 1
    if images.shape != expected.shape:
        raise ValueError(f"the pipeline generates {tuple(images.shape)}, expected are {tuple(expected.shape)}")
    return float((images.float().cpu() - expected.cpu()).abs().max())
