"""What is measured of images: a record for each metric, from which follows whatever else knows it.

Protocols, weights, tables, curves, the choice of a best checkpoint and the documentation's table read the records. A
metric of a protocol is an entry of `METRICS` and the function that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from distill.diffusion.registry import Registry, UnknownName, resolved

ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
LEGEND = "↑ higher is better, ↓ lower is better."


class Measurer(Protocol):
    """What measures images for a metric."""

    @property
    def name(self) -> str:
        """Which it is and which weights it has."""

    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What `summarise` needs of each of the images [B, 3, H, W] in [0, 1]: tensors [B, ...] on the CPU."""

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """The values for all images together, by name, standard errors as `NAME_se`."""


@runtime_checkable
class Pairable(Measurer, Protocol):
    """One whose values of two sets of images of the same prompts and noise can be compared, pair by pair."""

    def left_out(self, measured: Mapping[str, Tensor], groups: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The values, and what each is without each of the groups of neighbouring images, float64 [groups]."""


@dataclass(frozen=True)
class Metric:
    """A number that a row of an evaluation may have.

    Args:
        name: its key in rows, and in the `metrics` of a protocol.
        heading: of its column.
        decimals: with which it is written.
        better: which way is better; None where neither is, which has no curve.
        unit: what the number says.
        title: of its curves; "" is the heading.
        logarithmic: whether the axis of its curves is.
        paper: where it was published.
        load: dotted name of a function that makes the `Measurer` of a `distill.evaluation.protocol.Sources`. It raises
            FileNotFoundError, with the reason, where the metric cannot be measured. "" for a number that no protocol
            can name: the toy's classifier measures it, or every row has it, or a study.
        weights, optional_weights: the names of `weights.NAME=` without which it is left out, and with which it may be
            changed.
        needs_reference: whether it compares with real images.
        brief: how an image's row of the report's grid says it; "" is not at all.
    """

    name: str
    heading: str
    decimals: int
    better: Literal["higher", "lower"] | None
    unit: str = ""
    title: str = ""
    logarithmic: bool = False
    paper: str = ""
    load: str = ""
    weights: tuple[str, ...] = ()
    optional_weights: tuple[str, ...] = ()
    needs_reference: bool = False
    brief: str = ""

    @property
    def pattern(self) -> str:
        """The format of its numbers."""
        return f"{{:.{self.decimals}f}}"

    @property
    def column(self) -> tuple[str, str]:
        """Heading and format, as tables take them."""
        return self.heading + ARROWS[self.better], self.pattern

    @property
    def curve_title(self) -> str:
        return self.title or self.heading

    @property
    def curve(self) -> str:
        """The title of its curves, with the way that is better."""
        return self.curve_title + ARROWS[self.better]

    def loader(self) -> Callable[[Any], Measurer]:
        """The function that makes its `Measurer`, imported only now."""
        return resolved(self.load)


_SCORES = "distill.evaluation.scores"
_FEATURES = "distill.evaluation.features"
_HEUSEL = "Heusel et al. 2017, arXiv 1706.08500"
_KYNKAANNIEMI = "Kynkäänniemi et al. 2019, arXiv 1904.06991"
_TOY = "the toy's classifier"

METRICS: Registry[Metric] = Registry(
    "metric",
    [
        Metric(
            "caption_accuracy",
            "caption accuracy",
            3,
            "higher",
            unit="share of images that the classifier labels as their prompt",
            paper=_TOY,
            brief="captions {:.0%}",
        ),
        Metric(
            "frechet",
            "Fréchet",
            3,
            "lower",
            unit="distance between the classifier's features of images and of as many real ones",
            title="Fréchet distance",
            logarithmic=True,
            paper=_TOY,
            brief="Fréchet {:.2f}",
        ),
        Metric("sharpness", "sharpness", 2, None, unit="high-frequency energy, relative to real images", paper=_TOY),
        Metric(
            "diversity",
            "diversity",
            2,
            None,
            unit="conditional variance: of features between images of a caption, relative to real ones",
            paper=_TOY,
        ),
        Metric(
            "precision",
            "precision",
            3,
            "higher",
            unit="share of images within the real ones' nearest neighbours; of the toy, within a caption",
            paper=_KYNKAANNIEMI,
            load=f"{_FEATURES}.load_precision",
            weights=("features",),
            needs_reference=True,
        ),
        Metric(
            "recall",
            "recall",
            3,
            "higher",
            unit="share of real images within the images' nearest neighbours; of the toy, within a caption",
            paper=_KYNKAANNIEMI,
            load=f"{_FEATURES}.load_recall",
            weights=("features",),
            needs_reference=True,
        ),
        Metric(
            "coverage",
            "coverage",
            3,
            "higher",
            unit="share of real images with an image among their nearest neighbours; of the toy, within a caption",
            paper="Naeem et al. 2020, arXiv 2002.09797",
            load=f"{_FEATURES}.load_coverage",
            weights=("features",),
            needs_reference=True,
        ),
        Metric(
            "fid",
            "FID",
            2,
            "lower",
            unit="Fréchet distance of Inception's features from those of real images",
            logarithmic=True,
            paper=_HEUSEL,
            load=f"{_SCORES}.load_fid",
            weights=("inception",),
            needs_reference=True,
        ),
        Metric(
            "fd_dinov2",
            "FD-DINOv2",
            2,
            "lower",
            unit="Fréchet distance of DINOv2's features from those of real images",
            logarithmic=True,
            paper="Stein et al. 2023, arXiv 2306.04675",
            load=f"{_FEATURES}.load_fd_dinov2",
            weights=("dinov2",),
            needs_reference=True,
        ),
        Metric(
            "cmmd",
            "CMMD",
            3,
            "lower",
            unit="maximum mean discrepancy of CLIP's embeddings from those of real images, times 1000",
            logarithmic=True,
            paper="Jayasumana et al. 2024, arXiv 2401.09603",
            load=f"{_FEATURES}.load_cmmd",
            weights=("cmmd_clip",),
            needs_reference=True,
        ),
        Metric(
            "fid_patch",
            "FID-patch",
            2,
            "lower",
            unit="FID of the middle 299 x 299 pixels",
            logarithmic=True,
            paper="Lin et al. 2024, arXiv 2402.13929",
            load=f"{_SCORES}.load_fid_patch",
            weights=("inception",),
            needs_reference=True,
        ),
        Metric(
            "clip_score",
            "CLIP score",
            2,
            "higher",
            unit="100 cos between image and prompt",
            paper="Hessel et al. 2021, arXiv 2104.08718",
            load=f"{_SCORES}.load_clip_score",
            optional_weights=("clip",),
        ),
        Metric(
            "aesthetic",
            "aesthetic",
            2,
            "higher",
            unit="about 1 to 10",
            title="aesthetic score",
            paper="LAION's aesthetic predictor",
            load=f"{_SCORES}.load_aesthetic",
            weights=("aesthetic",),
            optional_weights=("aesthetic_clip",),
        ),
        Metric(
            "image_reward",
            "ImageReward",
            3,
            "higher",
            unit="about -2 to 2",
            paper="Xu et al. 2023, arXiv 2304.05977",
            load=f"{_SCORES}.load_image_reward_score",
            weights=("image_reward",),
            optional_weights=("bert_tokenizer",),
        ),
        Metric(
            "hps",
            "HPS",
            2,
            "higher",
            unit="100 cos, about 20 to 30",
            paper="Wu et al. 2023, arXiv 2306.09341",
            load=f"{_SCORES}.load_hps_score",
            weights=("hps",),
        ),
        Metric(
            "pickscore",
            "PickScore",
            2,
            "higher",
            unit="100 cos, about 20",
            paper="Kirstain et al. 2023, arXiv 2305.01569",
            load=f"{_SCORES}.load_pickscore",
            weights=("pickscore",),
            optional_weights=("pickscore_tokenizer",),
        ),
        Metric("reward", "reward", 2, "higher", unit="what a student is trained for"),
        Metric(
            "teacher_consistency",
            "from teacher",
            4,
            "lower",
            unit="mean squared difference, per latent element",
            title="distance from the teacher",
            logarithmic=True,
        ),
        Metric(
            "stored_consistency",
            "from stored ends",
            4,
            "lower",
            unit="mean squared difference, per latent element",
            title="distance from stored ends",
            logarithmic=True,
        ),
        Metric(
            "stored_cosine",
            "cosine with them",
            4,
            "higher",
            unit="of latents as vectors",
            title="cosine with stored ends",
        ),
        Metric("difference", "RMSE from reference", 4, "lower", unit="of pixels in [0, 1]"),
        Metric("style", "style", 3, "higher", unit="share of images in the style"),
        Metric("follows", "follows", 3, "higher", unit="correlation with the control"),
    ],
)


def plotted() -> list[str]:
    """The names of the metrics that have curves, and by which a best one can be chosen."""
    return [metric.name for metric in METRICS.values() if metric.better is not None]


def protocol_metrics() -> list[str]:
    """The names of the metrics that a protocol may have."""
    return [metric.name for metric in METRICS.values() if metric.load]


def known_weights() -> list[str]:
    """The names that `weights.NAME=` may have."""
    names = (name for metric in METRICS.values() for name in (*metric.weights, *metric.optional_weights))
    return list(dict.fromkeys(names))


def find_metric(name: str) -> Metric:
    """A metric that a protocol may have.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        found = METRICS.find(name)
    except UnknownName:
        found = None
    if found is None or not found.load:
        raise ValueError(f"metric {name!r} is not known; allowed: {', '.join(protocol_metrics())}")
    return found
