"""Images of several sizes: which sizes there are, a store of them, and batches of one size whatever ranks there are."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.data.as_webdataset import as_webdataset
from distill.data.images import Accept, list_pictures
from distill.data.index import INDEX, StoreIndex, StoreMismatch, StorePlan
from distill.data.loader import make_loader, order_of
from distill.data.order import BatchShare, SizedOrder
from distill.data.pictures import cut_picture, upright_size_of
from distill.data.prompts import read_prompts, read_sized_prompts
from distill.data.reader import open_store
from distill.data.record import BadSample, BadShard, StoreError
from distill.data.sizes import PRESETS, ImageSize, nearest, read_size, read_sizes
from distill.data.verify import add_checksums, verify_shard
from distill.data.writer import Solve
from distill.diffusion.random import generator
from distill.diffusion.trajectory import Batch, Pair, Trajectory
from tests.data.stores import PLAN, PROMPTS, files, states_of, teacher, write

SIZES = ("64x64", "96x48", "48x96")
PLANNED = replace(PLAN, sizes=SIZES, size_weights=(2.0, 1.0, 1.0), samples=23, samples_per_shard=7)


def sized(plan: StorePlan, asked: list[list[int]] | None = None) -> Solve:
    """The teacher of the tests, whose latents have an eighth of the images' sides."""

    def solve(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        (number,) = {plan.size_of(i) for i in indices}  # or the batch would be of several sizes
        if asked is not None:
            asked.append(list(indices))
        return teacher(plan, plan.image_sizes[number].shape(4, 8))(indices, prompts)

    return solve


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished store that nobody changes: 23 samples of three sizes in four shards."""
    return write(tmp_path_factory.mktemp("sizes") / "store", PLANNED, solve=sized(PLANNED))


# Sizes.


def test_sizes_are_written_width_first_and_published_lists_have_names() -> None:
    assert read_size("1152x896") == (896, 1152) and str(ImageSize(896, 1152)) == "1152x896"
    published = read_sizes("sdxl")
    assert len(published) == 41
    assert all(side % 64 == 0 for size in published for side in size)
    assert all(0.85 < size.pixels / 1024**2 < 1.05 for size in published)
    assert {size[::-1] for size in published} == set(published) and max(s.width / s.height for s in published) == 4
    assert read_sizes("768x512") == (ImageSize(512, 768),) and list(PRESETS) == ["sdxl"]


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("sd3", "'sd3' is no list of sizes"),
        (["1024"], "'1024' is no size: WIDTHxHEIGHT in pixels"),
        (["0x64"], "'0x64' is no size"),
        (["64x-64"], "is no size"),
        (["99999x8"], "a side has at most 65536"),
        (["64x64", "64x64"], "64x64 is among the sizes twice"),
        ([], "0 sizes; at least 1"),
    ],
)
def test_what_is_no_size_is_one_line(said: str | list[str], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        read_sizes(said)


def test_an_image_gets_the_size_of_which_least_is_cut() -> None:
    sizes = read_sizes("sdxl")
    chosen = [
        str(sizes[nearest(ImageSize(h, w), sizes)]) for h, w in ((1080, 1920), (1500, 1000), (999, 1000), (10, 99))
    ]
    assert chosen == ["1344x768", "832x1216", "1024x1024", "2048x512"]
    alike = read_sizes(["512x512", "1024x1024", "768x768"])
    assert [str(alike[nearest(ImageSize(n, n), alike)]) for n in (2000, 1000, 700, 9)] == [
        *("1024x1024", "768x768", "512x512", "512x512")
    ]


# Orders.


def orders_of(
    groups: dict[int, list[int]], world_size: int, changes: tuple[tuple[int, int], ...] = ()
) -> list[SizedOrder]:
    return [SizedOrder(5, groups, BatchShare(8, 2, rank, world_size, changes)) for rank in range(world_size)]


GROUPS = {0: list(range(40)), 2: list(range(40, 53)), 5: list(range(53, 56))}


@pytest.mark.parametrize("changes", [(), ((10, 4), (40, 16))])
def test_a_step_is_of_one_size_and_the_same_on_any_number_of_ranks(changes: tuple[tuple[int, int], ...]) -> None:
    size_of = {i: number for number, group in GROUPS.items() for i in group}
    taken: dict[int, list[list[int]]] = {}
    for world_size in (1, 2, 4):
        orders, taken[world_size] = orders_of(GROUPS, world_size, changes), []
        for step in range(120):
            shares = [(order, order.share) for order in orders]
            found = [
                order.index(position)
                for order, share in shares
                for micro in range(share.accumulation)
                for position in share.positions(step, micro)
            ]
            assert {size_of[i] for i in found} == {orders[0].size(step)}
            taken[world_size].append(found)
    assert taken[1] == taken[2] == taken[4]
    late = orders_of(GROUPS, 1, changes)[0]  # one that begins where a run is resumed
    first, samples = late.share.extent(77)
    assert [late.index(position) for position in range(first, first + samples)] == taken[1][77]


def test_every_sample_is_seen_equally_often_but_for_a_batch_of_its_size() -> None:
    order, seen, sizes = orders_of(GROUPS, 1)[0], Counter[int](), Counter[int]()
    for step in range(350):
        sizes[order.size(step)] += 1
        seen.update(order.index(position) for position in range(8 * step, 8 * step + 8))
        epochs = 8 * (step + 1) / 56
        for number, group in GROUPS.items():
            assert abs(8 * sizes[number] - epochs * len(group)) <= 8 * (1 + len(GROUPS) * len(group) / 56)
            assert max(seen[i] for i in group) - min(seen[i] for i in group) <= 1
    assert sum(sizes.values()) == 350 and set(sizes) == set(GROUPS)
    runs = [order.size(step) == order.size(step + 1) for step in range(349)]
    assert any(runs) and not all(runs)  # sizes come in no fixed turn


def test_orders_differ_by_seed_and_an_empty_size_is_refused() -> None:
    share = BatchShare(8, 8)
    found = {tuple(SizedOrder(seed, GROUPS, share).index(p) for p in range(64)) for seed in range(4)}
    assert len(found) == 4
    with pytest.raises(ValueError, match="at least 1 sample of every size"):
        SizedOrder(0, {0: [1], 1: []}, share)


# Stores.


def test_a_store_of_several_sizes_holds_what_its_plan_says(url: str) -> None:
    """Sample i is the one that a store of one size would have, at its own size; samples of a size lie together."""
    store = open_store(url)
    assert store.index.image_sizes == read_sizes(SIZES) and len(store) == 23
    groups = store.by_size()
    assert {number: list(map(int, group)) for number, group in groups.items()} == {
        number: [i for i in range(23) if PLANNED.size_of(i) == number] for number in range(3)
    }
    assert [len(groups[number]) for number in range(3)] == [15, 5, 3]
    for i in range(23):
        sample, shape = store.read(i, prompts=True), PLANNED.image_sizes[PLANNED.size_of(i)].shape(4, 8)
        assert torch.equal(sample.states, states_of(PLANNED, i, shape).half())
        assert sample.prompt == PROMPTS[i % len(PROMPTS)] and sample.conditioning["time_ids"][5] == i
        assert sample.guidance == pytest.approx(PLANNED.guidance_of(i))
    again = StoreIndex.from_json((Path(url) / INDEX).read_bytes())
    assert again == store.index and again.to_json() == (Path(url) / INDEX).read_bytes()
    reports = [verify_shard(store.folder, store.index, shard) for shard in store.index.shards]
    assert [(report.samples, report.problems) for report in reports] == [(7, ()), (7, ()), (7, ()), (2, ())]


def test_batches_are_solved_in_one_size_and_any_number_of_processes_writes_the_same(url: str, tmp_path: Path) -> None:
    asked: list[list[int]] = []
    for rank in (1, 0):
        write(tmp_path / "two", PLANNED, solve=sized(PLANNED, asked), rank=rank, world_size=2)
    assert files(tmp_path / "two") == files(url)
    assert sorted(i for batch in asked for i in batch) == list(range(23)) and max(map(len, asked)) == PLAN.batch_size


def test_a_store_of_several_sizes_grows_to_what_it_would_have_been(url: str, tmp_path: Path) -> None:
    """And a run that began on the smaller one has the same samples, in the same places."""
    smaller = replace(PLANNED, samples=17)
    write(tmp_path, smaller, solve=sized(smaller))
    before = [open_store(str(tmp_path)).read(i).key for i in range(17)]
    write(tmp_path, PLANNED, solve=sized(PLANNED))
    kept = {name: data for name, data in files(tmp_path).items() if name != "plan.json"}
    assert kept == {name: data for name, data in files(url).items() if name != "plan.json"}
    grown = open_store(str(tmp_path)).first(17)
    assert [grown.read(i).key for i in range(17)] == before
    assert sorted(int(i) for group in grown.by_size().values() for i in group) == list(range(17))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sizes": ("64x64", "96x48")}, r"size_weights are 3 numbers for 2 sizes"),
        ({"sizes": ("64x64", "96x48"), "size_weights": ()}, r"sizes is .*64x64"),
        ({"size_weights": (1.0, 1.0, 1.0)}, r"size_weights is \[2.0, 1.0, 1.0\] in the store"),
        ({"sizes": (), "size_weights": ()}, r"Set data.sizes, data.size_weights as it was"),
    ],
)
def test_another_list_of_sizes_is_another_store(
    change: dict[str, tuple[str, ...]], line: str, url: str, tmp_path: Path
) -> None:
    copied = tmp_path / "store"
    copied.mkdir()
    for name, data in files(url).items():
        (copied / name).write_bytes(data)
    with pytest.raises(StoreError, match=line):
        plan = replace(PLANNED, **change)  # type: ignore[arg-type]
        write(copied, plan, solve=sized(plan))
    assert files(copied) == files(url)


def test_a_teacher_that_solves_another_size_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the teacher gave states .* for images of (96x48|48x96) pixels"):
        write(tmp_path, PLANNED, solve=teacher(PLANNED))


def test_stores_of_one_square_say_nothing_of_sizes(tmp_path: Path) -> None:
    """Their files are what they have always been; what reads only those refuses the others by their schema."""
    write(tmp_path / "square")
    text = (tmp_path / "square" / INDEX).read_text() + (tmp_path / "square" / "plan.json").read_text()
    assert "size_weights" not in text and '"sizes"' not in text and '"schema": 1' in text
    write(tmp_path / "sized", PLANNED, solve=sized(PLANNED))
    assert json.loads((tmp_path / "sized" / INDEX).read_text())["schema"] == 2


def damage(folder: Path, edit: Callable[[dict[str, object]], object]) -> None:
    facts = json.loads((folder / INDEX).read_text())
    edit(facts)
    (folder / INDEX).write_text(json.dumps(facts))


DAMAGE: dict[str, Callable[[dict[str, object]], object]] = {
    "a size too few": lambda facts: facts["shards"][0].update(sizes="0 1"),  # type: ignore[index]
    "an unknown size": lambda facts: facts["shards"][0].update(sizes="0 1 0 9 1 0 0"),  # type: ignore[index]
    "no number": lambda facts: facts["shards"][0].update(sizes="a"),  # type: ignore[index]
    "sizes of another type": lambda facts: facts.update(sizes="64x64"),
    "a header of no size": lambda facts: facts["headers"].update({"8x8": facts["headers"]["64x64"]}),  # type: ignore[attr-defined, index]
    "a header that is missing": lambda facts: facts["headers"].pop("96x48"),  # type: ignore[attr-defined]
    "headers exchanged": lambda facts: facts["headers"].update({"64x64": facts["headers"]["96x48"]}),  # type: ignore[attr-defined, index]
    "no headers": lambda facts: facts.pop("headers"),
    "no weights": lambda facts: facts.update(size_weights=[1]),
}


@pytest.mark.parametrize("edit", DAMAGE.values(), ids=DAMAGE.keys())
def test_an_index_whose_sizes_make_no_sense_is_refused(
    edit: Callable[[dict[str, object]], object], url: str, tmp_path: Path
) -> None:
    for name, data in files(url).items():
        (tmp_path / name).write_bytes(data)
    damage(tmp_path, edit)
    with pytest.raises(StoreError):
        open_store(str(tmp_path))


def test_checksums_are_added_and_noticed_in_files_whose_samples_lie_by_size(url: str, tmp_path: Path) -> None:
    for name, data in files(url).items():
        if not name.endswith(".crc32"):
            (tmp_path / name).write_bytes(data)
    damage(tmp_path, lambda facts: [shard.pop("crc32") for shard in facts["shards"]])  # type: ignore[attr-defined]
    store = open_store(str(tmp_path))
    shards = [add_checksums(store.folder, store.index, shard)[1] for shard in store.index.shards]
    assert tuple(shards) == open_store(url).index.shards
    assert all((tmp_path / name).read_bytes() == data for name, data in files(url).items() if name.endswith(".crc32"))


def test_a_webdataset_of_several_sizes_has_every_sample_with_its_shape(url: str) -> None:
    store = open_store(url)
    found = {sample["index"]: sample for sample in as_webdataset(url)}
    assert sorted(found) == list(range(23))
    for i, sample in found.items():
        assert torch.equal(sample["states"], store.read(i).states)


# Batches.


def batches(url: str, rank: int, world_size: int, steps: int, **arguments: int) -> list[Batch]:
    share = 8 // world_size // 2  # micro-batches of 2
    loader = make_loader(
        *(open_store(url), lambda step: Pair(250)),
        **{
            "seed": 3,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "rank": rank,
            "world_size": world_size,
            **arguments,
        },  # type: ignore[arg-type]
    )
    return list(islice(loader, steps * share))


def rows_of(found: Sequence[Batch]) -> list[tuple[object, ...]]:
    return [
        (key, position, tuple(states.shape), states.double().sum().item(), tuple(times.tolist()))
        for batch in found
        for key, position, states, times in zip(batch.keys, batch.positions, batch.states, batch.times, strict=True)
    ]


def test_batches_are_the_same_on_ranks_workers_and_after_a_resume(url: str) -> None:
    steps = 12
    alone = batches(url, 0, 1, steps)
    assert len({batch.states.shape[-2:] for batch in alone}) == 3
    rows = rows_of(alone)
    for step in range(steps):
        assert len({row[2] for row in rows[8 * step : 8 * step + 8]}) == 1
    for world_size in (2, 4):
        ranks = [rows_of(batches(url, rank, world_size, steps, num_workers=rank % 3)) for rank in range(world_size)]
        of_rank = 8 // world_size
        together = [
            row for step in range(steps) for own in ranks for row in own[of_rank * step : of_rank * step + of_rank]
        ]
        assert together == rows
    resumed = rows_of(batches(url, 0, 1, steps - 5, start_step=5, num_workers=2))
    assert resumed == rows[8 * 5 :]


def test_a_rehearsal_is_of_the_largest_size_alone(tmp_path: Path) -> None:
    plan = replace(PLANNED, sizes=("64x64", "128x96"), size_weights=(5.0, 1.0))
    store = open_store(write(tmp_path, plan, solve=sized(plan)))
    order = order_of(store, 0, BatchShare(8, 8), largest=True)
    assert {store.size_of(order.index(position)) for position in range(80)} == {1}


def test_a_bad_sample_is_replaced_by_the_next_one_of_its_size(url: str, tmp_path: Path) -> None:
    for name, data in files(url).items():
        (tmp_path / name).write_bytes(data)
    whole = open_store(url)
    own = [int(i) for i in whole.by_size()[1]]
    bad = own[2]
    shard, line = whole.locate(bad)
    path, start = tmp_path / shard.name, int(shard.offsets.split()[line])
    data = bytearray(path.read_bytes())
    data[start + 20] ^= 1  # of its header
    path.write_bytes(data)
    store = open_store(str(tmp_path), max_bad_fraction=0.1)
    loader = make_loader(store, lambda step: Pair(250), seed=3, global_batch_size=4, micro_batch_size=4)
    sound = make_loader(whole, lambda step: Pair(250), seed=3, global_batch_size=4, micro_batch_size=4)
    replaced = 0
    for broken, good in islice(zip(loader, sound, strict=True), 30):
        assert broken.states.shape == good.states.shape
        for key, wanted in zip(broken.keys, good.keys, strict=True):
            replaced += key != wanted
            assert key == (whole.key(own[3]) if wanted == whole.key(bad) else wanted)
    assert replaced > 0 and list(loader.skipped) == [whole.key(bad)]
    with pytest.raises(BadSample):
        open_store(str(tmp_path)).read(bad)


# Prompts and pictures.


def test_prompts_may_have_the_sizes_of_their_images(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "width": 96, "height": 48},
        {"prompt": "", "width": 0},
        {"prompt": "b", "width": 64, "height": 64},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text("width,prompt,height\n96,a,48\n\n64,b,64\n")
    (tmp_path / "p.tsv").write_text("prompt\theight\twidth\na\t48\t96\nb\t64\t64\n")
    for name in ("p.jsonl", "p.json", "p.csv", "p.tsv"):
        assert read_sized_prompts(str(tmp_path / name)) == (["a", "b"], [ImageSize(48, 96), ImageSize(64, 64)])
        assert read_prompts(str(tmp_path / name)) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "p.jsonl",
            '{"prompt": "a", "width": 96, "height": 48}\n{"prompt": "b"}',
            "line 2: width and height are None and None",
        ),
        ("p.jsonl", '"a"', "line 1: width and height are None and None"),
        ("p.json", '[{"prompt": "a", "width": 9.5, "height": 48}]', "entry 1: width and height are 9.5 and 48"),
        ("p.csv", "prompt,width\na,64", "no column height"),
        ("p.csv", "prompt,width,height\na,64,wide", "line 2: width and height are 64 and wide"),
        ("p.txt", "a", r"p.txt have no sizes: columns width and height are read of .jsonl"),
    ],
)
def test_prompts_without_sizes_are_named(name: str, text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=line):
        read_sized_prompts(str(tmp_path / name))
    with pytest.raises(ValueError, match="written out have no sizes"):
        read_sized_prompts(["a"])


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    values = torch.randint(0, 256, (height, width, 3), generator=generator("picture", width, height), dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_pictures_are_listed_upright_and_too_small_for_their_size_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for name, data in {
        "a": jpeg(100, 50),
        "b": jpeg(100, 50, orientation=6),  # stands, and is stored lying
        "c": jpeg(95, 60),  # nearest to 96 x 48, of which it lacks a column
        "d": jpeg(70, 65),
    }.items():
        (source / f"{name}.jpg").write_bytes(data)
        (source / f"{name}.txt").write_text(name)
    assert upright_size_of(jpeg(100, 50, orientation=6)) == (50, 100)
    listing = list_pictures(str(source), str(tmp_path / "store"), Accept(0, sizes=SIZES))
    sizes = read_sizes(SIZES)
    found = {picture.caption: SIZES[nearest(picture.size_in_pixels, sizes)] for picture in listing.pictures}
    assert found == {"a": "96x48", "b": "48x96", "d": "64x64"}
    lines = [json.loads(line) for line in next((tmp_path / "store").glob("pictures-*.jsonl")).read_text().splitlines()]
    assert lines[0]["sizes"] == list(SIZES)
    assert [line["why"] for line in lines[1:] if "dropped" in line] == ["95 x 60 pixels, for 96x48"]
    with pytest.raises(StoreMismatch, match="sizes"):
        list_pictures(str(source), str(tmp_path / "store"), Accept(0, sizes=SIZES[:2]))


def test_a_picture_is_cut_to_its_size_and_says_where() -> None:
    """Resized to the least that covers the size, and cut in the middle or at random."""
    size = ImageSize(48, 96)
    cut = cut_picture(jpeg(200, 150), size)
    assert cut.pixels.shape == (3, 48, 96) and (cut.original, cut.corner) == ((150, 200), (12, 0))
    tall = cut_picture(jpeg(300, 100), size)
    assert (tall.original, tall.corner) == ((100, 300), (0, 24))
    corners = {cut_picture(jpeg(200, 150), size, generator("crop", i)).corner for i in range(40)}
    assert len(corners) > 10 and all(left == 0 and 0 <= top <= 24 for top, left in corners)


def test_samples_of_damaged_shards_are_named(url: str, tmp_path: Path) -> None:
    for name, data in files(url).items():
        (tmp_path / name).write_bytes(data)
    damage(tmp_path, lambda facts: facts["shards"][1].update(offsets="512 1024 9 9 9 9 9"))  # type: ignore[index]
    store = open_store(str(tmp_path))
    with pytest.raises(BadShard, match="outside its"):
        store.read(8)
