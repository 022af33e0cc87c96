"""What the metrics of published protocols are measured with: each image, and then all of them together.

Fréchet distances are torchmetrics' over features that are given, in float64; their errors are ours. All else is a score
a picture: CLIP's, the aesthetic one, and preference rewards, through open_clip and `distill.models.rewards`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from distill.evaluation.inception import FEATURES, SIDE, patch, whole
from distill.evaluation.metrics import Measurer
from distill.evaluation.protocol import Sources
from distill.evaluation.reference import Prepare, Statistics
from distill.evaluation.statistics import GROUPS, frechet_to_statistics_without, jackknife, mean_with_error
from distill.models.rewards import (
    MEAN,
    STD,
    HpsReward,
    Pixels,
    Reward,
    fill,
    load_clip_reward,
    load_hps_reward,
    load_image_reward,
    load_weights,
)

AESTHETIC_CLIP = "ViT-L-14-quickgelu"
AESTHETIC_WIDTH = 768


@dataclass(frozen=True)
class FrechetMetric:
    """Fréchet distance of a network's features from those of real pictures (Heusel et al. 2017).

    Args:
        key: under which its value stands in rows.
        name: which network, which preparation.
        network: what `prepare` makes of pictures -> features [B, F].
        real: makes or finds the statistics of real pictures; called when pictures are summed up.
    """

    key: str
    name: str
    network: Callable[[Tensor], Tensor]
    prepare: Prepare
    real: Callable[[], Statistics]

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {f"{self.key}_features": self.network(self.prepare(images)).float().cpu()}

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """The distance, its standard error, and how many real pictures it is from.

        Raises ValueError: no more pictures than features.
        """
        value, without = self.left_out(measured, GROUPS)
        return {
            self.key: value[self.key],
            f"{self.key}_se": jackknife(without[self.key]),
            f"{self.key}_n_real": self._real.n,
        }

    def left_out(self, measured: Mapping[str, Tensor], groups: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The distance, and what it is without each of the groups of neighbouring pictures, [groups]."""
        features, real = measured[f"{self.key}_features"], self._real
        _, without = frechet_to_statistics_without(features, real.mean, real.covariance, groups)
        return {self.key: fid(features, real)}, {self.key: without}

    @cached_property
    def _real(self) -> Statistics:
        return self.real()


class _AsGiven(nn.Module):
    """Takes the place of torchmetrics' network for what are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Tensor, real: Statistics) -> float:
    """torchmetrics' Fréchet inception distance of features [n, F] from a data set's, in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # seconds to import: only where it is needed

    metric = FrechetInceptionDistance(_AsGiven(features.shape[1]))
    metric.real_features_sum = real.n * real.mean
    metric.real_features_cov_sum = (real.n - 1) * real.covariance + real.n * torch.outer(real.mean, real.mean)
    metric.real_features_num_samples = torch.tensor(real.n)
    metric.update(features.double(), real=False)
    return float(metric.compute())


@dataclass(frozen=True)
class ScoreMetric:
    """The mean over pictures of a score that each has.

    Args:
        key: under which its value stands in rows.
        name: which model.
        score: pictures [B, 3, H, W] in [0, 1] and their prompts -> [B].
    """

    key: str
    name: str
    score: Reward

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {f"{self.key}_scores": self.score(images, prompts).double().cpu()}

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        mean, error = mean_with_error(measured[f"{self.key}_scores"])
        return {self.key: mean, f"{self.key}_se": error}

    def left_out(self, measured: Mapping[str, Tensor], groups: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The mean, and what it is without each of the groups of neighbouring pictures, [groups]."""
        scores = measured[f"{self.key}_scores"]
        parts = scores.tensor_split(groups)
        without = [(scores.sum() - part.sum()) / (len(scores) - len(part)) for part in parts]
        return {self.key: float(scores.mean())}, {self.key: torch.stack(without)}


class ClipScore(nn.Module):
    """100 cos(image, text) of an open_clip model (Hessel et al. 2021, arXiv 2104.08718, without its clipping at 0).

    Args:
        prefix: put before each prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, prefix: str = "") -> None:
        super().__init__()
        self.reward, self.prefix = HpsReward(model, tokenizer, scale=100.0), prefix

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, [self.prefix + prompt for prompt in prompts])


class Aesthetic(nn.Module):
    """LAION's aesthetic score, about 1 to 10: linear layers on a CLIP image embedding of length 1; prompts go unread.

    Args:
        model: open_clip's ViT-L-14 with OpenAI's weights.
        head: from the embedding's width to 1.
    """

    def __init__(self, model: Any, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.pixels = Pixels(_image_size(model))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        embedding = self.model.encode_image(self.pixels(images), normalize=True)  # [B, D]
        return self.head(embedding.float())[:, 0]


def load_open_clip(architecture: str, weights: str) -> Any:
    """An open_clip model.

    Args:
        weights: a file, a hub id, or the name that open_clip knows published weights by, which it fetches.

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: weights of another model, a pickle that holds code, or a model with other colours than CLIP's.
    """
    import open_clip  # seconds to import: only where it is needed

    known = open_clip.list_pretrained_tags_by_model(architecture)
    if Path(weights).is_file():
        model = fill(open_clip.create_model(architecture, load_weights=False), load_weights(weights), weights)
    elif weights in known:
        model = _fetched(architecture, weights)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights):
        model = _fetched(f"hf-hub:{weights}", None)
    else:
        names = ", ".join(known) or "none"
        raise FileNotFoundError(
            f"no file {weights!r}, and open_clip has no {architecture} of that name; known: {names}"
        )
    _image_size(model)
    return model.eval().requires_grad_(False)


