from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.toy.judge import Judge, frechet_distance, laplacian_energy, load_judge, sharpness
from distill.toy.world import CAPTIONS, balanced_labels, render, sample


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def test_judge_reads_fresh_renders(judge: Judge) -> None:
    images, captions, _ = sample(1000, seed=77)
    share, error = judge.caption_accuracy(images, captions)
    assert share >= 0.98
    assert error == pytest.approx((share * (1 - share) / 1000) ** 0.5)


def test_judge_is_not_fooled_by_wrong_captions(judge: Judge) -> None:
    images, captions, labels = sample(500, seed=78)
    shifted = [CAPTIONS[(label + 1) % len(CAPTIONS)] for label in labels.tolist()]
    assert judge.caption_accuracy(images, shifted)[0] < 0.02


def test_judge_wants_one_caption_a_picture(judge: Judge) -> None:
    images, captions, _ = sample(3, seed=0)
    with pytest.raises(ValueError, match="one caption a picture"):
        judge.caption_accuracy(images, captions[:2])


def test_features_are_standardised_over_real_pictures(judge: Judge) -> None:
    features = judge.features(render(balanced_labels(2000), torch.Generator().manual_seed(5)))
    assert features.shape == (2000, 64)
    assert features.mean(0).abs().max() < 0.15 and (features.std(0) - 1).abs().max() < 0.15


def test_distance_notices_blur_and_averaging(judge: Judge) -> None:
    """What few-step samples get wrong, a Frechet distance in the judge's features must see."""
    generator = torch.Generator().manual_seed(6)
    labels = balanced_labels(1000)
    real, other, third = (render(labels, generator) for _ in range(3))
    reference = judge.features(real)
    floor = frechet_distance(judge.features(other), reference)
    blurred = F.avg_pool2d(F.pad(other, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    averaged = (other + third) / 2
    assert frechet_distance(judge.features(blurred), reference) > 3 * floor
    assert frechet_distance(judge.features(averaged), reference) > 10 * floor
    assert sharpness(other, real) == pytest.approx(1, abs=0.1)
    assert sharpness(blurred, real) < 0.5
    assert sharpness(averaged, real) < 0.7


def test_frechet_distance_of_known_gaussians() -> None:
    """For commuting covariances it is |m|^2 + sum (s_a - s_b)^2; standardised samples make it exact."""
    white = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T
    scale, shift = torch.tensor([2.0, 1.0, 0.5]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    assert frechet_distance(white * scale + shift, white) == pytest.approx(5 + 1 + 0 + 0.25, abs=1e-9)
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-9)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double())
    assert frechet_distance((white * scale) @ turn, white @ turn) == pytest.approx(1.25, abs=1e-9)


def test_frechet_distance_is_symmetric_where_covariances_do_not_commute() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator) for _ in range(2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_refuses_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="features"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))


def test_laplacian_energy_of_known_pictures() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert laplacian_energy(ramp) == 0  # linear: no high frequency
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).mul(2.0).sub(1).expand(1, 1, 8, 8)
    assert laplacian_energy(board) == 64  # each pixel differs by 2 from its four neighbours
