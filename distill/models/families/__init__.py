"""Families of teachers: a file for each, named like it, and beside them what they share and what loads them.

Importing this package imports none of them, so that settings can be checked by a family's name before torch is loaded.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from distill.diffusion.registry import UnknownName, import_plugins

SHARED = ("base", "comfy", "cut", "loading", "qwen3", "registry", "teacher", "towers", "transformer", "unet")
"""Modules of this package that are no family."""
NAMES = tuple(
    sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", *SHARED))
)
"""The families of this project, by the names of their files."""


def check_family(name: str) -> None:
    """Raises UnknownName for a family that is neither one of this project nor a plug-in's."""
    if name in NAMES:
        return
    import_plugins()
    registry = sys.modules.get(f"{__name__}.registry")  # a plug-in that has families has imported it
    known = NAMES if registry is None else tuple(registry.FAMILIES)
    if name not in known:
        raise UnknownName(f"family {name!r} is not known; allowed: {', '.join(known)}")


_PLACES = {
    **dict.fromkeys(("Family", "Size"), "base"),
    **dict.fromkeys(("TextTower",), "towers"),
    **dict.fromkeys(("FAMILIES",), "registry"),
    **dict.fromkeys(("StableDiffusion",), "sd15"),
    **dict.fromkeys(("StableDiffusionXL",), "sdxl"),
    **dict.fromkeys(("PARTS", "Teacher"), "teacher"),
    **dict.fromkeys(("check_pipeline", "load_teacher", "open_pipeline", "require_family"), "loading"),
}
"""What stood in one module `families` before, for programs that import it from there."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
