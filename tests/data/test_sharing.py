"""Stores whose samples of a prompt share its text: training reads the same to the bit, and what is damaged is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.benchmarks.range_server import start
from distill.data import tar
from distill.data.as_webdataset import as_webdataset
from distill.data.index import INDEX, StoreIndex, StoreMismatch, StorePlan, texts_of
from distill.data.loader import make_loader
from distill.data.reader import open_store
from distill.data.record import BadSample, StoreError, make_key
from distill.data.sharing import Holders
from distill.data.verify import add_checksums, verify_shard
from distill.data.writer import Partly, Solve
from distill.diffusion.random import generator
from distill.diffusion.trajectory import Batch, Pair, Trajectory
from tests.data.stores import PLAN, PROMPTS, files, in_processes, teacher, whole_shards, write
from tests.data.test_checksums import without_checksums
from tests.durability import Disk

SHARED = ("encoder_hidden_states",)
ALONE = replace(PLAN, samples=19)  # 5 prompts, in shards of 4
PLANNED = replace(ALONE, shared=SHARED)
SIZED = replace(PLANNED, sizes=("64x64", "96x48"), samples_per_shard=7, samples=23)
FIRST_BARE = 5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each sample holds its own text."""
    return write(tmp_path_factory.mktemp("alone") / "store", ALONE)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same samples, of which the first five hold the texts of all; nobody changes it."""
    return write(tmp_path_factory.mktemp("shared") / "store", PLANNED)


@pytest.fixture
def copy(url: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(url, tmp_path / "copy"))


def batches(url: str, count: int = 12, workers: int = 0, **arguments: Any) -> list[Batch]:
    store = open_store(url, **arguments)
    loader = make_loader(
        store,
        lambda step: Pair(250),
        seed=3,
        global_batch_size=6,
        micro_batch_size=3,
        num_workers=workers,
        prompts=True,
    )
    return list(islice(loader, count))


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    parts = {"states": batch.states, "times": batch.times, "guidance": batch.guidance}
    return parts | dict(batch.conditioning) | {f"no {name}": x for name, x in batch.unconditional.items()}


def same(some: Sequence[Batch], others: Sequence[Batch]) -> bool:
    def equal(a: Batch, b: Batch) -> bool:
        x, y = tensors_of(a), tensors_of(b)
        named = (a.keys, a.positions, a.prompts, a.next_prompts) == (b.keys, b.positions, b.prompts, b.next_prompts)
        return named and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)

    return len(some) == len(others) and all(map(equal, some, others))


def sized(plan: StorePlan) -> Solve:
    def solve(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory | Partly:
        return teacher(plan, plan.image_sizes[plan.size_of(indices[0])].shape(4, 8))(indices, prompts)

    return solve


# What is read is the same.


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_store_where_each_sample_holds_its_text(alone: str, url: str, workers: int) -> None:
    assert same(batches(url, workers=workers), batches(alone))


def test_every_sample_is_whole_and_those_without_a_text_are_smaller_by_it(alone: str, url: str) -> None:
    store, other = open_store(url), open_store(alone)
    for i in range(len(store)):
        found, expected = store.read(i, prompts=True), other.read(i, prompts=True)
        assert (found.key, found.prompt, found.guidance) == (expected.key, expected.prompt, expected.guidance)
        assert torch.equal(found.states, expected.states)
        assert all(torch.equal(x, expected.conditioning[name]) for name, x in found.conditioning.items())
    whole, bare = store.index.layouts
    assert whole is not None and bare is not None
    text = whole.tensors["conditioning.encoder_hidden_states"]
    assert set(whole.tensors) - set(bare.tensors) == {"conditioning.encoder_hidden_states"}
    entry = len(whole.header) - len(bare.header)
    assert whole.payload_bytes - bare.payload_bytes == text.end - text.begin + entry
    backs = [int(back) for shard in store.index.shards for back in texts_of(shard)]
    assert backs == [0] * 5 + [5] * 5 + [10] * 5 + [15] * 4


def test_a_store_takes_less_by_its_texts(tmp_path: Path) -> None:
    """Of 4 samples a prompt three hold no text; what is counted in tar's blocks of 512 bytes is known to a block."""
    plan = replace(PLAN, samples=40, samples_per_shard=10)
    text = torch.randn(128, 64, generator=generator("long text")).half()

    def solve(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        found = teacher(plan)(indices, prompts)
        assert isinstance(found, Trajectory)
        return replace(found, conditioning={"text": text.expand(len(indices), 128, 64)})

    sizes = {}
    for name, shared in (("alone", ()), ("shared", ("text",))):
        write(tmp_path / name, replace(plan, shared=shared), prompts=[f"prompt {n}" for n in range(10)], solve=solve)
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name).glob("shard-*.tar"))
    saved = 30 * text.nbytes
    assert abs(sizes["alone"] - sizes["shared"] - saved) <= 30 * tar.BLOCK and saved > 0.6 * sizes["shared"]


