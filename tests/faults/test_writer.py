"""Writing a store: killed at every touch of a file, and by several at once. The bytes are those of one writer."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distill.data.index import StorePlan
from distill.data.reader import open_store
from distill.diffusion.trajectory import Trajectory
from tests.data.dying import in_child
from tests.data.stores import (
    BAD,
    PICTURES,
    PLAN,
    files,
    in_processes,
    skipping,
    teacher,
    whole_shards,
    write,
)
from tests.faults.conftest import Outcome
from tests.faults.ranks import ROOT
from tests.faults.runs import Runs
from tests.forked import python

Fault = Callable[[int, str], Outcome]
KILLED = "writer killed at a touch of a file"
ONE_SHARD = replace(PLAN, samples=3, batch_size=2)
STORES = {
    "one shard": partial(write, plan=ONE_SHARD),
    "three shards": partial(write, plan=PLAN),
    "pictures, some skipped": partial(write, plan=PICTURES, solve=skipping(PICTURES, BAD)),
    "one of two ranks": partial(write, plan=PLAN, rank=1, world_size=2),
}


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds on a busy disk, and only matters to a machine that goes down."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("kind", [k if k == "one shard" else pytest.param(k, marks=pytest.mark.faults) for k in STORES])
def test_killed_at_every_touch_and_run_again(kind: str, tmp_path: Path, no_fsync: None, fault: Fault) -> None:
    write_it = STORES[kind]
    names = in_child(partial(write_it, tmp_path / "whole"))
    assert names is not None
    expected = files(tmp_path / "whole")
    of_a_shard = {name for name in names if "shard-00000" in name or "index.json" in name}
    assert len(of_a_shard) >= 8 and len(names) >= 24, names  # some of them several times

    for number in range(1, len(names) + 1):
        folder = tmp_path / "killed"
        assert in_child(partial(write_it, folder), fatal=number) is None, names[number - 1]
        whole_shards(folder)
        start = time.monotonic()
        write_it(folder)
        seconds = time.monotonic() - start
        whole_shards(folder)
        found = files(folder)
        assert found == expected, names[number - 1]
        fault(20, KILLED).tried(seconds=seconds, bits_different=0)
        shutil.rmtree(folder)


def test_a_shard_with_a_note_is_not_written_again(tmp_path: Path, no_fsync: None, fault: Fault) -> None:
    """Whatever became of its writer; a shard without one is."""
    for point in ("os.rename shard-000001.tar:1", "os.rename shard-000001.json:1", "open index.json.tmp:2"):
        folder = tmp_path / point
        assert in_child(partial(write, folder), fatal=point) is None
        done = {n for n in range(3) if (folder / f"shard-00000{n}.json").exists()}
        solved: list[int] = []
        write(folder, solve=teacher(PLAN, solved=solved))
        assert solved == [i for i in range(11) if i // 4 not in done]
        fault(20, KILLED).tried()


def test_killed_at_random_moments_until_it_is_done(
    store_url: str, tmp_path: Path, no_fsync: None, fault: Fault
) -> None:
    """A writer that is killed again and again, by the clock, still finishes, with the same bytes."""

    def slowly(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        time.sleep(0.01)
        return teacher(PLAN)(indices, prompts)

    rng, folder, kills = random.Random(0), tmp_path / "store", 0
    for attempt in range(200):
        child = os.fork()
        if child == 0:
            write(folder, solve=slowly)
            os._exit(0)
        time.sleep(rng.uniform(0.01, 0.03 + 0.01 * attempt))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += killed
        if folder.exists():
            whole_shards(folder)
        if not killed:
            break
    assert kills > 0
    write(folder)  # removes what the last kill left
    assert files(folder) == files(store_url)
    for _ in range(kills):
        fault(20, "writer killed by the clock, again and again").tried(bits_different=0)


def test_the_same_store_written_twice_at_once(store_url: str, tmp_path: Path, no_fsync: None, fault: Fault) -> None:
    """By three whole writers, and by two one of whom dies at its work."""
    jobs = [partial(write, tmp_path / "three")] * 3
    assert in_processes(*jobs) == [0, 0, 0]
    assert files(tmp_path / "three") == files(store_url)
    fault(20, "the same store written at once").tried(bits_different=0)

    def dies() -> None:
        in_child(partial(write, tmp_path / "two"), fatal="write shard-000001.tar.tmp:2")

    assert in_processes(dies, partial(write, tmp_path / "two")) == [0, 0]
    write(tmp_path / "two")
    assert files(tmp_path / "two") == files(store_url)
    fault(20, "the same store written at once").tried(bits_different=0)


def test_two_stores_are_never_one(tmp_path: Path, no_fsync: None, fault: Fault) -> None:
    """Two jobs with other plans begin in one folder at once: one of them is refused, and the other's store is whole."""
    plans = [PLAN, replace(PLAN, seed=12)]
    codes = in_processes(*[partial(refused_or_written, tmp_path / "store", plan) for plan in plans])
    assert sorted(map(bool, codes)) == [False, True]
    winner = plans[codes.index(0)]
    assert open_store(str(tmp_path / "store")).index.seed == winner.seed
    assert files(tmp_path / "store") == files(write(tmp_path / "alone", winner))
    fault(20, "two stores written to one folder at once").tried(bits_different=0)


def refused_or_written(folder: Path, plan: StorePlan) -> None:
    try:
        write(folder, plan)
    except ValueError as error:
        assert "begun with another plan" in str(error)
        os._exit(2)


@pytest.mark.faults
def test_the_command_killed_at_touches_of_files(runs: Runs, tmp_path: Path, fault: Fault) -> None:
    """scripts/make_trajectories.py as it is run, at ten points of writing a store of two shards, and run again."""
    points = ["os.link plan.json.tmp:1", "os.rename unconditional.safetensors:1", "open shard-000000.tar.tmp:1"]
    points += ["write shard-000000.tar.tmp:1", "fsync shard-000000.tar.tmp:1", "os.rename shard-000000.tar:1"]
    points += ["write shard-000000.json.tmp:1", "os.rename index.json:1", "write shard-000001.tar.tmp:3"]
    points += ["os.rename shard-000001.json:1", "os.rename index.json:2"]
    settings = [s for s in runs.settings(tmp_path / "run") if not s.startswith("data.store=")]
    settings += ["data.samples_per_shard=6"]

    def command(folder: Path, *before: str) -> Any:
        line = [python(), *before, str(ROOT / "scripts/make_trajectories.py"), *settings, f"data.store={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    assert command(tmp_path / "whole").returncode == 0
    expected = files(tmp_path / "whole")
    for number, point in enumerate(points):
        folder = tmp_path / str(number)
        ended = command(folder, "-m", "tests.data.dying", point)
        assert ended.returncode == -signal.SIGKILL, (point, ended.stderr[-2000:])
        whole_shards(folder)
        start = time.monotonic()
        ended = command(folder)
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert files(folder) == expected, point
        fault(20, "make_trajectories.py killed").tried(seconds=time.monotonic() - start, bits_different=0)
