"""What is read is what was written, to the bit: each way of putting other bytes in their place is noticed."""

from __future__ import annotations

import json
import logging
import random
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from distill.data.checksums import checksums_name
from distill.data.index import INDEX
from distill.data.reader import Store, open_store
from distill.data.record import BadSample, BadShard, Sample
from distill.data.verify import verify_shard
from tests.data.stores import BAD, PICTURES, PLAN, skipping, states_of, write
from tests.data.test_loader import Everything, loader
from tests.data.test_reader import edit, sample_5, states_5

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "verify_shards.py"
ALL = tuple(range(len(PLAN.times)))


def read_all(store: Store, states: tuple[int, ...] = ALL, prompts: bool = True) -> list[Sample | BadSample]:
    return store.read_many([(i, states) for i in range(len(store))], prompts)


def bad_of(store: Store, states: tuple[int, ...] = ALL) -> list[int]:
    return [i for i, sample in enumerate(read_all(store, states)) if isinstance(sample, BadSample)]


def test_any_flipped_bit_of_what_is_read_is_noticed(copy: Path) -> None:
    """Bits at random of a whole shard: sample by sample, either one is bad or nothing that was read has changed."""
    rng, shard = random.Random(0), copy / "shard-000001.tar"
    whole, right = shard.read_bytes(), read_all(open_store(str(copy)))
    store, noticed = open_store(str(copy)), 0
    for _ in range(100):
        at = rng.randrange(len(whole))
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        found = read_all(store)
        bad = [i for i, sample in enumerate(found) if isinstance(sample, BadSample)]
        assert len(bad) <= 1 and set(bad) <= {4, 5, 6, 7}
        noticed += len(bad)
        for i, (now, before) in enumerate(zip(found, right, strict=True)):
            if i not in bad:
                assert isinstance(now, Sample) and isinstance(before, Sample) and now.prompt == before.prompt
                assert torch.equal(now.states, before.states) and now.guidance == before.guidance
    assert noticed > 85  # the others are in the padding


@pytest.mark.parametrize("where", ["head", "state 2", "JSON"])
def test_only_what_is_read_is_checked_and_the_part_is_named(copy: Path, where: str) -> None:
    layout = open_store(str(copy)).index.layout
    if where == "JSON":  # a letter of the prompt, which stays JSON of its sample
        data = (copy / "shard-000001.tar").read_bytes()
        at = data.index(b'"prompt": "', sample_5(copy)) + len(b'"prompt": "')
    else:
        text = sample_5(copy) + 512 + layout.start("conditioning.encoder_hidden_states")
        at = states_5(copy) + 2 * layout.state_bytes if "state" in where else text
    byte = (copy / "shard-000001.tar").read_bytes()[at]
    edit(copy, at, bytes([byte ^ 1]))
    store = open_store(str(copy))
    (said,) = [str(found) for found in read_all(store) if isinstance(found, BadSample)]
    named = {"head": "text, times or guidance", "state 2": "state 2", "JSON": "JSON"}[where]
    assert said.startswith("sample 000001-000001 in shard-000001.tar of ") and f"its {named} is not" in said
    assert isinstance(store.read_many([(5, (0, 3))])[0], BadSample) == (where == "head")


def test_a_shard_of_another_store_in_its_place_is_noticed(copy: Path, tmp_path: Path) -> None:
    """Of the same size, with the same keys; with its checksums or without."""
    write(tmp_path / "other", replace(PLAN, seed=12))
    name = "shard-000001.tar"
    assert (tmp_path / "other" / name).stat().st_size == (copy / name).stat().st_size
    shutil.copy(tmp_path / "other" / name, copy)
    assert bad_of(open_store(str(copy))) == [4, 5, 6, 7]
    shutil.copy(tmp_path / "other" / checksums_name(name), copy)
    assert bad_of(open_store(str(copy))) == [4, 5, 6, 7]


def test_shards_and_samples_that_changed_places_are_noticed(copy: Path) -> None:
    one, two = copy / "shard-000000.tar", copy / "shard-000001.tar"
    size = min(one.stat().st_size, two.stat().st_size)
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b[:size] + a[size:])
    two.write_bytes(a[:size] + b[size:])
    assert set(range(8)) - set(bad_of(open_store(str(copy)))) <= {3, 7}  # the last ones lie where sizes differ
    one.write_bytes(a)
    payload = open_store(str(copy)).index.layout.payload_bytes
    first, second = (int(x) for x in open_store(str(copy)).index.shards[1].offsets.split()[:2])
    moved = bytearray(b)
    moved[first : first + payload], moved[second : second + payload] = b[second : second + payload], b[first:][:payload]
    two.write_bytes(moved)  # each under the other's key
    assert bad_of(open_store(str(copy)), (0,)) == [4, 5]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_bit_ends_the_iteration_or_costs_its_sample(copy: Path, num_workers: int) -> None:
    edit(copy, states_5(copy) + 1, bytes([(copy / "shard-000001.tar").read_bytes()[states_5(copy) + 1] ^ 0x04]))
    with pytest.raises(BadSample, match="sample 000001-000001 in shard-000001.tar .*checksum.*allowed: 0"):
        list(islice(loader(open_store(str(copy)), reads=Everything(), num_workers=num_workers), 8))
    tolerant = loader(open_store(str(copy), max_bad_fraction=0.1), 11, 11, Everything(), num_workers=num_workers)
    batch = next(iter(tolerant))
    assert list(tolerant.skipped) == ["000001-000001"]
    for key, states in zip(batch.keys, batch.states, strict=True):
        assert torch.equal(states, states_of(PLAN, 4 * int(key[:6]) + int(key[7:])).half())


