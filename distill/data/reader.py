"""Reads a trajectory store: of each sample only the states that are wanted.

A sample's head (its tar header, safetensors header, times, guidance and conditioning) and each of its states are byte
ranges known from the index alone, read straight into the tensors of a batch (see `rows`). The head is compared with
what the index says it must be, and every part that is read with its checksum, so that a shard that was cut, shifted,
overwritten or exchanged, and a single bit that is another, are noticed at the first sample read from the damage;
nothing is unpacked, no name from an archive is trusted. What cannot be read is no damage: see `errors.ReadError`.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from distill.data import tar
from distill.data.cache import ReadCache, name_of
from distill.data.checksums import (
    FACTS_NUMBER,
    HEAD_NUMBER,
    chained,
    checksums_name,
    row_bytes,
    row_problem,
    start_of,
    state_number,
)
from distill.data.index import (
    INDEX,
    PLAN,
    UNCONDITIONAL,
    ShardInfo,
    StoreIndex,
    layout_numbers,
    payload_offsets,
    places,
    sample_ends,
    texts_of,
)
from distill.data.record import (
    CONDITIONING,
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
)
from distill.data.remote import TIMEOUT_SECONDS
from distill.data.retries import RETRY_SECONDS
from distill.data.rows import FACTS, GAP, HEAD, Memory, Piece, Rows, Span, ordinary_memory, plan_reads, plan_text
from distill.data.sharing import held_by
from distill.data.storage import STREAM_BYTES, Folder, Range, Scattered
from distill.diffusion.prediction import Conditioning

log = logging.getLogger(__name__)
CACHE_GIB = 100.0
MOST_KEPT_BYTES = 1 << 26
"""The most bytes of checksums that a process keeps, those of a larger store are read with each sample; and the most
bytes of places of samples."""
MAX_UNCONDITIONAL_BYTES = 1 << 28
_NO_TENSORS = frozenset({GAP, FACTS, HEAD})
Request = tuple[int, tuple[int, ...]]
"""Index of a sample, and places of the states wanted."""
Place = tuple[Rows, int, Request]
"""The rows that a sample is read into, which of them, and what is wanted."""


def open_store(
    url: str,
    *,
    allow_partial: bool = False,
    max_bad_fraction: float = 0.0,
    verify_sha256: bool = False,
    retry_seconds: float = RETRY_SECONDS,
    timeout_seconds: float = TIMEOUT_SECONDS,
    cache: str | None = None,
    cache_gib: float = CACHE_GIB,
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
        timeout_seconds: how long a single request to a store that is not local may take.
        cache: a local folder in which what was read of such a store is kept (`cache.ReadCache`); a local one has none.
        cache_gib: the most that it takes.

    Raises:
        StoreError: no store there, or one that may not be read, is unfinished, or has an index that makes no sense; the
            cache cannot be used.
        BadShard: a shard is missing, or not of the size that the index says; names it.
        ReadError: something cannot be read.
    """
    if not 0 <= max_bad_fraction < 1:
        raise StoreError(f"max_bad_fraction must be within [0, 1), got {max_bad_fraction}")
    folder = Folder(url, retry_seconds, timeout_seconds)
    kept = ReadCache(cache, cache_gib) if cache is not None and folder.local is None else None
    _check_permissions(folder)
    index = read_index(folder)
    if not index.complete and not allow_partial:
        raise StoreError(
            f"{folder.name} is unfinished: {len(index.shards)} of {index.planned_shards} shards are written. "
            "Run the writer again, or allow a partial store"
        )
    _check_sizes(folder, index, max_bad_fraction > 0)
    unchecked = sum(not shard.crc32 for shard in index.shards if shard.samples)
    if unchecked and int(os.environ.get("RANK", 0)) == 0:  # once, not on every process
        log.warning(
            "%d of %d shards of %s have no checksums (an earlier version wrote them): numbers that were damaged are "
            "not noticed; distill verify %s add_checksums=true adds them",
            *(unchecked, len(index.shards), folder.name, folder.name),
        )
    return Store(folder, index, read_unconditional(folder, index), max_bad_fraction, verify_sha256, cache=kept)


