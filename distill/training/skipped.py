"""Updates that no rank took, because a loss or a gradient was not finite on one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.diffusion.trajectory import Batch
from distill.training.processes import Processes

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """A run does not learn any more, which all ranks find alike; one line.

    `step` counts the optimizer steps before the one that it was found in.
    """

    def __init__(self, line: str, step: int) -> None:
        super().__init__(line)
        self.step = step


class NonFiniteError(Diverged):
    """Loss or gradient was not finite for too many steps in a row."""


@dataclass(frozen=True)
class Skipped:
    """An update that no rank took, because a loss or a gradient was not finite on one of them.

    Attributes:
        step: the optimizer steps before it; `network`: whose update it was.
        loss, grad_norm: over all ranks.
        keys: samples whose loss it may be; all those of the step where every loss was finite.
    """

    step: int
    network: str
    loss: float
    grad_norm: float
    keys: tuple[str, ...]


@dataclass
class SkippedUpdates:
    """Counts skipped updates; the same on all ranks.

    Under fp16, some are skipped because the loss scale was too large, and no sample is to blame. They are counted apart
    and end no run: the scale is lowered each time, and at its least a gradient that is not finite counts as any other.

    Args:
        at_most: give up after so many in a row of one network.
        on_skipped: called on rank 0 with each of them.

    Attributes:
        count: all of the run's.
        in_a_row: of each network whose last update was skipped.
        overflows: all that the loss scale has cost; `overflowing`: the networks whose last update was one of them.
    """

    at_most: int
    on_skipped: Callable[[Skipped], None] = lambda skipped: None
    count: int = 0
    in_a_row: dict[str, int] = field(default_factory=dict)
    overflows: int = 0
    overflowing: set[str] = field(default_factory=set)

    @property
    def goes_on(self) -> bool:
        """Whether the last update of a network was skipped, for whatever reason."""
        return bool(self.in_a_row or self.overflowing)

    def taken(self, network: str) -> None:
        """An update of a network was taken: its streak is over."""
        self.in_a_row.pop(network, None)
        self.overflowing.discard(network)

    def overflowed(self, network: str, step: int, scale: float, is_main: bool) -> None:
        """Counts an update that was skipped because its scaled gradient overflowed, and says so on rank 0.

        Args:
            scale: the loss scale from now on.
        """
        self.overflows += 1
        self.overflowing.add(network)
        if is_main:
            log.info(
                "step %d: %s skipped, its gradient overflows float16: the loss scale is lowered to %g (%d such so far)",
                step,
                network,
                scale,
                self.overflows,
            )

    def add(self, skipped: Skipped, is_main: bool) -> None:
        """Counts an update that was skipped, and says so on rank 0.

        Raises:
            NonFiniteError: it was one too many.
        """
        self.count += 1
        in_a_row = self.in_a_row[skipped.network] = self.in_a_row.get(skipped.network, 0) + 1
        what = (
            f"step {skipped.step}: {skipped.network} skipped, loss {skipped.loss} and gradient norm {skipped.grad_norm}"
        )
        if is_main:
            log.warning("%s; samples: %s", what, " ".join(skipped.keys))
            self.on_skipped(skipped)
        if in_a_row >= self.at_most:
            raise NonFiniteError(f"{what}; that makes {in_a_row} in a row, giving up", skipped.step)

    def state_dict(self) -> dict[str, Any]:
        """The counts; values of JSON."""
        counts: dict[str, Any] = {
            "skipped_steps": self.count,
            "skipped_in_a_row": max(self.in_a_row.values(), default=0),
        }
        counts |= {"skipped_in_a_row_of": dict(self.in_a_row)} if self.in_a_row else {}
        scaling = {"overflows": self.overflows, "overflowing": sorted(self.overflowing)}
        return counts | (scaling if self.overflows else {})

    def load_state_dict(self, state: Mapping[str, Any], networks: Collection[str]) -> None:
        """Takes over the counts of `state_dict`; an earlier version's had one streak for all `networks`."""
        self.count = state["skipped_steps"]
        one = dict.fromkeys(networks, state["skipped_in_a_row"]) if state["skipped_in_a_row"] else {}
        self.in_a_row = dict(state.get("skipped_in_a_row_of", one))
        self.overflows, self.overflowing = state.get("overflows", 0), set(state.get("overflowing", ()))


def suspects(processes: Processes, micro_batches: Sequence[Batch], losses: Tensor) -> tuple[str, ...]:
    """The samples of a skipped step that may be why, the same on all ranks.

    Args:
        micro_batches: this rank's, and `losses` [micro-batches] of them.
    """
    bad = [k for loss, batch in zip(losses, micro_batches, strict=True) if not loss.isfinite() for k in batch.keys]
    keys = [key for rank in processes.gathered(bad) for key in rank]
    if not keys:  # every loss was finite, a gradient was not: any sample may be the one
        keys = [key for rank in processes.gathered([k for b in micro_batches for k in b.keys]) for key in rank]
    return tuple(keys)
