"""Metrics over features of networks given by path: tiny vision models with random weights, and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from distill.evaluation.features import SCALE, discrepancy, features_network, kernel_sum
from distill.evaluation.inception import to_bytes
from distill.evaluation.protocol import Captions, MetricScorer, Protocol, build_scorer
from distill.evaluation.statistics import jackknife

SIDE, N = 28, 40
METRICS = ("precision", "recall", "coverage", "fd_dinov2", "cmmd")


def normal(n: int, seed: int, width: int = 6) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(n: int, seed: int) -> Tensor:
    """Each of a tone of its own, with noise, in whole 1/255."""
    random = torch.Generator().manual_seed(seed)
    tones = torch.rand(n, 3, 1, 1, generator=random)
    return to_bytes((0.7 * tones + 0.3 * torch.rand(n, 3, SIDE, SIDE, generator=random)).clamp(0, 1)).float() / 255


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}
        Dinov2Model(Dinov2Config(hidden_size=8, **small)).save_pretrained(folder / "dinov2")
        clip = CLIPVisionConfig(hidden_size=8, intermediate_size=16, projection_dim=6, **small)
        CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    (folder / "dinov2" / "preprocessor_config.json").write_text('{"crop_size": {"height": 28, "width": 28}}')
    return {"features": str(folder / "dinov2"), "dinov2": str(folder / "dinov2"), "cmmd_clip": str(folder / "clip")}


@pytest.fixture(scope="module")
def scorer(weights: dict[str, str | None], tmp_path_factory: pytest.TempPathFactory) -> MetricScorer:
    return scorer_of(weights, tmp_path_factory.mktemp("scorer"))


def scorer_of(weights: dict[str, str | None], folder: Path, metrics: tuple[str, ...] = METRICS) -> MetricScorer:
    real = folder / "real"
    real.mkdir()
    for i, image in enumerate(to_bytes(pictures(N, 0))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(real / f"{i:03d}.png")
    protocol = Protocol("own", "tests", N, SIDE, str(real), False, None, None, None, "", metrics)
    return build_scorer(protocol, Captions(["a picture"] * N), weights, folder / "kept", "cpu")


def measured(scorer: MetricScorer, images: Tensor) -> dict[str, Tensor]:
    parts = [scorer.measure(2 * part - 1, ["a picture"] * len(part)) for part in images.split(16)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_the_real_pictures_themselves_are_at_no_distance_and_all_within_reach(scorer: MetricScorer) -> None:
    assert scorer.left_out == {}
    found = scorer.summarise(measured(scorer, pictures(N, 0)), "report")
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["fd_dinov2"] == pytest.approx(0, abs=1e-4) and found["cmmd"] == pytest.approx(0, abs=1e-6)
    assert found["recall_n_real"] == N


def test_other_pictures_are_further_and_of_one_picture_nothing_is_recalled(scorer: MetricScorer) -> None:
    others, one = pictures(N, 1), pictures(1, 1).expand(N, -1, -1, -1)
    other, collapsed = (scorer.summarise(measured(scorer, images), "report") for images in (others, one))
    assert collapsed["recall"] == 0 < other["recall"] and collapsed["coverage"] < other["coverage"]
    assert 0 < other["cmmd"] < collapsed["cmmd"] and other["fd_dinov2"] < collapsed["fd_dinov2"]
    assert all(other[f"{name}_se"] > 0 for name in ("fd_dinov2", "cmmd"))


def test_a_difference_of_two_students_is_that_of_their_numbers(scorer: MetricScorer) -> None:
    a, b = measured(scorer, 0.3 + 0.6 * pictures(N, 1)), measured(scorer, pictures(N, 2))
    apart = scorer.difference(a, b, "report")
    of_a, of_b = (scorer.summarise(one, "report") for one in (a, b))
    for name in METRICS:
        assert apart[name] == pytest.approx(of_a[name] - of_b[name], abs=1e-9)
    assert all(apart[f"{name}_se"] > 0 for name in ("fd_dinov2", "cmmd"))
    assert all(value == 0 for value in scorer.difference(b, b, "report").values())


def test_the_discrepancy_is_the_mean_of_kernels_and_grows_with_distance() -> None:
    x, y = normal(30, 0), normal(50, 1)
    value, without = discrepancy(x, y, 5)
    n, m = len(x), len(y)
    assert value == pytest.approx(
        float(SCALE * (kernel_sum(x, x) / n**2 + kernel_sum(y, y) / m**2 - 2 * kernel_sum(x, y) / n / m)), rel=1e-9
    )
    kept = torch.cat([x[:6], x[12:]])
    assert float(without[1]) == pytest.approx(discrepancy(kept, y, 4)[0], rel=1e-9)
    assert discrepancy(x + 3, y, 5)[0] > value + 5 * jackknife(without)
    far = discrepancy(torch.zeros(10, 2), torch.full((10, 2), 1e3), 5)[0]
    assert far == pytest.approx(2 * SCALE)  # two points so far apart that their kernel is 0


def test_a_network_is_asked_once_for_three_metrics(weights: dict[str, str | None]) -> None:
    network = features_network(str(weights["features"]))
    assert network.side == SIDE and network.width == 8
    images, calls = pictures(3, 0), []
    network.model.register_forward_hook(lambda *_: calls.append(1))
    first = network(images)
    assert network(images) is first and len(calls) == 1
    assert not torch.equal(network(1 - images), first) and len(calls) == 2


def test_what_is_not_there_is_left_out_with_its_reason(tmp_path: Path) -> None:
    scorer = scorer_of({"features": str(tmp_path)}, tmp_path)
    assert scorer.left_out["recall"].startswith(f"{tmp_path} is no folder of transformers with AutoModel")
    assert scorer.left_out["cmmd"] == "no weights: set weights.cmmd_clip=FILE"


def test_statistics_of_real_pictures_have_no_neighbours(weights: dict[str, str | None], tmp_path: Path) -> None:
    scorer = scorer_of(weights, tmp_path, ("fd_dinov2",))
    scorer.summarise(measured(scorer, pictures(N, 1)), "report")
    (kept,) = (tmp_path / "kept").glob("fd_dinov2-*.safetensors")
    protocol = Protocol("own", "tests", N, SIDE, str(kept), False, None, None, None, "", ("recall",))
    without = build_scorer(protocol, Captions(["a picture"] * N), weights, tmp_path / "kept", "cpu")
    with pytest.raises(ValueError, match="holds statistics, and features compares with real pictures one by one"):
        without.summarise(measured(without, pictures(N, 1)), "report")
