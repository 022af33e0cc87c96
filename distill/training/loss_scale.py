"""The factor by which a loss is multiplied before its gradient is taken in float16, so that small gradients survive.

Micikevicius et al. 2018, arXiv 1710.03740, sec. 3.2. The start, the factors and the patience are those of torch's
`GradScaler`. One rule serves every way of sharding, so that a scale is at home on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEAST, MOST = 1.0, 2.0**24
PATIENCE = 2000  # updates without an overflow, after which a scale is tried that is twice as large


@dataclass
class LossScale:
    """A network's loss scale: a power of two, so that scaling and unscaling change no bit but those that underflow.

    Attributes:
        value: what the loss is multiplied by.
        since: updates taken since it last changed.
    """

    value: float = 2.0**16
    since: int = 0

    @property
    def is_least(self) -> bool:
        """Whether it cannot be lowered: a gradient that is not finite is then not the scale's fault."""
        return self.value <= LEAST

    def taken(self) -> None:
        """An update was taken."""
        self.since += 1
        if self.since >= PATIENCE and self.value < MOST:
            self.value, self.since = 2 * self.value, 0

    def overflowed(self) -> None:
        """An update was skipped, because a gradient times the scale exceeds float16's range."""
        self.value, self.since = max(LEAST, self.value / 2), 0

    def state_dict(self) -> dict[str, Any]:
        """Values of JSON."""
        return {"value": self.value, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.value, self.since = float(state["value"]), int(state["since"])
