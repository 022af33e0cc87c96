"""What a distillation method is: constants, the states it reads, and for each step the losses of its turns.

A method never holds a module, an optimizer, a device or a rank. Networks arrive as `Denoiser`s in a mapping; the loss
runs unchanged on one device, under DDP, under ZeRO, and in a unit test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill.diffusion.adversarial import AdversarialScalars
from distill.diffusion.random import Context
from distill.diffusion.trajectory import Batch, CleanEnd, Reads
from distill.methods.sampling import Sampling

Networks = Mapping[str, Any]
"""Networks by name: "student", "teacher" (`Denoiser`s), and what else a method trains or requires."""
CONSISTENCY, DISTANCE = "validation/heldout_consistency", "validation/heldout_distance"
HELDOUT, REWARD = "validation/heldout_loss", "validation/reward"
MEASURES = {CONSISTENCY: "lower", DISTANCE: "lower", HELDOUT: "lower", REWARD: "higher"}
"""What students are judged by without labels, and which values are better. See `distill.training.best`."""
Reward = Callable[..., tuple[Tensor, ...]]
"""Latents [B, C, h, w], then lists of B prompts -> for each list the scores [B], differentiable in the latents."""


@dataclass(frozen=True)
class Losses:
    """`total` (scalar) is differentiated; `parts` (scalars, detached or not) are logged by name.

    A part that is a number is the same on all ranks and for all micro-batches of a step.
    """

    total: Tensor
    parts: Mapping[str, Tensor | float]


@dataclass(frozen=True)
class Turn:
    """One trained network's part of a step: `loss` is differentiated with respect to the network `updates` alone.

    `kind` is for a network whose turns call networks more often at some steps than at others: turns of one kind call
    them alike, so that a plan counts each kind once.
    """

    updates: str
    loss: Callable[[Networks, Batch, Context], Losses]
    kind: str = ""


class Method(ABC):
    """A paper: its constants are the constructor's arguments, its algorithm box is a loss.

    `trains` names the networks that its turns update, if not in every step; `requires`, the others that its losses
    call: "teacher", "NAME_ema" for the moving average of a trained one, "reward" (`Reward`), "perceptual", or the name
    of any other helper that the settings describe (`helpers.NAME`).
    """

    title: str = ""
    """What it is called where people read it, as on model cards; "" is the name of its class."""
    paper: str = ""
    """Where it was published: authors, year, arXiv number."""
    tag: str = ""
    """The tag of its students on the hub; "" is the name of its class in small letters."""

    trains: tuple[str, ...] = ("student",)
    requires: tuple[str, ...] = ()
    needs_prompts: bool = False
    """Whether its losses read `Batch.prompts`."""
    least_samples: int = 1
    """What a global batch has to hold."""

    starts: tuple[int, ...] = (0,)
    """Steps at which what it reads, or how it trains, may change."""
    period: int = 1
    """After how many steps its turns repeat, from each of `starts` on, where networks train at some steps only.

    The student's turn is in the last step of a period ((step + 1) % period == 0): a step that is logged then has the
    numbers of all networks, where `log_every` is a multiple of the period.
    """
    steps: int | None = None
    """How many steps a run has to take, if the method says."""
    sampling: Sampling = Sampling()
    """How its students are sampled."""
    guidance: tuple[float, float] | None = None
    """The lowest and the highest w at which its losses call the teacher, in any step; None if they never guide it.

    Stored trajectories have their own, which comes on top wherever the method reads trajectories.
    """

    judged_by: tuple[str, ...] = (CONSISTENCY, HELDOUT)
    """Of `MEASURES`, what says which of a run's students is the best: the first that a run has.

    Held-out consistency is for students that are to end where the teacher's solve from the same noise does; for those
    that only share its distribution it is the held-out distance. A loss is the last resort: it is of a step, not of
    samples, and means something else in another stage.
    """
    adversarial: AdversarialScalars | None = None
    """How its adversarial training is logged, if it trains a discriminator."""

    @property
    def helpers(self) -> tuple[str, ...]:
        """What its losses call beside networks: "reward" and the like, by the names of the settings."""
        networks = {"teacher", *(f"{name}_ema" for name in self.trains)}
        return tuple(name for name in self.requires if name not in networks)

    @abstractmethod
    def reads(self, step: int = 0) -> Reads:
        """Which states of a stored trajectory a sample of a step's batch consists of; a pure function of `step`."""

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        """What takes the place of the run's learning rate, for a network at `step`; None keeps it."""
        return None

    def batch_size(self, step: int) -> int | None:
        """How many samples the global batch of `step` has; None keeps the run's. It may change at `starts`."""
        return None

    def resets(self, step: int) -> bool:
        """Whether the optimizers forget what they have gathered before `step`."""
        return False

    @abstractmethod
    def turns(self, step: int) -> Iterable[Turn]:
        """The turns of one step, in order; a pure function of `step`.

        A network may have several: each is an optimizer step on the same samples, with its own random numbers from
        `context`. The scalars of the last one are logged.
        """

    def turns_of_period(self, step: int) -> Iterable[Turn]:
        """The turns of `step`, then those of the steps after it, to where they repeat."""
        return (turn for i in range(self.period) for turn in self.turns(step + i))

    def held_out(self, step: int) -> Turn | None:
        """What of a step is measured, without training, on solves that are not learned from; None measures nothing.

        A small value has to mean that the student does what the teacher does. It is called without prompts.
        """
        return next((turn for turn in self.turns_of_period(step) if turn.updates == "student"), None)

    def guidance_learned(self, stored: tuple[float, float] | None) -> tuple[float, float]:
        """The lowest and the highest w that its students learn from: its own, and that of trajectories it reads.

        1 is no guidance.

        Args:
            stored: w of the trajectories in the store; None: they are not known.
        """
        ranges = [] if self.guidance is None else [self.guidance]
        if stored is not None and any(not isinstance(self.reads(step), CleanEnd) for step in self.starts):
            ranges.append(stored)
        if not ranges:
            return 1.0, 1.0
        return min(low for low, _ in ranges), max(high for _, high in ranges)
