"""Spikes: losses and gradients that leave the band in which those of the steps before them lie.

A run that meets one goes back to its last healthy checkpoint and passes over the samples seen since
(`distill.training.rollback`), as Chowdhery et al. 2022 did by hand (PaLM, arXiv 2204.02311, sec. 5.1).
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from distill.training.skipped import Diverged

log = logging.getLogger(__name__)

TO_DEVIATION = 1.4826  # times the median absolute deviation: the standard deviation, were it a normal distribution
LARGEST = 700.0  # whose exponential is still a float


@dataclass(frozen=True)
class SpikeSettings:
    """When a loss or a gradient is out of its band, and how often a run goes back for that.

    The band of a network's loss, and that of its gradient's norm, reaches from below to the median of the last `window`
    updates plus `deviations` robust standard deviations (1.4826 median absolute deviations), of the logarithms where
    all are positive. It is `factor` times the median at least. There is none until there have been `window` updates,
    nor for as many from each stage of the method on. Values outside do not move it.

    Args:
        rollbacks: so often a run goes back by itself, for a spike or for updates that were skipped too often in a row;
            0 watches nothing.
        window: updates of a network.
        deviations: above the median.
        factor: of the median.
        steps: so many updates of a network in a row are outside before it counts.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    rollbacks: int = 2
    window: int = 100
    deviations: float = 8.0
    factor: float = 4.0
    steps: int = 5

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rollbacks", self.rollbacks, 0),
            ("window", self.window, 10),
            ("steps", self.steps, 1),
            ("deviations", self.deviations, 1),
        ):
            if value < least:
                raise ValueError(f"spikes.{name} must be at least {least}, got {value}")
        if self.factor <= 1:
            raise ValueError(f"spikes.factor must be above 1, got {self.factor}")


class SpikeError(Diverged):
    """A loss or a gradient has been out of its band for too many updates."""


class Bands:
    """The bands of all losses and gradient norms of a run: the same on all ranks, as what they are told is.

    Args:
        settings: of the bands.
        starts: steps from which on the method does something else, and nothing before counts.
        is_main: says what there is to be said.

    Attributes:
        way_back: whether there is a checkpoint to go back to; called on all ranks when it matters. Without one a spike
            is a warning, and the band is found anew.
        rollbacks: how often the run has gone back.
    """

    def __init__(self, settings: SpikeSettings, starts: Sequence[int] = (0,), is_main: bool = True) -> None:
        self.settings, self.starts, self.is_main = settings, sorted(starts), is_main
        self.way_back: Callable[[], bool] = lambda: False
        self.rollbacks = 0
        self._stage = 0
        self._values: dict[str, deque[float]] = {}  # inside the band, by network and scalar
        self._outside: dict[str, int] = {}  # updates in a row, of each network whose last one was outside

    @property
    def outside(self) -> bool:
        """Whether the last update of a network was outside."""
        return bool(self._outside)

    def read(self, network: str, step: int, loss: float, grad_norm: float) -> None:
        """Takes what an update that was taken came to, all numbers finite.

        Args:
            step: optimizer steps before it.

        Raises:
            SpikeError: that makes too many outside, and there is a checkpoint to go back to.
        """
        if not self.settings.rollbacks:
            return
        self._begin_stage(step)
        found = {"loss": loss, "gradient norm": grad_norm}
        beyond = [line for name, value in found.items() if (line := self._beyond(network, name, value))]
        if not beyond:
            self._outside.pop(network, None)
            return
        in_a_row = self._outside[network] = self._outside.get(network, 0) + 1
        if in_a_row < self.settings.steps:
            return
        line = f"step {step + 1}: the {network}'s {' and its '.join(beyond)}, as for {in_a_row} updates in a row"
        if self.way_back():
            raise SpikeError(line, step)
        if self.is_main:
            log.warning("%s; there is no checkpoint to go back to, so the run continues", line)
        self.forget()

    def _begin_stage(self, step: int) -> None:
        stage = bisect_right(self.starts, step)
        if stage != self._stage:
            self.forget()
            self._stage = stage

    def forget(self) -> None:
        """Begins anew: there is no band until there have been enough updates."""
        self._values, self._outside = {}, {}

    def _beyond(self, network: str, name: str, value: float) -> str:
        """How a value is outside, in words; "" and kept if it is not."""
        values = self._values.setdefault(f"{network}/{name}", deque(maxlen=self.settings.window))
        if len(values) == self.settings.window and value > (most := limit(values, self.settings)):
            return f"{name} {value:.4g} is above {most:.4g}"
        values.append(value)
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as one that was not interrupted; values of JSON."""
        if not self._values:
            return {}
        values = {name: list(found) for name, found in self._values.items()}
        return {"stage": self._stage, "values": values, "outside": dict(self._outside)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; {} of a checkpoint of before."""
        window = self.settings.window
        self._stage = int(state.get("stage", 0))
        self._values = {name: deque(found, maxlen=window) for name, found in state.get("values", {}).items()}
        self._outside = dict(state.get("outside", {}))


def limit(values: Sequence[float] | deque[float], settings: SpikeSettings) -> float:
    """The upper end of a band, from what lay within it last."""
    if min(values) > 0:
        logs = [math.log(value) for value in values]
        return math.exp(min(LARGEST, _above(logs, settings.deviations, math.log(settings.factor))))
    return _above(list(values), settings.deviations, (settings.factor - 1) * median(map(abs, values)))


def _above(values: Sequence[float], deviations: float, least: float) -> float:
    middle = median(values)
    return middle + max(deviations * TO_DEVIATION * median(abs(value - middle) for value in values), least)
