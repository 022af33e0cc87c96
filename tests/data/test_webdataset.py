"""A store read by WebDataset gives what our own reader gives: whole, in order, or shuffled and cut over workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from distill.data.as_webdataset import as_webdataset
from distill.data.reader import open_store
from distill.data.record import StoreError
from tests.data.stores import write


def test_its_samples_are_those_of_the_store(tmp_path: Path) -> None:
    write(tmp_path)
    store, found = open_store(str(tmp_path)), list(as_webdataset(str(tmp_path)))
    assert len(found) == len(store)
    for i, sample in enumerate(found):
        own = store.read(i, prompts=True)
        assert (sample["__key__"], sample["index"], sample["prompt"]) == (own.key, i, own.prompt)
        assert torch.equal(sample["states"], own.states) and torch.equal(sample["times"], own.times)
        assert sample["guidance"] == pytest.approx(own.guidance)
        assert sample["conditioning"].keys() == own.conditioning.keys()
        assert all(torch.equal(sample["conditioning"][name], value) for name, value in own.conditioning.items())


def test_workers_share_its_shards_and_shuffling_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    keys = [sample["__key__"] for sample in as_webdataset(str(tmp_path))]
    loader = DataLoader(as_webdataset(str(tmp_path)), batch_size=None, num_workers=2)
    assert sorted(sample["__key__"] for sample in loader) == sorted(keys)
    shuffled = [sample["__key__"] for sample in as_webdataset(str(tmp_path), shuffle=100)]
    assert sorted(shuffled) == sorted(keys) and shuffled != keys


def test_no_store_and_a_remote_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no trajectory store at"):
        as_webdataset(str(tmp_path))
    write("memory://far/store")
    with pytest.raises(StoreError, match="is remote"):
        as_webdataset("memory://far/store")
