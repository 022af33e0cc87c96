"""Ways of sharding trained networks over the ranks of a run: a file for each, and the table by which they are named.

Another way (torch's FSDP2, say) is a file with a `Sharding` and a `TrainedNetwork` of its own, and its entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from distill.training.resharding import NotElastic, WholeState
from distill.training.sharding.base import Sharding
from distill.training.sharding.replicated import DataParallel, OneProcess
from distill.training.sharding.zero import ZeRO

SHARDINGS: dict[str, type[Sharding]] = {way.kind: way for way in (OneProcess, DataParallel, ZeRO)}
"""The ways of sharding by their names in `engine.kind`."""


def written_by(folder: Path) -> type[Sharding]:
    """The way of sharding whose files of an optimizer's state are in a network's folder of a checkpoint.

    Raises:
        NotElastic: there are none that are known.
    """
    for way in SHARDINGS.values():
        if way.wrote(folder):
            return way
    raise NotElastic(f"{folder} holds no optimizer's state")


def read_whole(folder: Path, shapes: Mapping[str, torch.Size]) -> WholeState:
    """The optimizer's state in a network's folder of a verified checkpoint, which it unpickles.

    Args:
        folder: as `TrainedNetwork.save` has written it.
        shapes: of the trained weights by name, in the order in which the optimizer holds them.

    Raises:
        NotElastic: it cannot be put together.
    """
    return written_by(folder).read_whole(folder, shapes)
