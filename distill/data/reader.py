"""Reads a trajectory store: of each sample only the states that are asked for.

A sample's head (its tar header, safetensors header, times, guidance and conditioning) and each of its states are byte
ranges known from the index alone. The head is compared with what the index says it must be, and every part that is
read with its checksum, so that a shard that was cut, shifted, overwritten or exchanged, and a single bit that is
another, are noticed at the first sample read from the damage; nothing is unpacked, no name from an archive is trusted.
What cannot be read is no damage: see `storage.ReadError`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice

import safetensors.torch
import torch
from torch import Tensor

from distill.data import tar
from distill.data.checksums import check_row, checksums_name, row_bytes, start_of
from distill.data.index import INDEX, PLAN, UNCONDITIONAL, ShardInfo, StoreIndex, payload_offsets, places
from distill.data.record import (
    CONDITIONING,
    GUIDANCE,
    MAX_JSON_BYTES,
    STATES,
    TIMES,
    BadSample,
    BadShard,
    Layout,
    Sample,
    StoreError,
    finite,
    make_key,
    parse_json,
    short,
    view,
)
from distill.data.storage import RETRY_SECONDS, STREAM_BYTES, Folder, Range
from distill.diffusion.prediction import Conditioning

log = logging.getLogger(__name__)
MERGE_BYTES = 4096
MOST_KEPT_BYTES = 1 << 26
"""Of checksums, in each process; those of a larger store are read again with each sample."""
MAX_UNCONDITIONAL_BYTES = 1 << 28
Request = tuple[int, tuple[int, ...]]
"""Index of a sample, and places of the states wanted."""


def open_store(
    url: str,
    *,
    allow_partial: bool = False,
    max_bad_fraction: float = 0.0,
    verify_sha256: bool = False,
    retry_seconds: float = RETRY_SECONDS,
) -> Store:
    """Opens a store for reading, and checks what can be checked without reading its shards.

    Args:
        url: a folder or an fsspec URL.
        allow_partial: accept a store whose writing has not finished; its samples then come in another order than those
            of the finished store.
        max_bad_fraction: share of samples that the loader may replace (see `loader`). Above 0, a shard of the wrong
            size is a warning; a missing one is always an error.
        verify_sha256: before the first read from a shard, and once in each process, read all of it and compare its
            sha256 with the index. (What is read of a sample is compared with its checksums in any case.)
        retry_seconds: how long a read that fails is tried again.

    Raises:
        StoreError: no store there, or one that may not be read, is unfinished, or has an index that makes no sense.
        BadShard: a shard is missing, or not of the size that the index says; names it.
        ReadError: something cannot be read.
    """
    if not 0 <= max_bad_fraction < 1:
        raise StoreError(f"max_bad_fraction must be within [0, 1), got {max_bad_fraction}")
    folder = Folder(url, retry_seconds)
    _check_permissions(folder)
    index = read_index(folder)
    if not index.complete and not allow_partial:
        raise StoreError(
            f"{url} is unfinished: {len(index.shards)} of {index.planned_shards} shards are written. "
            "Run the writer again, or allow a partial store"
        )
    _check_sizes(folder, index, max_bad_fraction > 0)
    unchecked = sum(not shard.crc32 for shard in index.shards if shard.samples)
    if unchecked and int(os.environ.get("RANK", 0)) == 0:  # once, not on every process
        log.warning(
            "%d of %d shards of %s have no checksums (an earlier version wrote them): numbers that were damaged are "
            "not noticed; distill verify %s add_checksums=true adds them",
            *(unchecked, len(index.shards), url, url),
        )
    return Store(folder, index, read_unconditional(folder, index), max_bad_fraction, verify_sha256)


def _check_permissions(folder: Folder) -> None:
    """Raises StoreError for what this user may not read: time mends other failures, but not that one."""
    if folder.local is None:
        return
    for path, needed in ((folder.local, os.R_OK | os.X_OK), (folder.local / INDEX, os.R_OK)):
        try:
            path.stat()
        except PermissionError:
            raise StoreError(f"{path} may not be read: the permissions of a folder above it say no") from None
        except OSError:
            return  # is said where it is opened
        if path.is_dir() == (path == folder.local) and not os.access(path, needed, effective_ids=True):
            raise StoreError(f"{path} may not be read: its permissions say no")


class Store:
    """A trajectory store that is open. Built by `open_store`; may be handed to other processes.

    `index` says what it is (see `StoreIndex`); `unconditional` holds the keyword tensors for no prompt, [1, ...].
    """

    def __init__(
        self,
        folder: Folder,
        index: StoreIndex,
        unconditional: Conditioning,
        max_bad_fraction: float = 0.0,
        verify_sha256: bool = False,
        samples: int | None = None,
    ) -> None:
        self.folder, self.index, self.unconditional = folder, index, unconditional
        self.max_bad_fraction, self.verify_sha256 = max_bad_fraction, verify_sha256
        self._starts = [0, *accumulate(shard.samples for shard in index.shards)]
        self._row = row_bytes(len(index.times))
        self._keeps_checksums = self._starts[-1] * self._row <= MOST_KEPT_BYTES
        self._checksums: dict[Range, bytes] = {}
        self._samples = self._starts[-1] if samples is None else samples
        self._verified: dict[str, str | None] = {}

    def __len__(self) -> int:
        return self._samples

    def first(self, samples: int) -> Store:
        """The store as it was when it had so many samples: those that came to it later are left out.

        Raises:
            StoreError: it has fewer.
        """
        if samples > len(self):
            raise StoreError(f"{self.folder.url} has {len(self)} samples, fewer than {samples}")
        return Store(
            self.folder, self.index, self.unconditional, self.max_bad_fraction, self.verify_sha256, samples=samples
        )

    def locate(self, i: int) -> tuple[ShardInfo, int]:
        """The shard of sample i, and its row there. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a store of {len(self)}")
        shard = bisect_right(self._starts, i) - 1
        return self.index.shards[shard], i - self._starts[shard]

    def key(self, i: int) -> str:
        return self._key(*self.locate(i))

    def _key(self, shard: ShardInfo, row: int) -> str:
        return make_key(shard.number, places(shard, len(self.index.shard_samples(shard.number)))[row])

    def read(self, i: int, states: Sequence[int] | None = None, prompts: bool = False) -> Sample:
        """Sample i with the states at these places of `index.times` (all of them by default), in the order given.

        Its prompt is read only if `prompts` asks for it.

        Raises:
            BadSample: it is not what the index says and was written, or not finite; names its key and shard.
            ReadError: it cannot be read.
        """
        wanted = range(len(self.index.times)) if states is None else states
        found = self.read_many([(i, tuple(wanted))], prompts)[0]
        if isinstance(found, BadSample):
            raise found
        return found

    def read_many(self, requests: Sequence[Request], prompts: bool = False) -> list[Sample | BadSample]:
        """Several samples at once, remote ones in parallel; a `BadSample` in the place of one that is bad.

        Raises:
            ReadError: one of them cannot be read.
        """
        located = [(*self.locate(i), plan_reads(self.index.layout, states)) for i, states in requests]
        ranges: list[Range] = []
        rows: dict[int, tuple[Range, int]] = {}  # where the checksums of each sample are
        bad: dict[int, str] = {}
        for at, (shard, row, spans) in enumerate(located):
            try:
                base = self._sample_start(shard, row)
                if prompts:
                    spans = tuple(_merge([*spans, self._facts_span(shard, row)]))
                    located[at] = (shard, row, spans)
            except BadShard as error:
                bad[at] = str(error)
                continue
            ranges += [(shard.name, base + span.begin, base + span.end) for span in spans]
            if shard.crc32:
                rows[at] = self._checksums_of(shard, row)
        wanted = list(dict.fromkeys(part for part, _ in rows.values() if part not in self._checksums))
        found = self.folder.ranges([*ranges, *wanted])
        checksums = dict(zip(wanted, map(bytes, found[len(ranges) :]), strict=True)) | self._checksums
        if self._keeps_checksums:
            self._checksums = checksums
        buffers = iter(found)
        results: list[Sample | BadSample] = []
        for at, (shard, row, spans) in enumerate(located):
            key = self._key(shard, row)
            try:
                if at in bad:
                    raise BadSample(bad[at])
                data = list(islice(buffers, len(spans)))
                pieces = [_piece(span, read) for span, read in zip(spans, data, strict=True)]
                facts = self._facts_span(shard, row) if prompts else None
                sample = _assemble(self.index, key, requests[at][1], pieces)
                if facts:
                    sample = replace(sample, prompt=_prompt(key, pieces, facts))
                if at in rows:
                    part, begin = rows[at]
                    self._check(key, checksums[part][begin : begin + self._row], requests[at][1], pieces, facts)
                results.append(sample)
            except BadSample as error:
                results.append(BadSample(f"sample {key} in {shard.name} of {self.folder.url}: {error}"))
        return results

    def _check(
        self, key: str, row: bytes, states: tuple[int, ...], pieces: Sequence[Piece], facts: Span | None
    ) -> None:
        """Compares all that was read of a sample with its checksums. Raises BadSample."""

        def cut(begin: int, end: int) -> memoryview:
            return _bytes(pieces, tar.BLOCK + begin, tar.BLOCK + end)

        said = None if facts is None else bytes(_bytes(pieces, facts.begin, facts.end))
        check_row(self.index.layout, row, start_of(self.index.identity, key), cut, states, said)

    def _checksums_of(self, shard: ShardInfo, row: int) -> tuple[Range, int]:
        """What to read for the checksums of a sample, and where they begin in that: a whole file if files are kept."""
        name, begin = checksums_name(shard.name), row * self._row
        if self._keeps_checksums:
            return (name, 0, shard.samples * self._row), begin
        return (name, begin, begin + self._row), 0

    def _sample_start(self, shard: ShardInfo, row: int) -> int:
        """Byte of the shard at which the sample's tar header begins."""
        if self.verify_sha256:
            self._verify(shard)
        return int(payload_offsets(shard, self.index.layout.payload_bytes)[row]) - tar.BLOCK

    def _facts_span(self, shard: ShardInfo, row: int) -> Span:
        """The sample's JSON with its tar header and padding: all there is between its payload and the next sample."""
        size = self.index.layout.payload_bytes
        offsets = payload_offsets(shard, size)
        following = int(offsets[row + 1]) - tar.BLOCK if row + 1 < len(offsets) else shard.bytes - len(tar.END)
        span = Span(tar.BLOCK + size + tar.padding(size), following - int(offsets[row]) + tar.BLOCK)
        if span.end < span.begin + 2 * tar.BLOCK:
            raise BadShard(f"{INDEX} holds offsets of {shard.name} that leave no room for its samples' JSON")
        if (room := span.end - span.begin) > 2 * tar.BLOCK + MAX_JSON_BYTES:
            raise BadShard(f"{INDEX} holds offsets of {shard.name} that leave {room} bytes for a sample's JSON")
        return span

    def _verify(self, shard: ShardInfo) -> None:
        if shard.name not in self._verified:
            self._verified[shard.name] = _sha256_problem(self.folder, shard)
        if problem := self._verified[shard.name]:
            raise BadShard(problem)


