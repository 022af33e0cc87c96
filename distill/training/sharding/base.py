"""What a way of sharding is: how ranks find each other, and what each of them holds of a trained network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.state import PartialState
from torch import nn

from distill.training.processes import Processes
from distill.training.resharding import WholeState
from distill.training.trained_network import TrainedNetwork, TrainingRecipe

PRECISIONS: dict[str, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What frozen networks and the products of trained ones are computed in, by `mixed_precision`."""


class UpdateSettings(NamedTuple):
    """What an optimizer step is made of, however the network is sharded; see `EngineSettings`."""

    mixed_precision: str
    gradient_accumulation_steps: int
    max_grad_norm: float | None


class Sharding(ABC):
    """One way of sharding, with its settings. It is checked when it is made, before any process group exists.

    Args:
        settings: by name; those of other ways must be empty.

    Attributes:
        kind: its name in `engine.kind`.
        settings_names: of the engine's settings that belong to this way alone.
        holds_whole: whether every rank holds all of the optimizer's state, so that it does not depend on their number.
        keeps_order: whether weights may lie in memory in another order than that of their elements.
        launch: the command that starts it.

    Raises:
        ValueError: a setting that has no meaning here, or is out of its range; it is named.
    """

    kind: ClassVar[str]
    settings_names: ClassVar[tuple[str, ...]] = ()
    holds_whole: ClassVar[bool] = True
    keeps_order: ClassVar[bool] = True
    launch: ClassVar[str]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if value and name not in self.settings_names:
                raise ValueError(f"engine.{name} has no meaning for engine.kind={self.kind}")

    def name_of(self, network: str | None = None) -> str:
        """What a network's sharding is called in logs and checkpoints; without one, that of the run."""
        return self.kind

    def check_compile(self) -> None:
        """Raises ValueError where blocks of networks cannot be compiled."""
        return

    def check_precision(self, mixed_precision: str) -> None:
        """Raises ValueError where this machine cannot compute in it; once this process has taken its device."""
        return

    def check_networks(self, trained: Collection[str]) -> None:
        """Raises ValueError where the settings speak of a network that is not trained."""
        return

    @abstractmethod
    def check_launch(self, processes: int, launched: bool) -> None:
        """Raises ValueError if this way cannot run as the processes were started; the line says what would."""

    @abstractmethod
    def join(self, launched: bool, timeout: timedelta) -> PartialState:
        """Finds the other ranks, and takes this one's device. No collective may take longer than `timeout`."""

    @abstractmethod
    def leave(self) -> None:
        """Destroys the process group, if there is one."""

    @abstractmethod
    def wrap(
        self,
        modules: Mapping[str, nn.Module],
        recipes: Mapping[str, TrainingRecipe],
        update: UpdateSettings,
        processes: Processes,
    ) -> dict[str, TrainedNetwork]:
        """Puts modules, which are on no particular device, under their optimizers.

        The weights of a module that require gradients are trained.

        Raises:
            RuntimeError: the library did not wrap the module as it should.
        """

    @classmethod
    @abstractmethod
    def wrote(cls, folder: Path) -> bool:
        """Whether the optimizer's state in a network's folder of a checkpoint is in this way's files."""

    @classmethod
    @abstractmethod
    def read_whole(cls, folder: Path, shapes: Mapping[str, torch.Size]) -> WholeState:
        """That state, unsharded; see `distill.training.sharding.read_whole`."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def wrapping_failed(engine: str, network: str, wrapped: nn.Module, accelerator: Any) -> RuntimeError:
    """Accelerate falls back to the bare module in silence; this is the error in place of that."""
    return RuntimeError(
        f"engine={engine} is set, but {network} came back as {type(wrapped).__name__} of "
        f"{accelerator.distributed_type.value} with {accelerator.num_processes} processes"
    )
