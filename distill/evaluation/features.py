"""Metrics over the features of networks that are given by path, against those of real pictures.

Precision, recall and coverage with any vision model of transformers; Fréchet distances of DINOv2's features (Stein et
al. 2023, arXiv 2306.04675); and CMMD, the maximum mean discrepancy of CLIP's embeddings (Jayasumana et al. 2024,
arXiv 2401.09603). Nothing is fetched: weights are folders of transformers, or hub ids that are in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.evaluation.inception import resized, squares
from distill.evaluation.metrics import Measurer
from distill.evaluation.neighbours import AT_ONCE, coverage, precision, recall
from distill.evaluation.protocol import Sources
from distill.evaluation.scores import FrechetMetric
from distill.evaluation.statistics import GROUPS, jackknife
from distill.models.folder import read_json

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DINOV2_SIDE = 224
BANDWIDTH, SCALE = 10.0, 1000.0
"""Of CMMD's Gaussian kernel, and what its square is multiplied by (Jayasumana et al. 2024, section 4)."""


class VisionNetwork(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] -> features [B, F]: of their middle square, scaled to the side of the network.

    A batch that it is shown again, the same tensor, is not computed again: several metrics share one network.

    Args:
        model: of transformers, with a `pooler_output` or, for CLIP, `image_embeds`.
        side: in pixels; mean, std: by which colours are normalised.
        unit: whether features are scaled to length 1.
    """

    def __init__(
        self, model: nn.Module, side: int, mean: Sequence[float], std: Sequence[float], unit: bool = False
    ) -> None:
        super().__init__()
        self.model, self.side, self.unit = model, side, unit
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))
        self.requires_grad_(False).eval()
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not images:
            self._last = images, self._features(images)
        return self._last[1]

    def prepare(self, images: Tensor) -> Tensor:
        """What of pictures [B, 3, H, W] the network is shown, [B, 3, side, side]; which it leaves as it is."""
        return resized(squares(images), self.side)

    def _features(self, images: Tensor) -> Tensor:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        shown = (self.prepare(images.to(mean.device)) - mean) / std
        out = self.model(pixel_values=shown)
        found = getattr(out, "image_embeds", None)
        found = (out.pooler_output if found is None else found).flatten(1).float()
        return nn.functional.normalize(found) if self.unit else found

    @property
    def width(self) -> int:
        """How many features there are."""
        return self.forward(torch.zeros(1, 3, self.side, self.side)).shape[1]


def load_vision(path: str, kind: str = "AutoModel") -> Any:
    """A vision model of transformers from its folder, or from the hub's cache.

    Raises:
        FileNotFoundError: it is not there.
    """
    import transformers  # seconds to import: only where it is needed

    cls = getattr(transformers, kind)  # AutoModel takes the classes of transformers alone, unless code is trusted
    try:
        return cls.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{path} is no folder of transformers with {kind}: {reason}") from None


def features_network(path: str) -> VisionNetwork:
    """Any vision model, shown pictures as its own `preprocessor_config.json` says, or as DINOv2's where there is none.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it gives no pooled features.
    """
    model = load_vision(path)
    try:
        said = read_json(Path(path), "preprocessor_config.json")
    except (OSError, ValueError):
        said = {}
    size = said.get("crop_size") or said.get("size") or {}
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    mean, std = said.get("image_mean", IMAGENET[0]), said.get("image_std", IMAGENET[1])
    network = VisionNetwork(model, side or DINOV2_SIDE, mean, std)
    try:
        _ = network.width
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} gives no pooled features of pictures, {type(model).__name__}: {error}") from None
    return network


SHARES = {"precision": precision, "recall": recall, "coverage": coverage}


@dataclass(frozen=True)
class FeatureMetric:
    """A number of pictures' features against those of real pictures.

    Args:
        key, name: its name in results; which network it is of.
        network: pictures [B, 3, H, W] in [0, 1] -> features [B, F].
        real: features of real pictures [m, F]; called when pictures are summed up.
    """

    key: str
    name: str
    network: Callable[[Tensor], Tensor]
    real: Callable[[], Tensor]

    def left_out(self, measured: Mapping[str, Tensor], groups: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The number, and what it is without each of the groups of neighbouring pictures."""
        raise NotImplementedError

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """The number, its standard error, and of how many real pictures. Raises ValueError: too few pictures."""
        value, without = self.left_out(measured, GROUPS)
        return {
            self.key: value[self.key],
            f"{self.key}_se": jackknife(without[self.key]),
            f"{self.key}_n_real": len(self._real),
        }

    @cached_property
    def _real(self) -> Tensor:
        return self.real()


