"""Files that cannot be read for a moment, or for longer; few open files; no hard links; and power that is cut."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from distill.data import retries, storage
from distill.data.errors import ReadError
from distill.data.reader import open_store
from distill.data.record import StoreError
from distill.data.storage import Folder, make_folder
from tests.data.stores import PLAN, files, in_processes, states_of, whole_shards, write
from tests.data.test_loader import loader
from tests.durability import Disk

TRANSIENT = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ENOENT, errno.EACCES]


class Fails:
    """A function that fails at some of its calls, counted from 1, with an error."""

    def __init__(self, real: Callable[..., Any], error: Callable[[], Exception], calls: range) -> None:
        self.real, self.error, self.calls, self.count = real, error, calls, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise self.error()
        return self.real(*args, **kwargs)


def of_number(number: int) -> Callable[[], OSError]:
    return lambda: OSError(number, os.strerror(number))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)


@pytest.mark.parametrize("number", TRANSIENT, ids=errno.errorcode.get)
@pytest.mark.parametrize("tries", [1, 3])
def test_a_read_that_fails_for_a_moment_is_tried_again(
    copy: Path, number: int, tries: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost, nothing replaced, and two lines say so."""
    store = open_store(str(copy), max_bad_fraction=0.9)
    fails = Fails(os.preadv, of_number(number), range(2, 2 + tries))
    monkeypatch.setattr(os, "preadv", fails)
    for i, found in enumerate(store.read_many([(i, (0, 4)) for i in range(11)])):
        assert not isinstance(found, Exception)
        assert torch.equal(found.states, states_of(PLAN, i).half()[[0, 4]])
    assert fails.count > 11 + tries
    assert caplog.text.count(f"cannot be read ([Errno {number}]") == 1 and "is read again, after" in caplog.text


