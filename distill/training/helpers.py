"""What a method's losses call beside networks: a reward, a distance of latents, or whatever else it requires."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

from hydra.utils import get_object
from torch import nn

from distill.config.composition import group_files
from distill.config.loading import ConfigError, build
from distill.config.settings import TrainSettings
from distill.methods.base import Method
from distill.models.latent_reward import LatentReward
from distill.training.teacher import open_teacher


def configured(cfg: TrainSettings) -> dict[str, Callable[[], nn.Module]]:
    """What makes each helper that the settings describe, by its name.

    A `reward` is of images, for which latents are decoded; what `helpers` describes is called as it is.

    Raises:
        ConfigError: one is described twice.
    """
    own: dict[str, Callable[[], nn.Module]] = {}
    if cfg.reward is not None:
        own["reward"] = partial(_latent_reward, cfg, cfg.reward)
    if cfg.perceptual is not None:
        own["perceptual"] = partial(build, cfg.perceptual)
    if twice := sorted(own.keys() & cfg.helpers.keys()):
        raise ConfigError(f"{twice[0]} and helpers.{twice[0]} are both set: leave one of them out")
    return own | {name: partial(_helper, cfg, node) for name, node in cfg.helpers.items()}


def check_helpers(cfg: TrainSettings, method: Method) -> None:
    """Raises ConfigError for a helper that the method requires and the settings lack, or that they have for nothing."""
    known = configured(cfg)
    for name in method.helpers:
        if name not in known:
            options = sorted(group_files(name))
            how = f"{name}={options[0]} or another" if options else f"helpers.{name}._target_=PACKAGE.NAME"
            raise ConfigError(f"the method requires a {name}, and there is no {name}: set {how}")
    for name in known:
        if name not in method.helpers:
            stages = ", or method.stages of which one does" if method.steps else ""
            key = f"helpers.{name}" if name in cfg.helpers else name
            raise ConfigError(
                f"{key} is set, and the method uses none: leave it out, or set a method that does{stages}"
            )


def helpers_of(cfg: TrainSettings, method: Method) -> dict[str, nn.Module]:
    """The helpers that the method requires, built."""
    known = configured(cfg)
    return {name: known[name]() for name in method.helpers}


def _latent_reward(cfg: TrainSettings, node: Mapping[str, Any]) -> nn.Module:
    return LatentReward(open_teacher(cfg.model, parts=("vae",)), build(node), cfg.reward_batch_size)


def _helper(cfg: TrainSettings, node: Mapping[str, Any]) -> nn.Module:
    if "teacher" not in signature(get_object(node["_target_"])).parameters:
        return build(node)
    make = build({**node, "_partial_": True})  # Hydra would make a dictionary of the teacher, which is a dataclass
    return make(teacher=open_teacher(cfg.model, parts=("vae",)))
