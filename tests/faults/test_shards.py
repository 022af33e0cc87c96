"""Stores that are damaged, incomplete, poisoned or another run's, as training meets them: in one process and on ranks.

The ranks are real processes of scripts/train.py. What stops one of them stops all, with the shard's or key's name.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from distill.data import tar
from distill.data.errors import AGAIN
from distill.data.images import Accept, list_pictures
from distill.data.index import INDEX, UNCONDITIONAL, StoreIndex
from distill.data.order import Order
from distill.data.prompts import read_prompts
from distill.data.reader import open_store
from distill.data.record import GUIDANCE, STATES, BadSample, BadShard, StoreError, make_key
from distill.data.verify import verify_shard
from distill.training.checkpoint import MANIFEST, _digest, _write_manifest
from tests.data.stores import PLAN, states_of, write
from tests.data.test_loader import Everything, loader
from tests.data.test_reader import CHANGED, DAMAGED_JSON, RESIZED, cut, edit, sample_5, states_5
from tests.faults.conftest import Outcome
from tests.faults.runs import BATCH, STEPS, Runs, errors
from tests.tiny import save_tiny
from tests.training.test_checkpoint import Bomb

Fault = Callable[[int, str], Outcome]
BROKEN = "a shard cut, overwritten, exchanged or with flipped bits"
UNREADABLE = "a read error, for a moment or for good"
MISSING = "a shard missing"
NUMBERS = "a sample with numbers that are not finite"
UNEVEN = "uneven shards, or fewer than ranks"
PICKLED = "a poisoned pickle"
OTHER = "a store of another teacher, schedule, guidance or grid"

FLIPPED: dict[str, Callable[[Path], None]] = {
    "a bit among the states": lambda f: flip(f, states_5(f) + 700),
    "a bit of the text": lambda f: flip(f, states_5(f) - 100),
    "a shard of another store of the same size": lambda f: other_shard(f),
}
UNREAD: dict[str, Callable[[Path], None]] = {  # which only a hash of the whole shard finds
    "a bit of the padding": lambda f: flip(f, sample_5(f) - 1),
    "a bit of the prompt": lambda f: flip(f, sample_5(f) - 512 + 30),
}
CUT = {
    **RESIZED,
    "cut in the middle of the file": lambda f: cut(f, (f / "shard-000001.tar").stat().st_size // 2),
    "cut in a header": lambda f: cut(f, sample_5(f) + 100),
    "without its end mark": lambda f: cut(f, (f / "shard-000001.tar").stat().st_size - len(tar.END)),
}
LOST = {
    "cut to nothing": [4, 5, 6, 7],
    "cut in the middle of the file": [6, 7],
    "longer": [],
    "without its end mark": [],
    "a shard of another store of the same size": [4, 5, 6, 7],
}


def flip(folder: Path, at: int) -> None:
    byte = (folder / "shard-000001.tar").read_bytes()[at]
    edit(folder, at, bytes([byte ^ 4]))


def other_shard(folder: Path) -> None:
    write(folder.parent / "other", replace(PLAN, seed=12))
    shutil.copy(folder.parent / "other/shard-000001.tar", folder)


# ---- row 6 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*CHANGED, *CUT, *FLIPPED, *UNREAD, *DAMAGED_JSON])
def test_damage_stops_the_run_with_the_name_of_the_shard(copy: Path, kind: str, fault: Fault) -> None:
    (CHANGED | CUT | FLIPPED | UNREAD | DAMAGED_JSON)[kind](copy)
    start = time.monotonic()
    with pytest.raises(BadShard, match="shard-000001.tar") as error:
        store = open_store(str(copy), verify_sha256=kind in UNREAD)
        reader = loader(store, reads=Everything(), prompts=kind in DAMAGED_JSON)
        list(islice(reader, 8))
    assert "\n" not in str(error.value)
    fault(6, BROKEN).tried(seconds=time.monotonic() - start)


@pytest.mark.parametrize(
    ("kind", "world_size", "num_workers"),
    [*((kind, ranks, 0) for kind in [*CHANGED, *CUT, *FLIPPED] for ranks in (1, 2)), ("cut in a payload", 1, 2)],
)
def test_losses_that_are_allowed_are_counted_and_the_rest_is_whole(
    copy: Path, caplog: pytest.LogCaptureFixture, kind: str, world_size: int, num_workers: int, fault: Fault
) -> None:
    """Damage to a shard costs its damaged samples and no others; seen and skipped are the whole index."""
    (CHANGED | CUT | FLIPPED)[kind](copy)
    lost = LOST.get(kind, [5, 6, 7] if kind in CUT else [5])
    lost_keys = {make_key(i // 4, i % 4) for i in lost}
    store = open_store(str(copy), max_bad_fraction=0.4)  # 4 of 11
    with caplog.at_level(logging.WARNING):
        loaders = [
            loader(store, 22, 11, Everything(), rank=rank, world_size=world_size, num_workers=num_workers)
            for rank in range(world_size)
        ]
        batches = [batch for each in loaders for batch in islice(each, 2 // world_size)]
    skipped = set().union(*(each.skipped for each in loaders))
    seen = {key for batch in batches for key in batch.keys}
    assert skipped == lost_keys
    assert seen == {make_key(i // 4, i % 4) for i in range(11)} - lost_keys
    assert all(key in caplog.text for key in lost_keys)
    for batch in batches:
        assert len(batch) == 11
        for b, key in enumerate(batch.keys):
            i = 4 * int(key[:6]) + int(key[7:])
            assert torch.equal(batch.states[b], states_of(PLAN, i).half())
    fault(6, BROKEN).tried(samples_lost=11 - len(seen | skipped))


@pytest.mark.distributed
def test_what_rank_1_alone_finds_damaged_stops_both_and_nothing_is_lost(
    runs: Runs, tmp_path: Path, fault: Fault
) -> None:
    """One flipped bit in the sample of its fourth step: both end, saved after the third. Allowed, it is replaced."""
    sample = Order(seed=0, samples=12).index(2 * 3 + 1)  # nobody else's, in these steps
    store, run = copied(runs, tmp_path), tmp_path / "run"
    layout = index_of(store).layout
    for k in range(layout.tensors[STATES].shape[0]):  # whichever of them the method draws
        flip_of(store, sample, 512 + layout.start(STATES) + k * layout.state_bytes + 7)
    ended = runs.run(run, ranks=2, more=[f"data.store={store}"])
    assert ended.codes == [2, 2], ended.said[-3000:]
    (line,) = [said for said in errors(ended.said) if "shard-" in said]
    assert f"000000-{sample:06d} in shard-000000.tar" in line and "allowed: 0" in line and "saved at step 3" in line
    assert (run / "checkpoints/step-00000003").is_dir()
    ended = runs.run(run, ranks=2, more=[f"data.store={store}", "data.max_bad_fraction=0.1"])
    assert ended.codes == [0, 0], ended.said[-3000:]
    lines = [said for said in ended.said.splitlines() if "skipped sample" in said]
    assert 1 <= len(lines) <= 2  # the training says so, and the loss on some of its samples at validations
    for line in lines:
        assert "[1] WARNING" in line and f"000000-{sample:06d} in shard-000000.tar" in line
        assert "(1 of 1 allowed)" in line
    fault(6, BROKEN).tried(seconds=ended.seconds)


@pytest.mark.distributed
@pytest.mark.parametrize("more", [["data.max_bad_fraction=0.5"], pytest.param([], marks=pytest.mark.faults)])
def test_what_rank_1_alone_cannot_read_is_not_damage(runs: Runs, tmp_path: Path, more: list[str], fault: Fault) -> None:
    """However much damage is allowed: both save and end to be run again, which then differs in no bit."""
    run, start = tmp_path / "run", time.monotonic()
    unreadable = [{"do": "unreadable", "rank": 1, "batch": batch} for batch in (1, 2, 3, 4)]  # in each of its processes
    ended = runs.run(run, ranks=2, faults=unreadable, more=[*more, "data.read_retry_seconds=0.3"])
    assert ended.codes == [AGAIN, AGAIN], ended.said[-3000:]
    (line,) = errors(ended.said)
    assert "shard-000000.tar cannot be read: [Errno 5] Input/output error" in line
    assert "skipped sample" not in ended.said
    runs.goes_on(run, ranks=2, more=more)
    lost, differ = runs.difference(run, ranks=2)
    assert (lost, differ) == (0, 0)
    fault(6, UNREADABLE).tried(seconds=time.monotonic() - start, samples_lost=lost, bits_different=differ)


def test_a_read_error_that_passes_is_not_noticed_in_a_run(runs: Runs, tmp_path: Path, fault: Fault) -> None:
    run = tmp_path / "run"
    ended = runs.run(run, faults=[{"do": "unreadable", "rank": 0, "batch": 3, "for": 2}])
    assert ended.codes == [0], ended.said[-3000:]
    assert "cannot be read ([Errno 5]" in ended.said and "is read again, after" in ended.said
    lost, differ = runs.difference(run)
    assert (lost, differ) == (0, 0)
    fault(6, UNREADABLE).tried(samples_lost=lost, bits_different=differ)


def test_a_run_on_a_store_that_has_grown_goes_on_as_it_began(runs: Runs, tmp_path: Path, fault: Fault) -> None:
    """Stopped after 4 of 8 steps, of which an epoch has 6; then the store has twice as many samples; then it has 6."""
    run, given = tmp_path / "run", [f"data.store={tmp_path}/store", "data.samples_per_shard=12"]
    assert runs.ranks.run([*runs.settings(run), *given], script="make_trajectories").codes == [0]
    ended = runs.run(run, faults=[{"do": "SIGTERM", "rank": 0, "step": 3}], more=given)
    assert ended.codes == [AGAIN], ended.said[-3000:]
    grow = [*runs.settings(run), *given, "data.num_samples=24"]
    ended = runs.ranks.run(grow, script="make_trajectories")
    assert ended.codes == [0] and len(open_store(str(tmp_path / "store"))) == 24, ended.said[-3000:]
    smaller = Path(shutil.copytree(run, tmp_path / "smaller"))
    _, ended = runs.goes_on(run, more=given)
    assert "the store has grown to 24 samples: this run continues with the first 12" in ended.said
    lost, differ = runs.difference(run)
    assert (lost, differ) == (0, 0)
    fault(14, UNEVEN).tried(samples_lost=lost, bits_different=differ)
    few = [*runs.settings(smaller), given[1], f"data.store={tmp_path}/few", "data.num_samples=6"]
    assert runs.ranks.run(few, script="make_trajectories").codes == [0]
    ended = runs.ranks.run(few)
    (line,) = errors(ended.said)
    assert ended.codes == [2] and "has 6 samples and had 12 when the run began" in line


# ---- row 7 --------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("more", [[], pytest.param(["data.max_bad_fraction=0.5"], marks=pytest.mark.faults)])
def test_a_missing_shard_stops_all_ranks_at_the_start(
    runs: Runs, tmp_path: Path, more: list[str], fault: Fault
) -> None:
    store = copied(runs, tmp_path)
    (store / "shard-000000.tar").unlink()
    ended = runs.run(tmp_path / "run", ranks=2, more=[f"data.store={store}", *more])
    assert 2 in ended.codes and set(ended.codes) <= {2, -15}  # the second is told to end, if it has not seen it yet
    lines = errors(ended.said)
    assert lines and all(f"shard-000000.tar of {store} is missing" in line for line in lines)
    assert not (tmp_path / "run").exists()
    fault(7, MISSING).tried(seconds=ended.seconds)


# ---- row 9 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["first state", "last state", GUIDANCE, "conditioning.time_ids"])
def test_numbers_that_are_not_finite_are_refused_with_their_key(
    copy: Path, part: str, value: float, fault: Fault
) -> None:
    layout = open_store(str(copy)).index.layout
    spec = layout.tensors[STATES if "state" in part else part]
    at = spec.end - 2 if part == "last state" else spec.begin
    edit(copy, sample_5(copy) + 512 + len(layout.header) + at, struct.pack("<e" if "state" in part else "<f", value))
    with pytest.raises(BadSample, match="sample 000001-000001 in shard-000001.tar .*not finite"):
        open_store(str(copy)).read(5)
    fault(9, NUMBERS).tried()


@pytest.mark.faults
@pytest.mark.distributed
def test_ranks_stop_at_a_latent_that_is_not_finite(runs: Runs, tmp_path: Path, fault: Fault) -> None:
    store = copied(runs, tmp_path)
    layout = index_of(store).layout
    for k in range(layout.tensors[STATES].shape[0]):  # whichever of them the method draws
        overwrite(store, 7, 512 + layout.start(STATES) + k * layout.state_bytes, struct.pack("<e", float("nan")))
    ended = runs.run(tmp_path / "run", ranks=2, more=[f"data.store={store}"])
    assert all(ended.codes)
    assert any("000000-000007" in line and "not finite" in line for line in errors(ended.said)), ended.said[-3000:]
    fault(9, NUMBERS).tried(seconds=ended.seconds)


# ---- row 14 -------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("per_shard", [5, pytest.param(12, marks=pytest.mark.faults)])
def test_ranks_take_the_same_steps_over_any_shards(runs: Runs, tmp_path: Path, per_shard: int, fault: Fault) -> None:
    """One shard for two ranks, and shards of 5, 5 and 2: every step is taken by both, over an epoch's end."""
    given = [f"data.store={tmp_path}/store", f"data.samples_per_shard={per_shard}"]
    ended = runs.ranks.run([*runs.settings(tmp_path / "run"), *given], script="make_trajectories")
    assert ended.codes == [0], ended.said
    assert [shard.samples for shard in index_of(tmp_path / "store").shards] == ([12] if per_shard == 12 else [5, 5, 2])
    ended = runs.run(tmp_path / "run", ranks=2, more=given)
    assert ended.codes == [0, 0], ended.said[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1)) and STEPS * BATCH > 12
    fault(14, UNEVEN).tried(seconds=ended.seconds)


