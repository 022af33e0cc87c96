"""Fréchet distance against closed forms, an independent formula, and its error against repeated draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.evaluation.statistics import frechet_difference_with_error, frechet_distance, frechet_with_error


def draws(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, width: int, seed: int = 0) -> Tensor:
    """A sample whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = draws(n, width, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def random_matrix(width: int, seed: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64) + 0.3 * draws(width, width, seed)


@pytest.mark.parametrize(("shift", "a", "b"), [(0.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.0, 1.0, 3.0), (1.5, 0.2, 4.0)])
def test_isotropic_gaussians(shift: float, a: float, b: float) -> None:
    width = 5
    distance = frechet_distance(a * whitened(200, width, 0), b * whitened(200, width, 1) + shift)
    assert distance == pytest.approx(width * (shift**2 + (a - b) ** 2), abs=1e-9)


def test_commuting_covariances() -> None:
    a, b = torch.tensor([0.1, 1.0, 5.0]).double(), torch.tensor([2.0, 0.0, 0.3]).double()
    distance = frechet_distance(whitened(50, 3, 0) * a, whitened(50, 3, 1) * b)
    assert distance == pytest.approx(float((a - b).square().sum()), abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_the_textbook_formula_with_an_unsymmetric_square_root(seed: int) -> None:
    x, y = (
        draws(300, 6, seed) @ random_matrix(6, seed + 10),
        draws(300, 6, seed + 20) @ random_matrix(6, seed + 30) + 0.4,
    )
    cx, cy = x.T.cov(), y.T.cov()
    cross = torch.linalg.eigvals(cx @ cy).real.sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(float(expected), rel=1e-10)


def test_a_set_is_at_distance_zero_from_itself_in_any_order() -> None:
    x = draws(100, 8).float()
    x[:, 3] = x[:, 2]  # a singular covariance
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-7)


def test_rotations_and_shifts_of_both_change_nothing_and_scale_is_squared() -> None:
    x, y = draws(200, 4, 0), draws(200, 4, 1) * 2 + 1
    turn = torch.linalg.qr(draws(4, 4, 2))[0]
    distance = frechet_distance(x, y)
    assert frechet_distance(x @ turn + 5, y @ turn + 5) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * distance, rel=1e-10)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [((10, 3), (9, 3), "equal n only"), ((10, 3), (10, 4), "equal n only"), ((4, 4), (4, 4), "more than 4 pictures")],
)
def test_unequal_or_too_few_is_refused(a: tuple[int, int], b: tuple[int, int], message: str) -> None:
    same = torch.zeros(b)
    for refused in (
        lambda: frechet_distance(torch.zeros(a), same),
        lambda: frechet_with_error(torch.zeros(a), same),
        lambda: frechet_difference_with_error(same, torch.zeros(a), torch.zeros(b)),
    ):
        with pytest.raises(ValueError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)


def test_the_error_is_that_of_repeated_draws() -> None:
    reference = draws(500, 3, 999)
    values, errors = zip(
        *(frechet_with_error(1.3 * draws(500, 3, seed) + 0.2, reference, groups=20) for seed in range(200)), strict=True
    )
    spread, claimed = torch.tensor(values).std(), torch.tensor(errors).square().mean().sqrt()
    assert 0.85 < float(claimed / spread) < 1.2
    assert values[0] == frechet_distance(1.3 * draws(500, 3, 0) + 0.2, reference)


@pytest.mark.parametrize(("shared", "gain"), [(True, (4, 10)), (False, (0.9, 1.1))])
def test_the_error_of_a_difference_is_that_of_repeated_draws(shared: bool, gain: tuple[float, float]) -> None:
    """Of two sets that are made of the same draws, and of two that are not; `gain` is over errors taken apart."""
    reference, found, claimed, apart = draws(500, 3, 999), [], [], []
    for seed in range(200):
        common = draws(500, 3, seed)
        a = 1.3 * common + 0.2 + 0.1 * draws(500, 3, 1000 + seed)
        b = 1.25 * (common if shared else draws(500, 3, 2000 + seed)) + 0.2 + 0.1 * draws(500, 3, 3000 + seed)
        difference, error = frechet_difference_with_error(a, b, reference, groups=20)
        found.append(difference)
        claimed.append(error)
        if seed < 20:
            (of_a, error_a), (of_b, error_b) = (frechet_with_error(x, reference, groups=20) for x in (a, b))
            assert difference == pytest.approx(of_a - of_b, abs=1e-12)
            apart.append(math.hypot(error_a, error_b) / error)
    assert 0.85 < float(torch.tensor(claimed).square().mean().sqrt() / torch.tensor(found).std()) < 1.2
    assert gain[0] < sum(apart) / len(apart) < gain[1]
