"""Reading: only the bytes asked for, and nothing believed that was not checked."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from distill.data import tar
from distill.data.index import INDEX, StoreIndex, StoreMismatch
from distill.data.reader import open_store
from distill.data.record import BadSample, BadShard, Layout, StoreError, finite, make_key
from distill.data.rows import plan_reads
from distill.data.storage import Folder
from tests.data.stores import BAD, PLAN, PROMPTS, UNCONDITIONAL, embedding_of, in_processes, states_of, teacher, write

BIG = replace(PLAN, samples=4)
SHAPE = (4, 32, 32)
STATE_BYTES = 4 * 32 * 32 * 2


class CountingFileSystem(MemoryFileSystem):
    """Memory, with a note of every range that is read."""

    protocol = "counting"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    read: list[int] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data = super().cat_file(path, start, end, **kwargs)
        self.read.append(len(data))
        return data


fsspec.register_implementation("counting", CountingFileSystem, clobber=True)


def test_what_is_read_is_what_was_written(store_url: str) -> None:
    store = open_store(store_url)
    assert len(store) == len(store.index) == 11
    assert torch.equal(store.unconditional["encoder_hidden_states"], UNCONDITIONAL["encoder_hidden_states"])
    for i in range(11):
        sample = store.read(i)
        assert sample.key == store.key(i) == make_key(i // 4, i % 4)
        assert torch.equal(sample.states, states_of(PLAN, i).half())
        assert tuple(sample.times.tolist()) == PLAN.times
        assert torch.equal(sample.conditioning["encoder_hidden_states"], embedding_of(PROMPTS[i % len(PROMPTS)]))
        assert sample.conditioning["time_ids"].tolist() == [64, 64, 0, 0, 64, i]
        assert sample.guidance == pytest.approx(PLAN.guidance_of(i))


@pytest.mark.parametrize("states", [(0,), (4,), (3, 1), (1, 2), (0, 2, 4), (2, 2)])
@pytest.mark.parametrize("scheme", ["", "counting://reads/"])
def test_planned_reads_equal_the_full_read(tmp_path: Path, scheme: str, states: tuple[int, ...]) -> None:
    url = write(scheme + str(tmp_path / "store"), BIG, solve=teacher(BIG, SHAPE))
    store = open_store(url)
    full, planned = store.read(3), store.read(3, states)
    assert torch.equal(planned.states, full.states[list(states)])
    assert planned.times.tolist() == [PLAN.times[k] for k in states]
    assert all(torch.equal(planned.conditioning[name], x) for name, x in full.conditioning.items())


@pytest.mark.parametrize(("states", "ranges"), [((1,), 2), ((1, 3), 3), ((4, 1), 3), ((2, 3), 2), ((0, 1), 1)])
def test_planned_reads_fetch_only_those_states(tmp_path: Path, states: tuple[int, ...], ranges: int) -> None:
    """Neighbours are one range; state 0 lies right behind the head."""
    url = write("counting://bytes" + str(tmp_path), BIG, solve=teacher(BIG, SHAPE))
    store = open_store(url)
    layout = store.index.layout
    head = tar.BLOCK + layout.start("states")
    store.read(1, states)  # fetches the checksums of the shard's samples
    CountingFileSystem.read.clear()
    store.read(2, states)
    assert len(CountingFileSystem.read) == ranges
    assert sum(CountingFileSystem.read) == head + len(states) * STATE_BYTES
    assert layout.payload_bytes > head + 3 * STATE_BYTES


def test_prompts_are_those_that_were_written(store_url: str, pictures_url: str) -> None:
    """Of every sample, the last of each shard too, and whatever is in them."""
    store, pictures = open_store(store_url), open_store(pictures_url)
    assert [store.read(i, (1,), prompts=True).prompt for i in range(11)] == [PROMPTS[i % 5] for i in range(11)]
    good = [i for i in range(11) if i not in BAD]
    assert [pictures.read(k, prompts=True).prompt for k in range(len(good))] == [PROMPTS[i % 5] for i in good]
    assert store.read(0).prompt == ""


@pytest.mark.parametrize(("states", "ranges"), [((1,), 3), ((4,), 2)])
def test_a_prompt_costs_its_json_and_no_more(tmp_path: Path, states: tuple[int, ...], ranges: int) -> None:
    """The JSON lies right behind the last state."""
    store = open_store(write("counting://prompts" + str(tmp_path), BIG, solve=teacher(BIG, SHAPE)))
    store.read(1, states)  # fetches the checksums of the shard's samples
    CountingFileSystem.read.clear()
    plain, bare = store.read(2, states), sum(CountingFileSystem.read)
    CountingFileSystem.read.clear()
    told = store.read(2, states, prompts=True)
    assert len(CountingFileSystem.read) == ranges and told.prompt == PROMPTS[2]
    assert bare + tar.BLOCK < sum(CountingFileSystem.read) <= bare + 3 * tar.BLOCK
    assert torch.equal(told.states, plain.states)


def test_local_reads_fetch_only_those_states(tmp_path: Path) -> None:
    """Counted by the kernel."""
    store = open_store(write(tmp_path, BIG, solve=teacher(BIG, SHAPE)))
    store.read(1, (0,))  # opens the shard
    before = bytes_read()
    store.read(1, (1, 3))
    read = bytes_read() - before
    assert 0 <= read - (tar.BLOCK + store.index.layout.start("states") + 2 * STATE_BYTES) < 1024


def bytes_read() -> int:
    path = Path("/proc/self/io")
    if not path.exists():
        pytest.skip("no /proc/self/io to count with")
    return int(path.read_text().split()[1])


@pytest.mark.parametrize("states", [(), (5,), (-1,)])
def test_states_that_are_not_there(store_url: str, states: tuple[int, ...]) -> None:
    with pytest.raises(IndexError, match="5"):
        open_store(store_url).read(0, states)


def test_samples_that_are_not_there(store_url: str) -> None:
    with pytest.raises(IndexError, match="sample 11 of a store of 11"):
        open_store(store_url).read(11)


def test_a_store_travels_to_other_processes(store_url: str) -> None:
    store = pickle.loads(pickle.dumps(open_store(store_url)))
    assert store.read(4, (1,)).key == "000001-000000"


def test_a_run_that_fits_its_store(store_url: str) -> None:
    open_store(store_url).index.require(
        teacher_hash="0123abcd", schedule_fingerprint="fedc9876", guidance=(2, 8), times=[500, 0], solver=None
    )


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"teacher_hash": "beef"}, "teacher_hash is '0123abcd' in the store and 'beef' in the run"),
        ({"schedule_fingerprint": "11"}, "schedule_fingerprint is 'fedc9876' in the store and '11' in the run"),
        ({"guidance": 7.5}, r"guidance is \[2.0, 8.0\] in the store and 7.5 in the run"),
        ({"times": [1000, 980]}, r"times is \[1000, 750, 500, 250, 0\] in the store and \[1000, 980\] in the run"),
        ({"solver_steps": 50, "seed": 1}, "solver_steps is 4 .* and 50 in the run; seed is 11 .* and 1 in the run"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_with_both_values(
    store_url: str, expected: dict[str, Any], message: str
) -> None:
    with pytest.raises(StoreMismatch, match=message):
        open_store(store_url).index.require(**expected)


def test_an_unknown_expectation_is_a_mistake(store_url: str) -> None:
    with pytest.raises(TypeError, match="'teacherhash'"):
        open_store(store_url).index.require(teacherhash="x")


def test_partial_stores_are_for_those_who_ask(tmp_path: Path) -> None:
    url = write(tmp_path / "store", rank=1, world_size=3)
    with pytest.raises(StoreError, match="unfinished: 1 of 3 shards"):
        open_store(url)
    store = open_store(url, allow_partial=True)
    assert [store.read(i, (0,)).key for i in range(len(store))] == [make_key(1, row) for row in range(4)]


def test_no_store_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="index.json is missing"):
        open_store(str(tmp_path))
    in_processes(lambda: write(tmp_path), fault="write shard-000000.tar.tmp:2")
    with pytest.raises(StoreError, match="no shard is finished"):
        open_store(str(tmp_path))


# Damage. Sample 5 is the second one of the second shard: `edit` changes bytes of that shard.


def json_5(folder: Path) -> int:
    """Where the tar header of its JSON starts."""
    size = StoreIndex.from_json((folder / INDEX).read_bytes()).layout.payload_bytes
    return sample_5(folder) + tar.BLOCK + size + tar.padding(size)


DAMAGED_JSON: dict[str, Callable[[Path], None]] = {
    "zeroed header": lambda f: edit(f, json_5(f), bytes(512)),
    "header of another sample": lambda f: edit(f, json_5(f), tar.header("000001-000000.json", 300)),
    "another size": lambda f: edit(f, json_5(f), tar.header("000001-000001.json", 20)),
    "a size beyond the next sample": lambda f: edit(f, json_5(f), tar.header("000001-000001.json", 1 << 30)),
    "not JSON": lambda f: edit(f, json_5(f) + tar.BLOCK, b"["),
    "not text": lambda f: edit(f, json_5(f) + tar.BLOCK + 40, b"\xff\xfe"),
    "a pickle": lambda f: edit(f, json_5(f) + tar.BLOCK, pickle.dumps({"prompt": "evil"})),
}


@pytest.mark.parametrize("kind", DAMAGED_JSON)
def test_a_damaged_json_is_a_bad_sample_for_those_who_read_it(copy: Path, kind: str) -> None:
    DAMAGED_JSON[kind](copy)
    found = open_store(str(copy)).read_many([(i, (0,)) for i in range(11)], prompts=True)
    assert [i for i, sample in enumerate(found) if isinstance(sample, BadSample)] == [5]
    said = str(found[5])
    assert "000001-000001 in shard-000001.tar" in said and "JSON" in said and "\n" not in said
    assert open_store(str(copy)).read(5, (0,)).key == "000001-000001"  # its states are whole


def test_offsets_that_leave_no_room_for_the_json(copy: Path) -> None:
    def crowd(facts: dict[str, Any]) -> None:
        first, _, third, fourth = facts["shards"][1]["offsets"].split()
        size = StoreIndex.from_json((copy / INDEX).read_bytes()).layout.payload_bytes
        facts["shards"][1]["offsets"] = f"{first} {int(first) + size + 512} {third} {fourth}"

    rewrite(copy, crowd)
    with pytest.raises(BadSample, match="leave no room for its samples' JSON"):
        open_store(str(copy)).read(4, (0,), prompts=True)


def edit(folder: Path, at: int, data: bytes, shard: str = "shard-000001.tar") -> None:
    with open(folder / shard, "r+b") as file:
        file.seek(at if at >= 0 else (folder / shard).stat().st_size + at)
        file.write(data)


def cut(folder: Path, at: int) -> None:
    with open(folder / "shard-000001.tar", "r+b") as file:
        file.truncate(at)


def sample_5(folder: Path) -> int:
    """Where its tar header starts."""
    index = StoreIndex.from_json((folder / INDEX).read_bytes())
    return int(index.shards[1].offsets.split()[1]) - tar.BLOCK


def states_5(folder: Path) -> int:
    index = StoreIndex.from_json((folder / INDEX).read_bytes())
    return sample_5(folder) + tar.BLOCK + index.layout.start("states")


RESIZED: dict[str, Callable[[Path], None]] = {
    "cut at a member boundary": lambda f: cut(f, sample_5(f)),
    "cut in a payload": lambda f: cut(f, states_5(f) + 700),
    "cut to nothing": lambda f: cut(f, 0),
    "longer": lambda f: edit(f, (f / "shard-000001.tar").stat().st_size, b"more"),
}
CHANGED: dict[str, Callable[[Path], None]] = {
    "zeroed header": lambda f: edit(f, sample_5(f), bytes(512)),
    "garbage header": lambda f: edit(f, sample_5(f), b"\x81garbage" * 64),
    "header of another sample": lambda f: edit(f, sample_5(f), tar.header("000001-000000.safetensors", 512)),
    "path out of the folder": lambda f: edit(f, sample_5(f), tar.header("../../evil.safetensors", 512)),
    "absolute path": lambda f: edit(f, sample_5(f), tar.header("/tmp/evil", 512)),
    "ten gigabytes": lambda f: edit(f, sample_5(f), tar.header("000001-000001.safetensors", 8 * 1024**3 - 1)),
    "garbage in the safetensors header": lambda f: edit(f, sample_5(f) + 512 + 20, b"\x00\xff\x00"),
    "safetensors header of a gigabyte": lambda f: edit(f, sample_5(f) + 512, struct.pack("<Q", 1 << 30)),
    "a pickle for a payload": lambda f: edit(f, sample_5(f) + 512, pickle.dumps(print)),
    "not a number": lambda f: edit(f, states_5(f) + 512 * 2 + 6, b"\x00\x7e"),
    "infinite": lambda f: edit(f, states_5(f) + 512 * 2, b"\x00\x7c"),
    "other times": lambda f: edit(f, sample_5(f) + 512 + open_store(str(f)).index.layout.start("times"), b"\x01"),
}


@pytest.mark.parametrize("kind", RESIZED)
def test_a_shard_of_another_size_is_refused_at_start(copy: Path, kind: str) -> None:
    RESIZED[kind](copy)
    with pytest.raises(BadShard, match="shard-000001.tar .* bytes, index.json says"):
        open_store(str(copy))


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_a_missing_shard_is_refused_at_start(copy: Path, tolerance: float) -> None:
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(BadShard, match="shard-000002.tar of .* is missing"):
        open_store(str(copy), max_bad_fraction=tolerance)


@pytest.mark.parametrize("kind", CHANGED)
def test_a_bad_sample_is_refused_with_its_key_and_shard_and_the_others_are_read(copy: Path, kind: str) -> None:
    CHANGED[kind](copy)
    store = open_store(str(copy))
    with pytest.raises(BadSample, match=r"000001-000001 in shard-000001.tar"):
        store.read(5, (2, 4))
    found = store.read_many([(i, (2,)) for i in range(11)])
    assert [i for i, sample in enumerate(found) if isinstance(sample, BadSample)] == [5]


def test_verified_shards_are_hashed_whole_before_the_first_read(copy: Path) -> None:
    """So that damage to what is never read is found too."""
    edit(copy, sample_5(copy) - 1, b"\1")  # of the padding
    open_store(str(copy)).read(5)
    store = open_store(str(copy), verify_sha256=True)
    store.read(0)
    for i in (4, 5):
        with pytest.raises(BadSample, match="shard-000001.tar.*sha256"):
            store.read(i)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ("512 9999999999999 9999999999999999 99999999999999999", "lie outside"),
        ("512 512 512 512", "overlap"),
        ("512 -512 4096 8192", "lie outside"),
        ("512 9223372036854775807 -9223372036854775808 512", "lie outside"),
        ("512 4096 8192", "holds 3 offsets for the 4 samples"),
        ("512 x y z", "not numbers"),
        ("512 99999999999999999999999 0 0", "not numbers"),
    ],
)
def test_offsets_out_of_bounds(copy: Path, offsets: str, message: str) -> None:
    rewrite(copy, lambda facts: facts["shards"][1].update(offsets=offsets))
    with pytest.raises(BadSample, match=f"{message}.*"):
        open_store(str(copy)).read(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["shards"][1].update(name="../../etc/passwd"), "names a shard '../../etc/passwd'"),
        (lambda f: f["shards"][1].update(name="shard-000000.tar"), "twice"),
        (lambda f: f["shards"][1].update(name="shard-000099.tar"), "shard-000099.tar"),
        (lambda f: f["shards"][1].update(samples=3), "3 samples"),
        (lambda f: f["shards"][1].update(samples=3, skipped="0"), "of trajectories none may be missing"),
        (lambda f: f["shards"][1].update(skipped=[0]), r"skips \[0\], not places"),
        (lambda f: f["shards"][1].update(skipped="0 x"), "skips '0 x', not places"),
        (lambda f: f.update(kind="pictures"), "pictures have times .* no solve"),
        (lambda f: f["shards"][1].update(bytes="all"), "'all' bytes"),
        (lambda f: f["shards"][1].update(more=1), "not understood"),
        (lambda f: f["shards"][1].update(sha256="?"), "sha256"),
        (lambda f: f["shards"][1].update(offsets="512"), "too few offsets for the 4 samples of shard-000001.tar"),
        (lambda f: f.pop("seed"), "seed"),
        (lambda f: f.update(schema=2), "schema 2"),
        (lambda f: f.update(times=[1000, 0]), "states are"),
        (lambda f: f.update(dtype="float32"), "states are"),
        (lambda f: f.update(header="{"), "header"),
        (lambda f: f.update(header=f["header"].replace('"I32"', '"OBJECT"')), "header"),
        (lambda f: f.update(header=f["header"].replace("[24,28]", "[25,29]")), "gap or overlap"),
        (lambda f: f.update(header=" " * 100_000), "claims 100000 bytes"),
        (lambda f: f.update(unconditional_sha256="0" * 64), "unconditional.safetensors .* is damaged"),
    ],
)
def test_an_index_that_makes_no_sense(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(copy, change)
    with pytest.raises(StoreError, match=message) as error:
        open_store(str(copy))
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"skipped": ""},
        {"skipped": "1 2"},
        {"skipped": "9"},
        {"skipped": "1", "samples": 4},
        {"skipped": "", "samples": 4},
    ],
)
def test_skipped_places_that_do_not_fit(pictures_url: str, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(pictures_url, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, lambda facts: facts["shards"][0].update(change))
    with pytest.raises(StoreError, match="shard-000000.tar|shard-000000.crc32|offsets"):
        open_store(str(tmp_path)).read(0)
    shutil.copytree(pictures_url, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, lambda facts: facts["shards"][1].update(name="shard-000003.tar", skipped=""))
    with pytest.raises(StoreError, match="names shard-000003.tar, and 3 shards are planned"):
        open_store(str(tmp_path))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((folder / INDEX).read_bytes())
    change(facts)
    (folder / INDEX).write_text(json.dumps(facts))


def test_an_index_survives_the_round_trip(store_url: str, pictures_url: str) -> None:
    for url in (store_url, pictures_url):
        data = (Path(url) / INDEX).read_bytes()
        assert StoreIndex.from_json(data).to_json() == data


@pytest.mark.parametrize("kind", CHANGED)
def test_reading_writes_nothing_anywhere(copy: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CHANGED[kind](copy)
    monkeypatch.chdir(copy)
    before = {path: path.stat().st_mtime_ns for path in copy.parent.rglob("*")}
    open_store(str(copy), verify_sha256=True).read_many([(i, (0,)) for i in range(11)])
    assert {path: path.stat().st_mtime_ns for path in copy.parent.rglob("*")} == before


@pytest.mark.parametrize("states", [(0,), (0, 1, 2, 3, 4), (0, 4)])
def test_read_plans_cover_what_they_must(store_url: str, states: tuple[int, ...]) -> None:
    layout = open_store(store_url).index.layout
    spans = plan_reads(layout, states)
    covered = {byte for span in spans for byte in range(span.begin, span.end)}
    first = tar.BLOCK + layout.start("states")
    needed = set(range(first)).union(*(range(first + k * 512, first + (k + 1) * 512) for k in states))
    assert needed <= covered
    assert all(a.end < b.begin for a, b in zip(spans, spans[1:], strict=False))


def test_safetensors_headers_are_read_as_the_library_writes_them() -> None:
    from safetensors.torch import save

    tensors = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.zeros(5, dtype=torch.int64), "c": torch.ones(())}
    data = save(tensors)
    layout = Layout.parse(data)
    assert layout.shapes == {name: tuple(x.shape) for name, x in tensors.items()}
    assert layout.payload_bytes == len(data)
    for name, x in tensors.items():
        start = layout.start(name)
        raw = bytearray(data[start : start + x.nbytes])
        assert torch.equal(torch.frombuffer(raw, dtype=x.dtype).reshape(x.shape), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_what_torch_says_of_every_value(dtype: torch.dtype) -> None:
    """By its bits: the same for each value of 16 bits, and for values of all sizes of the longer ones."""
    if dtype.itemsize == 2:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
        some = [0.0, 1.0, largest, least, least / 2, float("inf"), float("nan")]
        values = torch.tensor([*some, *(-x for x in some)], dtype=dtype)
    assert [finite(x[None]) for x in values] == torch.isfinite(values).tolist()
    plain = values[torch.isfinite(values)]
    assert finite(plain) and finite(plain[:0])
    assert not any(finite(torch.cat([plain, odd[None], plain])) for odd in values[~torch.isfinite(values)][::97])


def test_a_tar_header_is_tarfiles_own() -> None:
    for name in ("000000-000001.safetensors", "9" * 100, "é.json", "a"):
        for size in (0, 511, 8**11 - 1):
            info = tarfile.TarInfo(name)
            info.size, info.mode = size, 0o644
            assert tar.header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_buffers_are_filled_as_far_as_a_file_goes(tmp_path: Path) -> None:
    """In turn, local or not, with nothing after its end."""
    data = bytes(range(200))
    (tmp_path / "a").write_bytes(data)
    memory = MemoryFileSystem()
    memory.pipe_file("/fill/a", data)
    for url in (str(tmp_path), "memory://fill"):
        buffers = [bytearray(3), bytearray(0), bytearray(5), bytearray(200)]
        count, none = Folder(url).fill(
            [("a", 10, [memoryview(b) for b in buffers]), ("a", 200, [memoryview(bytearray(4))])]
        )
        assert (count, none) == (190, 0)
        assert b"".join(buffers)[:190] == data[10:] and not any(b"".join(buffers)[190:])
