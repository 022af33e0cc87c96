"""A store that is asked for more samples than it has gets them, as if it had been written with so many at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from distill.data.index import INDEX, PLAN, StoreMismatch
from distill.data.reader import open_store
from distill.data.record import StoreError
from distill.data.writer import SKIPPED
from distill.diffusion.trajectory import Trajectory
from tests.data.stores import BAD, PICTURES, PROMPTS, files, in_processes, skipping, states_of, teacher, write
from tests.data.stores import PLAN as WHOLE
from tests.data.test_checksums import without_checksums
from tests.data.test_loader import loader, same

SMALL = replace(WHOLE, samples=8)  # two full shards of 4
LARGE = replace(WHOLE, samples=19)


def without_plan(found: dict[str, bytes]) -> dict[str, bytes]:
    """Files without the one that remembers how many samples there were before."""
    return {name: data for name, data in found.items() if name != PLAN}


@pytest.mark.parametrize("writers", [1, 2, 5])
def test_a_grown_store_is_one_that_was_written_at_once(tmp_path: Path, writers: int) -> None:
    write(tmp_path / "store", SMALL)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "store").glob("*.tar")}
    jobs = [partial(write, tmp_path / "store", LARGE, rank=r, world_size=writers) for r in range(writers)]
    assert in_processes(*jobs) == [0] * writers
    assert without_plan(files(tmp_path / "store")) == without_plan(files(write(tmp_path / "once", LARGE)))
    for name, (data, modified) in before.items():
        path = tmp_path / "store" / name
        assert path.read_bytes() == data and path.stat().st_mtime_ns == modified
    store = open_store(str(tmp_path / "store"))
    assert all(torch.equal(store.read(i).states, states_of(LARGE, i).half()) for i in range(19))


def test_only_what_is_missing_is_solved(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    solved: list[int] = []
    write(tmp_path, LARGE, solve=teacher(LARGE, solved=solved))
    assert solved == list(range(8, 19))
    write(tmp_path, replace(LARGE, samples=24), solve=teacher(LARGE, solved=solved))
    assert solved[11:] == list(range(16, 24))  # the last shard, which was not full, once more
    assert len(open_store(str(tmp_path))) == 24


@pytest.mark.parametrize("old", ["checksums", "notes"])
def test_stores_of_before_they_could_grow_do(tmp_path: Path, old: str) -> None:
    """Their notes name the plan with its number of samples."""
    write(tmp_path / "store", SMALL)
    without_checksums(tmp_path / "store")
    digest = open_store(str(tmp_path / "store"))
    plan = replace(SMALL, **{k: getattr(digest.index, k) for k in ("prompts_sha256", "unconditional_sha256")})
    for note in (tmp_path / "store").glob("shard-*.json"):
        facts = json.loads(note.read_text())
        note.write_text(json.dumps(facts | {"plan": plan.digest()}))
    solved: list[int] = []
    for samples in (12, 16):
        write(tmp_path / "store", replace(LARGE, samples=samples), solve=teacher(LARGE, solved=solved))
    assert solved == list(range(8, 16))
    store = open_store(str(tmp_path / "store"))
    assert [bool(shard.crc32) for shard in store.index.shards] == [False, False, True, True]
    assert all(torch.equal(store.read(i).states, states_of(LARGE, i).half()) for i in range(16))


def test_a_store_that_does_not_say_what_its_teacher_computed_in_grows_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "store", SMALL)
    assert "teacher_dtype" not in (tmp_path / "store" / INDEX).read_text()
    write(tmp_path / "store", replace(LARGE, teacher_dtype="float16"))
    assert "does not record teacher_dtype, and continues without" in caplog.text
    assert without_plan(files(tmp_path / "store")) == without_plan(files(write(tmp_path / "once", LARGE)))


def test_a_store_keeps_what_its_teacher_computed_in(tmp_path: Path) -> None:
    write(tmp_path, replace(SMALL, teacher_dtype="float16"))
    assert open_store(str(tmp_path)).index.teacher_dtype == "float16"
    with pytest.raises(StoreMismatch, match=r"teacher_dtype is 'float16' in the store and 'float32' in the run"):
        write(tmp_path, replace(LARGE, teacher_dtype="float32"))
    write(tmp_path, replace(LARGE, teacher_dtype="float16"))
    assert len(open_store(str(tmp_path))) == 19


def test_a_store_stays_what_it_was_until_it_has_grown(tmp_path: Path) -> None:
    """A writer that is killed, or fails, leaves a store that can be trained on; and one that was asked for."""
    write(tmp_path, SMALL)

    def stops(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        if indices[0] >= 14:
            raise KeyboardInterrupt
        return teacher(LARGE)(indices, prompts)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, LARGE, solve=stops)
    assert (tmp_path / "shard-000002.tar").exists()
    store = open_store(str(tmp_path))
    assert len(store) == store.index.samples == 8 and store.index.complete
    write(tmp_path, LARGE)
    assert len(open_store(str(tmp_path))) == 19


def test_a_last_shard_that_was_not_full_is_written_anew(store_url: str, copy: Path, tmp_path: Path) -> None:
    """Meanwhile the store is unfinished, and says so."""
    in_processes(partial(write, copy, LARGE), fault="write shard-000003.tar.tmp:1")
    with pytest.raises(StoreError, match="is unfinished: 3 of 5 shards"):
        open_store(str(copy))
    write(copy, LARGE)
    assert without_plan(files(copy)) == without_plan(files(write(tmp_path / "once", LARGE)))
    for name in ("shard-000000.tar", "shard-000001.tar"):
        assert (copy / name).read_bytes() == (Path(store_url) / name).read_bytes()


@pytest.mark.parametrize("writers", [1, 3])
def test_so_is_an_only_shard_that_was_not_full(tmp_path: Path, writers: int) -> None:
    small, large = (replace(WHOLE, samples=n, samples_per_shard=10) for n in (3, 25))
    write(tmp_path / "store", small)
    jobs = [partial(write, tmp_path / "store", large, rank=r, world_size=writers) for r in range(writers)]
    assert in_processes(*jobs) == [0] * writers
    assert without_plan(files(tmp_path / "store")) == without_plan(files(write(tmp_path / "once", large)))


def test_what_makes_the_old_samples_must_stay(copy: Path) -> None:
    before = files(copy)
    with pytest.raises(StoreMismatch, match="seed is 11 in the store and 12 in the run. Set seed as it was") as error:
        write(copy, replace(LARGE, seed=12))
    assert "samples" not in str(error.value)
    with pytest.raises(StoreMismatch, match=r"prompts_sha256.*Set data.prompts \(the same texts"):
        write(copy, LARGE, prompts=[*PROMPTS, "one more"])
    with pytest.raises(StoreMismatch, match="samples is 11 in .* 8 in the run: .*grow, not shrink.*num_samples=11"):
        write(copy, SMALL)
    assert files(copy) == before


def test_pictures_grow_with_what_is_skipped(tmp_path: Path, pictures_url: str) -> None:
    plan, captions = replace(PICTURES, samples=8), [PROMPTS[i % len(PROMPTS)] for i in range(11)]
    bad = [i for i in BAD if i < 8]
    write(tmp_path / "store", plan, solve=skipping(plan, bad), prompts=captions[:8])
    assert len((tmp_path / "store" / SKIPPED).read_text().splitlines()) == len(bad)
    write(tmp_path / "store", PICTURES, solve=skipping(PICTURES, BAD), prompts=captions)
    once = write(tmp_path / "once", PICTURES, solve=skipping(PICTURES, BAD), prompts=captions)
    assert without_plan(files(tmp_path / "store")) == without_plan(files(once))
    assert open_store(str(tmp_path / "store")).read(1).key == open_store(pictures_url).read(1).key


def test_a_run_goes_on_with_the_samples_it_began_with(tmp_path: Path) -> None:
    """Their number decides the order of data: the batches of a run are the same before and after."""
    write(tmp_path, SMALL)
    expected = list(islice(loader(open_store(str(tmp_path))), 12))
    write(tmp_path, LARGE)
    store = open_store(str(tmp_path))
    assert all(same(a, b) for a, b in zip(expected, loader(store.first(8)), strict=False))
    assert not all(same(a, b) for a, b in zip(expected, loader(store), strict=False))
    with pytest.raises(StoreError, match="19 samples, fewer than 20"):
        store.first(20)


def test_an_unfinished_store_may_be_asked_for_more(tmp_path: Path) -> None:
    in_processes(partial(write, tmp_path / "store", SMALL), fault="write shard-000001.tar.tmp:1")
    write(tmp_path / "store", LARGE)
    assert without_plan(files(tmp_path / "store")) == without_plan(files(write(tmp_path / "once", LARGE)))


def test_the_index_of_a_copy_is_enough(tmp_path: Path) -> None:
    """A store that was copied without its notes opens, grown or not."""
    write(tmp_path / "store", SMALL)
    write(tmp_path / "store", LARGE)
    copied = Path(shutil.copytree(tmp_path / "store", tmp_path / "copied"))
    for note in copied.glob("shard-*.json"):
        note.unlink()
    (copied / PLAN).unlink()
    assert len(open_store(str(copied))) == 19 and (copied / INDEX).exists()
