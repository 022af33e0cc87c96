"""Distils diffusion models into students that sample in 1 to 8 steps.

    import distill

    toy = ["experiment=quickstart", "engine=single", "data.store=stores/toy"]
    distill.trajectories(*toy)
    distill.train(*toy, output_dir="runs/toy")
    distill.export(run="runs/toy", output_dir="exports/toy")
    distill.sample(run="runs/toy", prompts=["a red disc on black"], output_dir="pictures")

What is below is imported when it is first used: `import distill` takes no time.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    **dict.fromkeys(("trajectories", "latents", "train", "export", "sample", "evaluate"), "distill.api"),
    "load_teacher": "distill.models.families.loading",
    "open_store": "distill.data.reader",
    "as_webdataset": "distill.data.as_webdataset",
    "Run": "distill.training.assembly",
    "Method": "distill.methods.base",
    "Losses": "distill.methods.base",
    "Turn": "distill.methods.base",
    "Batch": "distill.diffusion.trajectory",
    "NoiseSchedule": "distill.diffusion.schedule",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distill' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
