"""The diffusers scheduler that generates what our own sampler of a name and spacing generates.

It is made of the noise's own keys and of what the sampler needs, and of nothing else: options of a teacher's scheduler
(Karras' sigmas, thresholding, an SDE's solver, clipping, offsets) would have a student run at times that it never
learned. Cards, exports, pipelines and the proof all come here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import diffusers

from distill.diffusion.noise import AnyNoise, FlowNoise, Noise, read_noise
from distill.diffusion.prediction import Prediction
from distill.diffusion.samplers import SAMPLERS, Sampler, Scheduler, check_pair
from distill.diffusion.solver import make_times


def noise_of(scheduler: Any) -> AnyNoise:
    """The noise of a diffusers scheduler.

    Raises:
        ValueError: of a class or with an option that is not understood.
    """
    return read_noise(type(scheduler).__name__, scheduler.config)


def scheduler_settings(
    noise: AnyNoise, sampler: str, spacing: str, prediction: Prediction | None = None, steps: int | None = None
) -> tuple[type[Any], dict[str, Any]]:
    """The scheduler's class in diffusers, and all of its settings: `cls(**settings)` is complete.

    Cards print it like that (`as_code`), never as `from_config` of another scheduler's config. Where `timesteps_for`
    gives times for a number of steps, or `sigmas_for` noise levels, the pipeline has to be called with them.

    Args:
        prediction: what the student predicts; None takes the noise's own, its teacher's.
        steps: the only number of steps that it will be used with; None leaves it open.

    Raises:
        ValueError: a sampler or a spacing that is not known, a pair that does not exist, or one that no scheduler of
            diffusers generates on this noise; a flow-matching shift that depends on the picture's size.
    """
    check_pair(sampler, spacing)
    known = SAMPLERS[sampler]
    if isinstance(noise, FlowNoise):
        name, settings = _flow_matching(known, prediction)
        return getattr(diffusers, name), noise.settings() | dict(settings)
    name, settings = _variance_preserving(noise, known, spacing, steps)
    said = {} if prediction is None else {"prediction_type": prediction.value}
    return getattr(diffusers, name), noise.settings() | said | dict(settings)


def _flow_matching(known: Sampler, prediction: Prediction | None) -> Scheduler:
    """The same at every spacing: the noise levels are handed over."""
    if prediction not in (None, Prediction.FLOW):
        raise ValueError(
            f"diffusers has no flow-matching scheduler for a student that predicts {prediction.value}: set "
            "student.prediction to null, which is the teacher's"
        )
    if known.flow is None:
        allowed = ", ".join(other.name for other in SAMPLERS.values() if other.flow)
        raise ValueError(f"sampler {known.name!r} has no scheduler in diffusers for flow matching; allowed: {allowed}")
    return known.flow


def _variance_preserving(noise: Noise, known: Sampler, spacing: str, steps: int | None) -> Scheduler:
    if noise.rescale_betas_zero_snr and not known.zero_snr:
        allowed = ", ".join(other.name for other in SAMPLERS.values() if other.zero_snr)
        raise ValueError(
            f"sampler {known.name!r} has no scheduler in diffusers for noise of zero terminal SNR; allowed: {allowed}"
        )
    even = steps is not None and noise.num_train_timesteps % steps == 0
    found = (known.even.get(spacing) if even else None) or known.schedulers[spacing]
    if found is None:
        raise ValueError(f"sampler {known.name!r} has no scheduler in diffusers at spacing {spacing!r}")
    return found


def make_scheduler(
    noise: AnyNoise, sampler: str, spacing: str, prediction: Prediction | None = None, steps: int | None = None
) -> Any:
    """The scheduler of `scheduler_settings`."""
    cls, settings = scheduler_settings(noise, sampler, spacing, prediction, steps)
    return cls(**settings)


def as_code(cls: type[Any], settings: Mapping[str, Any]) -> str:
    """What `scheduler_settings` says, as a line of Python: `LCMScheduler(beta_start=0.00085, ...)`."""
    said = (f"{key}={json.dumps(x) if isinstance(x, str) else repr(x)}" for key, x in settings.items())
    return f"{cls.__name__}({', '.join(said)})"


def timesteps_for(scheduler: Any, spacing: str, steps: int) -> list[int] | None:
    """What a pipeline with a scheduler of `make_scheduler` has to be given as `timesteps`, in network indices.

    None: its own times at so many steps are the spacing's, and `num_inference_steps` is enough; or it is of flow
    matching, where `sigmas_for` takes the place of this.

    Raises:
        ValueError: more steps than the spacing has times.
    """
    if isinstance(noise_of(scheduler), FlowNoise):
        return None
    wanted = [t - 1 for t in make_times(spacing, scheduler.config.num_train_timesteps, steps)[:-1]]
    own = type(scheduler)(**{key: scheduler.config[key] for key in _said(scheduler)})
    try:
        own.set_timesteps(steps)
    except ValueError:  # LCM's, for more steps than it has times
        return wanted
    return None if list(dict.fromkeys(own.timesteps.tolist())) == wanted else wanted


def sigmas_for(scheduler: Any, spacing: str, steps: int) -> list[float] | None:
    """What a pipeline with a flow-matching scheduler of `make_scheduler` is given as `sigmas`: t / T, which the latter
    then shifts. At trailing times that is 1, 1 - 1/N ... 1/N; None for other schedulers.

    A pipeline that passes these to its scheduler by itself does as well without. One that leaves the grid to the
    scheduler would have it shifted twice, and ended at a noise level of almost 0 that a step is spent on.

    Raises:
        ValueError: more steps than the spacing has times.
    """
    noise = noise_of(scheduler)
    if not isinstance(noise, FlowNoise):
        return None
    T = noise.num_train_timesteps
    return [t / T for t in make_times(spacing, T, steps)[:-1]]


def _said(scheduler: Any) -> list[str]:
    return [key for key in scheduler.config if not key.startswith("_")]
