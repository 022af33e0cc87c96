"""Frechet distance of two sets of features, in float64, with a standard error.

The distance is biased upwards in small samples, so that only distances of equal n compare: unequal n is refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance (Heusel et al. 2017, eq. 6) of the Gaussians fitted to two sets of features, each [n, F].

    Raises:
        ValueError: sets of different n or width, or too few for a covariance of full rank (n <= F).
    """
    features, reference = _checked(features, reference)
    return _distance(features, reference.mean(0), _root(reference.T.cov()))


def frechet_with_error(features: Tensor, reference: Tensor, groups: int = 25) -> tuple[float, float]:
    """The distance and the standard error that comes from the choice of `features`, the reference being given.

    The error is the delete-a-group jackknife's over groups of neighbours: with prompts in turn, each group holds all of
    them. Raises what `frechet_distance` raises.
    """
    features, reference = _checked(features, reference)
    mean, root = reference.mean(0), _root(reference.T.cov())
    parts = features.tensor_split(groups)
    without = [torch.cat([*parts[:i], *parts[i + 1 :]]) for i in range(groups)]
    distances = torch.tensor([_distance(rest, mean, root) for rest in without], dtype=torch.float64)
    spread = (groups - 1) * float((distances - distances.mean()).square().mean())
    return _distance(features, mean, root), math.sqrt(spread)


def _distance(features: Tensor, mean: Tensor, root: Tensor) -> float:
    """|m - m'|² + tr(C + C' - 2 (C'^1/2 C C'^1/2)^1/2); `root` is C'^1/2: symmetric, so its eigenvalues are real."""
    covariance = features.T.cov()
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    traces = covariance.trace() + root.square().sum()
    return float((features.mean(0) - mean).square().sum() + traces - 2 * cross)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _checked(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or features.shape != reference.shape:
        raise ValueError(
            f"Frechet distances compare at equal n only: features {tuple(features.shape)} against "
            f"{tuple(reference.shape)}, both must be [n, F]"
        )
    n, width = features.shape
    if n <= width:
        raise ValueError(f"a Frechet distance over {width} features needs more than {width} pictures, got {n}")
    return features.double(), reference.double()
