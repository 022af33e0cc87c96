"""The toy world's protocol: prompts balanced over its captions, a classifier trained on real pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distill.diffusion.random import generator
from distill.evaluation.blocks import network_hash
from distill.evaluation.neighbours import COVERAGE_K, PRECISION_K, Conditional
from distill.evaluation.statistics import (
    GROUPS,
    frechet_difference_with_error,
    frechet_with_error,
    jackknife,
    laplacian_energy,
    mean_with_error,
)
from distill.toy.judge import Judge
from distill.toy.world import CAPTIONS, balanced_labels, labels_of, render


class JudgeScorer:
    """Scores toy pictures with the toy's classifier, called the judge.

    Metrics: caption_accuracy, the share that it labels as their prompt, and its standard error; frechet, between
    its features of the pictures and of as many real ones of the same captions, and its standard error;
    sharpness, the high-frequency energy relative to those real ones (1: as sharp, less: blurred). Within captions, on
    average over them, and with standard errors: diversity, the conditional variance of features relative to those real
    ones (0: one picture for all noises); precision, recall and coverage, as `distill.evaluation.neighbours` defines
    them.

    Args:
        real: makes real pictures of labels; those of a styled world come from another function.
    """

    protocol, against = "toy", ""
    notes: Sequence[str] = ()
    left_out: Mapping[str, str] = {}

    def __init__(self, judge: Judge, real: Callable[[Tensor, torch.Generator], Tensor] = render) -> None:
        self.judge, self.real = judge, real
        self.name = f"toy judge {network_hash(judge)}, neighbours {PRECISION_K} and {COVERAGE_K}"
        self._real: dict[tuple[str, int], dict[str, Tensor]] = {}

    def prompts(self, split: str, n: int) -> list[str]:
        """The captions in turn."""
        return [CAPTIONS[label] for label in balanced_labels(n)]

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Features [B, F], whether the caption is right [B], high-frequency energy [B]."""
        device = next(self.judge.parameters()).device
        return {
            "features": self.judge.features(images.to(device)).cpu(),
            "right": captions_right(self.judge, images, prompts),
            "energy": laplacian_energy(images),
        }

    def summarise(self, measured: Mapping[str, Tensor], split: str) -> dict[str, float]:
        """The metrics named above. Raises ValueError if there are no more pictures than features."""
        n = len(measured["right"])
        real = self._real_measured(split, n)
        share = float(measured["right"].mean())
        frechet, frechet_se = frechet_with_error(measured["features"], real["features"])
        return {
            "caption_accuracy": share,
            "caption_accuracy_se": math.sqrt(share * (1 - share) / n),
            "frechet": frechet,
            "frechet_se": frechet_se,
            "sharpness": float(measured["energy"].mean() / real["energy"].mean()),
        } | with_errors(*self._conditional(measured, real))

    @staticmethod
    def _conditional(
        measured: Mapping[str, Tensor], real: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The metrics within captions, and what they are without each of some groups of pictures."""
        labels = balanced_labels(len(real["right"]))
        within = Conditional(measured["features"], real["features"], labels, labels)
        return within.values(), within.without(GROUPS)

    def difference(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor], split: str) -> dict[str, float]:
        """The metrics of `a` less those of `b`: their pictures share prompts and noise.

        Their standard errors are of the differences. Raises what `summarise` raises.
        """
        real = self._real_measured(split, len(a["right"]))
        right, right_se = mean_with_error(a["right"] - b["right"])
        frechet, frechet_se = frechet_difference_with_error(a["features"], b["features"], real["features"])
        sharper, sharper_se = mean_with_error((a["energy"] - b["energy"]) / real["energy"].mean())
        (of_a, without_a), (of_b, without_b) = (self._conditional(measured, real) for measured in (a, b))
        within = with_errors(
            {name: value - of_b[name] for name, value in of_a.items()},
            {name: values - without_b[name] for name, values in without_a.items()},
        )
        return within | {
            "caption_accuracy": right,
            "caption_accuracy_se": right_se,
            "frechet": frechet,
            "frechet_se": frechet_se,
            "sharpness": sharper,
            "sharpness_se": sharper_se,
        }

    def real_pictures(self, n: int) -> dict[str, float]:
        """What n other real pictures score: the best that can be reached."""
        return self.summarise(self._real_measured("other", n), "report")

    def _real_measured(self, split: str, n: int) -> dict[str, Tensor]:
        if (split, n) not in self._real:
            images = self.real(balanced_labels(n), generator("real pictures", split))
            self._real[split, n] = self.measure(images, self.prompts(split, n))
        return self._real[split, n]


def with_errors(values: Mapping[str, float], without: Mapping[str, Tensor]) -> dict[str, float]:
    """Values and their jackknife's standard errors, as `NAME_se`, from the values without each of some groups."""
    return {**values, **{f"{name}_se": jackknife(left) for name, left in without.items()}}


@torch.no_grad()
def captions_right(judge: Judge, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Whether the classifier labels each picture [B, 3, 32, 32] in [-1, 1] as its prompt: float64 [B], 1 or 0."""
    device = next(judge.parameters()).device
    return (judge.logits(images.to(device)).argmax(1).cpu() == labels_of(prompts)).double()