def test_a_sample_of_which_no_text_is_stored_is_read_with_one_more_range(url: str) -> None:
    """Remote reads are ranges in flight at once: of the sample, and of the one that holds its text."""
    store, asked = open_store(url), list[Any]()
    fill = store.folder.fill

    def counting(requests: Sequence[Any]) -> list[int]:
        asked.extend(request for request in requests if request[0].endswith(".tar"))
        return fill(requests)

    store.folder.fill = counting  # type: ignore[method-assign]
    store.read(0, states=[1])
    whole = len(asked)
    store.read(FIRST_BARE, states=[1])
    assert len(asked) - whole <= whole + 1
    assert {name for name, *_ in asked[whole:]} == {"shard-000001.tar", "shard-000000.tar"}
    assert sum(len(buffer) for *_, buffers in asked[whole:] for buffer in buffers) < 5000


# Writing.


@pytest.mark.parametrize("writers", [2, 5])
def test_any_number_of_writers_gives_the_same_bytes(url: str, tmp_path: Path, writers: int) -> None:
    jobs = [partial(write, tmp_path / "store", PLANNED, rank=r, world_size=writers) for r in range(writers)]
    assert in_processes(*jobs) == [0] * writers
    assert files(tmp_path / "store") == files(url)


@pytest.mark.parametrize(
    "fault", ["write shard-000001.tar.tmp:2", "os.rename shard-000003.json:1", "fsync shard-000000.tar.tmp:1"]
)
def test_a_writer_that_was_killed_goes_on_to_the_same_bytes(url: str, tmp_path: Path, fault: str) -> None:
    store = tmp_path / "store"
    assert in_processes(partial(write, store, PLANNED), fault=fault) == [-9]
    before = whole_shards(store)
    write(store, PLANNED)
    assert len(before) < 5 and files(store) == files(url)


