"""The toy protocol: what the numbers mean, with a judge of random weights, which knows nothing but is deterministic."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from distill.diffusion.random import generator
from distill.evaluation.toy import JudgeScorer
from distill.toy.judge import Judge, sharpness
from distill.toy.world import CAPTIONS, balanced_labels, render

N = 100


@pytest.fixture(scope="module")
def scorer() -> JudgeScorer:
    torch.manual_seed(0)
    return JudgeScorer(Judge().eval())


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return render(balanced_labels(N), generator("test"))


def test_prompts_are_balanced(scorer: JudgeScorer) -> None:
    assert set(Counter(scorer.prompts("report", N)).values()) == {N // len(CAPTIONS)}


def test_accuracy_is_the_share_that_the_judge_reads_as_asked(scorer: JudgeScorer, pictures: torch.Tensor) -> None:
    read = scorer.judge.logits(pictures).argmax(1).tolist()
    prompts = [CAPTIONS[(label + (i < 25)) % len(CAPTIONS)] for i, label in enumerate(read)]  # the first 25 are wrong
    metrics = scorer.summarise(scorer.measure(pictures, prompts), "report")
    assert metrics["caption_accuracy"] == 0.75
    assert metrics["caption_accuracy_se"] == pytest.approx((0.75 * 0.25 / N) ** 0.5)


def test_sharpness_is_relative_to_real_pictures_and_falls_with_blur(
    scorer: JudgeScorer, pictures: torch.Tensor
) -> None:
    prompts = scorer.prompts("report", N)
    real = render(balanced_labels(N), generator("real pictures", "report"))  # the split's own reference
    metrics = scorer.summarise(scorer.measure(real, prompts), "report")
    assert metrics["sharpness"] == pytest.approx(1) and metrics["frechet"] == pytest.approx(0, abs=1e-5)

    blurred = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    sharp, soft = (scorer.summarise(scorer.measure(images, prompts), "report") for images in (pictures, blurred))
    assert sharp["sharpness"] == pytest.approx(sharpness(pictures, real), rel=1e-5)
    assert 0.8 < sharp["sharpness"] < 1.25 and soft["sharpness"] < 0.5


def test_frechet_notices_modes_that_are_missing(scorer: JudgeScorer, pictures: torch.Tensor) -> None:
    prompts = scorer.prompts("report", N)
    monotonous = render(torch.zeros(N, dtype=torch.long), generator("test"))  # one caption, whatever was asked
    whole, poor = (scorer.summarise(scorer.measure(images, prompts), "report") for images in (pictures, monotonous))
    assert poor["frechet"] > whole["frechet"] + 3 * whole["frechet_se"]


def test_a_difference_is_of_the_metrics_and_its_error_of_the_pairs(scorer: JudgeScorer, pictures: torch.Tensor) -> None:
    """Blurred a little, the pictures stay what they were: the error is below those of the two apart."""
    prompts = scorer.prompts("report", N)
    soft = 0.9 * pictures + 0.1 * F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    a, b = (scorer.measure(images, prompts) for images in (soft, pictures))
    of_a, of_b = (scorer.summarise(measured, "report") for measured in (a, b))
    found = scorer.difference(a, b, "report")
    for name in ("caption_accuracy", "frechet"):
        assert found[name] == pytest.approx(of_a[name] - of_b[name], abs=1e-9)
    assert 0 < found["frechet_se"] < 0.5 * of_b["frechet_se"]
    assert set(scorer.difference(b, b, "report").values()) == {0.0}

    other = {**b, "right": b["right"].clone()}
    other["right"][:8] = 1 - other["right"][:8]  # one sample at a time: of 8 flips the mean square is 8 / N
    flips = float((other["right"] - b["right"]).sum()) / N
    found = scorer.difference(other, b, "report")
    assert found["caption_accuracy"] == pytest.approx(flips)
    assert found["caption_accuracy_se"] == pytest.approx(((8 / N - flips**2) / (N - 1)) ** 0.5)


def test_other_real_pictures_are_other_pictures(scorer: JudgeScorer) -> None:
    assert scorer.real_pictures(N)["frechet"] > 0.01


def test_as_few_pictures_as_features_are_refused(scorer: JudgeScorer, pictures: torch.Tensor) -> None:
    measured = scorer.measure(pictures[:64], scorer.prompts("report", 64))
    with pytest.raises(ValueError, match="needs more than 64 pictures, got 64$"):
        scorer.summarise(measured, "report")


def test_another_judge_has_another_name(scorer: JudgeScorer) -> None:
    torch.manual_seed(1)
    assert JudgeScorer(Judge()).name != scorer.name


def test_diversity_is_what_noise_changes_in_pictures_of_one_caption(
    scorer: JudgeScorer, pictures: torch.Tensor
) -> None:
    prompts = scorer.prompts("report", N)
    alike = pictures[: len(CAPTIONS)].repeat(N // len(CAPTIONS), 1, 1, 1)  # every caption's first picture, again
    found = [scorer.summarise(scorer.measure(x, prompts), "report")["diversity"] for x in (pictures, alike)]
    assert 0.7 < found[0] < 1.4 and found[1] == pytest.approx(0, abs=1e-6)


def test_a_difference_of_sharpness_is_that_of_the_two(scorer: JudgeScorer, pictures: torch.Tensor) -> None:
    prompts = scorer.prompts("report", N)
    blurred = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    a, b = (scorer.measure(images, prompts) for images in (blurred, pictures))
    apart = scorer.summarise(a, "report")["sharpness"] - scorer.summarise(b, "report")["sharpness"]
    found = scorer.difference(a, b, "report")
    assert found["sharpness"] == pytest.approx(apart, rel=1e-5) and found["sharpness_se"] < -apart / 5
