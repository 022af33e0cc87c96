"""Order and batches: a pure function of the seed and the position, whatever ranks and workers there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from distill.data.errors import ReadError
from distill.data.index import INDEX
from distill.data.loader import Loader, make_loader
from distill.data.order import BatchShare, Order
from distill.data.reader import Store, open_store
from distill.data.record import BadSample, make_key
from distill.diffusion.random import generator
from distill.diffusion.trajectory import Batch, CleanEnd, Pair, Reads
from tests.data.stores import BAD, PICTURES, PLAN, PROMPTS, UNCONDITIONAL, states_of, write
from tests.data.test_reader import CHANGED, DAMAGED_JSON, RESIZED

READS = Pair(250)


class Everything:
    """Reads all states, so that no damage among them is passed over."""

    def check(self, times: Sequence[int]) -> None:
        pass

    def pick(self, times: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
        return tuple(range(len(times)))


def loader(store: Store, global_batch: int = 8, micro_batch: int = 2, reads: Reads = READS, **arguments: int) -> Loader:
    return make_loader(
        store, lambda step: reads, seed=3, global_batch_size=global_batch, micro_batch_size=micro_batch, **arguments
    )


def same(a: Batch, b: Batch) -> bool:
    tensors = [(a.states, b.states), (a.times, b.times), (a.guidance, b.guidance)]
    tensors += [(x, b.conditioning[name]) for name, x in a.conditioning.items()]
    tensors += [(x, b.unconditional[name]) for name, x in a.unconditional.items()]
    return (a.keys, a.positions) == (b.keys, b.positions) and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("samples", [1, 2, 11, 1000])
def test_every_sample_once_an_epoch(samples: int) -> None:
    order = Order(seed=0, samples=samples)
    for epoch in range(3):
        assert sorted(order.index(epoch * samples + slot) for slot in range(samples)) == list(range(samples))


def test_orders_differ_by_seed_and_epoch_and_by_nothing_else() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [Order(seed, 50).index(number * 50 + slot) for slot in range(50)]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_orders_are_uniform() -> None:
    """Each of 4 samples stands first in a quarter of 2000 epochs: 500 ± 5 standard deviations of 19.4."""
    first = [Order(1, 4).index(4 * epoch) for epoch in range(2000)]
    assert all(abs(first.count(i) - 500) < 97 for i in range(4))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_shares_partition_every_step(world_size: int, micro_batch: int) -> None:
    shares = [BatchShare(8, micro_batch, rank, world_size) for rank in range(world_size)]
    for step in range(3):
        taken = [p for share in shares for i in range(share.accumulation) for p in share.positions(step, i)]
        assert taken == list(range(8 * step, 8 * step + 8))


def test_pictures_are_read_once_an_epoch_around_empty_places(pictures_url: str) -> None:
    """The clean latents of those that could be read, each its own; and no pair to be had of them."""
    store = open_store(pictures_url)
    batches = list(islice(loader(store, 5, 5, CleanEnd()), 2))
    good = [i for i in range(PICTURES.samples) if i not in BAD]
    for batch in batches:
        assert sorted(batch.keys) == [make_key(i // 4, i % 4) for i in good]
        for key, states, times in zip(batch.keys, batch.states, batch.times, strict=True):
            shard, place = map(int, key.split("-"))
            assert torch.equal(states, states_of(PICTURES, 4 * shard + place).half()) and times.tolist() == [0]
    with pytest.raises(ValueError, match=r"off the stored grid: no two of \[0\]"):
        loader(store)


@pytest.mark.parametrize("batches", [(8, 3, 0, 1), (8, 4, 0, 4), (0, 1, 0, 1), (8, 0, 0, 1)])
def test_batches_that_do_not_divide(batches: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"global_batch_size {batches[0]} must be a multiple of .* {batches[1]} x"):
        BatchShare(*batches)


def test_a_rank_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="rank must be within 0 ... 1, got 2"):
        BatchShare(8, 2, 2, 2)


def test_a_batch_holds_what_is_stored(store_url: str) -> None:
    """Two epochs of 11 samples in batches of 8: the states picked for a position are those of the sample there."""
    store, seen = open_store(store_url), []
    for batch in islice(loader(store, 8, 4), 6):
        assert (batch.states.shape, batch.times.shape) == ((4, 2, 4, 8, 8), (4, 2))
        for b, (key, position) in enumerate(zip(batch.keys, batch.positions, strict=True)):
            shard, row = map(int, key.split("-"))
            i = 4 * shard + row
            assert i == Order(3, 11).index(position)
            places = READS.pick(PLAN.times, generator(3, "read", position))
            assert batch.times[b].tolist() == [PLAN.times[k] for k in places]
            assert torch.equal(batch.states[b], states_of(PLAN, i).half()[list(places)])
            assert batch.guidance[b].item() == pytest.approx(PLAN.guidance_of(i))
            assert batch.conditioning["time_ids"][b, 5] == i
            seen.append(i)
        empty = batch.unconditional
        assert torch.equal(empty["encoder_hidden_states"][2:3], UNCONDITIONAL["encoder_hidden_states"])
        assert torch.equal(empty["time_ids"], batch.conditioning["time_ids"])  # none of its own
    assert sorted(seen[:11]) == sorted(seen[11:22]) == list(range(11))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prompts_are_loaded_when_asked_for(store_url: str, num_workers: int) -> None:
    store = open_store(store_url)
    for told, plain in islice(zip(loader(store, prompts=True, num_workers=num_workers), loader(store), strict=True), 6):
        assert told.prompts == tuple(PROMPTS[(4 * int(key[:6]) + int(key[7:])) % 5] for key in told.keys)
        assert plain.prompts == plain.next_prompts == () and same(told, plain)


@pytest.mark.parametrize(("micro_batch", "world_size"), [(8, 1), (4, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("damaged", [False, True])
def test_the_next_prompt_is_the_next_samples_of_the_step_on_any_number_of_ranks(
    copy: Path, micro_batch: int, world_size: int, damaged: bool
) -> None:
    """Steps of 8, over the end of an epoch of 11; a sample whose prompt is lost is replaced as the next one, too."""
    if damaged:
        DAMAGED_JSON["not JSON"](copy)
    store = open_store(str(copy), max_bad_fraction=0.1)
    ranks = [loader(store, 8, micro_batch, prompts=True, rank=r, world_size=world_size) for r in range(world_size)]
    streams = [iter(each) for each in ranks]
    for _ in range(3):
        batches = [next(stream) for stream in streams for _ in range(8 // micro_batch // world_size)]
        prompts = [p for batch in batches for p in batch.prompts]
        assert [p for batch in batches for p in batch.next_prompts] == [*prompts[1:], prompts[0]]
    assert len(prompts) == 8 and len(set(prompts)) > 2


def test_a_sample_whose_prompt_is_lost_is_replaced(copy: Path) -> None:
    DAMAGED_JSON["not JSON"](copy)
    store = open_store(str(copy), max_bad_fraction=0.1)
    asked, plain = loader(store, 11, 11, prompts=True), loader(store, 11, 11)
    batch = next(iter(asked))
    assert list(asked.skipped) == ["000001-000001"] and len(batch.prompts) == 11
    next(iter(plain))
    assert not plain.skipped


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches(store_url: str, world_size: int) -> None:
    """Micro-batches of 2 on 1, 2, 4 ranks: of each step the same ones, in the same order, by rank."""
    store, steps = open_store(store_url), 3
    alone = list(islice(loader(store), 4 * steps))
    per_rank = 4 // world_size
    ranks = [
        list(islice(loader(store, rank=rank, world_size=world_size), per_rank * steps)) for rank in range(world_size)
    ]
    together = [
        ranks[r][per_rank * step + i] for step in range(steps) for r in range(world_size) for i in range(per_rank)
    ]
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_workers_change_nothing(store_url: str) -> None:
    store = open_store(store_url)
    assert all(same(a, b) for a, b in islice(zip(loader(store), loader(store, num_workers=2), strict=True), 9))


@pytest.mark.parametrize("start", [1, 2, 5])
def test_a_resumed_run_continues_where_it_was(store_url: str, start: int) -> None:
    """Steps of 4 micro-batches, across the end of an epoch."""
    store = open_store(store_url)
    whole = list(islice(loader(store), 4 * (start + 1)))
    resumed = list(islice(loader(store, start_step=start), 4))
    assert all(same(a, b) for a, b in zip(whole[4 * start :], resumed, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_generator_is_left_alone(store_url: str, num_workers: int) -> None:
    before = torch.get_rng_state()
    next(iter(loader(open_store(store_url), num_workers=num_workers)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_stores_load_alike(store_url: str, num_workers: int) -> None:
    remote = open_store(write("memory://loader/store"))
    pairs = zip(loader(open_store(store_url)), loader(remote, num_workers=num_workers), strict=True)
    assert all(same(a, b) for a, b in islice(pairs, 5))


def test_reads_that_the_store_cannot_serve(store_url: str) -> None:
    with pytest.raises(ValueError, match="skip 20"):
        make_loader(open_store(store_url), lambda step: Pair(20), seed=0, global_batch_size=2, micro_batch_size=2)


# Bad samples


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["zeroed header", "not a number"])
def test_a_bad_sample_stops_the_run(copy: Path, kind: str, num_workers: int) -> None:
    CHANGED[kind](copy)
    with pytest.raises(BadSample, match="000001-000001 in shard-000001.tar.*allowed: 0") as error:
        for _ in islice(loader(open_store(str(copy)), reads=Everything(), num_workers=num_workers), 8):
            pass
    assert "\n" not in str(error.value)


def test_replacements_are_the_same_on_any_number_of_ranks(copy: Path) -> None:
    CHANGED["zeroed header"](copy)
    store = open_store(str(copy), max_bad_fraction=0.2)
    alone = [key for batch in islice(loader(store, 12, 3), 4) for key in batch.keys]
    two = [key for rank in (0, 1) for b in islice(loader(store, 12, 3, rank=rank, world_size=2), 2) for key in b.keys]
    assert alone == two


def test_more_losses_than_allowed_stop_the_run(copy: Path) -> None:
    RESIZED["cut at a member boundary"](copy)  # loses 3 of 11
    with pytest.raises(BadSample, match="3 bad of 11, allowed: 2"):
        for _ in islice(loader(open_store(str(copy), max_bad_fraction=0.2), 11, 11), 1):
            pass


def test_a_shard_that_goes_missing_later_stops_the_run(copy: Path) -> None:
    """And is not taken for damage, which might be allowed: it may be there again in a moment."""
    store = open_store(str(copy), max_bad_fraction=0.9, retry_seconds=0)
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(ReadError, match=r"shard-000002.tar cannot be read: \[Errno 2\]"):
        list(islice(loader(store), 8))


def test_clean_ends_come_from_a_store_of_one_state(tmp_path: Path) -> None:
    plan = replace(PLAN, times=(0,))
    store = open_store(write(tmp_path, plan))
    batch = next(iter(make_loader(store, lambda step: CleanEnd(), seed=0, global_batch_size=3, micro_batch_size=3)))
    assert batch.states.shape == (3, 1, 4, 8, 8) and not batch.times.any()


def test_a_store_of_ten_million_is_opened_without_reading_its_offsets(copy: Path) -> None:
    """Nonsense among the offsets of a shard is noticed when that shard is read, so it was not parsed before."""
    index = (copy / INDEX).read_text()
    (copy / INDEX).write_text(index.replace('"offsets": "512 ', '"offsets": "nonsense ', 1))
    store = open_store(str(copy))
    store.read(4)
    with pytest.raises(BadSample, match="not numbers"):
        store.read(0)
