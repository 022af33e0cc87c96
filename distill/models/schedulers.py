"""The diffusers scheduler that draws as our own sampler of a name does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)

from distill.diffusion.prediction import Prediction

_CLASSES = {
    "lcm": LCMScheduler,
    "euler": EulerDiscreteScheduler,
    "ddim": DDIMScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}


def scheduler_settings(sampler: str, spacing: str, prediction: Prediction | None = None) -> tuple[Any, dict[str, Any]]:
    """The class, and what has to be said to its `from_config` beside another scheduler's config.

    Chains end at clean data, as they do in training. `lcm` has times of its own. For `milestones`, which no scheduler
    knows by name, the pipeline has to be given the times. Without `prediction` it stays the config's.
    """
    said: dict[str, Any] = {"prediction_type": prediction.value} if prediction else {}
    if sampler == "lcm":
        return LCMScheduler, said
    if sampler == "ddim" and spacing == "milestones":  # the same steps, by a scheduler that takes times from outside
        return EulerDiscreteScheduler, {"timestep_spacing": "leading"} | said
    if sampler == "ddim":
        said = {"set_alpha_to_one": True, "clip_sample": False} | said
    return _CLASSES[sampler], {"timestep_spacing": spacing} | said


def make_scheduler(config: Mapping[str, Any], sampler: str, spacing: str, prediction: Prediction | None = None) -> Any:
    """The scheduler of `scheduler_settings`, with the noise schedule of `config`."""
    cls, said = scheduler_settings(sampler, spacing, prediction)
    return cls.from_config(config, **said)
