"""Published ways to evaluate, by name: what is drawn, what it is held against, and by which models it is scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.data.prompts import find_files, read_prompts
from distill.data.texts import coco_captions, parsed
from distill.data.words import counted
from distill.evaluation.blocks import key_of, network_hash
from distill.evaluation.inception import FEATURES, SIDE, load_inception, patch, to_bytes, whole
from distill.evaluation.metrics import (
    Aesthetic,
    ClipScore,
    FrechetMetric,
    Metric,
    Prepare,
    ScoreMetric,
    load_aesthetic_head,
    load_open_clip,
)
from distill.evaluation.reference import (
    Pictures,
    Statistics,
    find_pictures,
    read_statistics,
    statistics_of,
    write_statistics,
)
from distill.models.rewards import load_clip_reward, load_hps_reward, load_image_reward

log = logging.getLogger(__name__)
AESTHETIC_CLIP = "ViT-L-14-quickgelu"
AESTHETIC_WIDTH = 768


@dataclass(frozen=True)
class Captions:
    """Prompts in their order and, if it is known, the name of the picture that each describes."""

    prompts: Sequence[str]
    pictures: Sequence[str] | None = None


def read_captions(source: str, n: int) -> Captions:
    """The first n prompts of a source.

    Args:
        source: a `.json` in the layout of COCO's captions: `annotations` with `image_id` and `caption`, and `images`
            with `id` and `file_name`. Taken is the first caption of each picture, in the order of the file. Or
            whatever `distill.data.prompts.read_prompts` reads: text, JSON, JSONL, tables.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: fewer than n, or a file that is not understood.
    """
    found = _read(source)
    if len(found.prompts) < n:
        raise ValueError(f"prompts in {source}: there are {len(found.prompts)}, the protocol takes {n}")
    return Captions(found.prompts[:n], None if found.pictures is None else found.pictures[:n])


def _read(source: str) -> Captions:
    if source.lower().endswith(".json") and len(files := find_files(source)) == 1:
        with files[0] as stream:
            try:
                content = parsed(stream.read())
                if isinstance(content, dict) and "annotations" in content:
                    return Captions(*coco_captions(content))
            except ValueError as error:
                raise ValueError(f"prompts in {source}: {error}") from None
    return Captions(read_prompts(source))


@dataclass(frozen=True)
class Protocol:
    """What shapes the numbers of an evaluation.

    Args:
        name: of the protocol; used_by: papers that report by it.
        n: pictures a row.
        side: of the pictures that are drawn, in pixels.
        reference: real pictures (a folder, tars), or statistics of them (`.safetensors`); None is none.
        matching: of the reference only the pictures that the prompts describe, which COCO's files say.
        shown_at: pixels to which pictures are shrunk before FID's network sees them; None leaves them.
        clip: open_clip's name of the CLIP score's model; clip_weights: of its weights. None where none belongs to it.
        clip_prefix: put before each prompt that it reads.
        metrics: names of those that belong to it.
    """

    name: str
    used_by: str
    n: int
    side: int
    reference: str | None
    matching: bool
    shown_at: int | None
    clip: str | None
    clip_weights: str | None
    clip_prefix: str
    metrics: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name and all else here that shapes numbers, but for N, prompts and reference."""
        shown = "" if self.shown_at is None else f" shown at {self.shown_at} px"
        prefix = f" after {self.clip_prefix!r}" if self.clip_prefix else ""
        clip = "" if self.clip is None else f", CLIP {self.clip} {self.clip_weights}{prefix}"
        return f"{self.name}: {self.side} px{shown}{clip}"