@dataclass(frozen=True)
class Span:
    """Bytes begin ... end of a sample, counted from its tar header."""

    begin: int
    end: int


@dataclass(frozen=True)
class Piece:
    """A span and the bytes read for it; fewer if the shard ends within it."""

    span: Span
    data: bytearray


@lru_cache(maxsize=4096)
def _spans(layout_bytes: bytes, states: tuple[int, ...]) -> tuple[Span, ...]:
    layout = Layout.parse(layout_bytes)
    payload = tar.BLOCK
    wanted = [Span(0, payload + len(layout.header))]
    for name, spec in layout.tensors.items():
        if name != STATES:
            start = payload + layout.start(name)
            wanted.append(Span(start, start + spec.end - spec.begin))
    first = payload + layout.start(STATES)
    wanted += [Span(first + k * layout.state_bytes, first + (k + 1) * layout.state_bytes) for k in states]
    return tuple(_merge(wanted))


def plan_reads(layout: Layout, states: tuple[int, ...]) -> tuple[Span, ...]:
    """The byte ranges of a sample to read for its head and these states; neighbours become one range."""
    K = layout.tensors[STATES].shape[0]
    if any(not 0 <= k < K for k in states) or not states:
        raise IndexError(f"states {list(states)} of samples that have {K}")
    return _spans(layout.header, states)


