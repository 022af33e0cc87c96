"""Writes a trajectory store: sharded, resumable, and the same bytes from any number of processes.

The teacher arrives as a function; nothing here knows a model. Work is split by shard and the processes never talk: each
writes its shards, a note beside every finished one, and an index made from all the notes it sees. A process may die at
any moment. Started again it skips what is finished and redoes the shard it was in. If the plan has more samples than a
store, it adds those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import IO, Any, NamedTuple

import safetensors.torch

from distill.data import tar
from distill.data.checksums import checksums_name, make_row, row_bytes, start_of
from distill.data.errors import NotWritten, ReadError
from distill.data.index import (
    INDEX,
    LATER,
    OPTIONAL,
    PLAN,
    PLAN_FIELDS,
    PROVENANCE,
    SETTINGS,
    UNCONDITIONAL,
    ShardInfo,
    StoreIndex,
    StoreMismatch,
    StorePlan,
    check_shard,
    dump,
    header_facts,
    headers_of,
    load_facts,
    plan_arguments,
    plan_facts,
    schema_of,
    understanding,
)
from distill.data.progress import Progress, counted
from distill.data.record import STATE_DTYPES, Layout, StoreError, describe, encode, finite, make_key, shard_name, short
from distill.data.sharing import TEXT_OF, Holders
from distill.data.storage import Folder
from distill.diffusion.prediction import Conditioning
from distill.diffusion.trajectory import Trajectory

log = logging.getLogger(__name__)
PUBLISH_SECONDS = 30.0
SKIPPED = "skipped.txt"


@dataclass(frozen=True)
class Partly:
    """A batch some of whose samples cannot be made: `skipped` says of each, by its index, why; `rest` is the others."""

    rest: Trajectory | None
    skipped: Mapping[int, str]


Solve = Callable[[Sequence[int], Sequence[str]], Trajectory | Partly]
"""The teacher: indices and prompts of B samples, all of one size, to their trajectories. Sample i may depend on
(seed, i) only."""
SizeOf = Callable[[int], int]
"""Which of the plan's sizes a sample has, by its index."""


