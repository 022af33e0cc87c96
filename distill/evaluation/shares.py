"""Several processes on one evaluation: each makes its blocks, they meet in a folder, and none talks to another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# What a launcher tells each process: its rank, how many there are. SLURM's are those of a step, which `srun` starts.
_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Share:
    """Which pieces of work are this process's: every `world_size`-th, from its rank on.

    What the pieces are must not depend on `world_size`: then what they amount to does not either.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be within 0 ... {self.world_size - 1}, got {self.rank}")

    @classmethod
    def launched(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """What torchrun, accelerate or srun says of this process; all of the work where there is no launcher.

        Raises:
            ValueError: what it says makes no sense.
        """
        for names in _LAUNCHERS:
            if all(name in environment for name in names[:2]):
                return cls(*(int(environment.get(name, 0)) for name in names))
        return cls()

    def own(self, pieces: Sequence[T]) -> Sequence[T]:
        """This process's among all pieces."""
        return pieces[self.rank :: self.world_size]
