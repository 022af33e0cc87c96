"""Memory of batches is used again, and never while anyone holds a tensor in it."""

from __future__ import annotations

import gc
from itertools import islice

import pytest
import torch

from distill.data import memory
from distill.data.memory import HUGE_PAGE, LEAST_BYTES, Recycled, rounded
from distill.data.reader import open_store
from distill.diffusion.trajectory import Batch
from tests.data.test_loader import Everything, loader, same


@pytest.mark.parametrize("size", [LEAST_BYTES + 6, HUGE_PAGE + 10])
def test_memory_is_used_again_once_no_view_of_it_is_held(size: int) -> None:
    memory = Recycled()
    first = memory(size)
    assert (first.shape, first.dtype) == ((size,), torch.uint8)
    first.fill_(1)
    place, view = first.data_ptr(), first[2:6].view(torch.float16).view(2, 1)[1:]
    expected = view.clone()
    del first
    second = memory(size)
    assert second.data_ptr() != place and second.data_ptr() % 64 == 0
    second.fill_(2)
    assert torch.equal(view, expected)
    del view
    assert memory(size).data_ptr() == place


def test_nearly_equal_sizes_share_their_memory() -> None:
    """As those of images of one area do."""
    memory = Recycled()
    place = memory(2 * 4 * 152 * 104 * 4).data_ptr()
    assert memory(2 * 4 * 160 * 96 * 4).data_ptr() == place
    for size in (LEAST_BYTES, LEAST_BYTES + 1, 3 * HUGE_PAGE - 1, 10**9 + 7):
        assert size <= rounded(size) <= 1.25 * size + 4096


def test_little_memory_is_torchs_own() -> None:
    assert [len(Recycled()(size)) for size in (0, 1, LEAST_BYTES - 1)] == [0, 1, LEAST_BYTES - 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_that_are_held_stay_what_they_were(
    store_url: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ones, and one tensor of others; those that are dropped give their memory to later ones."""
    monkeypatch.setattr(memory, "LEAST_BYTES", 1)
    store = open_store(store_url)
    expected = [copied(batch) for batch in islice(loader(store, reads=Everything()), 40)]
    batches, whole, states, places = iter(loader(store, reads=Everything(), num_workers=num_workers)), [], [], set()
    for n, batch in enumerate(islice(batches, 40)):
        places.add(batch.states.data_ptr())
        if n % 13 == 0:
            whole.append((n, batch))
        elif n % 13 == 1:
            states.append((n, batch.states[1]))
        del batch
        gc.collect(0)
    batches.close()
    assert all(same(batch, expected[n]) for n, batch in whole)
    assert all(torch.equal(x, expected[n].states[1]) for n, x in states)
    assert len(places) <= len(whole) + len(states) + 2 * num_workers + num_workers + 3 < 40


def copied(batch: Batch) -> Batch:
    return Batch(
        batch.states.clone(),
        batch.times.clone(),
        {name: x.clone() for name, x in batch.conditioning.items()},
        {name: x.clone() for name, x in batch.unconditional.items()},
        batch.guidance.clone(),
        batch.keys,
        batch.positions,
    )