def _merge(spans: Iterable[Span]) -> list[Span]:
    """Joins ranges (equal or disjoint ones) that lie within a page of each other: one read is cheaper than two."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda s: s.begin):
        if merged and span.begin - merged[-1].end <= MERGE_BYTES:
            merged[-1] = Span(merged[-1].begin, span.end)
        else:
            merged.append(span)
    return merged


def _piece(span: Span, data: bytearray | bytes) -> Piece:
    if len(data) < span.end - span.begin:
        raise BadSample("the shard ends within it")
    return Piece(span, data if isinstance(data, bytearray) else bytearray(data))


def _assemble(index: StoreIndex, key: str, states: tuple[int, ...], pieces: Sequence[Piece]) -> Sample:
    """Checks the pieces of one sample and makes tensors of them. Raises BadSample."""
    layout = index.layout
    head = pieces[0].data
    if head[: tar.BLOCK] != tar.header(f"{key}.safetensors", layout.payload_bytes):
        raise BadSample("its tar header is damaged or another sample's")
    if head[tar.BLOCK : tar.BLOCK + len(layout.header)] != layout.header:
        raise BadSample("its safetensors header is damaged or of another shape")

    def tensor(name: str) -> Tensor:
        spec = layout.tensors[name]
        return _cut(pieces, tar.BLOCK + layout.start(name), spec.dtype, spec.shape)

    if tuple(tensor(TIMES).tolist()) != index.times:
        raise BadSample(f"its times {short(tensor(TIMES).tolist())} are not the store's")
    spec, first = layout.tensors[STATES], tar.BLOCK + layout.start(STATES)
    cut = [_cut(pieces, first + k * layout.state_bytes, spec.dtype, spec.shape[1:]) for k in states]
    found = {name.removeprefix(CONDITIONING): tensor(name) for name in layout.tensors if name.startswith(CONDITIONING)}
    guidance = tensor(GUIDANCE)
    named = [*found.items(), (GUIDANCE, guidance), *((f"state {k}", x) for k, x in zip(states, cut, strict=True))]
    for name, x in named:
        if not finite(x):
            raise BadSample(f"{name} has values that are not finite")
    times = torch.tensor([index.times[k] for k in states])
    return Sample(key, torch.stack(cut), times, found, float(guidance))


def _prompt(key: str, pieces: Sequence[Piece], span: Span) -> str:
    """The prompt in a sample's JSON, which must fill its span and be that sample's. Raises BadSample."""
    data = bytes(_bytes(pieces, span.begin, span.end))
    try:
        size = tar.parse_header(data[: tar.BLOCK], tar.BLOCK).size
        body = data[tar.BLOCK : tar.BLOCK + size]
        facts = parse_json(body)
        if data != tar.member(f"{key}.json", body) or facts["key"] != key or not isinstance(facts["prompt"], str):
            raise ValueError("it is another sample's or has no prompt")
        facts["prompt"].encode()  # or half of a surrogate pair would fail where the text is used
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample(f"its JSON is damaged ({type(error).__name__} {short(error)})") from None
    return facts["prompt"]


def _bytes(pieces: Sequence[Piece], begin: int, end: int) -> memoryview:
    """Bytes begin ... end of the sample, which lie in one piece."""
    piece = next(p for p in reversed(pieces) if p.span.begin <= begin)
    return memoryview(piece.data)[begin - piece.span.begin : end - piece.span.begin]


def _cut(pieces: Sequence[Piece], begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that begins at byte `begin` of the sample."""
    piece = next(p for p in reversed(pieces) if p.span.begin <= begin)
    return view(piece.data, begin - piece.span.begin, dtype, shape)


