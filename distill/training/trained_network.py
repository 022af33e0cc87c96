"""One trained network: its optimizer, learning rate, clipping, moving average and files.

`TrainedNetwork` is the same for all ways of sharding: there are float32 masters, on each rank its own share, which the
optimizer updates and the average follows. What differs is in a subclass for each way (`distill.training.sharding`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.models.ema import average_
from distill.training.learning_rate import LearningRate
from distill.training.rank_writes import Writes
from distill.training.resharding import WholeState
from distill.training.snapshot import Copies
from distill.training.state_files import StateFile


@dataclass(frozen=True)
class TrainingRecipe:
    """How a network is trained.

    Args:
        optimizer: makes a torch optimizer of the parameters it is given; its `lr` is what `schedule` multiplies.
        schedule: step -> factor of the learning rate.
        ema_decay: keep a moving average of the trained weights with this decay; None keeps none.
        multipliers: factors of the learning rate of some weights, by a part of their dotted names: "cond_proj" is of
            "time_embedding.cond_proj.weight".
    """

    optimizer: Callable[[Any], torch.optim.Optimizer]
    schedule: Callable[[int], float] = LearningRate()
    ema_decay: float | None = None
    multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be null or lie in [0, 1), got {self.ema_decay}")

    def groups(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
        """The weights by what multiplies their rate, in the order of the optimizer's groups; "" is of nothing.

        Raises:
            ValueError: a multiplier of no weight, or two of one.
        """
        found: dict[str, dict[str, nn.Parameter]] = {key: {} for key in ("", *self.multipliers)}
        for name, parameter in parameters.items():
            keys = [key for key in self.multipliers if key in name.split(".")] or [""]
            if len(keys) > 1:
                raise ValueError(f"learning_rate_multipliers: {name} has two of them, {' and '.join(keys)}")
            found[keys[0]][name] = parameter
        if missing := [key for key in self.multipliers if not found[key]]:
            key = f"learning_rate_multipliers.{missing[0]}"
            raise ValueError(
                f"{key}: no weight that is trained has {missing[0]} as a part of its dotted name, such as "
                f"{next(iter(parameters), 'any')}: leave it out (~{key})"
            )
        return {key: group for key, group in found.items() if group}

    def arranged(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The weights by name, in the order in which the optimizer holds them."""
        return {name: p for group in self.groups(parameters).values() for name, p in group.items()}

    def optimizer_of(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer of these weights, each at its rate."""
        groups = self.groups(parameters)
        if not self.multipliers:
            return self.optimizer(list(parameters.values()))
        optimizer = self.optimizer([{"params": list(group.values())} for group in groups.values()])
        for key, group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] *= self.multipliers.get(key, 1.0)
        return optimizer


def optimizer_bytes(make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Bytes of state that an optimizer keeps per weight, found by a step on a few weights."""
    weight = nn.Parameter(torch.zeros(16, 16))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([weight])
    optimizer.step()
    state = [x for x in optimizer.state[weight].values() if isinstance(x, Tensor) and x.ndim]
    return sum(x.nbytes for x in state) / weight.numel()


class TrainedNetwork(ABC):
    """A network in training, its module wrapped or partitioned by then. Methods are called on all ranks alike.

    Args:
        wrapped: what the turn that trains this network calls; everyone else calls the module inside.
        parameters: its trained parameters by name.
        optimizer: over those parameters.
        recipe: makes the optimizer, and says which schedule and average.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        recipe: TrainingRecipe,
    ) -> None:
        self.wrapped, self.parameters, self.optimizer, self.recipe = wrapped, parameters, optimizer, recipe
        self._base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.ema = None if recipe.ema_decay is None else [m.detach().clone() for m in self.masters()]

    def set_learning_rate(self, step: int) -> float:
        """Sets the learning rate of `step` and returns that of the first parameter group."""
        factor = self.recipe.schedule(step)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor
        return self._base_rates[0] * factor

    def follow(self) -> None:
        """Moves the average towards the weights; called after each step that was taken."""
        if self.ema is not None and self.recipe.ema_decay is not None:
            average_(self.ema, self.masters(), self.recipe.ema_decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network computes with its average; afterwards with its own weights again, to the bit."""
        try:
            with self._average_in_masters():
                self.spread()
                yield
        finally:
            self.spread()

    def bytes_to_come(self) -> int:
        """Bytes that the optimizer's first step will allocate for this rank's share of its state."""
        if self.optimizer.state:
            return 0
        return int(optimizer_bytes(self.recipe.optimizer) * sum(master.numel() for master in self.masters()))

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """All trained weights (or their average) by name: unsharded, float32, on rank 0's CPU; empty elsewhere."""
        if not ema:
            return self.whole()
        with self._average_in_masters():
            return self.whole()

    def load(self, folder: Path) -> None:
        """Reads what `files` were written there."""
        self._load_average(folder)
        self.load_state(folder)

    def load_moved(self, folder: Path, state: WholeState) -> None:
        """Reads `files` that were written on other ranks or at another ZeRO stage; `state` is of their optimizer."""
        self._load_average(folder)
        self.load_whole(load_file(folder / weights_file()))
        self.spread()
        self.load_optimizer(state)

    def _load_average(self, folder: Path) -> None:
        """Through the masters, which are to be set afterwards."""
        if self.ema is not None:
            self.load_whole(load_file(folder / weights_file(ema=True)))
            copy_into(self.masters(), self.ema)

    @property
    def _average(self) -> list[Tensor]:
        if self.ema is None:
            raise ValueError("no moving average is kept: set ema_decay")
        return self.ema

    @contextmanager
    def _average_in_masters(self) -> Iterator[None]:
        kept = [m.detach().clone() for m in self.masters()]
        copy_into(self._average, self.masters())
        try:
            yield
        finally:
            copy_into(kept, self.masters())

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must fit, in JSON: names and shapes of what is trained, as a count and a hash, whether an
        average is kept, and of which weights the rate is multiplied."""
        shapes = [(name, tuple(shape)) for name, shape in self.shapes().items()]
        count = sum(torch.Size(shape).numel() for _, shape in shapes)
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
        groups = {"rates": sorted(self.recipe.multipliers)} if self.recipe.multipliers else {}
        return {"parameters": count, "shapes": digest, "ema": self.ema is not None, **groups}

    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the trained weights by name, in the order in which the optimizer holds them."""
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def is_finite(self) -> bool:
        """Whether all of this rank's share of the weights is."""
        return bool(torch.stack([master.isfinite().all() for master in self.masters()]).all())

    @abstractmethod
    def scale_gradients(self, factor: float) -> None:
        """Multiplies the losses of the step that follows by `factor`, and its gradient by the inverse before it is
        clipped; a power of two."""

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of a micro-batch; ranks reduce their gradients in the last one of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` (scalar), one of the step's micro-batches, to their mean."""

    @abstractmethod
    def step(self) -> tuple[Tensor | float, Tensor | bool]:
        """Clips and takes an optimizer step, or none if the gradient is not finite: (global norm, was it taken).

        What is a tensor is on the device, and nobody has waited for it.
        """

    @abstractmethod
    def reset_optimizer(self) -> None:
        """Lets the optimizer forget what it has gathered: its state is that of a new one."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The float32 values that the optimizer updates: this rank's share, not copies."""

    @abstractmethod
    def whole(self) -> dict[str, Tensor]:
        """The masters by name: unsharded, on rank 0's CPU; empty elsewhere."""

    @abstractmethod
    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        """Sets the masters from unsharded weights, the same on all ranks."""

    @abstractmethod
    def spread(self) -> None:
        """Makes the network compute with the masters as they are now."""

    @abstractmethod
    def files(self, folder: Path, copies: Copies, writes: Writes) -> list[StateFile]:
        """The files of this network, this rank's share of them: weights, average and optimizer's state.

        Args:
            folder: the network's in the checkpoint, which is there. `path` of a file is relative to its parent.
            copies: makes the copies from which they will be written.
            writes: keeps what fails on this rank alone.
        """

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Reads weights and the optimizer's state."""

    @abstractmethod
    def load_optimizer(self, state: WholeState) -> None:
        """Sets the optimizer's state (this rank's share) from an unsharded one, the same on all ranks."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of what the network is wrapped in."""


def weights_file(ema: bool = False) -> str:
    """The file of a network's trained weights, unsharded, or of their average, in its folder of a checkpoint."""
    return "ema.safetensors" if ema else "weights.safetensors"


def unlike(name: str, saved: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> str:
    """How a trained network differs from the one that was saved, each as `describe` says; in a sentence."""
    if saved is None or here is None:
        which = (
            "was not trained when it was saved" if saved is None else "was trained when it was saved, and is not here"
        )
        return f"the {name} {which}"
    if saved["ema"] != here["ema"]:
        return f"an average of the {name} was {'' if saved['ema'] else 'not '}kept when it was saved (ema_decay)"
    if saved.get("rates") != here.get("rates"):
        had, has = (", ".join(one.get("rates", ())) or "none" for one in (saved, here))
        return f"the {name} had learning_rate_multipliers of {had} when it was saved, and has them of {has} here"
    counts = saved["parameters"], here["parameters"]
    if counts[0] == counts[1]:
        return f"the {name} has other trained weights than when it was saved, although as many ({counts[0]:,})"
    return f"the {name} had {counts[0]:,} trained weights when it was saved, and has {counts[1]:,} here"


@torch.no_grad()
def copy_into(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies each value into its target."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
