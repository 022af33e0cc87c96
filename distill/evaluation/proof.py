"""The proof that exported files are right: a plain diffusers pipeline draws what our own sampler draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from distill.evaluation.pipelines import draw, load_pipeline, sampling_of, timesteps_of, use_sampler


def plain_pipeline_agrees(
    pretrained_model_name_or_path: str,
    lora: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    expected: Tensor,
    guidance: float = 1.0,
) -> float:
    """The greatest difference of any pixel between our sampler's pictures and those of diffusers' own pipeline.

    `expected` [B, 3, H, W] in [-1, 1] are ours; the pipeline draws with the scheduler that the export asks for, or with
    LCMScheduler, after `load_lora_weights(lora)` or with the UNet of an exported network. `guidance` is for one that
    takes it as an input.

    Raises:
        ValueError: not one prompt and seed a picture, or pictures of another size.
    """
    if not len(prompts) == len(seeds) == len(expected):
        raise ValueError(
            f"{len(expected)} pictures need as many prompts and seeds, got {len(prompts)} and {len(seeds)}"
        )
    pipeline = load_pipeline(str(pretrained_model_name_or_path), lora)
    sampling = sampling_of(lora)
    if sampling is None:
        use_sampler(pipeline, "lcm", "lcm")
    times = timesteps_of(pipeline, "lcm" if sampling is None else sampling.spacing, steps)
    drawn = draw(pipeline, prompts, seeds, steps, guidance, timesteps=times) * 2 - 1
    if drawn.shape != expected.shape:
        raise ValueError(f"the pipeline draws {tuple(drawn.shape)}, expected are {tuple(expected.shape)}")
    return float((drawn.float().cpu() - expected.cpu()).abs().max())
