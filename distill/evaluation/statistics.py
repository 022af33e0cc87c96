"""Numbers of images and of their features, without any network: means, sharpness, and Fréchet distances, with errors.

A Fréchet distance is biased upwards in small samples, so that only distances of equal n compare: two sets of unequal n
are refused. Against statistics that are given, such as those of a data set, n is for the caller to state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 25
"""Of neighbouring pictures, of which a jackknife leaves out one after another."""


def mean_with_error(values: Tensor) -> tuple[float, float]:
    """The mean of values [n], and its standard error."""
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def laplacian_energy(images: Tensor) -> Tensor:
    """Mean squared response of the 3x3 Laplacian of each of the pictures [B, C, H, W]: float64 [B]. Blur lowers it."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    response = F.conv2d(images.flatten(0, 1)[:, None], kernel[None, None].to(images))  # [B C, 1, H - 2, W - 2]
    return response.square().reshape(len(images), -1).double().mean(1)


def rmse(images: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference of each of the pictures [B, C, H, W] from its reference: float64 [B]."""
    return (images - reference).double().square().flatten(1).mean(1).sqrt()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance (Heusel et al. 2017, eq. 6) of the Gaussians fitted to two sets of features, each [n, F].

    Raises:
        ValueError: sets of different n or width, or too few for a covariance of full rank (n <= F).
    """
    features, reference = _checked(features, reference)
    return _distance(features, reference.mean(0), _root(reference.T.cov()))


def frechet_with_error(features: Tensor, reference: Tensor, groups: int = GROUPS) -> tuple[float, float]:
    """The distance and the standard error that comes from the choice of `features`, the reference being given.

    The error is the delete-a-group jackknife's over groups of neighbours: with prompts in turn, each group holds all of
    them. Raises what `frechet_distance` raises.
    """
    distance, without = _with_groups_left_out(features, reference, groups)
    return distance, jackknife(without)


def frechet_to_statistics_with_error(
    features: Tensor, mean: Tensor, covariance: Tensor, groups: int = GROUPS
) -> tuple[float, float]:
    """The distance of features [n, F] from a Gaussian of this mean [F] and covariance [F, F], and its standard error.

    The error is that of `frechet_with_error`. Raises ValueError: too few features for a covariance of full rank.
    """
    distance, without = frechet_to_statistics_without(features, mean, covariance, groups)
    return distance, jackknife(without)


def frechet_to_statistics_without(
    features: Tensor, mean: Tensor, covariance: Tensor, groups: int = GROUPS
) -> tuple[float, Tensor]:
    """The distance of `frechet_to_statistics_with_error`, and those without each of the groups, float64 [groups]."""
    return _without_groups(_enough(features).double(), mean.double(), _root(covariance.double()), groups)


def frechet_difference_with_error(a: Tensor, b: Tensor, reference: Tensor, groups: int = GROUPS) -> tuple[float, float]:
    """The distance of `a` less that of `b`, and the standard error of this difference.

    Picture i of both is of one prompt and one starting noise: what these do to both cancels. The jackknife leaves the
    same groups out of both; it and the errors raised are those of `frechet_with_error`.
    """
    (of_a, without_a), (of_b, without_b) = (_with_groups_left_out(x, reference, groups) for x in (a, b))
    return of_a - of_b, jackknife(without_a - without_b)


def _with_groups_left_out(features: Tensor, reference: Tensor, groups: int) -> tuple[float, Tensor]:
    """The distance of all features, and those without each of the groups, float64 [groups]."""
    features, reference = _checked(features, reference)
    return _without_groups(features, reference.mean(0), _root(reference.T.cov()), groups)


def _without_groups(features: Tensor, mean: Tensor, root: Tensor, groups: int) -> tuple[float, Tensor]:
    parts = features.tensor_split(groups)
    without = [torch.cat([*parts[:i], *parts[i + 1 :]]) for i in range(groups)]
    distances = [_distance(rest, mean, root) for rest in without]
    return _distance(features, mean, root), torch.tensor(distances, dtype=torch.float64)


def jackknife(without: Tensor) -> float:
    """The delete-a-group jackknife's standard error of a value, from those without each group, [groups]."""
    return math.sqrt((len(without) - 1) * float(without.var(correction=0)))


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
    return _enough(features).double(), reference.double()


def _enough(features: Tensor) -> Tensor:
    n, width = features.shape
    if n <= width:
        raise ValueError(f"a Frechet distance over {width} features needs more than {width} pictures, got {n}")
    return features
