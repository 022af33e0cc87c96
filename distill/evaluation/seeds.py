"""Several training seeds, as one row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from distill.evaluation.compare import Row


def over_seeds(rows: list[Row], metrics: Sequence[str]) -> Row:
    """Metrics of several seeds' rows, on average; the standard error is of that mean, over pictures or over seeds.

    All seeds draw from one set of prompts and noises, so that over pictures their errors may be one and the same: they
    are averaged, and do not shrink with the number of seeds.
    """
    together: Row = {}
    for name in metrics:
        values = [row[name] for row in rows]
        together[name] = mean(values)
        if f"{name}_se" in rows[0]:
            pictures = mean(row[f"{name}_se"] for row in rows)
            seeds = stdev(values) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
            together[f"{name}_se"] = max(pictures, seeds)
    return together