# ---- row 15 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["payload", "header", "JSON", "the shard", INDEX, UNCONDITIONAL])
def test_a_poisoned_pickle_in_a_store_is_not_executed(copy: Path, tmp_path: Path, place: str, fault: Fault) -> None:
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    size = index_of(copy).layout.payload_bytes
    at = {"header": 0, "payload": 512, "JSON": 2 * 512 + size + tar.padding(size)}
    if place in at:
        edit(copy, sample_5(copy) + at[place], bomb)
    else:
        (copy / ("shard-000001.tar" if place == "the shard" else place)).write_bytes(bomb)
    try:
        store = open_store(str(copy), max_bad_fraction=0.5)
        assert any(isinstance(x, BadSample) for x in store.read_many([(i, (0,)) for i in range(11)], prompts=True))
        assert any(verify_shard(store.folder, store.index, shard).problems for shard in store.index.shards)
    except StoreError:
        assert place in (INDEX, UNCONDITIONAL)
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # the bomb was live
    fault(15, PICKLED).tried()


def test_a_poisoned_pickle_among_pictures_is_not_executed(tmp_path: Path, fault: Fault) -> None:
    """`webdataset` would unpickle `.pyd` and `.pickle` of its own accord."""
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    members = [tar.member(f"a.{ending}", bomb) for ending in ("pyd", "pickle", "pth", "jpg", "json", "txt")]
    (tmp_path / "a.tar").write_bytes(b"".join(members) + tar.END)
    with pytest.raises(StoreError, match="caption unreadable: 1|header unreadable: 1"):
        list_pictures(str(tmp_path / "a.tar"), str(tmp_path / "store"), Accept(8))
    with pytest.raises(ValueError, match="prompts in"):
        read_prompts(str(tmp_path / "a.tar"))
    assert not marker.exists()
    fault(15, PICKLED).tried()


