"""What a store is: the plan it is written to, and the index that says what has been written."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distill.data.record import (
    CONDITIONING,
    GUIDANCE,
    SHARD,
    STATE_DTYPES,
    STATES,
    TEXT_DTYPES,
    TIMES,
    BadShard,
    Layout,
    StoreError,
    TensorSpec,
    make_key,
    parse_json,
    short,
)
from distill.data.sizes import ImageSize, read_sizes, square
from distill.diffusion.random import generator
from distill.diffusion.segments import Segments

SCHEMA, SCHEMA_OF_SIZES, SCHEMA_OF_SHARED_TEXTS = 1, 2, 3
"""Of stores of one square size, as they have always been, of stores with a list of sizes, and of stores, of one size or
several, whose samples of a prompt share its text."""
INDEX, PLAN, UNCONDITIONAL = "index.json", "plan.json", "unconditional.safetensors"
NUMBERS = {"guidance": float, "times": int, "shift": float, "empty_prompts": float}
COUNTS = ("solver_steps", "resolution", "samples", "samples_per_shard", "batch_size")
MOST, MOST_BYTES = 10**12, 2**62
"""The most samples (and whatever else is counted), and bytes of a shard: arithmetic stays within 64 bits."""
KINDS = ("trajectories", "pictures")
TEACHER_DTYPES = ("float32", "float16", "bfloat16")
NO_SOLVE = "none"
"""`solver` and `spacing` of a store of pictures."""


SETTINGS = {
    "teacher_id": "model.pretrained_model_name_or_path",
    "teacher_hash": "model.pretrained_model_name_or_path (and teacher)",
    "schedule_fingerprint": "model.pretrained_model_name_or_path",
    "solver": "data.solver",
    "solver_steps": "data.solver_steps",
    "spacing": "data.solver",
    "guidance": "data.guidance",
    "times": "data.keep, data.segments and data.solver_steps",
    "dtype": "data.dtype",
    "teacher_dtype": "data.teacher_dtype",
    "text_dtype": "model.pretrained_model_name_or_path",
    "shift": "model.shift",
    "resolution": "model.resolution",
    "sizes": "data.sizes",
    "size_weights": "data.size_weights",
    "prompt_sizes_sha256": "data.prompts (the same sizes of its prompts)",
    "empty_prompts": "data.empty_prompts",
    "shared": "data.share_texts",
    "prompt_source": "data.prompts or data.images",
    "prompts_sha256": "data.prompts (the same texts in the same order)",
    "unconditional_sha256": "model.pretrained_model_name_or_path",
    "seed": "seed",
    "samples": "data.num_samples",
    "samples_per_shard": "data.samples_per_shard",
    "batch_size": "data.batch_size",
    "kind": "data (a store of pictures is made by distill latents with data=images)",
    "pictures_sha256": "data.images, data.min_size, data.max_aspect_ratio and data.prompt_column",
    "crop": "data.crop",
    "vae_hash": "data.vae",
}
"""Which setting of the command decides each field of a plan, for messages."""


class StoreMismatch(StoreError):
    """A store and what is wanted of it differ; the message names both values."""


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """Everything that decides a store's bytes, beside the teacher's weights and the machine's arithmetic.

    Args:
        teacher_id, teacher_hash: the teacher as a name and as a hash of its weights.
        schedule_fingerprint: `NoiseSchedule.fingerprint`.
        solver, solver_steps, spacing: the ODE solve, and the grid it runs on (`make_times`); none, 0 and none for
            pictures.
        guidance: w of every sample, or [w_min, w_max] when each has a random one of its own; w = 1 is none.
        times: those of the states kept, falling (`kept_times`).
        dtype: of the states: float16 or float32.
        resolution: side of the images, in pixels; or, of a store with `sizes`, what the teacher was opened at.
        sizes: of the images, as WIDTHxHEIGHT; none where all are squares of `resolution`.
        size_weights: how often a trajectory has each of them, in their ratio; none where all are as likely, or where
            what a sample is made of decides its size.
        prompt_sizes_sha256: of the sizes of all prompts, where prompts have sizes of their own.
        prompt_source: where the prompts come from, for people to read.
        seed: sample i depends on (seed, i) only.
        samples, samples_per_shard: how many.
        batch_size: samples that the teacher solves at once; batches never straddle a shard. (It is part of the plan
            because a network's arithmetic is not the same to the last bit in another batch size.)
        prompts_sha256, unconditional_sha256: filled in by the writer.
        kind: `trajectories`: teacher solves; every shard is full. `pictures`: clean latents of pictures, at time 0
            alone; a picture that could not be read leaves its place in its shard empty.
        pictures_sha256: of the listing (`images.Listing`).
        crop: which square of a picture (`pictures.CROPS`).
        vae_hash: the autoencoder's weights.
        teacher_dtype: what the teacher's network computed in while it solved; nothing in a store of pictures, and in
            those of before it was recorded.
        text_dtype: of the text's part of a sample, where that is not `dtype`.
        shift: of flow matching, which noise levels the times stand for; 0 where there is none.
        empty_prompts: the share of samples that have no prompt: "" in the place of theirs, and the conditioning of the
            teacher's unconditional pass.
        shared: the parts of the conditioning that depend on the prompt alone and are stored once for each prompt (see
            `sharing`); none where each sample holds all of its own.

    Raises:
        StoreError: a value of the wrong type or out of its range, naming it.
    """

    teacher_id: str
    teacher_hash: str
    schedule_fingerprint: str
    solver: str
    solver_steps: int
    spacing: str
    guidance: float | tuple[float, float]
    times: tuple[int, ...]
    resolution: int
    prompt_source: str
    seed: int
    samples: int
    samples_per_shard: int
    batch_size: int
    dtype: str = "float16"
    prompts_sha256: str = ""
    unconditional_sha256: str = ""
    kind: str = KINDS[0]
    pictures_sha256: str = ""
    crop: str = ""
    vae_hash: str = ""
    teacher_dtype: str = ""
    text_dtype: str = ""
    shift: float = 0.0
    sizes: tuple[str, ...] = ()
    size_weights: tuple[float, ...] = ()
    prompt_sizes_sha256: str = ""
    empty_prompts: float = 0.0
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        self._check_sizes()
        self._check_shared()
        for name, kind in NUMBERS.items():
            object.__setattr__(self, name, _exact(getattr(self, name), kind))
        if self.kind not in KINDS:
            raise StoreError(f"kind must be one of {', '.join(KINDS)}, got {short(repr(self.kind))}")
        least = {"solver_steps": 0 if self.kind == "pictures" else 1}
        for name in COUNTS:
            if not least.get(name, 1) <= getattr(self, name) <= MOST:
                allowed = f"at least {least.get(name, 1)} and at most {MOST}"
                raise StoreError(f"{name} must be {allowed}, got {short(getattr(self, name))}")
        if self.dtype not in STATE_DTYPES:
            raise StoreError(f"dtype must be one of {', '.join(STATE_DTYPES)}, got {short(repr(self.dtype))}")
        if self.teacher_dtype not in ("", *TEACHER_DTYPES):
            allowed = ", ".join(TEACHER_DTYPES)
            raise StoreError(f"teacher_dtype must be one of {allowed}, got {short(repr(self.teacher_dtype))}")
        if self.text_dtype not in ("", *TEXT_DTYPES):
            allowed = ", ".join(TEXT_DTYPES)
            raise StoreError(f"text_dtype must be one of {allowed}, got {short(repr(self.text_dtype))}")
        if not self.times or self.times[-1] < 0 or any(t <= s for t, s in pairwise(self.times)):
            raise StoreError(f"times must fall strictly and end at 0 or above, got {short(list(self.times))}")
        if self.kind == "pictures" and (self.times, self.solver, self.solver_steps) != ((0,), NO_SOLVE, 0):
            found = short(f"{list(self.times)} and {self.solver_steps} steps of {self.solver!r}")
            raise StoreError(f"pictures have times [0] and no solve (0 steps of {NO_SOLVE!r}), got {found}")
        low, high = self.guidance_range
        if not 0 <= low <= high:
            raise StoreError(f"guidance must be w >= 0 or 0 <= w_min <= w_max, got {self.guidance}")

    def _check_types(self) -> None:
        """What JSON holds may be anything, and some of it merely looks like a number."""
        whole = (*COUNTS, "seed")
        for name in PLAN_FIELDS:
            kind, words = (int, "a whole number") if name in whole else (str, "text")
            if name not in (*NUMBERS, "sizes", "size_weights", "shared") and type(getattr(self, name)) is not kind:
                raise StoreError(f"{name} must be {words}, got {short(repr(getattr(self, name)))}")
        times = self.times
        if not isinstance(times, (tuple, list)) or any(type(t) is not int for t in times):
            raise StoreError(f"times must be whole numbers, got {short(repr(times))}")
        if type(self.shift) not in (int, float) or not 0 <= self.shift <= MOST:
            raise StoreError(f"shift must be a number of at least 0, got {short(repr(self.shift))}")
        if type(self.empty_prompts) not in (int, float) or not 0 <= self.empty_prompts < 1:
            raise StoreError(f"empty_prompts must be a share of at least 0 and below 1, got {self.empty_prompts!r:.80}")
        bounds = tuple(self.guidance) if isinstance(self.guidance, Sequence) else (self.guidance, self.guidance)
        if len(bounds) != 2 or any(type(w) not in (int, float) or not abs(w) <= MOST for w in bounds):
            raise StoreError(f"guidance must be w or [w_min, w_max], got {short(repr(self.guidance))}")

    def _check_sizes(self) -> None:
        texts, weights = self.sizes, self.size_weights
        if not isinstance(texts, (tuple, list)) or any(type(text) is not str for text in texts):
            raise StoreError(f"sizes must be texts such as 1152x896, got {short(repr(texts))}")
        if not isinstance(weights, (tuple, list)) or any(
            type(w) not in (int, float) or not 0 < w <= MOST for w in weights
        ):
            raise StoreError(f"size_weights must be numbers above 0, got {short(repr(weights))}")
        if weights and len(weights) != len(texts):
            raise StoreError(f"size_weights are {len(weights)} numbers for {len(texts)} sizes: give one for each")
        object.__setattr__(self, "sizes", tuple(texts))
        object.__setattr__(self, "size_weights", tuple(map(float, weights)))
        try:
            read_sizes(self.sizes) if texts else None
        except ValueError as error:
            raise StoreError(f"sizes: {error}") from None

    def _check_shared(self) -> None:
        names = self.shared
        if not isinstance(names, (tuple, list)) or any(type(name) is not str or not name for name in names):
            raise StoreError(f"shared must be names of tensors, got {short(repr(names))}")
        if names and self.kind != "trajectories":
            raise StoreError(f"samples of {short(self.kind)} share no texts, got shared={short(repr(names))}")
        object.__setattr__(self, "shared", tuple(names))

    @cached_property
    def image_sizes(self) -> tuple[ImageSize, ...]:
        """The sizes of the images, by their numbers."""
        return read_sizes(self.sizes) if self.sizes else (square(self.resolution),)

    @property
    def guidance_range(self) -> tuple[float, float]:
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)

    @property
    def planned_shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    def shard_samples(self, shard: int) -> range:
        """Indices of the samples in a shard; only the last one may be shorter."""
        first = shard * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.samples))

    def key_of(self, i: int) -> str:
        """The key of sample i."""
        return make_key(*divmod(i, self.samples_per_shard))

    def text_of(self, i: int, back: int) -> str:
        """The key of the sample that holds the text of sample i, so many samples before it; "" for its own."""
        return self.key_of(i - back) if back else ""

    def guidance_of(self, i: int) -> float:
        """The w of sample i: fixed, or uniform in the range, from (seed, i)."""
        low, high = self.guidance_range
        return low + (high - low) * float(torch.rand((), generator=generator(self.seed, "guidance", i)))

    def prompt_of(self, i: int, prompts: Sequence[str]) -> str:
        """The prompt of sample i: that of its place in the list, or none, by (seed, i), in a share of them."""
        share = self.empty_prompts
        if share and float(torch.rand((), generator=generator(self.seed, "empty prompt", i))) < share:
            return ""
        return prompts[i % len(prompts)]

    def size_of(self, i: int) -> int:
        """The number of the size of sample i, where its weights decide that, from (seed, i)."""
        if len(self.image_sizes) == 1:
            return 0
        weights = np.cumsum(self.size_weights or [1.0] * len(self.sizes))
        at = float(torch.rand((), generator=generator(self.seed, "size", i), dtype=torch.float64))
        return min(int(np.searchsorted(weights, at * weights[-1], side="right")), len(weights) - 1)

    def digest(self) -> str:
        return hashlib.sha256(dump(plan_facts(self))).hexdigest()

    @cached_property
    def identity(self) -> str:
        """What a store keeps when it grows: a hash of all that decides what any one of its samples is."""
        grows = {"samples", "prompts_sha256"} if self.kind == "pictures" else {"samples"}  # captions are pictures' own
        facts = {name: value for name, value in plan_facts(self).items() if name not in grows}
        return hashlib.sha256(dump(facts)).hexdigest()

    def require(self, **expected: Any) -> None:
        """Checks what a run expects of the store; None is no expectation. `times` need only be among those stored.

        Raises:
            StoreMismatch: one line with every value that differs, the store's and the run's.
        """
        wrong = []
        for name, value in expected.items():
            if name not in PLAN_FIELDS:
                raise TypeError(f"a store has no {name!r}; it has {', '.join(PLAN_FIELDS)}")
            stored, value = getattr(self, name), _exact(value, NUMBERS[name]) if name in NUMBERS else value
            fits = set(value or ()) <= set(stored) if name == "times" else value in (None, stored)
            if not fits:
                wrong.append(f"{name} is {_short(stored)} in the store and {_short(value)} in the run")
        if wrong:
            raise StoreMismatch("the trajectory store does not fit this run: " + "; ".join(wrong))


PLAN_FIELDS = tuple(f.name for f in fields(StorePlan))
OF_PICTURES = ("kind", "pictures_sha256", "crop", "vae_hash")
"""Fields that only stores of pictures write down."""
LATER = ("teacher_dtype", "text_dtype", "shift", "empty_prompts", "shared")
"""Fields that earlier versions did not write down: left out where they say nothing."""
OF_SIZES = ("sizes", "size_weights", "prompt_sizes_sha256")
"""Fields that only stores with a list of sizes write down, as far as they say something."""
PROVENANCE = ("teacher_id", "teacher_hash", "schedule_fingerprint", "solver", "solver_steps", "spacing")
"""What every sample repeats of the plan, so that it means something outside its store."""


OPTIONAL = ("skipped", "crc32", "sizes", "texts")
"""Fields of a shard that are not written down where they are empty."""


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard. `offsets`: where each sample's safetensors payload starts, in bytes, as decimal numbers.
    `skipped`: the places of planned samples that it lacks, likewise. `crc32`: of the file with its samples' checksums,
    in hex; nothing if it has none (a store of before there were any). `sizes`: the number of each sample's size, as
    decimal numbers; nothing where all have the first. Samples of one size lie together in the file. `texts`: how many
    samples before each the one is that holds its text, likewise; 0: it does itself, nothing: all do.

    Offsets stay text until a sample of the shard is read: 10^7 of them load in a tenth of a second, not in two.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    offsets: str
    skipped: str = ""
    crc32: str = ""
    sizes: str = ""
    texts: str = ""

    @property
    def number(self) -> int:
        return int(self.name[6:-4])

    def facts(self) -> dict[str, Any]:
        """The shard as JSON holds it; a full one says nothing of `skipped`."""
        return {name: value for name, value in asdict(self).items() if name not in OPTIONAL or value}


class PayloadSizes(NamedTuple):
    """Bytes of a sample's tensors by the number of its size, 0 where there is no such sample: of one that holds its
    text, and of one whose text another holds."""

    whole: tuple[int, ...]
    bare: tuple[int, ...] = ()

    @property
    def of_layouts(self) -> tuple[int, ...]:
        """By the number of a sample's layout (`layout_numbers`)."""
        return self.whole + self.bare


@dataclass(frozen=True, kw_only=True)
class StoreIndex(StorePlan):
    """A plan, and what has been written of it: the finished shards, and what is in each sample.

    `layouts`: what a sample of each size looks like, then, where texts are shared, one of each size whose text another
    sample holds; None for what no sample looks like yet.
    """

    layouts: tuple[Layout | None, ...]
    shards: tuple[ShardInfo, ...]

    @property
    def layout(self) -> Layout:
        """What a sample looks like: of the first size that there is, which says all but the size of the states. With
        its text, if there is one that has it."""
        return next(layout for layout in self.layouts if layout is not None)

    @cached_property
    def payload_sizes(self) -> PayloadSizes:
        sizes = tuple(0 if layout is None else layout.payload_bytes for layout in self.layouts)
        return PayloadSizes(sizes[: len(self.image_sizes)], sizes[len(self.image_sizes) :])

    @cached_property
    def numbered(self) -> dict[int, ShardInfo]:
        """The finished shards by their numbers."""
        return {shard.number: shard for shard in self.shards}

    @property
    def complete(self) -> bool:
        """Whether every planned shard is there."""
        return len(self.shards) == self.planned_shards

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample's tensors; states are [K, C, h, w]."""
        return self.layout.shapes

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> bytes:
        facts = {"schema": schema_of(self), "complete": self.complete, **plan_facts(self)}
        whole = self.layouts[: len(self.image_sizes)]
        if self.sizes:
            there = {size: layout for size, layout in zip(self.sizes, whole, strict=True) if layout is not None}
            facts |= {"shapes": {size: layout.shapes for size, layout in there.items()}}
        else:
            facts |= {"shapes": self.shapes}
        headers = {n: layout.header[8:].decode() for n, layout in enumerate(self.layouts) if layout is not None}
        facts |= header_facts(self, headers)
        return dump(facts | {"shards": [shard.facts() for shard in self.shards]})

    @classmethod
    def from_json(cls, data: bytes) -> StoreIndex:
        """Reads an index, and trusts nothing in it.

        Raises:
            StoreError: not JSON, of another schema, a field missing or wrong, or a shard name that is not one.
        """
        facts = load_facts(data, INDEX)
        with understanding(INDEX):
            shards = tuple(ShardInfo(**shard) for shard in facts["shards"])
            plan = plan_arguments(facts)
            headers = headers_of(StorePlan(**plan), facts, INDEX)
            count = len(plan.get("sizes") or ("",)) * (2 if plan.get("shared") else 1)
            layouts = tuple(_layout_of(headers.get(number)) for number in range(count))
            index = cls(layouts=layouts, shards=shards, **plan)
        if facts.get("schema", SCHEMA) != schema_of(index):
            said = short(repr(facts.get("schema")))
            raise StoreError(f"{INDEX} has schema {said}, and a store like this one has {schema_of(index)}")
        _check_layouts(index)
        for shard in shards:
            check_shard(shard, index, INDEX)
        if len({shard.name for shard in shards}) < len(shards):
            raise StoreError(f"{INDEX} names a shard twice")
        return index


def _layout_of(header: str | None) -> Layout | None:
    if header is None:
        return None
    data = header.encode()
    return Layout.parse(struct.pack("<Q", len(data)) + data)


def header_facts(plan: StorePlan, headers: Mapping[int, str]) -> dict[str, Any]:
    """The headers of samples' tensors, by the numbers of their layouts, as files hold them: one, or one for each size,
    and likewise of samples whose text another one holds."""
    facts: dict[str, Any] = {}
    for first, name in _kinds_of_headers(plan):
        own = {number - first: headers[number] for number in sorted(headers)}
        own = {number: text for number, text in own.items() if 0 <= number < len(plan.image_sizes)}
        if plan.sizes:
            facts[f"{name}s"] = {plan.sizes[number]: text for number, text in own.items()}
        else:
            facts[name] = own.get(0, "")
    return facts


def headers_of(plan: StorePlan, facts: Mapping[str, Any], where: str) -> dict[int, str]:
    """What `header_facts` wrote down. Raises StoreError, KeyError: it makes no sense, or is missing."""
    found: dict[int, str] = {}
    for first, name in _kinds_of_headers(plan):
        if not plan.sizes:
            own = {"": facts[name]} if facts[name] else {}
        else:
            own = dict(facts[f"{name}s"])
        if unknown := set(own) - set(plan.sizes or ("",)):
            raise StoreError(f"{where} has headers of {short(sorted(unknown))}, which are none of its sizes")
        numbers = {size: number for number, size in enumerate(plan.sizes or ("",))}
        found |= {first + numbers[size]: header for size, header in own.items()}
    return found


def _kinds_of_headers(plan: StorePlan) -> tuple[tuple[int, str], ...]:
    """The number of the first layout of each kind of samples, and the name of their header in files."""
    return ((0, "header"), (len(plan.image_sizes), "bare_header"))[: 2 if plan.shared else 1]


def schema_of(plan: StorePlan) -> int:
    """The schema of a store's files: what reads only squares, or only samples with texts of their own, refuses others
    by it."""
    if plan.shared:
        return SCHEMA_OF_SHARED_TEXTS
    return SCHEMA_OF_SIZES if plan.sizes else SCHEMA


def plan_facts(plan: StorePlan) -> dict[str, Any]:
    """A plan as JSON holds it; of a store of trajectories, what it has always held."""
    names = PLAN_FIELDS if plan.kind == "pictures" else [name for name in PLAN_FIELDS if name not in OF_PICTURES]
    return {name: getattr(plan, name) for name in names if name not in (*LATER, *OF_SIZES) or getattr(plan, name)}


def plan_arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `StorePlan` that was written down as `facts`. Raises KeyError: one is missing."""
    return {name: facts[name] for name in PLAN_FIELDS if name in facts or name not in (*OF_PICTURES, *LATER, *OF_SIZES)}


def dump(facts: Mapping[str, Any]) -> bytes:
    """JSON with a line for each entry and for each shard. The same facts give the same bytes."""
    lines = []
    for name, value in facts.items():
        text = json.dumps(value, ensure_ascii=False)
        if name == "shards":
            text = "[\n" + ",\n".join(json.dumps(shard) for shard in value) + "\n]"
        lines.append(f"{json.dumps(name)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def load_facts(data: bytes | bytearray, name: str) -> dict[str, Any]:
    """Reads what `dump` wrote. Raises StoreError: not a JSON object of this schema."""
    try:
        facts = parse_json(data)
    except ValueError as error:
        raise StoreError(f"{name} is not JSON ({short(error)})") from None
    schema = facts.get("schema", SCHEMA) if isinstance(facts, dict) else None
    if type(schema) is not int or not SCHEMA <= schema <= SCHEMA_OF_SHARED_TEXTS:
        found = facts.get("schema") if isinstance(facts, dict) else type(facts).__name__
        readable = f"{SCHEMA} to {SCHEMA_OF_SHARED_TEXTS}"
        raise StoreError(f"{name} has schema {short(repr(found))}; this version reads {readable}")
    return facts


@contextmanager
def understanding(name: str) -> Iterator[None]:
    """Turns facts that are missing or of another type than expected into a StoreError about the file `name`."""
    try:
        yield
    except StoreError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise StoreError(f"{name} is not understood: {type(error).__name__} {short(error)}") from None


@lru_cache(maxsize=256)
def payload_offsets(shard: ShardInfo, payload_sizes: PayloadSizes) -> NDArray[np.int64]:
    """Where the payload of each of a shard's samples starts, [samples].

    Args:
        payload_sizes: `StoreIndex.payload_sizes`.

    Raises:
        BadShard: not as many as samples, out of the shard's bounds, or out of order.
    """
    try:
        offsets = np.fromiter(map(int, shard.offsets.split()), dtype=np.int64)
    except (ValueError, OverflowError):
        raise BadShard(f"{INDEX} holds offsets of {shard.name} that are not numbers") from None
    if len(offsets) != shard.samples:
        raise BadShard(f"{INDEX} holds {len(offsets)} offsets for the {shard.samples} samples of {shard.name}")
    lengths = np.array(payload_sizes.of_layouts, dtype=np.int64)[layout_numbers(shard, payload_sizes)]
    inside = len(offsets) == 0 or (offsets.min() >= 512 and (offsets <= shard.bytes - lengths).all())
    order = _order_in_file(shard, offsets)
    if not inside or (np.diff(offsets[order]) < lengths[order][:-1] + 512).any():
        raise BadShard(f"{INDEX} holds offsets of {shard.name} that lie outside its {shard.bytes} bytes, or overlap")
    return offsets


@lru_cache(maxsize=256)
def file_order(shard: ShardInfo, payload_sizes: PayloadSizes) -> NDArray[np.int64]:
    """Which of a shard's samples comes first in its file, second and so on, [samples]. Raises BadShard."""
    return _order_in_file(shard, payload_offsets(shard, payload_sizes))


def _order_in_file(shard: ShardInfo, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.argsort(offsets, kind="stable") if shard.sizes else np.arange(len(offsets))


@lru_cache(maxsize=256)
def sample_ends(shard: ShardInfo, payload_sizes: PayloadSizes, end: int) -> NDArray[np.int64]:
    """Where each of a shard's samples ends with its JSON, [samples]; of the last one it is `end`. Raises BadShard."""
    order, offsets = file_order(shard, payload_sizes), payload_offsets(shard, payload_sizes)
    ends = np.empty(len(offsets), dtype=np.int64)
    ends[order] = [*(offsets[order][1:] - 512), end]
    return ends


@lru_cache(maxsize=256)
def sizes_of(shard: ShardInfo, payload_sizes: PayloadSizes) -> NDArray[np.int64]:
    """The number of the size of each of a shard's samples, [samples].

    Raises:
        BadShard: not as many as samples, or a size that the store does not have.
    """
    found = np.array(shard.sizes.split() if shard.sizes else [0] * shard.samples, dtype=np.int64)
    if len(found) != shard.samples or (found >= len(payload_sizes.whole)).any():
        raise BadShard(f"{INDEX} gives {shard.name} {len(found)} sizes for {shard.samples} samples, or unknown ones")
    return found


@lru_cache(maxsize=256)
def layout_numbers(shard: ShardInfo, payload_sizes: PayloadSizes) -> NDArray[np.int64]:
    """Which of the index's layouts each of a shard's samples has, [samples]. Raises BadShard: one that there is not."""
    found = sizes_of(shard, payload_sizes) + len(payload_sizes.whole) * (texts_of(shard) > 0)
    sizes = payload_sizes.of_layouts
    if missing := [int(number) for number in np.unique(found) if number >= len(sizes) or not sizes[number]]:
        size = missing[0] % len(payload_sizes.whole)
        raise BadShard(f"{INDEX} does not say what samples of size {size} in {shard.name} look like")
    return found


@lru_cache(maxsize=256)
def texts_of(shard: ShardInfo) -> NDArray[np.int64]:
    """How many samples before each of a shard's the one is that holds its text, [samples]; 0: it does itself.

    Raises:
        BadShard: not as many as samples.
    """
    found = np.array(shard.texts.split() if shard.texts else [0] * shard.samples, dtype=np.int64)
    if len(found) != shard.samples:
        raise BadShard(f"{INDEX} says of {len(found)} samples of {shard.name} where their text is, not {shard.samples}")
    return found


def places(shard: ShardInfo, planned: int) -> Sequence[int]:
    """The place of each of a shard's samples among the `planned` ones, which keys and sample numbers go by."""
    return _places(shard.skipped, planned) if shard.skipped else range(planned)


@lru_cache(maxsize=256)
def _places(skipped: str, planned: int) -> tuple[int, ...]:
    missing = set(_missing(skipped))
    return tuple(place for place in range(planned) if place not in missing)


def kept_times(grid: Sequence[int], keep: str | Sequence[int] = "all", segments: int = 8) -> tuple[int, ...]:
    """Which of a solve's times are stored: `all`, `milestones` (edges of `segments` equal ones), or a list.

    Raises:
        StoreError: an unknown name, or times that the solver does not visit.
    """
    if isinstance(keep, str) and keep not in ("all", "milestones"):
        raise StoreError(f"times to keep must be all, milestones or a list of times, got {keep!r}")
    if keep == "all":
        return tuple(grid)
    wanted = Segments(grid[0], segments).milestones if keep == "milestones" else [int(t) for t in keep]
    if missing := sorted(set(wanted) - set(grid)):
        raise StoreError(f"times {missing} are to be kept, but the solver's grid is {_short(tuple(grid))}")
    return tuple(sorted(set(wanted), reverse=True))


def check_shard(shard: ShardInfo, plan: StorePlan, where: str) -> None:
    """Checks what `where` says of a shard, as far as that goes without reading its offsets one by one.

    Raises:
        StoreError: it makes no sense, or does not belong to the plan.
    """
    if not isinstance(shard.name, str) or not SHARD.fullmatch(shard.name):
        raise StoreError(f"{where} names a shard {short(repr(shard.name))}; allowed: shard-000000.tar and so on")
    if not isinstance(shard.skipped, str) or not re.fullmatch(r"([0-9]{1,9}( [0-9]{1,9})*)?", shard.skipped):
        raise BadShard(f"{where} says that {shard.name} skips {short(repr(shard.skipped))}, not places")
    if not isinstance(shard.crc32, str) or not re.fullmatch("([0-9a-f]{8})?", shard.crc32):
        raise BadShard(f"{where} gives the checksums of {shard.name} a crc32 of {short(repr(shard.crc32))}")
    if not isinstance(shard.sizes, str) or not re.fullmatch(r"([0-9]{1,3}( [0-9]{1,3})*)?", shard.sizes):
        raise BadShard(f"{where} gives the samples of {shard.name} the sizes {short(repr(shard.sizes))}, not numbers")
    if shard.sizes and not plan.sizes:
        raise BadShard(f"{where} gives the samples of {shard.name} sizes, and the store has one")
    if not isinstance(shard.texts, str) or not re.fullmatch(r"([0-9]{1,12}( [0-9]{1,12})*)?", shard.texts):
        raise BadShard(f"{where} gives the samples of {shard.name} the texts {short(repr(shard.texts))}, not numbers")
    if shard.texts and not plan.shared:
        raise BadShard(f"{where} gives the samples of {shard.name} texts of others, and the store shares none")
    if shard.skipped and plan.kind != "pictures":
        raise BadShard(f"{where} says that {shard.name} lacks samples; of {plan.kind} none may be missing")
    if shard.number >= plan.planned_shards:
        raise BadShard(f"{where} names {shard.name}, and {plan.planned_shards} shards are planned")
    planned, missing = len(plan.shard_samples(shard.number)), _missing(shard.skipped)
    there = planned - len(missing)
    counts = (shard.samples, shard.bytes)
    if any(type(n) is not int or n > MOST_BYTES for n in counts) or shard.samples != there or shard.bytes < 1:
        found = f"{short(repr(shard.samples))} samples in {short(repr(shard.bytes))} bytes"
        raise BadShard(f"{where} gives {shard.name} {found}, not {there}")
    if missing and missing[-1] >= planned:
        raise BadShard(f"{where} says that {shard.name} skips place {missing[-1]} of {planned}")
    if not isinstance(shard.offsets, str) or not re.fullmatch("[0-9a-f]{64}", str(shard.sha256)):
        raise BadShard(f"{where} has no offsets or no sha256 for {shard.name}")
    if shard.samples > (len(shard.offsets) + 1) // 2:  # before anything is made of so many
        raise BadShard(f"{where} holds too few offsets for the {shard.samples} samples of {shard.name}")


def _missing(skipped: str) -> list[int]:
    return sorted(set(map(int, skipped.split())))


def _check_layouts(index: StoreIndex) -> None:
    """Every sample has states [K, C, h, w] of the plan's dtype, its times, its guidance; h and w are of its size."""
    if all(layout is None for layout in index.layouts):
        raise StoreError(f"{INDEX} does not say what a sample looks like")
    count, shared = len(index.image_sizes), {CONDITIONING + name for name in index.shared}
    kinds: dict[bool, set[Any]] = {False: set(), True: set()}  # of samples with, and without their text
    for number, layout in enumerate(index.layouts):
        if layout is None:
            continue
        size, bare = index.image_sizes[number % count], number >= count
        _check_layout(index, layout)
        *_, h, w = layout.tensors[STATES].shape
        if index.sizes and h * size.width != w * size.height:
            raise StoreError(f"{INDEX}: states of {h} x {w} for images of {size} pixels")
        if wrong := shared & set(layout.tensors) if bare else shared - set(layout.tensors):
            raise StoreError(f"{INDEX}: {short(sorted(wrong))} must be in samples that hold their text, and no others")
        kinds[bare].add(_besides(layout, frozenset()))
        kinds[True].add(_besides(layout, shared))
    if max(map(len, kinds.values())) > 1:
        raise StoreError(f"{INDEX}: samples of two sizes differ in more than the height and width of their states")


def _besides(layout: Layout, without: Set[str]) -> frozenset[tuple[str, torch.dtype, tuple[int, ...]]]:
    """What a sample looks like, but for the height and width of its states, and `without` these tensors."""
    shapes = {name: spec.shape[:2] if name == STATES else spec.shape for name, spec in layout.tensors.items()}
    return frozenset((name, spec.dtype, shapes[name]) for name, spec in layout.tensors.items() if name not in without)


def _check_layout(index: StoreIndex, layout: Layout) -> None:
    tensors, K = layout.tensors, len(index.times)
    states = tensors.get(STATES)
    if states is None or len(states.shape) != 4 or states.shape[0] != K or states.dtype != STATE_DTYPES[index.dtype]:
        raise StoreError(f"{INDEX}: states are {short(states)}, not [{K}, C, h, w] of {index.dtype}")
    for name, dtype, shape in ((TIMES, torch.int32, (K,)), (GUIDANCE, torch.float32, (1,))):
        found: TensorSpec | None = tensors.get(name)
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            raise StoreError(f"{INDEX}: {name} is {short(found)}, not {dtype} {list(shape)}")


def _exact(value: Any, kind: type) -> Any:
    """Lists become tuples, and numbers of one kind, so that what JSON gives back equals what went in."""
    if value is None or isinstance(value, (str, bool)):
        return value
    return tuple(kind(v) for v in value) if isinstance(value, Sequence) else kind(value)


def _short(value: Any) -> str:
    if not isinstance(value, tuple):
        return short(repr(value))
    if len(value) <= 9:
        return str(list(value))
    return f"[{value[0]}, {value[1]}, … {value[-2]}, {value[-1]}] ({len(value)})"
