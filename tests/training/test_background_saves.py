"""Checkpoints that are written beside the training hold the state of their step, whatever happens meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from distill.planning.estimates import Counted, snapshot_bytes
from distill.training import checkpoint, state_files
from distill.training.checkpoint import Checkpoints, read_weights
from distill.training.engine import Engine
from distill.training.processes import Channel
from distill.training.rank_writes import WriteError
from distill.training.snapshot import HostMemory, InPlace
from distill.training.state_files import Pickled, Weights, header, write_files
from distill.training.trained_network import optimizer_bytes
from distill.training.watchdog import Watchdog
from tests.training.test_checkpoint import Make, advance, make, weights  # noqa: F401, a fixture

ALONE = Channel(0, 1, torch.device("cpu"), None)


class Gate:
    """Holds the thread that writes back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self.reached = threading.Event()
        self.times = 0

        def gated(*args: Any) -> Any:
            self.times += 1
            self.reached.set()
            assert self._open.wait(60)
            return write_files(*args)

        monkeypatch.setattr(checkpoint, "write_files", gated)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def advanced(make: Make, stop: int, **settings: Any) -> Engine:  # noqa: F811
    engine = make(**settings)
    advance(engine, 0, stop)
    return engine


def test_steps_taken_while_it_is_written_are_not_in_it(make: Make, tmp_path: Path, gate: Gate) -> None:  # noqa: F811
    """Every file, the manifest included, is that of a save for which the training has waited."""
    waited, running = (advanced(make, 2, ema_decay=0.9) for _ in range(2))
    gate.open()
    Checkpoints(tmp_path / "waited").save(waited, 2)
    gate._open.clear()
    beside = Checkpoints(tmp_path / "beside", background=True)
    beside.begin(running, 2)
    advance(running, 2, 4)  # in place: weights, averages and moments are others now
    gate.open()
    beside.finish()
    found, wanted = (bytes_of(tmp_path / name) for name in ("beside", "waited"))
    assert found == wanted and len(wanted) == 5
    advance(waited, 2, 4)
    assert torch.equal(weights(running), weights(waited))


def test_the_memory_of_a_copy_is_used_again(make: Make, tmp_path: Path) -> None:  # noqa: F811
    engine, checkpoints = advanced(make, 1), Checkpoints(tmp_path, background=True)
    places = []
    for step in (1, 2, 3):
        checkpoints.begin(engine, step)
        checkpoints.finish()
        kept = checkpoints._memory._kept
        places.append(sorted(memory.data_ptr() for part in kept.values() for memory in part if memory.numel()))
        advance(engine, step, step + 1)
    assert places[0] == places[1] == places[2] and len(places[0]) >= 8
    step, found = read_weights(tmp_path, "student", 3, ema=False)
    assert step == 3 and not torch.equal(found["1.weight"], engine.export_weights("student")["1.weight"])


def test_a_plan_knows_the_memory_of_the_copy(make: Make, tmp_path: Path) -> None:  # noqa: F811
    engine, checkpoints = advanced(make, 1, ema_decay=0.9), Checkpoints(tmp_path, background=True)
    checkpoints.save(engine, 1)
    network, held = Counted(trained=4004, frozen=5000), optimizer_bytes(torch.optim.AdamW)
    planned = snapshot_bytes(network, "single", 1, bf16=False, optimizer=held, averaged=True)
    assert checkpoints.copied_bytes == pytest.approx(planned, abs=16) and planned == 16 * 4004


def test_a_save_waits_for_the_one_before(make: Make, tmp_path: Path, gate: Gate) -> None:  # noqa: F811
    engine, checkpoints = advanced(make, 1), Checkpoints(tmp_path, background=True)
    checkpoints.begin(engine, 1)
    assert gate.reached.wait(60) and not checkpoints.found()  # nothing looks like a checkpoint yet
    advance(engine, 1, 2)
    threading.Timer(0.3, gate.open).start()
    checkpoints.begin(engine, 2)
    assert checkpoints.found()[0][0] == 1
    checkpoints.finish()
    assert [step for step, _ in checkpoints.found()] == [2, 1] and gate.times == 2