@dataclass(frozen=True)
class NeighbourMetric(FeatureMetric):
    """Precision, recall or coverage, by `key` of `SHARES`; see `distill.evaluation.neighbours`."""

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"neighbour_features": self.network(images).float().cpu()}

    def left_out(self, measured: Mapping[str, Tensor], groups: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The share, and what it is without each of the groups of neighbouring pictures, the balls' radii kept."""
        features, real = measured["neighbour_features"], self._real
        share, without = SHARES[self.key](features, real, groups)
        return {self.key: share}, {self.key: without}


@dataclass(frozen=True)
class DiscrepancyMetric(FeatureMetric):
    """CMMD: the squared maximum mean discrepancy of pictures' embeddings from those of real pictures, times 1000.

    The estimate is the biased one, of least variance (Gretton et al. 2012, eq. 5), as published numbers are.
    Embeddings have length 1.
    """

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {f"{self.key}_embeddings": self.network(images).float().cpu()}

    def left_out(self, measured: Mapping[str, Tensor], groups: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The discrepancy, and what it is without each of the groups of neighbouring pictures."""
        value, without = discrepancy(measured[f"{self.key}_embeddings"], self._real, groups)
        return {self.key: value}, {self.key: without}


def discrepancy(x: Tensor, y: Tensor, groups: int) -> tuple[float, Tensor]:
    """CMMD of x [n, F] from y [m, F], and what it is without each of the groups of neighbours in x, [groups]."""
    parts = x.double().tensor_split(groups)
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    among = torch.stack([torch.stack([kernel_sum(a, b) for b in parts]) for a in parts])  # [groups, groups]
    across = torch.stack([kernel_sum(part, y) for part in parts]) / len(y)  # [groups]
    own = kernel_sum(y, y) / len(y) ** 2

    def of(total: Tensor, cross: Tensor, n: Tensor) -> Tensor:
        return SCALE * (total / n**2 + own - 2 * cross / n)

    n = sizes.sum()
    without = of(among.sum() - 2 * among.sum(1) + among.diagonal(), across.sum() - across, n - sizes)
    return float(of(among.sum(), across.sum(), n)), without


def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum of the Gaussian kernel over all pairs of x [n, F] and y [m, F], a float64 scalar."""
    y, total = y.double(), torch.zeros((), dtype=torch.float64)
    for rows in x.double().split(AT_ONCE):
        squares_ = torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        total += (-squares_ / (2 * BANDWIDTH**2)).exp().sum()
    return total


# ---- loaded from what an evaluation has --------------------------------------------------------------------------


def load_precision(sources: Sources) -> Measurer:
    return _neighbours("precision", sources)


def load_recall(sources: Sources) -> Measurer:
    return _neighbours("recall", sources)


def load_coverage(sources: Sources) -> Measurer:
    return _neighbours("coverage", sources)


def _neighbours(key: str, sources: Sources) -> Measurer:
    name, network = sources.once(
        "features", lambda: sources.named("features", features_network(sources.path("features")))
    )
    real = partial(sources.reference.features, "features", name, network)
    return NeighbourMetric(key, f"{key} {name}", network, real)


def load_fd_dinov2(sources: Sources) -> Measurer:
    path = sources.path("dinov2")
    vision = VisionNetwork(load_vision(path, "Dinov2Model"), DINOV2_SIDE, *IMAGENET)
    if sources.protocol.n <= (width := vision.width):
        raise FileNotFoundError(f"over {width} features it takes more than {width} pictures, n={sources.protocol.n}")
    name, network = sources.named("FD-DINOv2", vision)
    real = partial(sources.reference.statistics, "fd_dinov2", name, vision.prepare, network)
    return FrechetMetric("fd_dinov2", name, network, vision.prepare, real)


def load_cmmd(sources: Sources) -> Measurer:
    from distill.models.rewards import MEAN, STD

    model = load_vision(sources.path("cmmd_clip"), "CLIPVisionModelWithProjection")
    vision = VisionNetwork(model, model.config.image_size, MEAN, STD, unit=True)
    name, network = sources.named("CMMD", vision)
    return DiscrepancyMetric("cmmd", name, network, partial(sources.reference.features, "cmmd", name, network))