def read_index(folder: Folder) -> StoreIndex:
    try:
        return StoreIndex.from_json(folder.read(INDEX))
    except FileNotFoundError:
        begun = PLAN in folder.sizes()
        why = "its writing has begun, but no shard is finished that holds a sample" if begun else f"{INDEX} is missing"
        raise StoreError(f"no trajectory store at {folder.url}: {why}") from None
    except StoreError as error:
        raise type(error)(f"{folder.url}: {error}") from None


def _check_sizes(folder: Folder, index: StoreIndex, tolerant: bool) -> None:
    sizes = folder.sizes()
    for shard in index.shards:
        if shard.name not in sizes:
            raise BadShard(f"{shard.name} of {folder.url} is missing")
        if sizes[shard.name] != shard.bytes:
            problem = f"{shard.name} of {folder.url} has {sizes[shard.name]} bytes, {INDEX} says {shard.bytes}"
            if not tolerant:
                raise BadShard(problem)
            log.warning("%s; its samples are read as far as they go", problem)
        name, expected = checksums_name(shard.name), shard.samples * row_bytes(len(index.times))
        if shard.crc32 and sizes.get(name) != expected:
            found = f"has {sizes[name]} bytes, not {expected}" if name in sizes else "is missing"
            again = f"distill verify {folder.url} add_checksums=true makes it anew"
            raise BadShard(f"{name} of {folder.url} {found}: {again}")


def read_unconditional(folder: Folder, index: StoreIndex) -> Conditioning:
    where = f"{UNCONDITIONAL} of {folder.url}"
    if UNCONDITIONAL not in folder.sizes():
        raise StoreError(f"{where} is missing")
    (data,) = folder.ranges([(UNCONDITIONAL, 0, MAX_UNCONDITIONAL_BYTES + 1)])
    if (found := hashlib.sha256(data).hexdigest()) != index.unconditional_sha256:
        raise StoreError(f"{where} is damaged: sha256 {found}, {INDEX} says {short(index.unconditional_sha256)}")
    try:
        tensors = safetensors.torch.load(bytes(data))
    except safetensors.SafetensorError as error:
        raise StoreError(f"{where} is not understood ({short(error)})") from None
    for name, x in tensors.items():
        if x.dim() < 1 or len(x) != 1 or not finite(x):
            raise StoreError(f"{where}: {short(name)} has the shape {list(x.shape)}, not [1, ...], or is not finite")
    return tensors


def _sha256_problem(folder: Folder, shard: ShardInfo) -> str | None:
    digest = hashlib.sha256()
    with folder.open(shard.name, folder.sizes().get(shard.name, 0)) as file:
        while chunk := file.read(STREAM_BYTES):
            digest.update(chunk)
    if digest.hexdigest() == shard.sha256:
        return None
    return f"the shard's sha256 is {digest.hexdigest()}, {INDEX} says {shard.sha256}"
