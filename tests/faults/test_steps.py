"""Runs in which something goes wrong that does not end a process: numbers, disks, services, waiting for ever."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.training.tracking import JsonlTracker
from tests.faults.ranks import can_mount
from tests.faults.runs import BATCH, STEPS, Runs, errors, metrics, weights

Fault = Callable[..., Any]
HUNG, UNHEALTHY, NOT_SAVED = 4, 3, 74  # exit codes


def notes(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped_batches.jsonl").read_text().splitlines()]


def disk_use(folder: Path) -> int:
    """KiB that files take, in pages of 4."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


# ---- numbers ----------------------------------------------------------------------------------------------------


def spoiled(rank: int) -> list[dict[str, Any]]:
    """Steps 3 and 5, counted from 1, and two in a row from 7 on, of which the second is one too many."""
    which = ((2, "nan", "loss"), (4, "inf", "gradient"), (6, "inf", "loss"), (7, "nan", "gradient"))
    return [{"do": does, "of": of, "rank": rank, "step": step} for step, does, of in which]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero2", *(pytest.param(e, marks=pytest.mark.faults) for e in ("ddp", "zero3"))])
def test_a_rank_whose_numbers_are_not_finite(engine: str, runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """All skip the update together, the samples are written down, and too many in a row end the run."""
    two, one = tmp_path / "two", tmp_path / "one"
    start = time.monotonic()
    cpu = {"ACCELERATE_USE_CPU": "true"}
    for run, ranks, kind in ((two, 2, engine), (one, 1, "single")):
        more = [f"engine={kind}", "engine.max_nonfinite_steps=2", "spikes.rollbacks=0"]
        ended = runs.run(run, ranks=ranks, faults=spoiled(ranks - 1), more=more, environment=cpu)
        assert ended.codes == [UNHEALTHY] * ranks, ended.said[-4000:]
        (line,) = errors(ended.said)
        assert "step 7: student skipped" in line and "2 in a row, giving up" in line
        assert [metrics(run)[step]["skipped"] for step in range(1, 8)] == [0, 0, 1, 0, 1, 0, 1]
        assert [(note["step"], note["network"]) for note in notes(run)] == [(s, "student") for s in (3, 5, 7, 8)]
    # of a loss the rank's own samples, one of two here; of a gradient, which is everybody's, all of the step
    assert [len(note["keys"]) for note in notes(two)] == [1, BATCH, 1, BATCH]
    assert all(set(a["keys"]) <= set(b["keys"]) for a, b in zip(notes(two), notes(one), strict=True))
    found, wanted = weights(two, 6), weights(one, 6)
    assert all(np.isfinite(w).all() for w in found.values())
    assert found.keys() == wanted.keys()
    both = [np.concatenate([w[name].ravel() for name in wanted]) for w in (found, wanted)]
    # AdamW's first steps at a rate of .01 enlarge what sums in another order differ by
    assert np.linalg.norm(both[0] - both[1]) < 1e-4 * np.linalg.norm(both[1])
    assert not (two / "DONE").exists()
    fault(8, "loss or gradient not finite on a rank").tried(seconds=time.monotonic() - start)

    ended = runs.run(
        two, ranks=2, more=[f"engine={engine}"], environment=cpu
    )  # the same steps again, from step 6: mended, it goes on
    assert ended.codes == [0, 0] and [note["step"] for note in notes(two)] == [3, 5]


# ---- disks ------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_disk_that_is_full_when_checkpoints_are_written(runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """The run goes on without the third checkpoint, and ends, on both ranks, at the last; those before are valid."""
    if not can_mount(tmp_path / "probe"):
        pytest.skip("a small file system cannot be mounted here")
    run = tmp_path / "run"
    size = disk_use(runs.undisturbed(ranks=2) / "checkpoints" / f"step-{STEPS:08d}")
    start = time.monotonic()
    ended = runs.run(run, ranks=2, disk=(run, 64 + 5 * size // 2), more=["checkpoints_total_limit=null"])
    seconds = time.monotonic() - start
    assert ended.codes == [NOT_SAVED] * 2, ended.said[-4000:]
    (goes_on,) = [line for line in ended.said.splitlines() if "could not be written" in line and "WARNING" in line]
    (ends,) = errors(ended.said)
    assert "step-00000006" in goes_on and "step-00000008" in ends and "the disk is full" in ends
    assert (run / "checkpoints/latest").read_text() == "step-00000004\n" and not (run / "DONE").exists()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000002", "step-00000004"]
    assert metrics(run) == metrics(runs.undisturbed(ranks=2))
    again, _ = runs.goes_on(run, ranks=2)
    lost, differ = runs.difference(run, ranks=2)
    assert (lost, differ) == (0, 0)
    fault(10, "disk full while saving").tried(True, seconds + again, lost, differ)


@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.parametrize("method", ["one network", "two networks"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_alone_cannot_write(rank: int, method: str, runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """The others, which could, do not wait for it in a collective that it never comes to."""
    run = tmp_path / "run"
    ended = runs.run(run, method, 2, [{"do": "limit", "rank": rank, "step": 4, "bytes": 8000}])
    assert ended.codes == [NOT_SAVED] * 2, ended.said[-4000:]
    # that of step 2 is complete by then, that of step 4 may be: it is written beside the step
    assert (run / "checkpoints/latest").read_text() in ("step-00000002\n", "step-00000004\n")
    assert len(errors(ended.said)) == 1
    seconds, _ = runs.goes_on(run, method, 2)
    lost, differ = runs.difference(run, method, 2)
    assert (lost, differ) == (0, 0)
    fault(10, "disk full while saving").tried(True, seconds, lost, differ)


def test_metrics_wait_while_they_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.log({"loss": 1.0}, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))  # the second line fits in part
    try:
        for step in (2, 3):
            tracker.log({"loss": 1.0}, step)
        tracker.images("validation", [Image.new("RGB", (8, 8))], 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.log({"loss": 1.0}, 4)
    tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "lines wait in memory" in said[0] and "pictures of step 3 are not written" in said[1]


# ---- services ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, kills",
    [("offline", True), *(pytest.param(m, False, marks=pytest.mark.faults) for m in ("offline", "online"))],
)
def test_wandb_that_is_offline_unreachable_or_killed(
    mode: str, kills: bool, runs: Runs, fault: Fault, tmp_path: Path
) -> None:
    """Training takes its steps, and the local file has them all."""
    run = tmp_path / "run"
    environment = {"HOME": str(tmp_path), "WANDB_MODE": mode, "WANDB_API_KEY": "0" * 40}
    environment["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # nobody listens there
    faults = [{"do": "kill wandb", "rank": 0, "step": 5}] if kills else []
    start = time.monotonic()
    ended = runs.run(run, faults=faults, more=["tracking=wandb"], environment=environment)
    assert ended.codes == [0], ended.said[-4000:]
    lost, differ = runs.difference(run)
    assert (lost, differ) == (0, 0)
    if mode == "online":
        assert "wandb" in "".join(line for line in ended.said.splitlines() if "WARNING" in line)
    fault(13, "wandb offline, unreachable, killed").tried(True, time.monotonic() - start, lost, differ)


# ---- waiting for ever -------------------------------------------------------------------------------------------


def test_a_loader_that_hangs_is_named_and_ended(runs: Runs, fault: Fault, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = time.monotonic()
    hang = [{"do": "hang", "rank": 0, "batch": 4}]  # in the process that trains, whose stack is shown
    ended = runs.run(run, faults=hang, more=["watchdog_minutes=0.05", "dataloader_num_workers=0"])
    assert ended.codes == [HUNG], ended.said[-4000:]
    (line,) = errors(ended.said)
    assert "rank 0 has waited" in line and "a batch from the loader" in line and "watchdog_minutes=0.05" in line
    assert "in _do" in ended.said  # the stack of the thread that hangs
    seconds, _ = runs.goes_on(run)
    lost, differ = runs.difference(run)
    assert (lost, differ) == (0, 0)
    fault(17, "a loader or a rank hangs").tried(True, time.monotonic() - start, lost, differ)


@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.parametrize(
    "where, code, says",
    [
        ({"do": "hang", "batch": 4}, HUNG, "a batch from the loader"),
        ({"do": "hang", "step": 3}, HUNG, "step 4: its computation, or other ranks in it"),
        ({"do": "hang", "save": 1, "touch": 5}, HUNG, "the checkpoint of step 2"),
        ({"do": "SIGSTOP", "step": 3}, HUNG, "step 4: its computation, or other ranks in it"),
        ({"do": "freeze", "step": 3}, 1, "Timeout"),
    ],
    ids=["loader", "step", "save", "stopped", "frozen"],
)
def test_a_rank_that_hangs_ends_all(
    where: dict[str, Any], code: int, says: str, runs: Runs, fault: Fault, tmp_path: Path
) -> None:
    """Itself, or by the watchdog of the rank that waits for it; a launcher does the rest."""
    run = tmp_path / "run"
    start = time.monotonic()
    ended = runs.run(run, ranks=2, faults=[{"rank": 1, **where}], more=["watchdog_minutes=0.2"])
    assert all(ended.codes) and {HUNG, code} & set(ended.codes), ended.said[-4000:]
    assert says in ended.said and "most recent call first" in ended.said
    if where["do"] == "hang":  # the stacks of both are there; a process that is stopped or frozen cannot write its own
        stacks = [(run / f"hang-rank-{rank}.txt").read_text() for rank in (0, 1)]
        assert all("most recent call first" in text for text in stacks) and "in _do" in stacks[1]
    runs.goes_on(run, ranks=2)
    lost, differ = runs.difference(run, ranks=2)
    assert (lost, differ) == (0, 0)
    fault(17, "a loader or a rank hangs").tried(True, time.monotonic() - start, lost, differ)


@pytest.mark.faults
def test_a_thread_that_reads_ahead_and_hangs_ends_the_run(runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """The process that waits for its batch is ended, and its stack with that of the thread is shown."""
    hang = [{"do": "hang", "rank": 0, "batch": 4}]
    ended = runs.run(tmp_path / "run", faults=hang, more=["watchdog_minutes=0.1", "dataloader_num_workers=1"])
    assert ended.codes == [HUNG] and "in _do" in ended.said
    fault(17, "a loader or a rank hangs").tried()


def test_a_run_stops_at_the_signals_of_its_settings(runs: Runs, tmp_path: Path) -> None:
    run, other = tmp_path / "run", ["preemption_signals=[SIGUSR2]"]
    ended = runs.run(run, faults=[{"do": "SIGUSR2", "rank": 0, "step": 2}], more=other)
    assert ended.codes == [75] and (run / "PREEMPTED").read_text() == "3\n", ended.said[-4000:]
    ended = runs.run(run, more=["preemption_signals=[SIGUP]"])
    assert ended.codes == [2] and "preemption_signals: no signal is called 'SIGUP'" in ended.said.splitlines()[-1]


def test_a_run_says_what_it_ran_in_and_keeps_secrets(runs: Runs, tmp_path: Path) -> None:
    told = {"SLURM_JOB_ID": "17", "NCCL_DEBUG": "WARN", "HF_HOME": "/hf"}
    secret = {
        "HF_TOKEN": "hf_secret",
        "WANDB_API_KEY": "secret",
        "HF_ENDPOINT": "https://me:secret@hub",
        "MY_SECRET": "x",
    }
    ended = runs.run(tmp_path / "run", environment=told | secret)
    assert ended.codes == [0], ended.said[-4000:]
    text = (tmp_path / "run" / "environment.json").read_text()
    found = json.loads(text)
    assert told.items() <= found["variables"].items() and "secret" not in text
    assert found["packages"]["torch"] and found["git_commit"] and found["host"]
    assert f"max_train_steps={STEPS}" in (tmp_path / "run" / "overrides.txt").read_text().splitlines()