def _check_permissions(folder: Folder) -> None:
    """Raises StoreError for what this user may not read: other failures may pass with time, but not that one."""
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
        cache: ReadCache | None = None,
    ) -> None:
        self.folder, self.index, self.unconditional, self.cache = folder, index, unconditional, cache
        self.max_bad_fraction, self.verify_sha256 = max_bad_fraction, verify_sha256
        self._starts = [0, *accumulate(shard.samples for shard in index.shards)]
        self._row = row_bytes(len(index.times))
        self._keeps_checksums = self._starts[-1] * self._row <= MOST_KEPT_BYTES
        self._checksums: dict[Range, bytes] = {}
        spec = index.layout.tensors[TIMES]
        self._times = torch.tensor(index.times).to(spec.dtype).numpy().tobytes()
        self._samples = self._starts[-1] if samples is None else samples
        self._known: dict[str, _Known] = {}
        self._shared = frozenset(CONDITIONING + name for name in index.shared)
        self._most_known = 1 + MOST_KEPT_BYTES // (8 * index.samples_per_shard)
        self._verified: dict[str, str | None] = {}
        self._sizes: NDArray[np.int64] | None = None
        if len(index.image_sizes) > 1:
            self._sizes = np.concatenate([np.zeros(0, np.int64), *map(self._sizes_in, index.shards)])

    def __len__(self) -> int:
        return self._samples

    def first(self, samples: int) -> Store:
        """The store as it was when it had so many samples: those that came to it later are left out.

        Raises:
            StoreError: it has fewer.
        """
        if samples > len(self):
            raise StoreError(f"{self.folder.name} has {len(self)} samples, fewer than {samples}")
        settings = self.max_bad_fraction, self.verify_sha256, samples, self.cache
        return Store(self.folder, self.index, self.unconditional, *settings)

    def apart(self) -> Store:
        """The same store with files opened on its own, for another thread; what is known of it is shared."""
        other = copy.copy(self)
        other.folder = self.folder.apart()
        return other

    def locate(self, i: int) -> tuple[ShardInfo, int]:
        """The shard of sample i, and its row there. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a store of {len(self)}")
        shard = bisect_right(self._starts, i) - 1
        return self.index.shards[shard], i - self._starts[shard]

    def key(self, i: int) -> str:
        return self._key(*self.locate(i))

    def size_of(self, i: int) -> int:
        """The number of the size of sample i, by which `index.image_sizes` has it."""
        return 0 if self._sizes is None else int(self._sizes[i])

    def by_size(self) -> dict[int, NDArray[np.int64]]:
        """The samples of each size that there are any of, by its number."""
        sizes = np.zeros(len(self), np.int64) if self._sizes is None else self._sizes[: len(self)]
        return {int(number): np.flatnonzero(sizes == number) for number in np.unique(sizes)}

    def _sizes_in(self, shard: ShardInfo) -> NDArray[np.int64]:
        return layout_numbers(shard, self.index.payload_sizes) % len(self.index.image_sizes)

    def _about(self, shard: ShardInfo) -> _Known:
        """Where a shard's samples lie in it; kept, for samples come in random order. Raises BadShard."""
        if (known := self._known.get(shard.name)) is None:
            known = self._known[shard.name] = _Known(
                payload_offsets(shard, self.index.payload_sizes) - tar.BLOCK,
                layout_numbers(shard, self.index.payload_sizes) if len(self.index.layouts) > 1 else None,
                texts_of(shard) if shard.texts else None,
                shard.number,
                places(shard, len(self.index.shard_samples(shard.number))),
                checksums_name(shard.name) if shard.crc32 else "",
            )
            if len(self._known) > self._most_known:
                self._known.pop(next(iter(self._known)), None)  # another thread may do so, too
        return known

    def _layout_of(self, shard: ShardInfo, known: _Known, line: int) -> Layout:
        """What a sample looks like. Raises BadShard: the index does not say."""
        found = self.index.layouts[0 if known.layouts is None else known.layouts[line]]
        if found is None:
            raise BadShard(f"{INDEX} does not say what the samples of {shard.name} look like")
        return found

    def _key(self, shard: ShardInfo, row: int) -> str:
        return make_key(shard.number, places(shard, len(self.index.shard_samples(shard.number)))[row])

    def read(self, i: int, states: Sequence[int] | None = None, prompts: bool = False) -> Sample:
        """Sample i with the states at these places of `index.times` (all of them by default), in the order given.

        Its prompt is read only with `prompts`.

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
        rows = [self.rows(1, len(states), size=self.size_of(i)) for i, states in requests]
        bad = self.fill([(one, 0, request) for one, request in zip(rows, requests, strict=True)], prompts)
        return [bad[at] if at in bad else one.sample(0) for at, one in enumerate(rows)]

    def rows(self, samples: int, states: int, memory: Memory = ordinary_memory, size: int = 0) -> Rows:
        """Tensors for so many samples of a size with so many states each, to be filled; they lie in this memory."""
        layout = self.index.layouts[size]
        if layout is None:
            raise StoreError(f"{self.folder.name} has no samples of {self.index.image_sizes[size]}")
        return Rows(layout, samples, states, memory)

    def fill(self, wanted: Sequence[Place], prompts: bool = False) -> dict[int, BadSample]:
        """Reads samples into rows, remote ones in parallel. What a row holds whose sample is bad means nothing.

        Returns:
            of each that is bad why, by its place in `wanted`.

        Raises:
            ReadError: one of them cannot be read.
        """
        bad = self._filled(wanted, prompts, self.cache)
        if bad and self.folder.local is None:  # what was kept of it, or its way here, may be what is damaged
            some = self._filled([wanted[at] for at in bad], prompts, None)
            bad = {at: some[n] for n, at in enumerate(bad) if n in some}
        return bad

    def _filled(self, wanted: Sequence[Place], prompts: bool, cache: ReadCache | None) -> dict[int, BadSample]:
        """`fill`, once. What is right is kept in the cache, and what came from there and is not is dropped."""
        bad: dict[int, BadSample] = {}
        readings: dict[int, list[Reading]] = {}  # of each its own, and that of the sample which holds its text
        for at, (rows, row, (i, states)) in enumerate(wanted):
            shard, line = self.locate(i)
            try:
                readings[at] = self._readings(shard, line, rows, row, states, prompts)
            except BadShard as error:
                bad[at] = self._bad(shard, self._key(shard, line), error)
        lacking = self._read([one for those in readings.values() for one in those], cache)
        numbers = self._kept(lacking)
        for at, those in readings.items():
            try:
                self._accept(those, numbers)
            except BadSample as error:
                bad[at] = self._bad(those[0].shard, those[0].key, error)
            if cache is not None:
                for one in those:
                    one.settle(cache, right=at not in bad)
        return bad

    def _read(self, readings: Sequence[Reading], cache: ReadCache | None) -> dict[Range, bytes]:
        """Reads these samples, and what they lack of checksums, which is returned. Raises ReadError.

        What lies elsewhere is requested in one go, of which each takes long. What is here is read sample by sample,
        and its checksum is made while the processor still has the bytes at hand.
        """
        lacking = self._lacking(readings)
        more: list[Scattered] = [(name, begin, [memoryview(data)]) for (name, begin, _), data in lacking.items()]
        if self.folder.local is not None:
            for one in readings:
                one.take(self.folder.fill(one.requests))
            counts = self.folder.fill(more)
        else:
            missing = [one.requests if cache is None else one.not_in(cache) for one in readings]
            counts = self.folder.fill([scattered for requests in missing for scattered in requests] + more)
            for one, requests in zip(readings, missing, strict=True):
                one.take(counts[: len(requests)], requests)
                del counts[: len(requests)]
        return {part: bytes(data[:count]) for count, (part, data) in zip(counts, lacking.items(), strict=True)}

    def _bad(self, shard: ShardInfo, key: str, error: BadShard) -> BadSample:
        replaced = " (the file was replaced since the store was opened)" if self.folder.was_replaced(shard.name) else ""
        return BadSample(f"sample {key} in {shard.name} of {self.folder.name}: {error}{replaced}")

    def _readings(
        self, shard: ShardInfo, line: int, rows: Rows, row: int, states: tuple[int, ...], prompts: bool
    ) -> list[Reading]:
        """What to read of a sample, and of the one that holds its text if that is another. Raises BadShard."""
        if self.verify_sha256:
            self._verify(shard)
        known = self._about(shard)
        layout, back = self._layout_of(shard, known, line), known.back(line)
        whole: Layout | None = layout
        if back and known.layouts is not None:
            whole = self.index.layouts[int(known.layouts[line]) % len(self.index.image_sizes)]
        if whole is not rows.layout:
            raise ValueError(f"sample {self._key(shard, line)} is of another size than the rows it is read into")
        facts = self._facts_part(shard, line, layout) if prompts else None
        spans, text_of = plan_reads(layout, states, facts), ""
        if back:
            text_of = self.index.text_of(shard.number * self.index.samples_per_shard + line, back)
        start = start_of(self.index.identity, known.key(line), text_of)
        own = Reading(shard, line, known, layout, start, spans, rows, row, states)
        return [own, self._text_reading(shard, line, rows, row)] if back else [own]

    def _text_reading(self, shard: ShardInfo, line: int, rows: Rows, row: int) -> Reading:
        """What to read of the sample that holds the text of another. Raises BadShard."""
        holder, place = held_by(self.index, shard, line, lambda one, at: self._about(one).back(at))
        if self.verify_sha256:
            self._verify(holder)
        known = self._about(holder)
        layout, start = self._layout_of(holder, known, place), start_of(self.index.identity, known.key(place))
        return Reading(holder, place, known, layout, start, plan_text(layout), rows, row, (), only=self._shared)

    def _accept(self, readings: Sequence[Reading], numbers: Mapping[Range, bytes]) -> None:
        """Checks what was read of a sample, its own and its text that another holds. Raises BadSample."""
        own, problem, checked = readings[0], "", True
        for one in readings:
            self._check_head(one)
            checked = checked and bool(one.found)
            if one.found and not problem:
                found = self._checksum_problem(one, numbers)
                problem = found and one.whose + found
        facts = bytes(own.buffers[FACTS]) if FACTS in own.buffers else None
        own.rows.repeat(own.row, own.states)
        if problem or not checked:  # checksums are made of finite values only
            _check_finite(own.rows, own.row, own.states)
        prompt = "" if facts is None else _prompt(own.key, facts)
        if problem:
            raise BadSample(problem)
        own.rows.name(own.row, own.key, own.states, self.index.times, prompt)

    def _check_head(self, one: Reading) -> None:
        """Whether what was read begins like the sample that it should be of. Raises BadSample."""
        if not one.is_whole:
            raise BadSample(f"{one.whose}the shard ends within it")
        head = bytes(one.buffers[HEAD])
        if head[: tar.BLOCK] != tar.header(f"{one.key}.safetensors", one.layout.payload_bytes):
            raise BadSample(f"{one.whose}its tar header is damaged or another sample's")
        if head[tar.BLOCK :] != one.layout.header:
            raise BadSample(f"{one.whose}its safetensors header is damaged or of another shape")
        if bytes(one.buffers[TIMES]) != self._times:
            said = one.rows.stored_times(one.buffers[TIMES])
            raise BadSample(f"{one.whose}its times {short(said)} are not the store's")

    def _checksum_problem(self, one: Reading, numbers: Mapping[Range, bytes]) -> str:
        part, begin = self._checksums_of(one)
        row, states = numbers[part][begin : begin + self._row], len(self.index.times)
        return row_problem(row, states, one.checksums_start, one.found)

    def _lacking(self, readings: Sequence[Reading]) -> dict[Range, bytearray]:
        """Room for the checksums of these samples that are still to be read, by where they are."""
        parts = dict.fromkeys(self._checksums_of(one)[0] for one in readings if one.known.checksums)
        return {part: bytearray(part[2] - part[1]) for part in parts if part not in self._checksums}

    def _kept(self, found: dict[Range, bytes]) -> Mapping[Range, bytes]:
        """Checksums by where they are: those that were read now, and all others that are kept."""
        if not self._keeps_checksums:
            return found
        self._checksums.update(found)
        return self._checksums

    def _checksums_of(self, one: Reading) -> tuple[Range, int]:
        """What to read for the checksums of a sample, and where they begin in that: a whole file if files are kept."""
        name, begin = one.known.checksums, one.line * self._row
        if self._keeps_checksums:
            return (name, 0, one.shard.samples * self._row), begin
        return (name, begin, begin + self._row), 0

    def _facts_part(self, shard: ShardInfo, row: int, layout: Layout) -> Piece:
        """The sample's JSON with its tar header and padding: all there is between its payload and the next sample."""
        size, lengths = layout.payload_bytes, self.index.payload_sizes
        start, end = payload_offsets(shard, lengths)[row], sample_ends(shard, lengths, shard.bytes - len(tar.END))[row]
        part = Piece(FACTS, tar.BLOCK + size + tar.padding(size), int(end - start) + tar.BLOCK)
        if part.end < part.begin + 2 * tar.BLOCK:
            raise BadShard(f"{INDEX} holds offsets of {shard.name} that leave no room for its samples' JSON")
        if (room := part.end - part.begin) > 2 * tar.BLOCK + MAX_JSON_BYTES:
            raise BadShard(f"{INDEX} holds offsets of {shard.name} that leave {room} bytes for a sample's JSON")
        return part

    def _verify(self, shard: ShardInfo) -> None:
        if shard.name not in self._verified:
            self._verified[shard.name] = _sha256_problem(self.folder, shard)
        if problem := self._verified[shard.name]:
            raise BadShard(problem)