def test_pauses_grow_and_end(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 0.01, 0.02, 0.04 … s, and half of that at least; then one line names file, errno and tries."""
    store, pauses = open_store(str(copy), max_bad_fraction=0.9, retry_seconds=0.3), []
    monkeypatch.setattr(os, "preadv", Fails(os.preadv, of_number(errno.EIO), range(1, 10**6)))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (pauses.append(seconds), sleep(seconds)))
    with pytest.raises(ReadError, match=r"shard-00000\d.tar cannot be read: \[Errno 5\] .*\(\d+ tries in 0 s") as error:
        store.read(5)
    assert "\n" not in str(error.value) and sum(pauses) < 0.4
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, (0.01, 0.02, 0.04, 0.08), strict=False))
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_sample_that_cannot_be_read_is_never_replaced(
    copy: Path, num_workers: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever may be damaged, on whichever rank; from a worker it comes as one line."""
    store = open_store(str(copy), max_bad_fraction=0.9, retry_seconds=0.05)
    monkeypatch.setattr(os, "preadv", Fails(os.preadv, of_number(errno.EIO), range(8, 10**6)))
    batches = loader(store, rank=rank, world_size=2, num_workers=num_workers)
    with pytest.raises(ReadError, match=r"cannot be read: \[Errno 5\]") as error:
        list(islice(batches, 30))
    assert "\n" not in str(error.value) and not batches.skipped


def test_a_stale_handle_is_opened_anew(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS has them after a server's restart: every read through it fails, however often."""
    store = open_store(str(copy))
    store.read(0)
    stale, preadv = {file.fileno() for file in store.folder._open.values()}, os.preadv

    def fails(descriptor: int, *args: Any) -> int:
        if descriptor in stale:
            stale.discard(descriptor)
            raise OSError(errno.ESTALE, "Stale file handle")
        return preadv(descriptor, *args)

    monkeypatch.setattr(os, "preadv", fails)
    assert torch.equal(store.read(1).states, states_of(PLAN, 1).half())


def test_the_index_too(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, listed = Path.read_bytes, Path.iterdir
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads(self))
    monkeypatch.setattr(Path, "iterdir", lambda self: lists(self))
    reads, lists = Fails(read, of_number(errno.EIO), range(1, 3)), Fails(listed, of_number(errno.ESTALE), range(1, 2))
    assert len(open_store(str(copy))) == 11
    reads = Fails(read, of_number(errno.EIO), range(1, 10**6))
    with pytest.raises(ReadError, match="index.json cannot be read"):
        open_store(str(copy), retry_seconds=0.02)


class UnsteadyFileSystem(MemoryFileSystem):
    """Memory behind a network that fails, with errors that are not the operating system's."""

    protocol = "unsteady"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    failures = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if UnsteadyFileSystem.failures > 0:
            UnsteadyFileSystem.failures -= 1
            raise RuntimeError("503 Slow Down")
        return super().cat_file(path, start, end, **kwargs)


fsspec.register_implementation("unsteady", UnsteadyFileSystem, clobber=True)


def test_remote_reads_are_tried_again(tmp_path: Path) -> None:
    url = write(f"unsteady:/{tmp_path}/store")
    UnsteadyFileSystem.failures = 2
    store = open_store(url, retry_seconds=5)
    UnsteadyFileSystem.failures = 5
    assert torch.equal(store.read(5).states, states_of(PLAN, 5).half())
    UnsteadyFileSystem.failures = 10**6
    store.folder.retry_seconds = 0.02
    with pytest.raises(ReadError, match="shard-000001.tar cannot be read: RuntimeError: 503 Slow Down"):
        store.read(5)
    UnsteadyFileSystem.failures = 0


def test_few_files_may_be_open(tmp_path: Path) -> None:
    """A soft limit of 24: 40 shards with their checksums are read all the same, and none is taken for damaged."""
    write(tmp_path / "store", replace(PLAN, samples=40, samples_per_shard=1))
    assert in_processes(partial(_read_with_few_files, tmp_path / "store")) == [0]


def _read_with_few_files(folder: Path) -> None:
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 5, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    store = open_store(str(folder), max_bad_fraction=0.5, retry_seconds=0)
    for _ in range(2):
        for i, found in enumerate(store.read_many([(i, (0,)) for i in range(40)])):
            assert not isinstance(found, Exception) and torch.equal(found.states[0], states_of(PLAN, i).half()[0])
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(held + 5 - len(os.listdir("/proc/self/fd")))]
    store.read(7)  # others have taken all that was left, if anything was
    del spare


def test_without_hard_links_the_first_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    jobs = [partial(_publish_one, tmp_path, n) for n in range(8)]
    assert in_processes(*jobs) == [0] * 8
    text = (tmp_path / "name").read_text()
    assert len(set(text)) == 1 and len(text) == 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    write(tmp_path / "store")
    assert len(open_store(str(tmp_path / "store"))) == 11


def _publish_one(folder: Path, number: int) -> None:
    Folder(folder).publish_first("name", str(number).encode() * 100_000)
    first = (folder / "name").read_bytes()
    time.sleep(0.05)
    Folder(folder).publish_first("name", b"later")
    assert (folder / "name").read_bytes() == first


def test_a_claim_whose_maker_was_killed_is_waited_for_and_then_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", Fails(os.link, of_number(errno.ENOTSUP), range(1, 100)))
    monkeypatch.setattr(storage, "CLAIM_SECONDS", 0.3)
    (tmp_path / "name.claim").touch()
    start = time.monotonic()
    Folder(tmp_path).publish_first("name", b"mine")
    assert time.monotonic() - start > 0.25 and [p.name for p in tmp_path.iterdir()] == ["name"]


def test_power_cut_at_any_moment_of_writing_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the index and the notes is there and whole, and the writer that comes again has the same bytes."""
    root = tmp_path / "watched"
    root.mkdir()
    with Disk(root) as disk:
        write(root / "store")
    expected = files(root / "store")
    assert files(disk.at_the_end().lay_out(tmp_path / "end") / "store") == expected
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what is tried from here on lives on
    laid_out: set[tuple[tuple[str, bytes], ...]] = set()
    for number, cut in enumerate(disk.cuts()):
        folder = cut.lay_out(tmp_path / f"cut-{number}") / "store"
        state = tuple(files(folder).items()) if folder.exists() else ()
        if not folder.exists() or state in laid_out:
            continue
        laid_out.add(state)
        whole_shards(folder)
        for note in folder.glob("shard-*.json"):
            assert note.read_bytes(), (note, cut.where)
        write(folder)
        assert {name: data for name, data in files(folder).items() if ".tmp" not in name} == expected, cut.where
    assert len(laid_out) > 20


def test_power_cut_while_a_store_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the old store or the new one, or an unfinished one that is finished by the same command."""
    root, grown = tmp_path / "watched", replace(PLAN, samples=8)
    root.mkdir()
    write(root / "store", replace(PLAN, samples=4))
    with Disk(root) as disk:
        write(root / "store", grown)
    expected = files(root / "store")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for number, cut in enumerate(disk.cuts()):
        folder = cut.lay_out(tmp_path / f"cut-{number}") / "store"
        assert len(open_store(str(folder))) in (4, 8), cut.where
        write(folder, grown)
        assert {name: data for name, data in files(folder).items() if ".tmp" not in name} == expected, cut.where


def test_new_folders_are_durable(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        make_folder(tmp_path / "a" / "b" / "c")
    assert (disk.at_the_end().lay_out(tmp_path.parent / "end") / "a" / "b" / "c").is_dir()


def test_files_are_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    """A store is shared: the command's umask decides, not a library."""
    assert in_processes(lambda: (os.umask(0o027), write(tmp_path / "store"))) == [0]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "store").iterdir()} == {0o640}


def test_a_file_in_the_place_of_a_store_is_a_mistake_that_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "store"
    file.write_text("not a folder")
    with pytest.raises(FileNotFoundError):
        Folder(str(file), retry_seconds=1e9).read("index.json")
    with pytest.raises(StoreError, match="index.json"):
        open_store(str(file))


def test_a_store_that_may_not_be_read_is_a_mistake_that_is_said_at_once(tmp_path: Path) -> None:
    """Its permissions, those of its index, and those of a folder above it; by somebody who is not root."""
    copy = tmp_path / "above" / "store"
    write(copy)

    def refused() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(StoreError, match="may not be read"):
            open_store(str(copy), retry_seconds=1e9)

    for path in [tmp_path, *tmp_path.parents]:
        if path == Path("/tmp"):
            break
        path.chmod(0o755)
    for path, mode in ((copy / "index.json", 0o200), (copy, 0o300), (copy.parent, 0o600)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert in_processes(refused) == [0], path
        path.chmod(before)
