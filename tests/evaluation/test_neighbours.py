"""Precision, recall and coverage against what is known: equal sets, disjoint ones, Gaussians, collapsed samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.evaluation import neighbours
from distill.evaluation.neighbours import Conditional, coverage, expected_coverage, precision, radii, recall
from distill.evaluation.statistics import jackknife


def normal(n: int, seed: int, width: int = 4) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def shares(features: Tensor, real: Tensor) -> tuple[float, ...]:
    return tuple(of(features, real, 5)[0] for of in (precision, recall, coverage))


def test_a_set_covers_itself_and_none_that_is_far_away() -> None:
    real = normal(60, 0)
    assert shares(real, real) == (1, 1, 1)
    assert shares(real + 100, real) == (0, 0, 0)


def test_half_of_the_modes_is_all_true_and_half_of_the_recall_and_coverage() -> None:
    modes = torch.cat([normal(50, 0), normal(50, 1) + 50])
    found = shares(modes[:50], modes)
    assert found == (1, 0.5, 0.5)
    assert shares(modes, modes[:50]) == (0.5, 1, 1)  # every second sample is of a mode that is not there


def test_one_sample_for_all_noises_has_no_recall() -> None:
    collapsed = normal(1, 0).expand(60, -1)
    assert recall(collapsed, normal(60, 1), 5)[0] == 0 and coverage(collapsed, normal(60, 1), 5)[0] < 0.3


def test_coverage_of_two_samples_of_one_gaussian_is_the_closed_form() -> None:
    found = torch.tensor([coverage(normal(80, 2 * i), normal(100, 2 * i + 1), 5)[0] for i in range(40)])
    expected = expected_coverage(80, 100)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / 40**0.5
    assert expected_coverage(10**6, 10**6) == pytest.approx(1 - 2**-5, abs=1e-4)


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    other = pytest.importorskip("torch_fidelity.metric_prc", reason="torch-fidelity is not installed")
    features, real = normal(120, 0).double(), 0.8 * normal(90, 1).double() + 0.6
    theirs = other.calculate_precision_recall_full(features, real)
    assert (precision(features, real, 5)[0], recall(features, real, 5)[0]) == pytest.approx(theirs, abs=1e-6)
    assert 0.1 < theirs[0] < 0.95 and 0.1 < theirs[1] < 0.95


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, real = normal(70, 0), normal(50, 1) + 0.3
    whole = [of(features, real, 7) for of in (precision, recall, coverage)]
    monkeypatch.setattr(neighbours, "AT_ONCE", 16)
    for (value, without), of in zip(whole, (precision, recall, coverage), strict=True):
        again = of(features, real, 7)
        assert again[0] == value and torch.equal(again[1], without)


def test_what_is_left_out_is_left_out() -> None:
    features, real = normal(60, 0), normal(60, 1)
    _, without = coverage(features, real, 6)
    kept = torch.cat([features[:20], features[30:]])
    assert without[2] == pytest.approx(coverage(kept, real, 6)[0])
    _, without = precision(features, real, 6)
    assert without[2] == pytest.approx(precision(kept, real, 6)[0])
    reach = radii(features, 3)
    kept_reach = torch.cat([reach[:20], reach[30:]])
    _, without = recall(features, real, 6)
    assert without[2] == pytest.approx(float((torch.cdist(real, kept) <= kept_reach).any(1).double().mean()), abs=0.02)


def test_too_few_pictures_are_one_line() -> None:
    with pytest.raises(ValueError, match="3 nearest neighbours take more than 3 pictures, got 3"):
        radii(normal(3, 0), 3)


# ---- within prompts --------------------------------------------------------------------------------------------------


def labels(prompts: int, each: int) -> Tensor:
    return torch.arange(prompts * each) % prompts


def test_the_world_itself_scores_one_and_collapsed_samples_vary_not_at_all() -> None:
    of, real = labels(5, 12), normal(60, 0)
    assert Conditional(real, real, of, of).values() == pytest.approx(
        {"precision": 1, "recall": 1, "coverage": 1, "diversity": 1}
    )
    collapsed = normal(5, 1)[of]  # one sample for each prompt
    found = Conditional(collapsed, real, of, of).values()
    assert found["diversity"] == 0 and found["recall"] == 0


def test_half_of_the_spread_is_a_quarter_of_the_variance() -> None:
    of, real = labels(5, 40), normal(200, 0)
    means = torch.stack([real[of == label].mean(0) for label in range(5)])[of]
    found = Conditional(means + 0.5 * (real - means), real, of, of).values()
    assert found["diversity"] == pytest.approx(0.25) and found["recall"] < 0.9 < found["precision"]


def test_right_pictures_of_wrong_prompts_are_neither_true_nor_diverse_within_a_prompt() -> None:
    of = labels(4, 15)
    real = normal(60, 0) + 50.0 * of[:, None]
    swapped = real.roll(1, 0)  # each prompt has the pictures of its neighbour, and all together are the same set
    found = Conditional(swapped, real, of, of).values()
    assert found["precision"] == found["recall"] == found["coverage"] == 0
    assert shares(swapped, real) == (1, 1, 1)


def test_the_jackknife_sees_how_far_other_samples_fall() -> None:
    of, real = labels(5, 40), normal(200, 0)
    found = [Conditional(normal(200, seed), real, of, of) for seed in range(1, 25)]
    for name in ("diversity", "recall", "coverage", "precision"):
        spread = float(torch.tensor([one.values()[name] for one in found]).std())
        said = sum(jackknife(one.without(25)[name]) for one in found[:4]) / 4
        assert 0.5 < said / spread < 2.2, name