class _Known(NamedTuple):
    """What the index says of a shard's samples, line by line: the byte at which its tar header begins, the number of
    its layout (None: all have the first), how many samples before it the one is that holds its text (None: each holds
    its own), and its place among the planned ones, which its key has. And the file with their checksums, "" for none.
    """

    starts: NDArray[np.int64]
    layouts: NDArray[np.int64] | None
    texts: NDArray[np.int64] | None
    number: int
    places: Sequence[int]
    checksums: str

    def key(self, line: int) -> str:
        return make_key(self.number, self.places[line])

    def back(self, line: int) -> int:
        return 0 if self.texts is None else int(self.texts[line])


class Reading:
    """A sample that is being read.

    Args:
        shard, line: where it is: which of the shard's samples; `known` and `layout` say more.
        checksums_start: where its checksums begin (`start_of`).
        rows, row: where it is put.
        states: places of its states that are wanted, in their order.
        only: the tensors that are put there; None is all, and the others are read to be checked alone.

    Attributes:
        requests: what to read, span by span.
        buffers: of the parts that a sample has once, by name, in the order of their bytes.
        is_whole: whether all of it was there.
        found: the checksums of what was read, by their places in a row; none if the store has none.
    """

    def __init__(
        self,
        shard: ShardInfo,
        line: int,
        known: _Known,
        layout: Layout,
        checksums_start: int,
        spans: Sequence[Span],
        rows: Rows,
        row: int,
        states: tuple[int, ...],
        only: Set[str] | None = None,
    ) -> None:
        self.shard, self.line, self.known, self.layout = shard, line, known, layout
        self.checksums_start, self._is_of_another = checksums_start, only is not None
        self.rows, self.row, self.states = rows, row, states
        self.key, start = known.key(line), int(known.starts[line])
        self.requests: list[Scattered] = []
        self._kept: dict[str, list[memoryview]] = {}
        self._fetched: dict[str, list[memoryview]] = {}
        self._alone, self._gaps = set[int](), set[int]()  # buffers, by their identities
        self.buffers: dict[str, memoryview] = {}
        self._states: list[tuple[int, memoryview]] = []
        self.is_whole, self.found = False, dict[int, int]()
        for span in spans:
            found = []
            for part in span.parts:
                if only is None or part.name in only:
                    buffer = rows.buffer(part, row, states)
                else:
                    buffer = memoryview(bytearray(part.end - part.begin))
                found.append(buffer)
                if part.name in (STATES, FACTS):
                    self._alone.add(id(buffer))
                if part.name == STATES:
                    self._states.append((part.state, buffer))
                elif part.name == GAP:
                    self._gaps.add(id(buffer))
                else:
                    self.buffers[part.name] = buffer
            self.requests.append((shard.name, start + span.begin, found))

    @property
    def whose(self) -> str:
        """How a message about it begins: nothing, or that it is another sample's text."""
        if not self._is_of_another:
            return ""
        return f"its text is that of sample {self.key} in {self.shard.name}, and of that "

    def not_in(self, cache: ReadCache) -> list[Scattered]:
        """Fills what a cache has of the sample, and returns the requests for the rest.

        A state is an entry of its own, for each batch reads other states, and so is the JSON. What else lies together
        is one, and gaps are none.
        """
        left: list[Scattered] = []
        for file, at, buffers in self.requests:
            for _, group in groupby(buffers, key=self._entry_of):
                part = list(group)
                size = sum(map(len, part))
                name = name_of(self.shard.sha256, file, at, size)
                if id(part[0]) in self._gaps:
                    pass  # nobody reads it
                elif cache.fill(name, part):
                    self._kept[name] = part
                else:
                    self._fetched[name] = part
                    left.append((file, at, part))
                at += size
        return left

    def _entry_of(self, buffer: memoryview) -> int:
        """Buffers that follow each other and have the same number are one entry."""
        alone = self._alone | self._gaps
        return id(buffer) if id(buffer) in alone else 0

    def settle(self, cache: ReadCache, right: bool) -> None:
        """Keeps what was fetched of the sample if all of it is right, and drops what was kept of it if it is not."""
        if right:
            for name, part in self._fetched.items():
                cache.add(name, part)
        else:
            for name in self._kept:
                cache.drop(name)

    def take(self, counts: list[int], requests: Sequence[Scattered] | None = None) -> None:
        """Takes notice of what the buffers now hold, of which so many bytes were read, request by request."""
        requests = self.requests if requests is None else requests
        self.is_whole = counts == [sum(map(len, buffers)) for _, _, buffers in requests]
        if not self.known.checksums:
            return
        start = self.checksums_start
        payload = [self.buffers[HEAD][tar.BLOCK :]]
        payload += [buffer for name, buffer in self.buffers.items() if name not in _NO_TENSORS]
        self.found = {HEAD_NUMBER: chained(payload, start)}
        self.found |= {state_number(k): chained((buffer,), start) for k, buffer in self._states}
        if (facts := self.buffers.get(FACTS)) is not None:
            self.found[FACTS_NUMBER] = chained((facts,), start)


