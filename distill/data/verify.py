"""Reads all of a store, and says everything that is wrong with it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO

import torch

from distill.data import tar
from distill.data.checksums import checksums_name, make_row, start_of
from distill.data.index import (
    INDEX,
    PROVENANCE,
    ShardInfo,
    StoreIndex,
    dump,
    file_order,
    layout_numbers,
    load_facts,
    payload_offsets,
    places,
    texts_of,
)
from distill.data.record import (
    GUIDANCE,
    MAX_JSON_BYTES,
    TIMES,
    BadShard,
    Layout,
    StoreError,
    finite,
    make_key,
    parse_json,
    short,
    view,
)
from distill.data.sharing import TEXT_OF, held_by
from distill.data.storage import Folder
from distill.data.writer import note_name, publish_checksums

MAX_PROBLEMS = 8


@dataclass(frozen=True)
class ShardReport:
    """What was found in one shard: samples read, and what is wrong, if anything."""

    shard: str
    samples: int
    problems: tuple[str, ...]


def verify_shard(
    folder: Folder, index: StoreIndex, shard: ShardInfo, seen: Callable[[int], None] = lambda samples: None
) -> ShardReport:
    """Checks a shard's size, sha256, tar structure and checksums, and every sample's schema, times, numbers and facts.

    One pass over the file, one sample in memory. `seen` is called after each sample.

    Raises:
        ReadError: the shard cannot be read.
    """
    rows = bytearray()
    verdict = _verified(folder, index, shard, seen, rows)
    if verdict.problems or not shard.crc32:
        return verdict
    problem = _checksums_problem(folder, shard, bytes(rows))
    return replace(verdict, problems=(problem,) if problem else ())


def add_checksums(
    folder: Folder, index: StoreIndex, shard: ShardInfo, seen: Callable[[int], None] = lambda samples: None
) -> tuple[ShardReport, ShardInfo]:
    """Writes the checksums of a shard, new or again, once all of it is found to be what the index says.

    Returns what was found, and the shard as the index is to list it.
    """
    rows = bytearray()
    verdict = _verified(folder, index, shard, seen, rows)
    if verdict.problems:
        return verdict, shard
    shard, note = publish_checksums(folder, shard, bytes(rows)), note_name(shard.number)
    with suppress(FileNotFoundError):  # what a later index is made of, if the store grows
        folder.publish(note, dump(load_facts(folder.read(note), note) | shard.facts()))
    return verdict, shard


def _checksums_problem(folder: Folder, shard: ShardInfo, rows: bytes) -> str | None:
    name = checksums_name(shard.name)
    if name not in folder.sizes((name,)):
        return f"{name} is missing; add_checksums=true writes it again"
    (data,) = folder.ranges([(name, 0, len(rows) + 1)])
    if bytes(data) != rows or f"{zlib.crc32(data):08x}" != shard.crc32:
        return f"{name} does not hold the checksums of its samples; add_checksums=true writes it again"
    return None


def _verified(
    folder: Folder, index: StoreIndex, shard: ShardInfo, seen: Callable[[int], None], rows: bytearray
) -> ShardReport:
    """Reads a shard; the checksums of its samples are added to `rows`."""
    size = folder.sizes((shard.name,)).get(shard.name)
    if size is None:
        return ShardReport(shard.name, 0, ("the shard is missing",))
    problems = [f"{size} bytes, {INDEX} says {shard.bytes}"] if size != shard.bytes else []
    good = 0
    with folder.open(shard.name, size) as raw:
        file = _Hashing(raw, size)
        try:
            for problem in _samples(file, index, shard, rows):
                seen(1)
                if problem is None:
                    good += 1
                elif len(problems) < MAX_PROBLEMS:
                    problems.append(problem)
            if file.read(len(tar.END) + 1) != tar.END:
                problems.append(f"no end mark at byte {file.at}, after its last sample")
        except StoreError as error:
            problems.append(str(error))  # the tar itself is broken here: what follows cannot be read
        while file.read(1 << 22):
            pass
    if file.sha256.hexdigest() != shard.sha256:
        problems.append(f"sha256 is {file.sha256.hexdigest()}, {INDEX} says {shard.sha256}")
    return ShardReport(shard.name, good, tuple(problems))


class _Hashing:
    """Reads a stream of `size` bytes from start to end, and hashes and counts what it reads."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.at, self.sha256 = file, size, 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.at += len(data)
        self.sha256.update(data)
        return data