def test_a_power_loss_leaves_shards_that_are_whole(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    plan = replace(PLANNED, samples=8)
    with Disk(tmp_path / "disk") as disk:
        write(tmp_path / "disk" / "store", plan)
    expected = files(tmp_path / "disk" / "store")
    for number, cut in enumerate(islice(disk.cuts(), 0, None, 7)):
        cut.lay_out(place := tmp_path / str(number))
        (place / "store").mkdir(exist_ok=True)
        whole_shards(place / "store")
        write(place / "store", plan)
        assert files(place / "store") == expected
    assert number > 3


def test_a_grown_store_is_one_that_was_written_at_once_and_new_samples_refer_to_old_ones(
    url: str, alone: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    write(store, replace(PLANNED, samples=8))
    jobs = [partial(write, store, PLANNED, rank=r, world_size=2) for r in range(2)]
    assert in_processes(*jobs) == [0, 0]
    grown, once = files(store), files(url)
    assert {name: data for name, data in grown.items() if name != "plan.json"} == {
        name: data for name, data in once.items() if name != "plan.json"
    }
    assert same(batches(str(store)), batches(alone))
    assert len(open_store(str(store)).first(8)) == 8


def test_a_store_that_was_begun_without_grows_without_and_the_other_way_round(
    alone: str, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Path(shutil.copytree(alone, tmp_path / "alone"))
    write(first, replace(PLANNED, samples=24))
    assert "does not record shared, and continues without" in caplog.text
    assert (
        files(first)["shard-000005.tar"]
        == files(write(tmp_path / "once", replace(ALONE, samples=24)))["shard-000005.tar"]
    )
    second = Path(shutil.copytree(url, tmp_path / "shared"))
    with pytest.raises(
        StoreMismatch, match=r"shared is \['encoder_hidden_states'\] in the store.*Set data.share_texts"
    ):
        write(second, replace(ALONE, samples=24))


def test_a_store_without_sharing_holds_what_it_always_held(alone: str, url: str) -> None:
    text = (Path(alone) / INDEX).read_text()
    assert '"schema": 1' in text and "bare_header" not in text and '"shared"' not in text and '"texts"' not in text
    facts = json.loads((Path(url) / INDEX).read_text())
    assert facts["schema"] == 3 and facts["shared"] == list(SHARED)  # earlier versions refuse it by its schema
    assert "texts" not in facts["shards"][0] and facts["shards"][1]["texts"] == "0 5 5 5"


def test_a_teacher_without_what_is_to_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the teacher gave no t5, which samples of a prompt are to share"):
        write(tmp_path, replace(PLANNED, shared=("t5",)))


# Which sample holds a text.


@pytest.mark.parametrize("prompts", [PROMPTS, ["a", "b", "a", "c"], ["a"]])
@pytest.mark.parametrize("plan", [PLANNED, replace(PLANNED, empty_prompts=0.3), SIZED])
def test_a_text_is_held_by_an_earlier_sample_of_the_same_prompt_that_holds_it(
    plan: StorePlan, prompts: list[str]
) -> None:
    holders = Holders(plan, prompts, plan.size_of)
    for i in [*range(60), 59, 3, 17]:  # in any order, as processes with some of the shards ask
        holder = i - Holders(plan, prompts, plan.size_of).back(i)
        assert holder == i - holders.back(i) <= i and holders.back(holder) == 0
        assert plan.prompt_of(holder, prompts) == plan.prompt_of(i, prompts)
    held = sum(holders.back(i) == 0 for i in range(60))
    texts = {plan.prompt_of(i, prompts) for i in range(60)}
    assert len(texts) <= held <= len(texts) + len(plan.image_sizes)


def test_samples_without_a_prompt_share_a_text_too(tmp_path: Path) -> None:
    plan = replace(ALONE, empty_prompts=0.3)
    write(tmp_path / "alone", plan)
    write(tmp_path / "shared", replace(plan, shared=SHARED))
    assert same(batches(str(tmp_path / "shared")), batches(str(tmp_path / "alone")))


def test_samples_of_several_sizes_share_texts(tmp_path: Path) -> None:
    write(tmp_path / "alone", replace(SIZED, shared=()), solve=sized(SIZED))
    write(tmp_path / "shared", SIZED, solve=sized(SIZED))
    assert same(batches(str(tmp_path / "shared")), batches(str(tmp_path / "alone")))
    store = open_store(str(tmp_path / "shared"))
    assert len(store.index.layouts) == 4 and None not in store.index.layouts
    assert not [p for shard in store.index.shards for p in verify_shard(store.folder, store.index, shard).problems]


def test_batches_are_the_same_from_a_web_server_and_its_cache_holds_a_text_once(
    url: str, alone: str, tmp_path: Path
) -> None:
    kept: dict[str, list[Path]] = {}
    for name, store in (("shared", url), ("alone", alone)):
        server = start(Path(store).parent)
        arguments: dict[str, Any] = {"cache": str(tmp_path / name), "cache_gib": 1.0, "retry_seconds": 0}
        for _ in range(2):  # the second time from the cache
            found = batches(f"http://127.0.0.1:{server.server_address[1]}/store", workers=2, **arguments)
            assert same(found, batches(alone))
        server.shutdown()
        kept[name] = [path for path in (tmp_path / name).glob("parts/??/*")]
    sizes = {name: sum(path.stat().st_size for path in found) for name, found in kept.items()}
    assert sizes["alone"] - sizes["shared"] > 0


# Damage.


def place_of(folder: Path, i: int, name: str) -> tuple[Path, int]:
    """The file of a sample, and where a tensor of it begins."""
    index = open_store(str(folder)).index
    shard, line = index.numbered[i // 4], i % 4
    layout = index.layouts[int(texts_of(shard)[line] > 0)]
    assert layout is not None
    return folder / shard.name, int(shard.offsets.split()[line]) + layout.start(name)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def bad_of(url: Path, **arguments: Any) -> dict[int, str]:
    store = open_store(str(url), **arguments)
    found = store.read_many([(i, (0,)) for i in range(len(store))])
    return {i: str(one) for i, one in enumerate(found) if isinstance(one, BadSample)}


def test_a_damaged_text_is_said_of_each_sample_that_has_it(copy: Path) -> None:
    flip(*place_of(copy, 2, "conditioning.encoder_hidden_states"))
    bad = bad_of(copy)
    assert list(bad) == [2, 7, 12, 17]
    assert "sample 000000-000002 in shard-000000.tar" in bad[2] and "checksum" in bad[2]
    line = (
        "sample 000001-000003 in shard-000001.tar of .*: its text is that of sample 000000-000002 in shard-000000.tar, "
    )
    with pytest.raises(BadSample, match=line + "and of that its text, times or guidance is not what was written"):
        open_store(str(copy)).read(7)
    index = open_store(str(copy)).index
    reports = [verify_shard(open_store(str(copy)).folder, index, shard) for shard in index.shards]
    assert [bool(report.problems) for report in reports] == [True, False, False, False, False]


def test_another_state_of_the_sample_that_holds_a_text_may_be_damaged(copy: Path) -> None:
    flip(*place_of(copy, 2, "states"))
    assert list(bad_of(copy)) == [2]


def test_damage_of_a_text_costs_the_samples_that_have_it(copy: Path) -> None:
    flip(*place_of(copy, 2, "conditioning.encoder_hidden_states"))
    with pytest.raises(BadSample, match="bad of 19, allowed: 0"):
        batches(str(copy))
    found = batches(str(copy), max_bad_fraction=0.25)
    assert not {make_key(i // 4, i % 4) for i in (2, 7, 12, 17)} & {key for batch in found for key in batch.keys}


def test_values_that_are_not_finite_are_noticed_without_checksums(copy: Path) -> None:
    without_checksums(copy)
    path, at = place_of(copy, 2, "conditioning.encoder_hidden_states")
    data = bytearray(path.read_bytes())
    data[at : at + 2] = b"\x00\x7c"
    path.write_bytes(data)
    assert list(bad_of(copy)) == [2, 7, 12, 17]


def test_checksums_are_added_again(copy: Path) -> None:
    expected = {name: data for name, data in files(copy).items() if name.endswith(".crc32")}
    without_checksums(copy)
    store = open_store(str(copy))
    for shard in store.index.shards:
        report, _ = add_checksums(store.folder, store.index, shard)
        assert not report.problems
    assert {name: data for name, data in files(copy).items() if name.endswith(".crc32")} == expected


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    facts = json.loads((folder / INDEX).read_text())
    edit(facts)
    (folder / INDEX).write_text(json.dumps(facts))
    return folder


REFUSED = {
    "shared is text": lambda f: f.update(shared="encoder_hidden_states"),
    "another is shared": lambda f: f.update(shared=["t5"]),
    "none is shared": lambda f: f.update(shared=[]),
    "no header of the others": lambda f: f.pop("bare_header"),
    "the others have the text": lambda f: f.update(bare_header=f["header"]),
    "none has the text": lambda f: f.update(header=f["bare_header"]),
    "texts that are no numbers": lambda f: f["shards"][1].update(texts="0 -5 5 5"),
    "texts of another type": lambda f: f["shards"][1].update(texts=[0, 5, 5, 5]),
    "an earlier schema": lambda f: f.update(schema=1),
}  # fmt: skip


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED.keys())
def test_an_index_whose_texts_make_no_sense_is_refused(copy: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(StoreError):
        open_store(str(edited(copy, edit)))


BAD = {
    "before the first sample": ("0 5 5 9", "its text should lie 9 samples before it, where there is none"),
    "one that holds none": ("0 5 5 1", "its text should be in 000001-000002 of shard-000001.tar, which holds none"),
    "too few": ("0 5 5", "3 samples of shard-000001.tar where their text is, not 4"),
    "of another prompt": ("0 5 5 6", "its checksums are damaged or another sample's"),
}


@pytest.mark.parametrize(("texts", "line"), BAD.values(), ids=BAD.keys())
def test_a_reference_that_leads_nowhere_is_a_bad_sample(copy: Path, texts: str, line: str) -> None:
    edited(copy, lambda facts: facts["shards"][1].update(texts=texts))
    with pytest.raises(BadSample, match=line):
        open_store(str(copy)).read(7)
    folder = open_store(str(copy)).folder
    index = StoreIndex.from_json((copy / INDEX).read_bytes())
    if texts != "0 5 5":
        assert verify_shard(folder, index, index.shards[1]).problems  # its JSON names the one that holds it


def test_a_partial_store_says_which_text_is_not_there_yet(tmp_path: Path) -> None:
    write(tmp_path, PLANNED, rank=1, world_size=2)  # shards 1 and 3
    store = open_store(str(tmp_path), allow_partial=True)
    assert store.read(0).key == "000001-000000"
    with pytest.raises(BadSample, match="its text is in shard-000000.tar, which is not finished"):
        store.read(1)


# Other readers.


def test_webdataset_gives_whole_samples_and_what_others_see_names_the_text(url: str, alone: str) -> None:
    found, expected = list(as_webdataset(url)), list(as_webdataset(alone))
    assert [one["__key__"] for one in found] == [one["__key__"] for one in expected] and len(found) == 19
    for one, other in zip(found, expected, strict=True):
        assert one["conditioning"].keys() == other["conditioning"].keys()
        assert all(torch.equal(x, other["conditioning"][name]) for name, x in one["conditioning"].items())
        assert torch.equal(one["states"], other["states"]) and one["prompt"] == other["prompt"]
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(Path(url).glob("shard-*.tar"))]
    said = [json.loads(one["json"]) for one in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)]
    assert [one.get("text_of") for one in said] == [None] * 5 + [
        make_key(n // 4, n % 4) for n in (*range(5), *range(5), *range(4))
    ]


def test_webdatasets_workers_give_whole_samples(url: str) -> None:
    loader = torch.utils.data.DataLoader(as_webdataset(url), batch_size=None, num_workers=2)
    assert all("encoder_hidden_states" in one["conditioning"] for one in loader)