@pytest.mark.distributed
def test_a_poisoned_checkpoint_is_not_executed(runs: Runs, tmp_path: Path, fault: Fault) -> None:
    """Not even one that somebody sealed with the poison in it: the run goes on from the one before."""
    marker, run = tmp_path / "executed", Path(shutil.copytree(runs.undisturbed(), tmp_path / "run"))
    newest = max((run / "checkpoints").glob("step-*"))
    (file,) = newest.rglob("optimizer*.pt")
    (run / "DONE").unlink()
    file.write_bytes(pickle.dumps(Bomb(marker)))
    manifest = json.loads((newest / MANIFEST).read_text())
    del manifest["seal"]
    manifest["files"][str(file.relative_to(newest))] = _digest(file)
    _write_manifest(newest, manifest)
    ended = runs.run(run)
    assert ended.codes == [0] and not marker.exists(), ended.said
    assert f"{file.name} is not a file of torch's" in ended.said
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the bomb was live
    fault(15, PICKLED).tried()


# ---- row 18 -------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_store_of_another_kind_is_refused_with_both_values(runs: Runs, tmp_path: Path, fault: Fault) -> None:
    """One line each, before anything is trained; on two ranks as on one."""
    teacher = save_tiny(tmp_path / "other", "sd15", seed=1)
    scheduled = save_tiny(tmp_path / "scheduled", "sd15")
    config = Path(scheduled) / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    plan = index_of(runs.store)
    path = "model.pretrained_model_name_or_path"
    tries = {
        "data.guidance=3": ["guidance is 7.5 in the store and 3.0 in the run; set data.guidance=7.5,"],
        "data.solver_steps=16": ["solver_steps is 8 in the store and 16 in the run; set data.solver_steps=8,"],
        f"{path}={teacher}": [f"teacher_hash is {plan.teacher_hash!r} in the store and '"],
        f"{path}={scheduled}": [f"schedule_fingerprint is {plan.schedule_fingerprint!r} in the store and '"],
        "method.skip=50": ["skip 50", "1000, 875"],
    }
    for number, (override, words) in enumerate(tries.items()):
        ended = runs.run(tmp_path / "run", ranks=1 + number % 2, more=[override])
        lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
        assert 2 in ended.codes and set(ended.codes) <= {2, -15} and lines, ended.said[-3000:]
        assert all(word in line for word in words for line in lines)
        assert not (tmp_path / "run/checkpoints").exists()
        fault(18, OTHER).tried(seconds=ended.seconds)


def copied(runs: Runs, folder: Path) -> Path:
    return Path(shutil.copytree(runs.store, folder / "store"))


def index_of(store: Path) -> StoreIndex:
    return StoreIndex.from_json((store / INDEX).read_bytes())


def flip_of(store: Path, sample: int, at: int) -> None:
    """A bit of the first shard, counted from the tar header of one of its samples."""
    at += int(index_of(store).shards[0].offsets.split()[sample]) - tar.BLOCK
    byte = (store / "shard-000000.tar").read_bytes()[at]
    edit(store, at, bytes([byte ^ 1]), "shard-000000.tar")


def overwrite(store: Path, sample: int, at: int, data: bytes) -> None:
    """Bytes of the first shard, counted from the tar header of one of its samples."""
    start = int(index_of(store).shards[0].offsets.split()[sample]) - tar.BLOCK
    edit(store, start + at, data, "shard-000000.tar")
