"""A store that the first version of this package wrote is opened, checked, read and grows.

`first_version.tar.gz` holds its very bytes: the code of the commit "The trajectory store: deterministic writer, planned
reads, …" wrote three samples of `stores.PLAN` with states [5, 4, 2, 2]. Its index says nothing of pictures, of the
dtypes of teacher and text, of a shift, of sizes, of empty prompts or of checksums.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.data.index import INDEX, LATER, OF_PICTURES, OF_SIZES, PLAN_FIELDS, StoreMismatch
from distill.data.reader import Store, open_store
from distill.data.verify import verify_shard
from tests.data.stores import PLAN, PROMPTS, UNCONDITIONAL, embedding_of, states_of, teacher, write

WRITTEN = replace(PLAN, samples=3, samples_per_shard=2)
SHAPE = (4, 2, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).with_name("first_version.tar.gz")) as archive:
        archive.extractall(tmp_path / "store", filter="data")
    return tmp_path / "store"


def assert_holds(store: Store, samples: int) -> None:
    assert len(store) == store.index.samples == samples and store.index.complete
    assert torch.equal(store.unconditional["encoder_hidden_states"], UNCONDITIONAL["encoder_hidden_states"])
    for i in range(samples):
        sample = store.read(i)
        assert torch.equal(sample.states, states_of(WRITTEN, i, SHAPE).half())
        assert tuple(sample.times.tolist()) == PLAN.times
        assert float(sample.guidance) == pytest.approx(WRITTEN.guidance_of(i))
        assert torch.equal(sample.conditioning["encoder_hidden_states"], embedding_of(PROMPTS[i % len(PROMPTS)]))


def test_a_store_of_the_first_version_is_read_and_whole(folder: Path) -> None:
    said = json.loads((folder / INDEX).read_text())
    assert not said.keys() & {*LATER, *OF_PICTURES, *OF_SIZES} and all("crc32" not in s for s in said["shards"])
    store = open_store(str(folder))
    assert_holds(store, 3)
    assert [verify_shard(store.folder, store.index, shard).problems for shard in store.index.shards] == [(), ()]


def test_a_run_may_require_of_it_what_it_says_and_no_noise_levels_of_flow_matching(folder: Path) -> None:
    index = open_store(str(folder)).index
    assert (index.kind, index.teacher_dtype, index.text_dtype, index.shift) == ("trajectories", "", "", 0.0)
    index.require(**{name: getattr(WRITTEN, name) for name in PLAN_FIELDS if not name.endswith("_sha256")})
    with pytest.raises(StoreMismatch, match="shift is 0.0 in the store and 3.0 in the run"):
        index.require(shift=3.0)


def test_more_samples_are_added_to_it(folder: Path) -> None:
    before = (folder / "shard-000000.tar").read_bytes()
    more = replace(WRITTEN, samples=6)
    solved: list[int] = []
    write(folder, more, solve=teacher(more, SHAPE, solved))
    assert (folder / "shard-000000.tar").read_bytes() == before and min(solved) >= 2  # the first shard is left alone
    assert_holds(open_store(str(folder)), 6)
