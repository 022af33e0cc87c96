"""A remote store that is away for a minute while batches are read: nothing is lost, and two lines say so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from distill.benchmarks.range_server import start
from distill.data.loader import make_loader
from distill.data.reader import open_store
from tests.data.stores import PLAN, states_of, write
from tests.data.test_loader import Everything
from tests.faults.conftest import Outcome
from tests.servers import proxy, s3


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_minute_away(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[int, str], Outcome],
) -> None:
    server = None if kind == "s3" else start(tmp_path)
    with s3(monkeypatch) if server is None else proxy(server.server_address[1]) as between:
        local = write(tmp_path / "store")
        url = f"http://127.0.0.1:{between.port}/store" if server else write("s3://bucket/store")
        store = open_store(url, timeout_seconds=5)
        arguments = {"seed": 3, "global_batch_size": 4, "micro_batch_size": 4, "num_workers": 2}
        loaders = [make_loader(one, lambda step: Everything(), **arguments) for one in (store, open_store(local))]
        batches = iter(loaders[0])
        found = list(islice(batches, 3))
        between.away, since = True, time.monotonic()
        threading.Timer(60, lambda: setattr(between, "away", False)).start()
        found += list(islice(batches, 9))
        seconds = time.monotonic() - since - 60
        assert 0 < seconds < 15
        for one, right in zip(found, loaders[1], strict=False):
            assert one.keys == right.keys and torch.equal(one.states, right.states)
        failures, ends = caplog.text.count("trying again for up to"), caplog.text.count("is read again, after")
        assert failures == ends <= 2  # where one thread has come through before another one has failed
        fault(22, "a remote store that is away for a minute").tried(seconds=seconds, bits_different=0)
    assert torch.equal(open_store(local).read(5).states, states_of(PLAN, 5).half())