def test_rows_of_a_store_too_large_to_keep_them_are_read_one_by_one(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.data.reader.MOST_KEPT_BYTES", 0)
    assert bad_of(open_store(str(copy))) == []
    edit(copy, states_5(copy) + 3, b"\x12")
    assert bad_of(open_store(str(copy))) == [5]


def test_pictures_are_checked_around_empty_places(pictures_url: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures_url, tmp_path / "store"))
    assert not any(isinstance(x, BadSample) for x in read_all(open_store(str(folder)), (0,)))
    shard = folder / "shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[int(open_store(str(folder)).index.shards[2].offsets.split()[1]) + 700] ^= 1
    shard.write_bytes(data)
    assert bad_of(open_store(str(folder)), (0,)) == [4]  # the second of two that it holds
    assert write(folder, PICTURES, solve=skipping(PICTURES, BAD))


@pytest.mark.parametrize("change", ["missing", "shorter", "other"])
def test_checksums_that_are_lost_are_named_with_what_makes_them_anew(
    copy: Path, change: str, verify: Callable[..., tuple[int, str]]
) -> None:
    file = copy / "shard-000001.crc32"
    data = file.read_bytes()
    file.unlink() if change == "missing" else file.write_bytes(data[:-4] if change == "shorter" else b"\0" + data[1:])
    with pytest.raises(BadShard, match="shard-000001.*add_checksums=true"):
        open_store(str(copy)).read(4)
    status, said = verify(copy)
    assert status == 1 and "shard-000001.crc32" in said and "add_checksums=true" in said
    assert verify(copy, "add_checksums=true")[0] == 0
    assert file.read_bytes() == data and bad_of(open_store(str(copy))) == []


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the script: its exit status and what it says."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify_shards.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        said = capsys.readouterr()
        return int(str(exit.value.code)), said.out + said.err

    return run


def without_checksums(folder: Path) -> Path:
    """The store as earlier versions wrote it."""
    for file in folder.glob("*.crc32"):
        file.unlink()
    for file in (folder / INDEX, *folder.glob("shard-*.json")):
        facts = json.loads(file.read_text())
        for shard in facts.get("shards", [facts]):
            shard.pop("crc32", None)
        file.write_text(json.dumps(facts))
    return folder


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_store_without_checksums_opens_and_says_once_how_to_add_them(
    copy: Path, store_url: str, caplog: pytest.LogCaptureFixture, verify: Callable[..., tuple[int, str]]
) -> None:
    without_checksums(copy)
    store = open_store(str(copy))
    assert caplog.text.count(f"distill verify {copy} add_checksums=true") == 1 and "3 of 3 shards" in caplog.text
    assert torch.equal(store.read(5).states, states_of(PLAN, 5).half())
    status, said = verify(copy, "add_checksums=true")
    assert status == 0 and "3 shards" in said
    caplog.clear()
    assert bad_of(open_store(str(copy))) == [] and not warnings_of(caplog)
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in Path(store_url).iterdir())
    for file in copy.glob("*.crc32"):
        assert file.read_bytes() == (Path(store_url) / file.name).read_bytes()
    write(copy)  # a writer that comes again leaves them
    assert bad_of(open_store(str(copy))) == [] and not warnings_of(caplog)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_said_to_be_so(copy: Path, checksums: bool, value: float) -> None:
    """With checksums, which fit finite values alone, and without."""
    if not checksums:
        without_checksums(copy)
    layout = open_store(str(copy)).index.layout
    edit(copy, states_5(copy) + 3 * layout.state_bytes, torch.tensor(value, dtype=torch.float16).numpy().tobytes())
    store = open_store(str(copy))
    assert bad_of(store, (0, 1, 2, 4)) == []
    with pytest.raises(BadSample, match="sample 000001-000001 in shard-000001.tar of .*: state 3 has values that are"):
        store.read(5, (1, 3))


def test_checksums_are_not_made_of_what_is_damaged(copy: Path, verify: Callable[..., tuple[int, str]]) -> None:
    """Or they would vouch for it."""
    without_checksums(copy)
    edit(copy, states_5(copy) + 1, b"\x12")
    status, said = verify(copy, "add_checksums=true")
    assert status == 1 and "shard-000001.tar: sha256" in said
    store = open_store(str(copy))
    assert [bool(shard.crc32) for shard in store.index.shards] == [True, False, True]
    assert verify_shard(store.folder, store.index, store.index.shards[1]).problems