def _check_finite(rows: Rows, row: int, states: tuple[int, ...]) -> None:
    for name, x in rows.tensors_of(row).items():
        if not finite(x):
            where = (
                next(f"state {k}" for k, one in zip(states, x, strict=True) if not finite(one))
                if name == STATES
                else name
            )
            raise BadSample(f"{where} has values that are not finite")


def _prompt(key: str, data: bytes) -> str:
    """The prompt in a sample's JSON, which must fill its room and be that sample's. Raises BadSample."""
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


def read_index(folder: Folder) -> StoreIndex:
    try:
        return StoreIndex.from_json(folder.read(INDEX))
    except FileNotFoundError:
        begun = PLAN in folder.sizes((PLAN,))
        why = "its writing has begun, but no shard is finished that holds a sample" if begun else f"{INDEX} is missing"
        raise StoreError(f"no trajectory store at {folder.name}: {why}") from None
    except StoreError as error:
        raise type(error)(f"{folder.name}: {error}") from None


def _check_sizes(folder: Folder, index: StoreIndex, tolerant: bool) -> None:
    sizes = folder.sizes(name for shard in index.shards for name in (shard.name, checksums_name(shard.name)))
    for shard in index.shards:
        if shard.name not in sizes:
            raise BadShard(f"{shard.name} of {folder.name} is missing")
        if sizes[shard.name] != shard.bytes:
            problem = f"{shard.name} of {folder.name} has {sizes[shard.name]} bytes, {INDEX} says {shard.bytes}"
            if not tolerant:
                raise BadShard(problem)
            log.warning("%s; its samples are read as far as they go", problem)
        name, expected = checksums_name(shard.name), shard.samples * row_bytes(len(index.times))
        if shard.crc32 and sizes.get(name) != expected:
            found = f"has {sizes[name]} bytes, not {expected}" if name in sizes else "is missing"
            again = f"distill verify {folder.name} add_checksums=true writes it again"
            raise BadShard(f"{name} of {folder.name} {found}: {again}")


def read_unconditional(folder: Folder, index: StoreIndex) -> Conditioning:
    where = f"{UNCONDITIONAL} of {folder.name}"
    if UNCONDITIONAL not in folder.sizes((UNCONDITIONAL,)):
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
    with folder.open(shard.name, folder.sizes((shard.name,)).get(shard.name, 0)) as file:
        while chunk := file.read(STREAM_BYTES):
            digest.update(chunk)
    if digest.hexdigest() == shard.sha256:
        return None
    return f"the shard's sha256 is {digest.hexdigest()}, {INDEX} says {shard.sha256}"