def _samples(file: _Hashing, index: StoreIndex, shard: ShardInfo, rows: bytearray) -> Iterator[str | None]:
    """Reads sample after sample and yields what is wrong with each. Raises StoreError where the tar breaks."""
    lengths = index.payload_sizes
    offsets, layouts, texts = payload_offsets(shard, lengths), layout_numbers(shard, lengths), texts_of(shard)
    indices = index.shard_samples(shard.number)
    there, checksums = places(shard, len(indices)), dict[int, bytes]()
    for row in file_order(shard, lengths).tolist():
        place, layout = there[row], index.layouts[layouts[row]]
        assert layout is not None  # `layout_numbers` has looked
        key = make_key(shard.number, place)
        payload = _member(file, f"{key}.safetensors", layout.payload_bytes)
        start = file.at - len(payload) - tar.padding(len(payload))
        if start != offsets[row]:
            raise StoreError(f"sample {key} starts at byte {start}, {INDEX} says {offsets[row]}")
        facts = _member(file, f"{key}.json", MAX_JSON_BYTES)
        problem = _payload_problem(index, layout, payload)
        text_of = index.text_of(indices[place], int(texts[row]))
        problem = problem or _facts_problem(index, layout, key, indices[place], text_of, payload, facts)
        problem = problem or (_text_problem(index, shard, row) if text_of else None)
        if problem is None:
            member = tar.member(f"{key}.json", facts)
            checksums[row] = make_row(layout, payload, member, start_of(index.identity, key, text_of))
        yield f"sample {key}: {problem}" if problem else None
    rows += b"".join(checksums[row] for row in sorted(checksums))


def _member(file: _Hashing, name: str, most: int) -> bytes:
    start = file.at
    block = file.read(tar.BLOCK)
    try:
        found = tar.parse_header(block, start + tar.BLOCK)
    except ValueError as error:
        raise StoreError(f"{error}, where {name} should begin") from None
    if found.name != name or not found.regular:
        raise StoreError(f"byte {start} has a member {short(repr(found.name))}, where the file {name} should begin")
    if found.size > most:
        raise StoreError(f"{name} claims {found.size} bytes, at most {most} fit")
    whole = found.size + tar.padding(found.size)
    if whole > file.size - file.at:
        raise StoreError(f"the shard ends within {name}")
    return file.read(whole)[: found.size]


def _payload_problem(index: StoreIndex, layout: Layout, payload: bytes) -> str | None:
    if len(payload) != layout.payload_bytes:
        return f"its tensors take {len(payload)} bytes, {INDEX} says {layout.payload_bytes}"
    if not payload.startswith(layout.header):
        return "its safetensors header is damaged or of another shape"
    buffer = bytearray(payload)
    for name, spec in layout.tensors.items():
        x = view(buffer, layout.start(name), spec.dtype, spec.shape)
        if not finite(x):
            return f"{name} has values that are not finite"
        if name == TIMES and tuple(x.tolist()) != index.times:
            return f"its times {short(x.tolist())} are not the store's"
    return None


def _text_problem(index: StoreIndex, shard: ShardInfo, row: int) -> str | None:
    """Whether there is the sample that holds a sample's text; that one is read with its own shard."""
    try:
        held_by(index, shard, row)
    except BadShard as error:
        return str(error)
    return None


def _facts_problem(
    plan: StoreIndex, layout: Layout, key: str, i: int, text_of: str, payload: bytes, data: bytes
) -> str | None:
    """Whether KEY.json belongs to this sample of this store."""
    try:
        facts = parse_json(data)
    except ValueError as error:
        return f"{key}.json is not JSON ({short(error)})"
    w = float(view(bytearray(payload), layout.start(GUIDANCE), torch.float32, (1,)))
    expected = {"key": key, "index": i, TEXT_OF: text_of or None, **{name: getattr(plan, name) for name in PROVENANCE}}
    for name, value in expected.items():
        if not isinstance(facts, dict) or facts.get(name) != value:
            return f"{key}.json does not say {name} {short(repr(value))}"
    said = facts.get("guidance")
    if type(said) not in (int, float) or not abs(said - w) <= 1e-4:
        return f"guidance is {w} among its tensors and {short(repr(said))} in {key}.json"
    low, high = plan.guidance_range
    if not low - 1e-4 <= w <= high + 1e-4:
        return f"guidance is {w}, {INDEX} says {plan.guidance}"
    return None
