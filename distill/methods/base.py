"""What a distillation method is: constants, the states it reads, and for each step the losses of its turns.

A method never holds a module, an optimizer, a device or a rank. Networks arrive as `Denoiser`s in a mapping; the loss
runs unchanged on one device, under DDP, under ZeRO, and in a unit test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from distill.diffusion.prediction import Denoiser
from distill.diffusion.random import Context
from distill.diffusion.trajectory import Batch, Reads

Networks = Mapping[str, Denoiser]
"""Networks by name: "student", "teacher", and what else a method trains or asks for."""


@dataclass(frozen=True)
class Losses:
    """`total` (scalar) is differentiated; `parts` (scalars, detached or not) are logged by name."""

    total: Tensor
    parts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """One trained network's part of a step: `loss` is differentiated with respect to the network `updates` alone."""

    updates: str
    loss: Callable[[Networks, Batch, Context], Losses]


class Method(ABC):
    """A paper: its constants are the constructor's arguments, its algorithm box is a loss.

    `trains` names the networks that its turns update; `asks`, the further ones that its losses call: "teacher", or
    "NAME_ema" for the moving average of a trained one.
    """

    trains: tuple[str, ...] = ("student",)
    asks: tuple[str, ...] = ()

    @abstractmethod
    def reads(self) -> Reads:
        """Which states of a stored trajectory a sample of a batch consists of."""

    @abstractmethod
    def turns(self, step: int) -> Iterable[Turn]:
        """The turns of one step, in order; a pure function of `step`."""