def _fetched(architecture: str, tag: str | None) -> Any:
    import open_clip

    try:
        return open_clip.create_model(architecture, pretrained=tag, weights_only=True)
    except (RuntimeError, OSError, HFValidationError) as error:  # what open_clip and the hub client raise
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"open_clip cannot fetch {architecture} {tag or ''}: {reason}") from None


def _image_size(model: Any) -> int:
    """The side of the square that the model is shown, in pixels."""
    import open_clip

    shown = open_clip.get_model_preprocess_cfg(model)
    if (tuple(shown["mean"]), tuple(shown["std"])) != (MEAN, STD):
        raise ValueError(
            f"an open_clip model whose colours are normalised by {shown['mean']}, {shown['std']}: not CLIP's"
        )
    return shown["size"][0]


def load_aesthetic_head(path: str, width: int) -> nn.Sequential:
    """LAION's head: its version 2 (five linear layers, with nothing but dropout between them) or 1 (a single one).

    Raises:
        ValueError: no such head for embeddings of this width; or what `load_weights` raises.
    """
    weights = load_weights(path)
    names = sorted((name for name in weights if name.endswith("weight")), key=lambda name: [*map(int, _numbers(name))])
    if any(weights[name].ndim != 2 for name in names) or not names:
        raise ValueError(f"{path} holds no linear layers: {', '.join(sorted(weights)[:3])}")
    layers = nn.Sequential(*(nn.Linear(weights[name].shape[1], weights[name].shape[0]) for name in names))
    widths = [width, *(weights[name].shape[0] for name in names)]
    if [weights[name].shape[1] for name in names] != widths[:-1] or widths[-1] != 1:
        raise ValueError(f"{path} does not lead from {width} features to 1: {[list(weights[n].shape) for n in names]}")
    renamed: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        renamed |= {f"{i}.weight": weights[name], f"{i}.bias": weights[name.removesuffix("weight") + "bias"]}
    return fill(layers, renamed, path)


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


# ---- loaded from what an evaluation has --------------------------------------------------------------------------


def load_fid(sources: Sources) -> Measurer:
    shown_at = sources.protocol.shown_at
    shown = "" if shown_at is None else f" at {shown_at} px"
    return _frechet(sources, "fid", f"FID{shown}", partial(whole, shown_at=shown_at))


def load_fid_patch(sources: Sources) -> Measurer:
    if sources.protocol.side < SIDE:
        raise FileNotFoundError(f"pictures of {sources.protocol.side} px have no patch of {SIDE} px")
    return _frechet(sources, "fid_patch", "FID-patch", patch)


def _frechet(sources: Sources, key: str, what: str, prepare: Prepare) -> Measurer:
    if sources.protocol.n <= FEATURES:
        raise FileNotFoundError(
            f"over {FEATURES} features it takes more than {FEATURES} pictures, n={sources.protocol.n}"
        )
    reference, (name, inception) = sources.reference, sources.inception

    def network(images: Tensor) -> Tensor:
        return inception(images.to(sources.device))

    real = partial(reference.statistics, key, f"{what} {name}", prepare, network)
    return FrechetMetric(key, f"{what} {name}", network, prepare, real)


def load_clip_score(sources: Sources) -> Measurer:
    import open_clip  # seconds to import: only where it is needed

    protocol = sources.protocol
    if protocol.clip is None or protocol.clip_weights is None:
        raise ValueError(
            f"the protocol {protocol.name} names no model of the CLIP score: set protocol.clip, clip_weights"
        )
    model = load_open_clip(protocol.clip, sources.weights.get("clip") or protocol.clip_weights)
    score = ClipScore(model, open_clip.get_tokenizer(protocol.clip), protocol.clip_prefix)
    return ScoreMetric("clip_score", *sources.named(f"CLIP {protocol.clip}", score))


def load_aesthetic(sources: Sources) -> Measurer:
    head = load_aesthetic_head(sources.path("aesthetic"), AESTHETIC_WIDTH)
    model = load_open_clip(AESTHETIC_CLIP, sources.weights.get("aesthetic_clip") or "openai")
    return ScoreMetric("aesthetic", *sources.named("aesthetic", Aesthetic(model, head)))


def load_image_reward_score(sources: Sources) -> Measurer:
    tokenizer = sources.weights.get("bert_tokenizer") or "bert-base-uncased"
    reward = load_image_reward(sources.path("image_reward"), tokenizer)
    return ScoreMetric("image_reward", *sources.named("ImageReward", reward))


def load_hps_score(sources: Sources) -> Measurer:
    return ScoreMetric("hps", *sources.named("HPSv2", load_hps_reward(sources.path("hps"))))


def load_pickscore(sources: Sources) -> Measurer:
    reward = load_clip_reward(sources.path("pickscore"), sources.weights.get("pickscore_tokenizer"))
    return ScoreMetric("pickscore", *sources.named("PickScore", reward))
