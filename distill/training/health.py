"""Health of a run: its scalars when adversarial training goes wrong, or when a student samples one image only.

Which scalars are of adversarial training, and what they are called, the method says.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean

from distill.diffusion.adversarial import AdversarialScalars

log = logging.getLogger(__name__)

DIVERSITY = "validation/diversity"
COLLAPSE = "collapse"
"""The alarm of a student whose samples have become alike."""


class Health:
    """Alarms. One that is raised is a warning line, once; `alarm/<name>` in the metrics is 1 for as long as it is on.

    `chance`: the discriminator cannot distinguish real from fake. `winning`: it always can. `collapse`: pictures of
    different noise have become alike. An alarm is cleared only well away from its limit: twice as far from .5
    (`chance`) or from 1 (`winning`), or half-way back to the first diversity (`collapse`).

    Args:
        logged_steps: over how many of them the accuracies are averaged.
        chance: raised where the mean of both accuracies is at most .5 and this; null: never.
        winning: raised where both accuracies are above this; null: never.
        diversity: raised where the diversity is below this share of what the first validation found; null: never.
        stop: an alarm ends the run.
        main: says the lines, as one of all ranks should.
        adversarial: what the method's adversarial training is logged as; None: it has none.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    def __init__(
        self,
        logged_steps: int = 20,
        chance: float | None = 0.05,
        winning: float | None = 0.98,
        diversity: float | None = 0.5,
        stop: bool = False,
        main: bool = True,
        adversarial: AdversarialScalars | None = None,
    ) -> None:
        if logged_steps < 1:
            raise ValueError(f"health.logged_steps must be at least 1, got {logged_steps}")
        for name, value, low, high in (
            ("chance", chance, 0, 0.25),
            ("winning", winning, 0.75, 1),
            ("diversity", diversity, 0, 1),
        ):
            if value is not None and not low <= value < high:
                raise ValueError(f"health.{name} must be null or lie in [{low}, {high}), got {value}")
        self.chance, self.winning, self.diversity = chance, winning, diversity
        self.stop, self.main, self.adversarial = stop, main, adversarial
        self.alarms: dict[str, str] = {}
        self._window: deque[tuple[int, float, float]] = deque(maxlen=logged_steps)  # step, both accuracies
        self._first: tuple[int, float] | None = None  # step and diversity of the first validation

    @property
    def ends_run(self) -> bool:
        """Whether an alarm is on that ends the run."""
        return self.stop and bool(self.alarms)

    def read(self, scalars: Mapping[str, float], step: int) -> dict[str, float]:
        """Takes the scalars of a logged step, or of a validation; returns those to be logged with them.

        They are `alarm/<name>` for each alarm that the scalars bear upon, and `<discriminator>/balance`: the student's
        adversarial loss over the discriminator's, .5 where neither is ahead (of the non-saturating loss).
        """
        before = set(self.alarms)
        found = self._read(scalars, step)
        self._say(name for name in self.alarms if name not in before)
        return found

    def forget(self) -> None:
        """Begins anew, with no alarm on."""
        self.alarms.clear()
        self._window.clear()
        self._first = None

    def recall(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Reads what a run has logged until it stopped, `step` included; says which alarms are on."""
        for row in rows:
            self._read(row, int(row["step"]))
        self._say(self.alarms)

    def _say(self, names: Iterable[str]) -> None:
        for name in names if self.main else ():
            log.warning("%s: %s", name, self.alarms[name])

    def _read(self, scalars: Mapping[str, float], step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.adversarial is not None and all(name in scalars for name in self.adversarial.accuracies):
            found |= self._adversarial(scalars, self.adversarial, step)
        if math.isfinite(diversity := scalars.get(DIVERSITY, math.nan)):
            found |= self._collapse(diversity, step)
        return found

    def _adversarial(self, scalars: Mapping[str, float], names: AdversarialScalars, step: int) -> dict[str, float]:
        """Both alarms of the discriminator."""
        found = names.balance(scalars)
        now = scalars[names.accuracies[0]], scalars[names.accuracies[1]]
        if all(map(math.isfinite, now)):
            self._window.append((step, *now))
        full = len(self._window) == self._window.maxlen
        real, fake = (fmean(row[i] for row in self._window) if full else math.nan for i in (1, 2))
        who = names.discriminator
        over = f"accuracies {real:.2f} on real, {fake:.2f} on fake, from step {self._window[0][0] if full else step} on"
        if self.chance is not None:
            worse, better = (real + fake) / 2 <= 0.5 + self.chance, (real + fake) / 2 > 0.5 + 2 * self.chance
            found["alarm/chance"] = self._switch(
                "chance",
                worse,
                better,
                f"{who} does no better than guessing ({over}). Try a higher learning rate of it, a lower one of the "
                "student, less re-noising; a student as good as its teacher reads the same",
            )
        if self.winning is not None:
            worst = min(real, fake)
            found["alarm/winning"] = self._switch(
                "winning",
                worst > self.winning,
                worst < 1 - 2 * (1 - self.winning),
                f"{who} is always right ({over}). Try a lower learning rate of it, a higher one of the student, "
                "r1 above 0, re-noising to noisier times",
            )
        return found

    def _collapse(self, diversity: float, step: int) -> dict[str, float]:
        self._first = self._first or (step, diversity)
        if self.diversity is None:
            return {}
        at, first = self._first
        return {
            f"alarm/{COLLAPSE}": self._switch(
                COLLAPSE,
                diversity < self.diversity * first,
                diversity > (1 + self.diversity) / 2 * first,
                f"the student's pictures of different noise are alike: {DIVERSITY} is {diversity:.3g} at step {step}, "
                f"and was {first:.3g} at step {at}. Try an earlier checkpoint with a lower learning rate of the "
                "student",
            )
        }

    def _switch(self, name: str, worse: bool, better: bool, line: str) -> float:
        """Whether the alarm is on, 0 or 1: it is raised where `worse`, cleared where `better`, and stays between."""
        if worse:
            self.alarms.setdefault(name, line)
        elif better:
            self.alarms.pop(name, None)
        return float(name in self.alarms)