@dataclass(frozen=True)
class Reference:
    """Real pictures, or their statistics: what FID and FID-patch are measured against.

    `kept` takes what is computed, so that it is computed once, as a file that can be a reference itself.
    """

    source: str
    protocol: str
    pictures: Pictures | None
    kept: Path

    @classmethod
    def find(cls, protocol: Protocol, captions: Captions, kept: Path) -> Reference:
        """Raises FileNotFoundError: none is given, or it is not there. ValueError: it holds no pictures."""
        if protocol.reference is None:
            raise FileNotFoundError("no real pictures: set protocol.reference=FOLDER, TARS or STATISTICS.safetensors")
        source = protocol.reference
        if source.endswith(".safetensors"):
            read_statistics(source, protocol.name)
            return cls(source, protocol.name, None, kept)
        if protocol.matching and captions.pictures is None:
            raise FileNotFoundError("the prompts do not say which pictures they describe, as COCO's captions do")
        found = find_pictures(source, captions.pictures if protocol.matching else None)
        return cls(source, protocol.name, found, kept)

    @property
    def identity(self) -> str:
        if self.pictures is None:
            size = Path(self.source).stat().st_size
            return f"{Path(self.source).name}, {size} bytes"
        return f"{len(self.pictures.names)} pictures {self.pictures.identity}"

    def statistics(
        self, key: str, network_name: str, prepare: Prepare, network: Callable[[Tensor], Tensor]
    ) -> Statistics:
        """Of one metric's features of the real pictures.

        Raises:
            ValueError: a statistics file without this metric.
        """
        if self.pictures is None:
            return _of(key, self.source, read_statistics(self.source, self.protocol))
        path = self.kept / f"{key}-{key_of({'pictures': self.identity, 'network': network_name})}.safetensors"
        if not path.is_file():
            found = statistics_of(self.pictures, prepare, network, f"real pictures for {key}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_statistics(path, {key: found}, self.protocol)
        return _of(key, str(path), read_statistics(path, self.protocol))


def _of(key: str, path: str, found: Mapping[str, Statistics]) -> Statistics:
    if key not in found:
        raise ValueError(f"reference={path} has no statistics for {key}, it has: {', '.join(found)}")
    return found[key]


@dataclass(frozen=True)
class MetricScorer:
    """A `distill.evaluation.compare.Scorer` made of metrics. Pictures are measured as files hold them, in 8 bits.

    Args:
        of: the protocol.
        captions: its prompts.
        metrics: those of the protocol that can be measured here; left_out: the others, and why not.
        against: identity of the reference, or nothing.
        device: where the metrics' networks are.
    """

    of: Protocol
    captions: Captions
    metrics: Sequence[Metric]
    left_out: Mapping[str, str]
    against: str
    device: torch.device | str = "cpu"

    @property
    def name(self) -> str:
        return "; ".join([self.protocol, *(metric.name for metric in self.metrics)])

    @property
    def protocol(self) -> str:
        digest = key_of({"prompts": list(self.captions.prompts)})[:8]
        held = f", reference {self.against}" if self.against else ""
        return f"{self.of.label}, prompts {digest}{held}"

    @property
    def notes(self) -> Sequence[str]:
        return (f"Protocol {self.of.name}, as in: {self.of.used_by}.",)

    def prompts(self, split: str, n: int) -> list[str]:
        """The first n, of any split. Raises ValueError: fewer are there."""
        if n > len(self.captions.prompts):
            raise ValueError(f"the protocol has {counted(len(self.captions.prompts), 'prompt')}, asked for are {n}")
        return list(self.captions.prompts[:n])

    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        pixels = to_bytes((images + 1) / 2).to(self.device).float() / 255
        found: dict[str, Tensor] = {"drawn": torch.ones(len(images))}  # a file with none of the metrics is not empty
        for metric in self.metrics:
            found |= metric.measure(pixels, prompts)
        return found

    def summarise(self, measured: Mapping[str, Tensor], split: str) -> dict[str, float]:
        values: dict[str, float] = {}
        for metric in self.metrics:
            values |= metric.summarise(measured)
        return values


# ---- which metrics there are, and what they are loaded from ----------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """All that metrics are loaded from.

    Args:
        weights: a path or hub id by the names of `configs/evaluate.yaml`; None where none is given.
    """

    protocol: Protocol
    captions: Captions
    weights: Mapping[str, str | None]
    kept: Path
    device: torch.device | str

    def path(self, name: str) -> str:
        """Raises FileNotFoundError: none is given."""
        if (found := self.weights.get(name)) is None:
            raise FileNotFoundError(f"no weights: set weights.{name}=FILE")
        return found

    @cached_property
    def reference(self) -> Reference:
        """Raises what `Reference.find` raises."""
        return Reference.find(self.protocol, self.captions, self.kept)

    @cached_property
    def inception(self) -> tuple[str, nn.Module]:
        """Named; raises FileNotFoundError: no weights of it."""
        return self.named("Inception", load_inception(self.path("inception")))

    def named(self, what: str, module: nn.Module) -> tuple[str, nn.Module]:
        """A module where it is to run, and what it is called: `what` and its weights' hash."""
        return f"{what} {network_hash(module)}", module.to(self.device)


def build_scorer(
    protocol: Protocol, captions: Captions, weights: Mapping[str, str | None], kept: Path, device: torch.device | str
) -> MetricScorer:
    """The protocol's metrics as far as their weights and reference are there; of the others the reason is kept.

    Args:
        weights: a path or hub id by name, see `configs/evaluate.yaml`.
        kept: folder for the reference's statistics.

    Raises:
        ValueError: a metric that is not known, or weights that are not what they are given as.
    """
    sources = Sources(protocol, captions, weights, kept, device)
    metrics: list[Metric] = []
    left_out: dict[str, str] = {}
    for name in protocol.metrics:
        if name not in METRICS:
            raise ValueError(f"metric {name!r} is not known; allowed: {', '.join(METRICS)}")
        try:
            metrics.append(METRICS[name](sources))
        except FileNotFoundError as error:
            left_out[name] = str(error)
            log.warning("%s is left out: %s", name, error)
    held = any(isinstance(metric, FrechetMetric) for metric in metrics)
    against = sources.reference.identity if held else ""
    return MetricScorer(protocol, captions, metrics, left_out, against, device)


def _fid(sources: Sources) -> Metric:
    shown_at = sources.protocol.shown_at
    shown = "" if shown_at is None else f" at {shown_at} px"
    return _frechet(sources, "fid", f"FID{shown}", partial(whole, shown_at=shown_at))


def _fid_patch(sources: Sources) -> Metric:
    if sources.protocol.side < SIDE:
        raise FileNotFoundError(f"pictures of {sources.protocol.side} px have no patch of {SIDE} px")
    return _frechet(sources, "fid_patch", "FID-patch", patch)


def _frechet(sources: Sources, key: str, what: str, prepare: Prepare) -> Metric:
    if sources.protocol.n <= FEATURES:
        raise FileNotFoundError(
            f"over {FEATURES} features it takes more than {FEATURES} pictures, n={sources.protocol.n}"
        )
    reference, (name, inception) = sources.reference, sources.inception

    def network(images: Tensor) -> Tensor:
        return inception(images.to(sources.device))

    real = partial(reference.statistics, key, f"{what} {name}", prepare, network)
    return FrechetMetric(key, f"{what} {name}", network, prepare, real)


def _clip_score(sources: Sources) -> Metric:
    import open_clip  # seconds to import: only where it is needed

    protocol = sources.protocol
    if protocol.clip is None or protocol.clip_weights is None:
        raise ValueError(
            f"the protocol {protocol.name} names no model of the CLIP score: set protocol.clip, clip_weights"
        )
    model = load_open_clip(protocol.clip, sources.weights.get("clip") or protocol.clip_weights)
    score = ClipScore(model, open_clip.get_tokenizer(protocol.clip), protocol.clip_prefix)
    return ScoreMetric("clip_score", *sources.named(f"CLIP {protocol.clip}", score))


def _aesthetic(sources: Sources) -> Metric:
    head = load_aesthetic_head(sources.path("aesthetic"), AESTHETIC_WIDTH)
    model = load_open_clip(AESTHETIC_CLIP, sources.weights.get("aesthetic_clip") or "openai")
    return ScoreMetric("aesthetic", *sources.named("aesthetic", Aesthetic(model, head)))


def _image_reward(sources: Sources) -> Metric:
    tokenizer = sources.weights.get("bert_tokenizer") or "bert-base-uncased"
    reward = load_image_reward(sources.path("image_reward"), tokenizer)
    return ScoreMetric("image_reward", *sources.named("ImageReward", reward))


def _hps(sources: Sources) -> Metric:
    return ScoreMetric("hps", *sources.named("HPSv2", load_hps_reward(sources.path("hps"))))


def _pickscore(sources: Sources) -> Metric:
    reward = load_clip_reward(sources.path("pickscore"), sources.weights.get("pickscore_tokenizer"))
    return ScoreMetric("pickscore", *sources.named("PickScore", reward))


METRICS: Mapping[str, Callable[[Sources], Metric]] = {
    "fid": _fid,
    "fid_patch": _fid_patch,
    "clip_score": _clip_score,
    "aesthetic": _aesthetic,
    "image_reward": _image_reward,
    "hps": _hps,
    "pickscore": _pickscore,
}
"""What loads each metric. It raises FileNotFoundError if the metric cannot be measured here, and says why."""
