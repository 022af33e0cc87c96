"""Students of several training seeds: how far two are apart, and the seeds as one row of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from torch import Tensor

from distill.evaluation.compare import Row, Scorer
from distill.evaluation.statistics import mean_with_error


def difference(scorer: Scorer, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Row:
    """`Scorer.difference` of two rows' `Comparison.measured`, and how much further `a` is from the teacher."""
    further, error = mean_with_error(a["teacher_distance"] - b["teacher_distance"])
    row = scorer.difference(a, b, "report")
    return row | {"teacher_consistency": further, "teacher_consistency_se": error}


def over_seeds(rows: list[Row], metrics: Sequence[str]) -> Row:
    """Metrics of several seeds' rows, on average; the standard error is of that mean, over pictures or over seeds.

    All seeds sample one set of prompts and noises, so that over pictures their errors may be one and the same: they
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
