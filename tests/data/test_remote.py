"""Stores on a real S3 server and a real web server on localhost, slow, busy, cut off, away, changed or forbidden."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from distill.benchmarks.range_server import Answers, start
from distill.data import heldout
from distill.data.errors import BadSample, ReadError, StoreError
from distill.data.loader import make_loader
from distill.data.reader import Store, open_store
from distill.data.remote import fetch, file_system
from distill.data.retries import shown
from distill.diffusion.trajectory import Batch
from tests.data.stores import PLAN, files, states_of, write
from tests.data.test_loader import Everything
from tests.servers import BUSY, FORBIDDEN, Proxy, proxy, s3


@dataclass
class Place:
    """A store behind a proxy; `put` replaces a file of it, or removes it, behind the proxy's back."""

    url: str
    between: Proxy
    put: Callable[[str, bytes | None], None]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Place]]:
    """The same store on both kinds of server; the tests put back what they change."""
    folder = tmp_path_factory.mktemp("remote")
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        places, local = {}, Path(write(folder / "store"))
        web = stack.enter_context(proxy(start(folder).server_address[1]))

        def put_file(name: str, data: bytes | None) -> None:
            (local / name).unlink(missing_ok=True)
            if data is not None:
                (local / name).write_bytes(data)

        places["http"] = Place(f"http://127.0.0.1:{web.port}/store", web, put_file)
        between = stack.enter_context(s3(environment))
        url = write("s3://bucket/a/store")
        import boto3

        client = boto3.client("s3")

        def put_object(name: str, data: bytes | None) -> None:
            where = {"Bucket": "bucket", "Key": f"a/store/{name}"}
            client.delete_object(**where) if data is None else client.put_object(**where, Body=data)

        places["s3"] = Place(url, between, put_object)
        yield places


@pytest.fixture(params=["s3", "http"])
def place(request: pytest.FixtureRequest, servers: dict[str, Place]) -> Iterator[Place]:
    one = servers[request.param]
    yield one
    between = one.between
    between.busy, between.cuts, between.latency, between.away, between.answer = 0, 0, 0.0, False, BUSY


def batches(store: Store, workers: int, count: int = 8) -> list[Batch]:
    loader = make_loader(
        store, lambda step: Everything(), seed=3, global_batch_size=4, micro_batch_size=4, num_workers=workers
    )
    return list(islice(loader, count))


def equal(a: Batch, b: Batch) -> bool:
    same = (a.keys, a.positions) == (b.keys, b.positions) and a.conditioning.keys() == b.conditioning.keys()
    pairs = [
        (a.states, b.states),
        (a.times, b.times),
        *((x, b.conditioning[name]) for name, x in a.conditioning.items()),
    ]
    return same and all(torch.equal(x, y) for x, y in pairs)


def busy(between: Proxy) -> None:
    between.busy = 6


def cuts(between: Proxy) -> None:
    between.cuts = 6


def away(between: Proxy) -> None:
    between.away = True
    threading.Timer(1.0, lambda: setattr(between, "away", False)).start()


def slow(between: Proxy) -> None:
    between.latency = 0.05


