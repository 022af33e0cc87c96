"""The local cache of a remote store: what is in it is right or not used, and it is bounded, whoever dies meanwhile."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from distill.benchmarks.range_server import start
from distill.data.cache import ReadCache, name_of
from distill.data.reader import Store, open_store
from distill.data.record import StoreError
from tests.data.stores import PLAN, in_processes, states_of
from tests.servers import Proxy, proxy

GIB = 2.0**-30
MANY = 1.0


class Cached(NamedTuple):
    url: str
    between: Proxy
    folder: Path

    def open(self) -> Store:
        return open_store(self.url, cache=str(self.folder), cache_gib=MANY, retry_seconds=0, timeout_seconds=5)

    def entries(self) -> list[Path]:
        return sorted(self.folder.glob("parts/??/*"))


@pytest.fixture
def cached(store_url: str, tmp_path: Path) -> Iterator[Cached]:
    shutil.copytree(store_url, tmp_path / "store")
    server = start(tmp_path)
    with proxy(server.server_address[1]) as between:
        yield Cached(f"http://127.0.0.1:{between.port}/store", between, tmp_path / "cache")
    server.shutdown()


def read_all(store: Store, states: tuple[int, ...] = (0, 3, 1)) -> None:
    for i, found in enumerate(store.read_many([(i, states) for i in range(len(store))], prompts=True)):
        assert not isinstance(found, Exception), found
        assert torch.equal(found.states, states_of(PLAN, i).half()[list(states)])


def test_what_was_read_is_not_fetched_again_by_any_process(cached: Cached) -> None:
    read_all(cached.open())
    store = cached.open()
    store.read(0), store.read(4), store.read(8)  # the checksums of shards, which are kept in memory
    before = cached.between.requests
    read_all(store)
    read_all(store, (1,))
    assert in_processes(partial(read_all, store, (3, 0)), partial(read_all, store.apart())) == [0, 0]
    assert cached.between.requests == before
    cached.between.away = True
    read_all(store)


def flipped(path: Path, data: bytes) -> None:
    path.write_bytes(data[:40] + bytes([data[40] ^ 16]) + data[41:])


def longer(path: Path, data: bytes) -> None:
    path.write_bytes(data + b"\0")


def poisoned(path: Path, data: bytes) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
            return os.system, (f"touch {path.parent.parent.parent / 'ran'}",)

    path.write_bytes(pickle.dumps(Evil()))


DAMAGE: dict[str, Callable[[Path, bytes], object]] = {
    "a bit": flipped,
    "cut": lambda path, data: path.write_bytes(data[:-1]),
    "empty": lambda path, data: path.write_bytes(b""),
    "longer": longer,
    "pickle": poisoned,
    "folder": lambda path, data: (path.unlink(), path.mkdir()),
    "may not be read": lambda path, data: path.chmod(0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_fetched_anew(cached: Cached, damage: str) -> None:
    read_all(cached.open())
    before = {path: path.read_bytes() for path in cached.entries()}
    for path, data in before.items():
        DAMAGE[damage](path, data)
    for _ in range(2):
        read_all(cached.open())
    if damage != "folder":
        assert {path: path.read_bytes() for path in cached.entries()} == before
    assert not (cached.folder / "ran").exists()


def test_an_entry_with_other_content_is_found_by_the_checksums_of_the_store(cached: Cached) -> None:
    """Each holds what another one of its size should, well sealed."""
    store = cached.open()
    read_all(store)
    assert store.cache is not None
    names = [path.name for path in cached.entries()]
    whole = {name: (cached.folder / "parts" / name[:2] / name).read_bytes()[16:] for name in names}
    for name, data in whole.items():
        other = next((one for key, one in whole.items() if len(one) == len(data) and one != data), data)
        store.cache.add(name, [memoryview(other)])
    before = cached.between.requests
    read_all(cached.open())
    assert cached.between.requests > before
    read_all(cached.open())
    assert {path.name: path.read_bytes()[16:] for path in cached.entries()} == whole


LIMIT = 100 * 4096


def added(folder: Path, seed: int, entries: int, pause: float = 0.0, limit: int = LIMIT) -> None:
    cache = ReadCache(folder, limit * GIB)
    for n in range(entries):
        data = random.Random(seed * 1000 + n).randbytes(4000)
        cache.add(name_of("shard", f"{seed}", n, 4000), [memoryview(data)])
        time.sleep(pause)


def total(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.glob("parts/??/*"))


def test_it_stays_within_its_limit_and_keeps_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes add twice what there is room for; one entry of the first is used all the while."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cache = ReadCache(tmp_path, LIMIT * GIB)
    kept, data = name_of("kept", "", 0, 5), bytearray(b"12345")
    cache.add(kept, [memoryview(data)])
    for turn in range(8):
        jobs = [partial(added, tmp_path, 2 * turn + rank, 15) for rank in range(2)]
        assert in_processes(*jobs) == [0, 0]
        assert turn < 4 or LIMIT // 2 < total(tmp_path)
        assert total(tmp_path) <= LIMIT
        buffer = bytearray(5)
        assert cache.fill(kept, [memoryview(buffer)]) and buffer == data
    assert cache.fill(name_of("shard", "15", 14, 4000), [memoryview(bytearray(4000))])
    assert not cache.fill(name_of("shard", "0", 0, 4000), [memoryview(bytearray(4000))])
    ReadCache(tmp_path, LIMIT // 10 * GIB)  # a smaller limit holds at once
    assert total(tmp_path) <= LIMIT // 10


def test_processes_that_are_killed_leave_nothing_that_is_not_whole(tmp_path: Path) -> None:
    for seed in range(6):
        child = os.fork()
        if child == 0:
            added(tmp_path, seed, 10**6, 0.0005, 4 * LIMIT)
        time.sleep(0.05 + 0.01 * seed)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    cache, there = ReadCache(tmp_path, 4 * LIMIT * GIB), 0
    for seed in range(6):
        for n in range(400):
            buffer = bytearray(4000)
            if cache.fill(name_of("shard", f"{seed}", n, 4000), [memoryview(buffer)]):
                there += 1
                assert buffer == random.Random(seed * 1000 + n).randbytes(4000)
    assert there > 20 and list((tmp_path / "staging").iterdir()) == []


def test_a_cache_that_takes_no_more_is_one_warning(cached: Cached, caplog: pytest.LogCaptureFixture) -> None:
    store = cached.open()
    shutil.rmtree(cached.folder / "staging")
    (cached.folder / "staging").write_text("no folder")
    for _ in range(3):
        read_all(store)
    assert caplog.text.count("takes no more ([Errno 20]") == 1 and cached.entries() == []


def test_a_cache_that_cannot_be_made_is_one_line(cached: Cached, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"^data.cache=.*/file/x cannot be used: \[Errno 20\] Not a directory$"):
        open_store(cached.url, cache=str(tmp_path / "file/x"))


def test_a_local_store_has_none(store_url: str, tmp_path: Path) -> None:
    open_store(store_url, cache=str(tmp_path / "cache")).read(0)
    assert not (tmp_path / "cache").exists()