def test_one_that_cannot_be_written_is_a_warning_and_the_next_is_tried(
    make: Make,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, checkpoints = advanced(make, 1), Checkpoints(tmp_path, background=True)
    full = OSError(28, "No space left on device")

    def fails(*_: Any) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(state_files.HashedFile, "write", fails)
        checkpoints.begin(engine, 1)
        checkpoints.wait()
        (said,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert "step-00000001 could not be written" in said and "No space left" in said
        assert not list(tmp_path.iterdir())
        with pytest.raises(WriteError, match="step-00000002 could not be written"):
            checkpoints.save(engine, 2)  # the last one must be
    checkpoints.save(engine, 2)
    assert checkpoints.found()[0][0] == 2 and len(caplog.records) <= 3


def test_what_else_ends_the_thread_ends_the_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    engine, checkpoints = advanced(make, 1), Checkpoints(tmp_path, background=True)

    def broken(*_: Any) -> None:
        raise KeyError("a mistake in the program")

    monkeypatch.setattr(checkpoint, "_write_manifest", broken)
    checkpoints.begin(engine, 1)
    with pytest.raises(KeyError, match="a mistake in the program"):
        checkpoints.begin(engine, 2)


def test_the_watchdog_looks_at_the_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("distill.training.watchdog.give_up", said.append)
    with Watchdog(0.2 / 60) as watchdog, watchdog.beside("the checkpoint of step 3, which is being written"):
        for _ in range(8):
            with watchdog.over("a step"):
                time.sleep(0.1)
    assert said and " s for the checkpoint of step 3, which is being written" in said[0]


def test_the_line_about_a_full_disk_names_it_whoever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error does not."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "w.safetensors").symlink_to("/dev/full")
    (tmp_path / "o.pt").symlink_to("/dev/full")
    for file in (
        Pickled("o.pt", lambda: torch.ones(9)),
        Weights("w.safetensors", {"a": [1]}, [("a", torch.ones(1))], False),
    ):
        with pytest.raises(WriteError, match="No space left on device"):
            write_files([file], tmp_path, ALONE)


# ---- copies and files -------------------------------------------------------------------------------------------


def test_copies_lie_in_memory_as_their_tensors_did() -> None:
    storage = torch.arange(24.0)
    inner = storage[4:16].view(3, 4).t()
    state = {
        "a": inner,
        "b": storage[:4],
        "again": inner,
        "n": 3,
        "p": nn.Parameter(torch.ones(2)),
        "none": torch.empty(0),
    }
    with HostMemory().snapshot() as copies:
        found = copies.of(state)
    expected = inner.clone()
    storage.fill_(-1)
    assert torch.equal(found["a"], expected) and found["a"].stride() == inner.stride() and found["n"] == 3
    assert found["a"] is found["again"] and isinstance(found["p"], nn.Parameter) and found["none"].numel() == 0
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr() != storage.data_ptr()
    assert InPlace().of(state)["b"].data_ptr() == storage.data_ptr()


class Ranks:
    """What ranks send to rank 0, in the order in which it wants it."""

    def __init__(self, sizes: list[dict[str, int]], sent: dict[int, list[Tensor]], rank: int = 0) -> None:
        self.rank, self.sizes, self.sent = rank, sizes, sent

    def gathered(self, value: Any) -> list[Any]:
        return self.sizes

    def send(self, values: Tensor, rank: int) -> None:
        self.sent[self.rank].append(values)

    def receive(self, count: int, rank: int) -> Tensor:
        values = self.sent[rank].pop(0)
        assert values.numel() == count
        return values


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_weights_of_many_ranks_are_the_file_of_the_library(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, with ranks that have nothing of a weight; names of any alphabet."""
    monkeypatch.setattr(state_files, "CHUNK", chunk)
    whole = {"b.weight": torch.randn(3, 4), "a": torch.randn(7), "ü.bias": torch.randn(()), "b": torch.randn(2, 1, 2)}
    cuts = {"b.weight": (0, 5, 5, 12), "a": (0, 0, 3, 7), "ü.bias": (0, 1, 1, 1), "b": (0, 2, 3, 4)}
    pieces = [[(n, w.flatten()[cuts[n][r] : cuts[n][r + 1]]) for n, w in whole.items()] for r in range(3)]
    sizes = [{name: piece.numel() for name, piece in part} for part in pieces]
    sent: dict[int, list[Tensor]] = {1: [], 2: []}
    shapes = {name: w.shape for name, w in whole.items()}
    for rank in (1, 2, 0):
        channel: Any = Ranks(sizes, sent, rank)
        digests = write_files([Weights("w.safetensors", shapes, pieces[rank], True)], tmp_path, channel)
    assert (tmp_path / "w.safetensors").read_bytes() == save(whole) and not sent[1] and not sent[2]
    assert digests == {"w.safetensors": checkpoint._digest(tmp_path / "w.safetensors")}
    assert save(whole).startswith(header(shapes))