@pytest.mark.parametrize("disturb", [busy, cuts, away, slow])
def test_batches_are_those_of_the_local_store_whatever_the_network_does(
    place: Place, disturb: Callable[[Proxy], None], store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """To the bit, in the same order, in two threads; and what failed is two lines, not two for each read."""
    expected = batches(open_store(store_url), 0)
    store = open_store(place.url, retry_seconds=30, timeout_seconds=1)
    disturb(place.between)
    assert all(equal(a, b) for a, b in zip(expected, batches(store, 2), strict=True))
    assert not store.max_bad_fraction and place.between.busy == 0
    failures, ends = caplog.text.count("trying again for up to"), caplog.text.count("is read again, after")
    assert failures == ends <= 2


def test_a_store_that_is_written_to_s3_is_the_local_one(servers: dict[str, Place], store_url: str) -> None:
    fs, path = file_system(servers["s3"].url)
    there = {name.rsplit("/", 1)[-1]: fs.cat_file(name) for name in fs.ls(path, detail=False)}
    assert there == files(store_url)


def test_all_of_a_batch_is_in_flight_at_once(place: Place) -> None:
    """Eleven samples of five states, each state requested alone, take little longer than one."""
    store = open_store(place.url)
    store.read(0)
    place.between.latency = 0.2
    start_time = time.monotonic()
    fetched = fetch(store.folder.fs, [(store.folder.path("shard-000000.tar"), n, n + 1) for n in range(4)], 9)
    assert time.monotonic() - start_time < 0.5 and all(isinstance(one, bytes) for one in fetched)
    before = place.between.requests
    assert not any(isinstance(found, BadSample) for found in store.read_many([(i, (0, 4)) for i in range(4)]))
    assert place.between.requests - before == 1  # what lies near each other is one request


def test_an_answer_that_does_not_come_has_a_limit(place: Place) -> None:
    store = open_store(place.url, retry_seconds=0.2)
    store.folder.timeout_seconds = 0.3
    place.between.latency = 30.0
    start_time = time.monotonic()
    with pytest.raises(ReadError, match=r"shard-000001.tar cannot be read: .*no answer within 0.3 s \(2 tries"):
        store.read(5)
    assert time.monotonic() - start_time < 5


def test_what_is_for_good_is_one_line_at_once(place: Place) -> None:
    """An object that is gone, and one that may not be read; no sample takes the place of one that is in it."""
    store, start_time = open_store(place.url, retry_seconds=100, max_bad_fraction=0.9), time.monotonic()
    whole = bytes(store.folder.read("shard-000001.tar"))
    place.put("shard-000001.tar", None)
    try:
        with pytest.raises(StoreError, match=r"store/shard-000001.tar is not there \(404\)$") as error:
            list(batches(store, 2))
    finally:
        place.put("shard-000001.tar", whole)
    assert not isinstance(error.value, BadSample)
    place.between.busy, place.between.answer = 10**6, FORBIDDEN
    for read in (lambda: store.read(5), lambda: open_store(place.url, retry_seconds=100)):
        with pytest.raises(StoreError, match=r"store.* may not be read \(.*403.*\): check the credentials") as error:
            read()
        assert "\n" not in str(error.value)
    assert time.monotonic() - start_time < 15


def test_no_credentials_are_one_line_at_once(servers: dict[str, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    type(file_system(servers["s3"].url)[0]).clear_instance_cache()
    with pytest.raises(StoreError, match="may not be read .*redentials"):
        open_store(servers["s3"].url, retry_seconds=100)
    type(file_system(servers["s3"].url)[0]).clear_instance_cache()


def test_an_object_that_is_replaced_is_never_trained_on(place: Place, tmp_path: Path) -> None:
    """By one of the same size: of another store, and with a single bit that is another."""
    store = open_store(place.url)
    whole = bytes(store.folder.read("shard-000001.tar"))
    other = (Path(write(tmp_path / "other", replace(PLAN, seed=12))) / "shard-000001.tar").read_bytes()
    at = int(store.index.shards[1].offsets.split()[1]) + store.index.layout.start("states") + 7
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    try:
        for data in (other, flipped):
            assert len(data) == len(whole) and data != whole
            place.put("shard-000001.tar", data)
            with pytest.raises(BadSample, match=r"is not what was written .*the file was replaced since the store"):
                store.read(5)
    finally:
        place.put("shard-000001.tar", whole)
    assert torch.equal(store.read(5).states, states_of(PLAN, 5).half())


class Signed(Answers):
    """Answers those who know the signature."""

    def answer(self, body: bool) -> None:
        super().answer(body) if self.path.endswith("?X-Signature=secret") else self.refuse(403)


def test_a_signed_url_is_read_and_its_signature_is_never_said(
    store_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(store_url, tmp_path / "store")
    with proxy(start(tmp_path, answers=Signed).server_address[1]) as between, caplog.at_level(logging.DEBUG, "distill"):
        url = f"http://127.0.0.1:{between.port}/store"
        store = open_store(f"{url}?X-Signature=secret", retry_seconds=5, timeout_seconds=2)
        between.busy = 2
        assert store.read(3).key == "000000-000003" and "cannot be read" in caplog.text
        assert heldout.within(store.folder.url) == f"{url}/heldout?X-Signature=secret"
        assert not heldout.is_there(store.folder.url)
        said = [caplog.text]
        for wrong in (f"{url}/none?X-Signature=secret", f"{url}?X-Signature=secret2"):
            with pytest.raises(StoreError) as error:
                open_store(wrong)
            said.append(str(error.value))
        between.away = True
        with pytest.raises(ReadError) as late:
            open_store(f"{url}?X-Signature=secret", retry_seconds=0)
        assert "secret" not in " ".join([*said, str(late.value)]) and "X-Signature" not in str(late.value)
    assert shown("https://me:secret@host/a?b=c is") == "https://***@host/a?*** is"
    assert shown("s3://bucket/a?b is no path with a secret") == "s3://bucket/a?*** is no path with a secret"


class WithoutRanges(Answers):
    def wanted(self, size: int) -> tuple[int, int]:
        return 0, size


def test_a_server_without_ranges_is_one_line(store_url: str, tmp_path: Path) -> None:
    shutil.copytree(store_url, tmp_path / "store")
    server = start(tmp_path, answers=WithoutRanges)
    store = open_store(f"http://127.0.0.1:{server.server_address[1]}/store", retry_seconds=100)
    with pytest.raises(StoreError, match="sends whole files where a range is wanted"):
        store.read(3)
    server.shutdown()


def test_a_file_that_ends_early_is_damage(place: Place) -> None:
    """Not an error of the network: a range begins behind its end."""
    store = open_store(place.url)
    whole = bytes(store.folder.read("shard-000002.tar"))
    try:
        place.put("shard-000002.tar", whole[: len(whole) // 2])
        with pytest.raises(BadSample, match="the shard ends within it"):
            store.read(10)
        with pytest.raises(StoreError, match=r"shard-000002.tar of .* has \d+ bytes, index.json says"):
            open_store(place.url)
    finally:
        place.put("shard-000002.tar", whole)
