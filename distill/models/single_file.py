"""A student in one file, in the layout of the original checkpoints: for user interfaces, and `from_single_file`.

What is in the file, and under which names, a family says (`Network.one_file`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.diffusion.prediction import Prediction
from distill.models.families.base import Family
from distill.models.families.registry import family_of_network
from distill.models.files import rounded, save_file
from distill.models.folder import find_pipeline


def save_single_file(
    path: Path,
    network: Any,
    pretrained_model_name_or_path: str,
    dtype: torch.dtype,
    prediction: Prediction,
    metadata: Mapping[str, str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    family: Family | None = None,
) -> None:
    """Writes `network`, with those parts of the teacher that belong in its family's files, all in `dtype`.

    Args:
        family: the network's, which is found by its class where it is not given.

    Raises:
        FileNotFoundError: the pipeline lacks a file.
        ValueError: a weight that the dtype cannot hold; a network that is not of the original ones' shape, or of a
            family without such a layout.
    """
    family = family or family_of_network(network)
    layout = family.network.one_file
    if layout is None:
        raise ValueError(f"no layout of one file is known for {family.title}")
    source = find_pipeline(pretrained_model_name_or_path, layout.parts, revision, variant)
    tensors = {
        name: rounded(name, tensor.detach(), dtype).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in layout.tensors(network, source, variant)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | layout.marks(prediction), path, metadata={"format": "pt"} | dict(metadata or {}))
