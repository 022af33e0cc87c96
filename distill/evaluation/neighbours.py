"""Diversity and truth of samples as numbers, by nearest neighbours among features: precision, recall, coverage.

A set of points covers the balls around each of them that reach to its k-th nearest other point. What lies in a ball of
the real pictures is plausible (precision); what of the real pictures lies in a ball of the generated ones could have
been generated (recall: Kynkäänniemi et al. 2019, arXiv 1904.06991). Of the balls of the real pictures, the share with a
generated one inside is the coverage (Naeem et al. 2020, arXiv 2002.09797), which outliers among the generated pictures
do not raise. Two samples of one continuous distribution do not score 1, but see `expected_coverage`; values compare at
equal numbers of pictures only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PRECISION_K = 3
"""Neighbours of precision and recall, as in Kynkäänniemi et al. 2019."""
COVERAGE_K = 5
"""Neighbours of coverage, as in Naeem et al. 2020."""
AT_ONCE = 2048
"""Rows of a matrix of distances that are held at once."""


Share = tuple[float, Tensor]
"""A share, and what it is without each of some groups of neighbouring generated pictures, float64 [groups]: the radii
of the balls are kept, which a group changes little."""


def precision(features: Tensor, real: Tensor, groups: int, k: int = PRECISION_K) -> Share:
    """Of the features [n, F], the share that lies in a ball of the real ones [m, F]."""
    reach = radii(real, k)
    inside = torch.cat([(block <= reach).any(1) for block in _distances(features, real)]).double()
    parts = inside.tensor_split(groups)
    without = [(inside.sum() - part.sum()) / (len(inside) - len(part)) for part in parts]
    return float(inside.mean()), torch.stack(without)


def recall(features: Tensor, real: Tensor, groups: int, k: int = PRECISION_K) -> Share:
    """Of the real features [m, F], the share that lies in a ball of the generated ones [n, F]."""
    return _covered(real, features, radii(features, k).expand(len(real), -1), groups)


def coverage(features: Tensor, real: Tensor, groups: int, k: int = COVERAGE_K) -> Share:
    """Of the balls of the real features [m, F], the share in which one of the features [n, F] lies."""
    return _covered(real, features, radii(real, k)[:, None].expand(-1, len(features)), groups)


def _covered(real: Tensor, features: Tensor, reach: Tensor, groups: int) -> Share:
    """Of the real features [m, F], the share that is within `reach` [m, n] of one of the features [n, F]."""
    near = []
    for block, far in zip(_distances(real, features), reach.split(AT_ONCE), strict=True):
        near.append(torch.stack([part.any(1) for part in (block <= far).tensor_split(groups, dim=1)], 1))
    by_group = torch.cat(near)  # [m, groups]
    several = by_group.sum(1, keepdim=True) - by_group.long()  # groups other than this one
    return float(by_group.any(1).double().mean()), (several > 0).double().mean(0)


def expected_coverage(n: int, m: int, k: int = COVERAGE_K) -> float:
    """The mean coverage where n generated and m real pictures are of one continuous distribution.

    Of a real picture, its m - 1 others and the n generated ones, all orders of distance are equally likely: its ball is
    empty where the k nearest are all real (Naeem et al. 2020, lemma 2).
    """
    empty = 1.0
    for i in range(1, k + 1):
        empty *= (m - i) / (n + m - i)
    return 1 - empty


def radii(features: Tensor, k: int) -> Tensor:
    """The distance of each of the features [n, F] to its k-th nearest other one, float64 [n].

    Raises:
        ValueError: there are no k others.
    """
    if len(features) <= k:
        raise ValueError(f"{k} nearest neighbours take more than {k} pictures, got {len(features)}")
    return torch.cat([_kth(block, k) for block in _distances(features, features)])


def _kth(distances: Tensor, k: int) -> Tensor:
    """The k-th smallest but for the smallest, which is each one's own: distances [B, n] -> [B]."""
    return distances.kthvalue(k + 1, dim=1).values


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The Euclidean distances of a [n, F] to b [m, F], in float64, in blocks of rows."""
    b = b.double()
    for rows in a.double().split(AT_ONCE):
        yield torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class WithinPrompt:
    """One prompt's pictures, generated and real, by their features' distances.

    Args:
        places: of the generated pictures among those of all prompts, [n].
        among: distances of the generated to each other, [n, n].
        across: of the real to the generated, [m, n].
        reach, reach_coverage: radii of the real pictures' balls, [m] each.
        features: of the generated, [n, F].
        real_variance: summed over the features, of the real pictures.
    """

    places: Tensor
    among: Tensor
    across: Tensor
    reach: Tensor
    reach_coverage: Tensor
    features: Tensor
    real_variance: float


class Conditional:
    """Precision, recall, coverage and variance within prompts, on average over them: what a prompt leaves open.

    Args:
        features: of generated pictures [n, F]; real: of real ones [m, F].
        labels: of the generated pictures' prompts [n]; real_labels: of the real ones' [m].

    Raises:
        ValueError: a prompt with too few pictures, generated or real.
    """

    def __init__(self, features: Tensor, real: Tensor, labels: Tensor, real_labels: Tensor) -> None:
        self.n = len(features)
        self.prompts: list[WithinPrompt] = []
        for label in labels.unique():
            places, truth = torch.nonzero(labels == label)[:, 0], real[real_labels == label].double()
            own = features[places].double()
            if len(own) < 2 or len(truth) < 2:
                raise ValueError(f"diversity takes 2 pictures of each prompt, got {len(own)} and {len(truth)}")
            self.prompts.append(
                WithinPrompt(
                    places,
                    torch.cat(list(_distances(own, own))),
                    torch.cat(list(_distances(truth, own))),
                    radii(truth, min(PRECISION_K, len(truth) - 1)),
                    radii(truth, min(COVERAGE_K, len(truth) - 1)),
                    own,
                    float(truth.var(0).sum()),
                )
            )

    def values(self, left_out: Tensor | None = None) -> dict[str, float]:
        """precision, recall, coverage, and diversity: the variance relative to the real pictures'.

        Args:
            left_out: places of generated pictures that take no part.
        """
        found: dict[str, list[Tensor]] = {"precision": [], "recall": [], "coverage": []}
        variance: list[float] = []
        for prompt in self.prompts:
            kept = torch.arange(len(prompt.places))
            if left_out is not None:
                kept = kept[~torch.isin(prompt.places, left_out)]
            if len(kept) < 2:
                continue
            across, among = prompt.across[:, kept], prompt.among[kept][:, kept]
            reach = _kth(among, min(PRECISION_K, len(kept) - 1))
            found["precision"].append((across <= prompt.reach[:, None]).any(0))
            found["recall"].append((across <= reach).any(1))
            found["coverage"].append(across.amin(1) <= prompt.reach_coverage)
            variance.append(float(prompt.features[kept].var(0).sum()))
        real = sum(prompt.real_variance for prompt in self.prompts) / len(self.prompts)
        shares = {name: float(torch.cat(values).double().mean()) for name, values in found.items()}
        return shares | {"diversity": sum(variance) / len(variance) / real}

    def without(self, groups: int) -> dict[str, Tensor]:
        """The values without each of the groups of neighbouring pictures: [groups] each, for a jackknife."""
        parts = torch.arange(self.n).tensor_split(groups)
        return together([self.values(part) for part in parts])


def together(rows: list[dict[str, float]]) -> dict[str, Tensor]:
    """Values by name from several rows that have the same names: float64 [rows] each."""
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def without_groups(
    values: Callable[[Mapping[str, Tensor]], dict[str, float]], measured: Mapping[str, Tensor], groups: int
) -> dict[str, Tensor]:
    """`values` of what was measured of pictures, [n, ...] each, without each of the groups of neighbours: [groups]."""
    n = len(next(iter(measured.values())))
    places = torch.arange(n)
    kept = [places[~torch.isin(places, part)] for part in places.tensor_split(groups)]
    return together([values({name: tensor[rest] for name, tensor in measured.items()}) for rest in kept])
