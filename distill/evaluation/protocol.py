"""Published ways to evaluate, by name: what is generated, what it is compared with, and which models score it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.data.prompts import find_files, read_prompts
from distill.data.texts import coco_captions, parsed
from distill.data.words import counted
from distill.evaluation.blocks import key_of, network_hash
from distill.evaluation.inception import load_inception, to_bytes
from distill.evaluation.metrics import METRICS, Measurer, Pairable, find_metric
from distill.evaluation.reference import (
    Pictures,
    Prepare,
    Statistics,
    features_of,
    find_pictures,
    read_statistics,
    statistics_of,
    write_statistics,
)
from distill.evaluation.statistics import GROUPS, jackknife
from distill.models.files import save_file

log = logging.getLogger(__name__)


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
        n: pictures per row.
        side: of the pictures that are generated, in pixels.
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
        """Statistics of one metric's features of the real pictures.

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

    def features(self, key: str, network_name: str, network: Callable[[Tensor], Tensor]) -> Tensor:
        """The features of each of the real pictures, [m, F] float32; they are computed once, and kept.

        Raises:
            ValueError: the reference is a statistics file, which has none.
        """
        if self.pictures is None:
            raise ValueError(
                f"reference={self.source} holds statistics, and {key} compares with real pictures one by one: "
                "set protocol.reference=FOLDER or TARS"
            )
        path = self.kept / f"{key}-{key_of({'pictures': self.identity, 'network': network_name})}.safetensors"
        if not path.is_file():
            found = features_of(self.pictures, network, f"real pictures for {key}")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": found}, path)
        return load_file(path)["features"]


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
    metrics: Sequence[Measurer]
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
            raise ValueError(f"the protocol has {counted(len(self.captions.prompts), 'prompt')}, and n={n} are needed")
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

    def difference(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor], split: str) -> dict[str, float]:
        """The metrics of `a` less those of `b`, of the same prompts and noise, with the errors of the differences.

        A metric of another package that is not `Pairable` has none.
        """
        found: dict[str, float] = {}
        for metric in self.metrics:
            if isinstance(metric, Pairable):
                (of_a, without_a), (of_b, without_b) = (metric.left_out(one, GROUPS) for one in (a, b))
                found |= {name: value - of_b[name] for name, value in of_a.items()}
                found |= {f"{name}_se": jackknife(left - without_b[name]) for name, left in without_a.items()}
        return found


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
    shared: dict[str, tuple[str, nn.Module]] = field(default_factory=dict)

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

    def once(self, name: str, load: Callable[[], tuple[str, nn.Module]]) -> tuple[str, nn.Module]:
        """A network that several metrics share, loaded by the first of them."""
        if name not in self.shared:
            self.shared[name] = load()
        return self.shared[name]

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
    metrics: dict[str, Measurer] = {}
    left_out: dict[str, str] = {}
    for name in protocol.metrics:
        try:
            metrics[name] = find_metric(name).loader()(sources)
        except FileNotFoundError as error:
            left_out[name] = str(error)
            log.warning("%s is left out: %s", name, error)
    against = sources.reference.identity if any(METRICS[name].needs_reference for name in metrics) else ""
    return MetricScorer(protocol, captions, list(metrics.values()), left_out, against, device)
