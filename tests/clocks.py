"""What of a run's metrics clocks say: it differs from run to run."""

from __future__ import annotations

from distill.training.stragglers import PREFIXES

CLOCKS = {"samples_per_second", "data_wait", "step_seconds", "peak_memory_gib", "eta_seconds", "cpu_seconds"}


def is_clock(name: str) -> bool:
    return name in CLOCKS or name.startswith(PREFIXES)
