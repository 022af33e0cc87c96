"""The families that are known: one file of this package each, and those that installed packages add."""

from __future__ import annotations

import importlib
from typing import Any

from distill.diffusion.noise import short
from distill.diffusion.registry import Registry, import_plugins
from distill.models.families import NAMES
from distill.models.families.base import Family, Published

FAMILIES: Registry[Family] = Registry(
    "family", (importlib.import_module(f"distill.models.families.{name}").FAMILY for name in NAMES)
)
"""By their names in settings and exports. A family from elsewhere: `FAMILIES.register(MyFamily())` in a plug-in."""


def family_of_pipeline(path: str, kind: object) -> Family:
    """The family whose pipelines are of this class of diffusers; plug-ins are asked if none here has it.

    Raises:
        ValueError: there is none; it names the pipeline's `path` and the classes that are known.
    """
    for ask in (lambda: None, import_plugins):
        ask()
        for family in FAMILIES.values():
            if family.pipeline == kind:
                return family
    known = ", ".join(family.pipeline for family in FAMILIES.values())
    raise ValueError(f"{path} is a {short(kind)[1:-1]}; known teachers: {known} (text to image, base model)")


def network_of(pipeline: Any) -> Any:
    """The denoising network of a pipeline of diffusers, whatever it calls it."""
    names = dict.fromkeys(family.network.folder for family in FAMILIES.values())
    return next(getattr(pipeline, name) for name in names if hasattr(pipeline, name))


def family_of_network(network: Any) -> Family:
    """The family of a network, bare, by its class and its config; where several call it alike, one of them.

    Raises:
        ValueError: a network of no family.
    """
    if hasattr(network, "get_base_model"):  # peft's wrapper
        network = network.get_base_model()
    kind, config = type(network).__name__, getattr(network, "config", {})
    for family in FAMILIES.values():
        if family.network.kind == kind and family.network.describes(config):
            return family
    raise ValueError(f"a {kind} is the network of no family; known: {', '.join(FAMILIES)}")


def published(name: str) -> tuple[Family, Published]:
    """The family of a published model and what is known of it, by its name in `Family.full_size`.

    Raises:
        ValueError: a name that is not known.
    """
    known = {own: (family, model) for family in FAMILIES.values() for own, model in family.full_size.items()}
    if name not in known:
        raise ValueError(f"published model {name!r} is not known; allowed: {', '.join(known)}")
    return known[name]
