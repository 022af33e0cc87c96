"""The best checkpoint of a run by what is measured without labels, and when a run no longer gets better.

A measure is read at every validation, of the same held-out solves, noise or prompts each time: two checkpoints are
compared sample by sample, and the standard error is that of the differences. Which measures a method's students are
judged by the method says (`Method.judged_by`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from distill.methods.base import MEASURES
from distill.training.health import COLLAPSE

log = logging.getLogger(__name__)

Samples = Mapping[str, Sequence[float]]
"""What was measured of each sample, by the measure's name; the measure is the mean."""
STEP, WAITED = "best/step", "best/waited"


@dataclass(frozen=True)
class Measurement:
    """What a validation measured: of which step, by which measure, and of each sample."""

    step: int
    measure: str
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.measure} {fmean(self.values):.4g} ± {error_of(self.values):.2g}"


class Best:
    """Follows a run's measure. It reads numbers: nothing that is computed depends on it, except when a run ends.

    Args:
        choose: the best checkpoint is saved, kept and marked, and `distill export` takes it.
        stop: the run ends, with exit code 0, once `patience` validations in a row have not been better.
        measures: of `MEASURES`, in order: the first one that the run has is followed. null: those that its method says.
        patience: how many validations.
        min_delta: how many standard errors of the paired differences an improvement has to be for `stop`. What is
            chosen is the best by any margin.
        main: logs the lines, as one of all ranks should.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    def __init__(
        self,
        choose: bool = False,
        stop: bool = False,
        measures: list[str] | None = None,
        patience: int = 5,
        min_delta: float = 1.0,
        main: bool = True,
    ) -> None:
        if patience < 1:
            raise ValueError(f"best.patience must be at least 1, got {patience}")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"best.min_delta must be at least 0, got {min_delta}")
        if measures is not None and not measures:
            raise ValueError("best.measures is empty: give at least one, or null for those of the method")
        for name in measures or ():
            if name not in MEASURES:
                raise ValueError(f"best.measures: {name!r} is not known; allowed: {', '.join(MEASURES)}")
        self.choose, self.stop, self.patience, self.min_delta, self.main = choose, stop, patience, min_delta, main
        self.measures: tuple[str, ...] = tuple(measures or ())
        self.found: Measurement | None = None  # what is chosen
        self.reason = ""  # why the run ends
        self._level: Measurement | None = None  # what later ones have to be better than
        self._waited = self._last = 0  # validations since then; the step that was read last

    @property
    def follows(self) -> bool:
        """Whether anything has to be measured for it."""
        return self.choose or self.stop

    @property
    def ends_run(self) -> bool:
        """Whether the run is to end, for `reason`."""
        return bool(self.reason)

    def is_at(self, step: int) -> bool:
        """Whether the checkpoint of this step is the one that is chosen."""
        return self.choose and self.found is not None and self.found.step == step

    def has_read(self, step: int) -> bool:
        """Whether the validation of this step is known."""
        return step <= self._last

    def read(self, samples: Samples, step: int, alarms: Collection[str] = ()) -> dict[str, float]:
        """Takes what a validation has measured; returns scalars to be logged with it.

        While a student's samples have collapsed, it is not chosen, whatever was measured.

        Args:
            alarms: those that are on.
        """
        if not self.follows or self.has_read(step):
            return {}
        self._last = step
        name = self._level.measure if self._level else next((one for one in self.measures if samples.get(one)), None)
        if name is None or not samples.get(name):
            self._say(f"step {step} is not judged: no {name or ' or '.join(self.measures)} was measured", log.warning)
            return {}
        self._take(Measurement(step, name, tuple(map(float, samples[name]))), alarms)
        scalars = {WAITED: float(self._waited)} if self.stop else {}
        return scalars if self.found is None else {STEP: float(self.found.step), **scalars}

    def _take(self, now: Measurement, alarms: Collection[str]) -> None:
        sound = COLLAPSE not in alarms and math.isfinite(fmean(now.values))
        if sound and improvement(now, self.found) > 0:
            self.found = now
            self._say(f"the best checkpoint so far is that of step {now.step}: {now}")
        if sound and improvement(now, self._level) > self.min_delta:
            self._level, self._waited = now, 0
        else:
            self._waited += 1
        if self.stop and self._waited >= self.patience:
            self.reason = self._reason(now, alarms)

    def _reason(self, now: Measurement, alarms: Collection[str]) -> str:
        since = f"since step {self._level.step} ({self._level})" if self._level else "since the run began"
        also = f"; on at the end: alarm {' and '.join(alarms)}" if alarms else ""
        return (
            f"{now.measure} has not improved by {self.min_delta:g} standard errors in {self._waited} validations, "
            f"{since}, and is {fmean(now.values):.4g}{also}"
        )

    def _say(self, line: str, say: Callable[[str], None] = log.info) -> None:
        if self.main:
            say(line)

    def state(self) -> dict[str, Any]:
        """All that it knows, as values of JSON."""
        kept = {"found": self.found, "level": self._level}
        texts = {name: None if one is None else asdict(one) for name, one in kept.items()}
        return {**texts, "waited": self._waited, "last": self._last, "reason": self.reason}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Knows what it knew when `state` was taken; nothing, if it followed another measure then, or of {}."""
        found, level = (
            None if not state.get(name) else Measurement(**_as_read(state[name])) for name in ("found", "level")
        )
        if any(one is not None and one.measure not in self.measures for one in (found, level)):
            self._say("best.measures has changed: what was the best before is forgotten")
            state, found, level = {}, None, None
        self.found, self._level = found, level
        self._waited, self._last = int(state.get("waited", 0)), int(state.get("last", 0))
        self.reason = str(state.get("reason", "")) if self.stop and self._waited >= self.patience else ""


def _as_read(found: Mapping[str, Any]) -> dict[str, Any]:
    return {**found, "values": tuple(found["values"])}


def improvement(now: Measurement, than: Measurement | None) -> float:
    """How many standard errors better one is, by the differences of the same samples; below 0 where it is worse."""
    if than is None:
        return math.inf
    sign = 1.0 if MEASURES[now.measure] == "higher" else -1.0
    if len(now.values) != len(than.values):  # more solves are held out now
        apart = [fmean(now.values) - fmean(than.values)]
        error = math.hypot(error_of(now.values), error_of(than.values))
    else:
        apart = [a - b for a, b in zip(now.values, than.values, strict=True)]
        error = error_of(apart)
    difference = sign * fmean(apart)
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


def error_of(values: Sequence[float]) -> float:
    """The standard error of a mean; 0 of a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