def write_store(
    url: str,
    plan: StorePlan,
    prompts: Sequence[str],
    unconditional: Conditioning,
    solve: Solve,
    *,
    size_of: SizeOf | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Writes this process's shards of a store, and the index over everybody's.

    A store that has fewer samples than the plan grows: full shards stay as they are, and the new ones are what they
    would be if all had been written at once. A last shard that was not full is written again, with all its samples;
    until then the store is unfinished. Without such a shard it stays what it was until it has grown.

    Args:
        url: a folder or an fsspec URL.
        plan: what to write. Sample i is of `plan.prompt_of(i, prompts)`.
        unconditional: the network's keyword tensors for no prompt, [1, ...].
        solve: the teacher. States are stored in the plan's dtype, conditioning in the dtype it arrives in.
        size_of: which of the plan's sizes a sample has; None follows the plan's weights.
        rank, world_size: this process among those that write (`work_split`). Rank r writes shards r, r + world_size, ….

    Raises:
        StoreMismatch: the folder holds a store with another plan, or with more samples; names both values, and what to
            set.
        StoreError: no prompts, or the teacher's answer is not what the plan says or not finite; the key is named. Or
            every sample of the store was skipped.
        NotWritten: a file could not be written.
        ReadError: one could not be read.
    """
    if not prompts:
        raise StoreError(f"no prompts to make {plan.kind} of")
    if not 0 <= rank < world_size:
        raise StoreError(f"rank must be within 0 ... {world_size - 1}, got {rank}")
    bare = {name: x.detach().cpu().contiguous() for name, x in unconditional.items()}
    if bad := [name for name, x in bare.items() if not finite(x)]:
        raise StoreError(f"the unconditional {bad[0]} has values that are not finite")
    empty = safetensors.torch.save(bare)
    plan = replace(plan, prompts_sha256=_digest(prompts), unconditional_sha256=hashlib.sha256(empty).hexdigest())

    folder = Folder(url)
    folder.make()
    plan = _as_recorded(folder, plan)
    earlier = _agree(folder, plan, prompts)
    folder.publish(UNCONDITIONAL, empty)

    with _writing(url):
        _write_shards(folder, plan, prompts, solve, size_of or plan.size_of, earlier, rank, world_size)


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """Turns an OSError after the first file was written, which is not the user's mistake, into a NotWritten."""
    try:
        yield
    except (ReadError, PermissionError, NotADirectoryError, IsADirectoryError):
        raise
    except OSError as error:
        why = (
            f"[Errno {error.errno}] {error.strerror}" if error.errno is not None else f"{type(error).__name__} {error}"
        )
        raise NotWritten(
            f"{url} cannot be written ({why}); the shards that are finished are kept: the same command writes the rest"
        ) from error


def _write_shards(
    folder: Folder,
    plan: StorePlan,
    prompts: Sequence[str],
    solve: Solve,
    size_of: SizeOf,
    earlier: Sequence[StorePlan],
    rank: int,
    world_size: int,
) -> None:
    notes, url = Notes(folder, plan, earlier), folder.name
    if notes.shows_growth:
        notes.publish_index()  # the store is unfinished from here on
    mine = range(rank, plan.planned_shards, world_size)
    finished = notes.finished(mine)
    todo = [shard for shard in mine if shard not in finished]
    log.info(
        "%s: rank %d of %d has %d of its %s to write", url, rank, world_size, len(todo), counted(len(mine), "shard")
    )
    samples = sum(len(plan.shard_samples(shard)) for shard in todo)
    progress = Progress(f"{plan.kind}, rank {rank}", samples, "samples", bar=rank == 0)
    holders, due = Holders(plan, prompts, size_of), 0.0
    for shard in todo:
        if shard not in notes.finished([shard]):  # another job may be writing the same store
            write_shard(notes, shard, holders, solve, progress)
        if (start := time.monotonic()) >= due:
            notes.publish_index()
            end = time.monotonic()
            due = end + max(PUBLISH_SECONDS, 100 * (end - start))  # the index of a large store takes a while
    notes.publish_index()
    notes.publish_skipped()


class _Written(NamedTuple):
    """Of a sample in its shard: where its payload begins, the number of its size, how many samples before it the one is
    that holds its text, and its checksums."""

    offset: int
    size: int
    back: int
    row: bytes


def write_shard(notes: Notes, shard: int, holders: Holders, solve: Solve, progress: Progress) -> None:
    """Writes one shard, then the note that says it is finished; nothing if someone else finished it meanwhile."""
    folder, plan, name = notes.folder, notes.plan, shard_name(shard)
    with folder.staged(name) as (path, file):
        out, store, first = _Hashed(file), plan.identity, plan.shard_samples(shard).start
        headers: dict[int, bytes] = {}
        skipped: dict[int, str] = {}
        written: dict[int, _Written] = {}  # by place
        for place, size, record in _records(plan, shard, holders, solve):
            progress.update(1)
            if isinstance(record, str):
                skipped[place] = record
                continue
            key, (payload, description, back) = make_key(shard, place), record
            layout = size + (len(plan.image_sizes) if back else 0)
            header = headers.setdefault(layout, Layout.parse(payload).header)
            if not payload.startswith(header):
                raise StoreError(f"sample {key}: its tensors differ in shape or kind from the shard's first sample")
            facts = tar.member(f"{key}.json", description)
            start = start_of(store, key, plan.text_of(first + place, back))
            row = make_row(Layout.parse(header), payload, facts, start)
            written[place] = _Written(out.size + tar.BLOCK, size, back, row)
            out.write(tar.member(f"{key}.safetensors", payload) + facts)
        out.write(tar.END)
        if shard in notes.finished([shard]):
            return
        folder.commit_staged(path, file, name)
    in_order = [written[place] for place in sorted(written)]
    offsets, lacking = _numbers(one.offset for one in in_order), _numbers(sorted(skipped))
    info = ShardInfo(name, len(in_order), out.size, out.sha256.hexdigest(), offsets, lacking)
    if any(one.size for one in in_order):
        info = replace(info, sizes=_numbers(one.size for one in in_order))
    if any(one.back for one in in_order):
        info = replace(info, texts=_numbers(one.back for one in in_order))
    info = publish_checksums(folder, info, b"".join(one.row for one in in_order))
    said = {"schema": schema_of(plan), "plan": plan.identity, **_headers_said(plan, headers), **info.facts()}
    reasons = [skipped[place] for place in sorted(skipped)]
    folder.publish(note_name(shard), dump(said | ({"reasons": reasons} if reasons else {})))


def _headers_said(plan: StorePlan, headers: Mapping[int, bytes]) -> dict[str, Any]:
    """The headers of a shard's samples as its note has them."""
    return header_facts(plan, {number: header[8:].decode() for number, header in headers.items()})


def publish_checksums(folder: Folder, info: ShardInfo, rows: bytes) -> ShardInfo:
    """Writes the checksums of a shard's samples, if it has any; the shard, with what says that they are there."""
    if not rows:
        return info
    folder.publish(checksums_name(info.name), rows)
    return replace(info, crc32=f"{zlib.crc32(rows):08x}")


class Notes:
    """The notes beside finished shards, `shard-000000.json`, from which every process derives the same index.

    `earlier` are the plans of the same store with fewer samples, before it grew.
    """

    def __init__(self, folder: Folder, plan: StorePlan, earlier: Sequence[StorePlan] = ()) -> None:
        self.folder, self.plan, self.earlier = folder, plan, tuple(earlier)
        # By their digests, as notes of before stores could grow have them.
        self._plans = {plan.identity, *(one.digest() for one in (plan, *earlier))}
        self._read: dict[int, tuple[ShardInfo, dict[int, str], tuple[str, ...]]] = {}

    def finished(self, shards: Iterable[int] | None = None) -> dict[int, ShardInfo]:
        """Those of these shards (or of all) with a note of this plan and a file of the size it says."""
        sizes = self.folder.sizes()
        wanted = range(self.plan.planned_shards) if shards is None else shards
        noted = [shard for shard in wanted if note_name(shard) in sizes]
        self._read_notes({shard: sizes[note_name(shard)] for shard in noted if shard not in self._read})
        found = {shard: self._read[shard][0] for shard in noted if shard in self._read}
        return {shard: info for shard, info in found.items() if self._is_complete(info, sizes)}

    def _is_complete(self, info: ShardInfo, sizes: Mapping[str, int]) -> bool:
        checked = not info.crc32 or sizes.get(checksums_name(info.name)) == info.samples * row_bytes(
            len(self.plan.times)
        )
        return sizes.get(info.name) == info.bytes and checked

    @property
    def shows_growth(self) -> bool:
        """Whether the index cannot stay while the store grows: a shard that it lists is to be written again."""
        return any(one.samples % one.samples_per_shard for one in self.earlier)

    def _stays(self, shards: Mapping[int, ShardInfo]) -> bool:
        """Whether the index of the store before it grew is kept for now: it is true until the new one is."""
        if not self.earlier or self.shows_growth or len(shards) == self.plan.planned_shards:
            return False
        try:
            index = StoreIndex.from_json(self.folder.read(INDEX))
        except (FileNotFoundError, StoreError):
            return False
        return index.complete and index.samples < self.plan.samples

    def publish_index(self) -> None:
        """Writes the index over all finished shards.

        Two processes may do so at once, and the one that saw less may come last. So each looks again after it wrote,
        until what it wrote is all there is: the last process has listed everything. There is none over shards that
        hold no sample.
        """
        listed: set[int] | None = None
        while set(shards := self.finished()) != listed and any(info.samples for info in shards.values()):
            listed = set(shards)
            if self._stays(shards):
                return
            self.folder.publish(INDEX, self._index(shards).to_json())

    def publish_skipped(self) -> None:
        """Once every shard is finished, says which samples were skipped and why, if any: in a file and in the log.

        Raises:
            StoreError: all of them.
        """
        shards = self.finished()
        if len(shards) < self.plan.planned_shards or not any(info.skipped for info in shards.values()):
            return
        lines = [
            f"{make_key(shard, int(place))} {reason}"
            for shard, info in shards.items()
            for place, reason in zip(info.skipped.split(), self._read[shard][2], strict=True)
        ]
        self.folder.publish(SKIPPED, ("\n".join(lines) + "\n").encode())
        said = f"{len(lines)} of {self.plan.samples} {self.plan.kind} were skipped, see {SKIPPED} of {self.folder.name}"
        if len(lines) == self.plan.samples:
            raise StoreError(f"{said}, such as {lines[0]}")
        log.warning("%s", said)

    def _read_notes(self, sizes: Mapping[int, int]) -> None:
        self.folder.forget(*map(note_name, sizes))  # those of a shard that is written again are replaced
        found = self.folder.ranges([(note_name(shard), 0, size) for shard, size in sizes.items()])
        for shard, data in zip(sizes, found, strict=True):
            note = f"{note_name(shard)} of {self.folder.name}"
            facts = load_facts(data, note)
            if facts.get("plan") in self._plans and not self._is_partial(shard, facts):
                self._read[shard] = self._understood(shard, facts, note)

    def _is_partial(self, shard: int, facts: Mapping[str, Any]) -> bool:
        """Whether a note is of the shard as it was planned before the store grew: the last one, and not full."""
        before = {len(one.shard_samples(shard)) for one in self.earlier} - {len(self.plan.shard_samples(shard))}
        samples, skipped = facts.get("samples"), facts.get("skipped", "")
        return isinstance(samples, int) and isinstance(skipped, str) and samples + len(skipped.split()) in before

    def _understood(
        self, shard: int, facts: Mapping[str, Any], note: str
    ) -> tuple[ShardInfo, dict[int, str], tuple[str, ...]]:
        """What a note says: a shard, the headers of its samples by the numbers of their layouts, why it lacks others.

        Raises:
            StoreError: it makes no sense.
        """
        with understanding(note):
            info = ShardInfo(
                **{f.name: facts[f.name] for f in fields(ShardInfo) if f.name in facts or f.name not in OPTIONAL}
            )
            check_shard(info, self.plan, note)
            reasons = [str(reason) for reason in facts.get("reasons", ())]
            if info.name != shard_name(shard) or len(reasons) != len(info.skipped.split()):
                raise StoreError(f"{note} is of {info.name}, with {len(reasons)} reasons for the samples it lacks")
            headers = headers_of(self.plan, facts, note) if info.samples else {}
            for header in headers.values():
                _layout(header)
            return info, headers, tuple(reasons)

    def _index(self, shards: Mapping[int, ShardInfo]) -> StoreIndex:
        found: dict[int, tuple[str, int]] = {}  # of each layout the header, and a shard that has it
        for shard, info in shards.items():
            for number, header in self._read[shard][1].items() if info.samples else ():
                one, first = found.setdefault(number, (header, shard))
                if one != header:
                    raise StoreMismatch(
                        f"samples of {shard_name(first)} and {shard_name(shard)} differ in shape or kind: "
                        f"{one} and {header}"
                    )
        count = len(self.plan.image_sizes) * (2 if self.plan.shared else 1)
        layouts = tuple(_layout(found[number][0]) if number in found else None for number in range(count))
        return StoreIndex(layouts=layouts, shards=tuple(shards.values()), **plan_facts(self.plan))


def _layout(header: str) -> Layout:
    data = header.encode()
    return Layout.parse(len(data).to_bytes(8, "little") + data)


def work_split(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's (rank, world_size) from a launcher's RANK and WORLD_SIZE, a SLURM array, or both at once.

    Raises:
        StoreError: the array's task ids do not follow one another.
    """
    rank, world_size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return rank, world_size
    task, first, tasks = (int(environ[f"SLURM_ARRAY_TASK_{x}"]) for x in ("ID", "MIN", "COUNT"))
    last = int(environ["SLURM_ARRAY_TASK_MAX"])
    if last - first + 1 != tasks:
        raise StoreError(
            f"SLURM array ids must follow one another, such as 0-{tasks - 1}; got {tasks} of {first}-{last}"
        )
    return (task - first) * world_size + rank, tasks * world_size


def _batches(plan: StorePlan, shard: int, size_of: SizeOf) -> Iterator[tuple[int, list[int]]]:
    """The samples of a shard in the order in which they are solved and written: batches of one size, each with it."""
    by_size: dict[int, list[int]] = {}
    for i in plan.shard_samples(shard):
        by_size.setdefault(size_of(i), []).append(i)
    for size, indices in sorted(by_size.items()):
        for at in range(0, len(indices), plan.batch_size):
            yield size, indices[at : at + plan.batch_size]


Record = tuple[bytes, bytes, int]
"""A sample's safetensors payload and JSON, and how many samples before it the one is that holds its text."""


def _records(plan: StorePlan, shard: int, holders: Holders, solve: Solve) -> Iterator[tuple[int, int, Record | str]]:
    """Place in its shard, size, and what there is of each sample, solved batch by batch; or why it has none."""
    first, prompts = plan.shard_samples(shard).start, holders.prompts
    for size, indices in _batches(plan, shard, holders.size_of):
        key = make_key(shard, indices[0] - first)
        solved = solve(indices, [plan.prompt_of(i, prompts) for i in indices])
        made, skipped = (solved.rest, solved.skipped) if isinstance(solved, Partly) else (solved, {})
        if skipped and plan.kind != "pictures":
            raise StoreError(f"batch at {key}: samples were skipped ({next(iter(skipped.values()))})")
        kept = [i for i in indices if i not in skipped]
        if len(kept) + len(skipped) != len(indices) or (made is None and kept):
            raise StoreError(f"batch at {key}: samples neither made nor skipped, or skipped unasked")
        yield from ((i - first, size, reason) for i, reason in sorted(skipped.items()))
        if made is not None:
            _check(made, plan, key, len(kept), size)
            yield from ((place, size, record) for place, record in _encoded(plan, shard, holders, kept, made))


def _encoded(
    plan: StorePlan, shard: int, holders: Holders, indices: Sequence[int], made: Trajectory
) -> Iterator[tuple[int, Record]]:
    states = made.states.detach().cpu().to(STATE_DTYPES[plan.dtype])
    conditioning = {name: x.detach().cpu() for name, x in made.conditioning.items()}
    own = {name: x for name, x in conditioning.items() if name not in plan.shared}
    for b, i in enumerate(indices):
        place, text = i - plan.shard_samples(shard).start, plan.prompt_of(i, holders.prompts)
        key, w, back = make_key(shard, place), float(made.guidance[b]), holders.back(i)
        try:
            payload = encode(states[b], plan.times, w, {k: x[b] for k, x in (own if back else conditioning).items()})
            facts = _facts(plan, key, i, text, made.seeds[b], w, back)
        except StoreError as error:
            raise StoreError(f"sample {key} (prompt {short(repr(text))}): {error}") from None
        yield place, (payload, facts, back)


def _facts(plan: StorePlan, key: str, i: int, prompt: str, seed: int, w: float, back: int) -> bytes:
    provenance = {name: getattr(plan, name) for name in PROVENANCE}
    of_another = {TEXT_OF: plan.text_of(i, back)} if back else {}
    return describe(key=key, index=i, prompt=prompt, seed=seed, guidance=w, **provenance, **of_another)


def _check(trajectory: Trajectory, plan: StorePlan, key: str, B: int, size: int) -> None:
    """Refuses what does not fit the plan; `key` is the batch's first."""
    shape, K = tuple(trajectory.states.shape), len(plan.times)
    if len(shape) != 5 or shape[:2] != (B, K) or tuple(trajectory.times) != plan.times:
        raise StoreError(
            f"batch at {key}: the teacher gave states {list(shape)} at {len(trajectory.times)} times, "
            f"the plan says [{B}, {K}, C, h, w] at {list(plan.times)}"
        )
    wanted = plan.image_sizes[size]
    if plan.sizes and shape[3] * wanted.width != shape[4] * wanted.height:
        raise StoreError(f"batch at {key}: the teacher gave states {list(shape)} for images of {wanted} pixels")
    if missing := [name for name in plan.shared if name not in trajectory.conditioning]:
        raise StoreError(f"batch at {key}: the teacher gave no {missing[0]}, which samples of a prompt are to share")
    given = {name: len(x) for name, x in trajectory.conditioning.items()}
    for name, found in {**given, "guidance": len(trajectory.guidance), "seeds": len(trajectory.seeds)}.items():
        if found != B:
            raise StoreError(f"batch at {key}: the teacher gave {found} of {name} for {B} samples")
    low, high = plan.guidance_range
    if bool(((trajectory.guidance < low - 1e-4) | (trajectory.guidance > high + 1e-4)).any()):
        raise StoreError(f"batch at {key}: guidance {trajectory.guidance.tolist()}, the plan says {plan.guidance}")


def _as_recorded(folder: Folder, plan: StorePlan) -> StorePlan:
    """The plan, without what a store that an earlier version began does not record: it continues without."""
    try:
        facts = load_facts(folder.read(PLAN), f"{PLAN} of {folder.name}")
    except FileNotFoundError:
        return plan
    recorded = {name: getattr(plan, name) for name in LATER if getattr(plan, name) and name not in facts}
    unsaid: dict[str, Any] = {name: type(value)() for name, value in recorded.items()}
    if unsaid:
        log.warning("%s does not record %s, and continues without", folder.name, ", ".join(unsaid))
    return replace(plan, **unsaid)


def _agree(folder: Folder, plan: StorePlan, prompts: Sequence[str]) -> list[StorePlan]:
    """Lays down the plan, or checks that the one already there is this one, or this one with fewer samples.

    Returns the plans that the store had when it had fewer.
    """
    folder.publish_first(PLAN, dump({"schema": schema_of(plan), **plan_facts(plan)}))
    where = f"{PLAN} of {folder.name}"
    facts = load_facts(folder.read(PLAN), where)
    with understanding(where):
        begun = StorePlan(**plan_arguments(facts))
        sizes = sorted({int(n) for n in facts.get("was", ())} | {begun.samples})
    earlier = [_smaller(plan, n, prompts) for n in sizes if n < plan.samples]
    # Captions of pictures are among what `pictures_sha256` is of, and more of them as the store grows.
    free = {"samples", "prompts_sha256"} if plan.kind == "pictures" else {"samples"}
    if differing := [name for name in PLAN_FIELDS if name not in free and getattr(begun, name) != getattr(plan, name)]:
        said = [
            f"{name} is {_shown(begun, name)} in the store and {_shown(plan, name)} in the run" for name in differing
        ]
        to_set = ", ".join(dict.fromkeys(SETTINGS[name] for name in differing))
        raise StoreMismatch(
            f"{folder.name} was begun with another plan: {'; '.join(said)}. "
            f"Set {to_set} as it was, or write to a new folder (data.store)"
        )
    if begun.samples > plan.samples:
        raise StoreMismatch(
            f"samples is {begun.samples} in {folder.name} and {plan.samples} in the run: a store may grow, not shrink. "
            f"Set data.num_samples={begun.samples}, or write to a new folder (data.store)"
        )
    if begun.samples < plan.samples:
        log.info("%s grows from %d to %d %s", folder.name, begun.samples, plan.samples, plan.kind)
        was = {"was": [one.samples for one in earlier]}
        folder.publish(PLAN, dump({"schema": schema_of(plan), **plan_facts(plan), **was}))
    return earlier


def _smaller(plan: StorePlan, samples: int, prompts: Sequence[str]) -> StorePlan:
    """The plan as it was with fewer samples; the prompts of pictures are the captions of as many."""
    there = prompts[:samples] if plan.kind == "pictures" else prompts
    return replace(plan, samples=samples, prompts_sha256=_digest(there))


def _shown(plan: StorePlan, name: str) -> str:
    value = getattr(plan, name)
    return short(repr(list(value) if isinstance(value, tuple) else value))


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _numbers(values: Iterable[int]) -> str:
    return " ".join(map(str, values))


def note_name(shard: int) -> str:
    """The file beside a shard that says that it is finished."""
    return shard_name(shard).replace(".tar", ".json")


@dataclass
class _Hashed:
    """Writes to a file, and counts and hashes what it writes."""

    file: IO[bytes]
    size: int = 0

    def __post_init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)
