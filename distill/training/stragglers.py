"""Ranks that are slow: how long each computes by itself and waits for data, and a line that names one that lags.

All ranks of a step end it together, so its time says nothing of any one. What does is the time that a rank needs alone:
of its losses' forward passes, before the first sum over ranks, and of its waits for batches. Under ZeRO-3 a forward
pass waits for other ranks' weights, and ranks look more alike than they are.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

log = logging.getLogger(__name__)

SLOW, FINE = 1.5, 1.25
"""Times the ranks' median at which a rank counts as slow, and at which it no longer does."""
READINGS = 5
"""In a row in which a rank has to be slow before a line names it."""
EACH_UP_TO = 16
"""Ranks whose times are logged one by one; of more, the median and the slowest."""
PREFIXES = ("compute_seconds/", "data_seconds/", "slowest_rank")
"""What the names of the logged times begin with."""


class OwnTime:
    """Seconds that this process computes by itself, on its device; between two readings.

    Nothing waits for the device while steps are taken: on a GPU its own clock is read when a step is logged.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Surrounds the computation."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def read(self) -> float:
        """The seconds since the last reading. Starts again."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class Stragglers:
    """Compares the ranks, whenever a step is logged.

    Args:
        gathered: a value of every rank, in their order, on all of them.
        ranks: how many there are; of one nothing is said.
        main: says the lines, as one of all ranks should.
        host: this rank's machine.
    """

    def __init__(
        self, gathered: Callable[[Any], list[Any]], ranks: int, main: bool = True, host: str = socket.gethostname()
    ) -> None:
        self._gathered, self.ranks, self.main, self.host = gathered, ranks, main, host
        self._in_a_row = [0] * ranks
        self.named: set[int] = set()

    def read(self, compute_seconds: float, data_seconds: float, steps: int, step: int) -> dict[str, float]:
        """Takes what this rank needed alone for some `steps`, up to `step`; call it on all ranks.

        Returns:
            per step: `compute_seconds/rankN` and `data_seconds/rankN` of each rank (of more than `EACH_UP_TO` ranks
            `/median` and `/max`), and `slowest_rank`. Nothing of one rank.
        """
        if self.ranks == 1:
            return {}
        steps = max(steps, 1)
        rows = self._gathered((compute_seconds / steps, data_seconds / steps, self.host))
        own = [compute + data for compute, data, _ in rows]
        self._name(own, [host for _, _, host in rows], step)
        found = {"slowest_rank": float(own.index(max(own)))}
        for at, name in enumerate(("compute_seconds", "data_seconds")):
            values = [row[at] for row in rows]
            if self.ranks <= EACH_UP_TO:
                found |= {f"{name}/rank{rank}": value for rank, value in enumerate(values)}
            else:
                found |= {f"{name}/median": median(values), f"{name}/max": max(values)}
        return found

    def _name(self, own: list[float], hosts: list[str], step: int) -> None:
        for rank, seconds in enumerate(own):
            others = median(own[:rank] + own[rank + 1 :])
            times = seconds / max(others, 1e-9)
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if times > SLOW else 0
            if self._in_a_row[rank] == READINGS and rank not in self.named:
                self.named.add(rank)
                if self.main:
                    log.warning(
                        "rank %d on %s is slow: alone it needs %.3g s a step, %.1f times the others' median of "
                        "%.3g s, for %d log lines up to step %d",
                        *(rank, hosts[rank], seconds, times, others, READINGS, step),
                    )
            elif times < FINE and rank in self.named:
                self.named.discard(rank)
                if self.main:
                    log.info("rank %d on %s is as fast as the others again, at step %d", rank, hosts[rank], step)
