"""A checkpoint's optimizer state, unsharded, by weights: for a run on other ranks, or sharded in another way.

Every checkpoint holds unsharded weights and averages. The optimizer's state lies as its ranks held it. It is put
together from their files, as universal checkpoints are (Lian et al. 2024, arXiv 2406.18820), in memory and for any
optimizer that keeps values for each element of a weight, or values that are the same for all weights.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")
SAY_SECONDS = 10.0
OPTIMIZER = "optimizer.pt"  # of a network that was not sharded
REMEDY = "resume with as many ranks and the same engine as it was saved with"


class NotElastic(ValueError):
    """The optimizer's state cannot be re-sharded; one line."""


@dataclass(frozen=True)
class WholeState:
    """An optimizer's state, unsharded.

    Attributes:
        of: what is kept for each element of a weight (Adam: exp_avg, exp_avg_sq; SGD: momentum_buffer), from the
            weight's name; {} for a weight that has not been updated.
        part: the same of some elements, flat, from the weight's name, the first one and the end. Files are mapped into
            memory: no more of them is read.
        keys: of those values, over all weights; none before the optimizer's first step.
        shared: what is kept once for all weights (Adam: step), numbers or tensors of one element.
    """

    of: Callable[[str], dict[str, Tensor]]
    part: Callable[[str, int, int], dict[str, Tensor]]
    keys: tuple[str, ...]
    shared: Mapping[str, Any]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept, as before the first step, or by an optimizer that keeps nothing."""
        return not self.keys and not self.shared

    def new_shared(self) -> dict[str, Any]:
        """Copies of the shared values."""
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in self.shared.items()}


def read_replicated(folder: Path, shapes: Mapping[str, torch.Size]) -> WholeState:
    """The optimizer's state in a network's folder of a verified checkpoint that one rank wrote.

    Args:
        folder: as `TrainedNetwork.save` has written it.
        shapes: of the trained weights by name, in the order in which the optimizer holds them.

    Raises:
        NotElastic: a value that is neither one for each element of its weight nor the same for all weights.
    """
    saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)["state"]
    names = list(shapes)
    kept: dict[str, dict[str, Tensor]] = {}
    once: dict[str, list[Any]] = defaultdict(list)
    for i, values in saved.items():
        kept[names[i]] = of_weight = {}
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == shapes[names[i]]:
                of_weight[key] = value
            elif value is not None:
                once[key].append(value)
    shared = {key: shared_value(folder, key, values) for key, values in once.items()}
    keys = sorted({key for values in kept.values() for key in values})

    def part(name: str, begin: int, end: int) -> dict[str, Tensor]:
        return {key: value.flatten()[begin:end] for key, value in kept.get(name, {}).items()}

    return WholeState(lambda name: kept.get(name, {}), part, tuple(keys), shared)


def with_progress(items: Iterable[T], count: Callable[[T], int], total: int, what: str) -> Iterator[T]:
    """The items, with a line every `SAY_SECONDS` about how much of them is done by then."""
    done, said = 0, time.monotonic()
    for item in items:
        yield item
        done += count(item)
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            log.info("%s: %d of %d million weights", what, done / 1e6, total / 1e6)


def shared_value(folder: Path, key: str, values: Sequence[Any]) -> Any:
    """The value that all weights, or shares of them, have for `key`; of steps the most, as weights may join later.

    Raises:
        NotElastic: they have different ones, or it is no single number.
    """
    numbers = [value for value in values if isinstance(value, (int, float)) or _is_scalar(value)]
    if len(numbers) < len(values):
        raise NotElastic(f"{folder}: the optimizer keeps a {key!r} that is not cut as the weights are: {REMEDY}")
    if key == "step":
        return max(values, key=float)
    if len({float(value) for value in numbers}) > 1:
        raise NotElastic(f"{folder}: the optimizer keeps a {key!r} of its own for each weight: {REMEDY}")
    return values[0]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
