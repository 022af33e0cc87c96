"""Runs that are killed, stopped and damaged, on two processes: run again, they are as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.ranks import PATIENCE, ROOT
from tests.faults.runs import EVERY, Runs, accelerate, errors, metrics, wait_for

pytestmark = pytest.mark.distributed

Fault = Callable[..., Any]
ONE, TWO = "one network", "two networks"
FILES = (
    "manifest.json",
    "student/weights.safetensors",
    "student/ema.safetensors",
    "student/mp_rank_00_model_states.pt",
    "student/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "student/zero_pp_rank_1_mp_rank_00_optim_states.pt",
)


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints that look whole."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit())


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_a_run_that_meets_one_fault_after_another(runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """A rank killed in a step, two signals to the other, a rank killed in a save, and the newest checkpoint damaged."""
    run = tmp_path / "run"
    killed = runs.run(run, ranks=2, faults=[{"do": "kill", "rank": 1, "step": 3}])
    assert killed.codes[1] == -signal.SIGKILL and killed.codes[0] != 0
    assert killed.seconds < 15 and saved(run) == [2]

    start = time.monotonic()
    stopped = runs.run(run, ranks=2, faults=[{"do": "SIGUSR1 SIGTERM", "rank": 1, "step": 4}])
    assert stopped.codes == [75, 75], stopped.said
    assert (run / "PREEMPTED").read_text() == "5\n" and saved(run) == [2, 4, 5]
    assert "going on" not in stopped.said and "resumed from" in stopped.said
    fault(2, "SIGTERM, SIGUSR1, twice").tried(seconds=time.monotonic() - start)

    torn = runs.run(run, ranks=2, faults=[{"do": "kill", "rank": 0, "save": 1, "touch": 20}])
    assert torn.codes[0] == -signal.SIGKILL and torn.codes[1] != 0
    assert saved(run) == [2, 4, 5] and list((run / "checkpoints").glob("*.tmp"))

    truncate(run / "checkpoints" / "step-00000005" / FILES[-1])
    seconds, ended = runs.goes_on(run, ranks=2)
    said = [line for line in ended.said.splitlines() if "WARNING" in line]
    assert any("step-00000006.tmp: it was never completed" in line for line in said)
    assert len([line for line in said if "step-00000005 is damaged" in line and FILES[-1] in line]) == 1
    assert "step 4" in next(line for line in ended.said.splitlines() if "resumed from" in line)
    assert not (run / "PREEMPTED").exists() and not list((run / "checkpoints").glob("*.tmp"))

    lost, differ = runs.difference(run, ranks=2)
    assert (lost, differ) == (0, 0)
    cost = {"samples_lost": lost, "bits_different": differ}
    fault(1, "SIGKILL of a rank in a step").tried(seconds=killed.seconds + seconds, **cost)
    fault(4, f"killed while saving, {ONE}").tried(seconds=torn.seconds + seconds, **cost)
    fault(5, "checkpoint damaged").tried(seconds=seconds, **cost)


def test_a_launcher_that_is_told_to_end_ends_a_saved_run(runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """`accelerate launch` and SIGTERM, twice: it passes them on, waits for the checkpoint, and exits with an error."""
    run = tmp_path / "run"
    (tmp_path / "faults.json").write_text("[]")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = accelerate([*runs.settings(run, ranks=2), "max_train_steps=1000"], tmp_path / "faults.json")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        wait_for(run / "metrics.jsonl", 3, process)
        start = time.monotonic()
        for _ in range(2):
            process.terminate()
            time.sleep(0.1)
        code = process.wait(120)
    seconds = time.monotonic() - start
    said = (tmp_path / "log").read_text()
    assert code not in (0, 2) and seconds < 30, said[-4000:]
    step = int((run / "PREEMPTED").read_text())
    assert max(saved(run)) == step >= 3 and max(metrics(run)) == step
    fault(2, "SIGTERM, SIGUSR1, twice").tried(seconds=seconds)


@pytest.mark.faults
@pytest.mark.parametrize(
    "number, name, does", [(1, "SIGKILL of a rank in a step", "SIGKILL"), (2, "SIGTERM, SIGUSR1, twice", "SIGUSR1")]
)
def test_a_rank_that_ends_under_a_launcher_takes_the_others_with_it(
    number: int, name: str, does: str, runs: Runs, fault: Fault, tmp_path: Path
) -> None:
    """By itself; `accelerate launch` exits with an error, and the same settings go on."""
    run = tmp_path / "run"
    (tmp_path / "faults.json").write_text(json.dumps([{"do": does, "rank": 1, "step": 4}]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        command = accelerate(runs.settings(run, ranks=2), tmp_path / "faults.json")
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        wait_for(run / "metrics.jsonl", 4, process)
        start, ranks = time.monotonic(), process.children(recursive=True)
        gone, left = psutil.wait_procs([process, *ranks], timeout=60)
    seconds = time.monotonic() - start
    assert not left and process.returncode not in (0, 2), (tmp_path / "log").read_text()[-4000:]
    assert seconds < (15 if does == "SIGKILL" else 60)  # who is asked to stop takes a step, saves, and leaves in order
    # a kill may cost the checkpoint that is being written beside the step
    assert saved(run) in ([[2], [2, 4]] if does == "SIGKILL" else [[2, 4, 5]])
    assert (run / "PREEMPTED").exists() == (does != "SIGKILL")
    more, _ = runs.goes_on(run, ranks=2)
    lost, differ = runs.difference(run, ranks=2)
    fault(number, name).tried(lost == differ == 0, seconds + more, lost, differ)
    assert (lost, differ) == (0, 0)


def touches(runs: Runs, folder: Path, method: str, ranks: int) -> list[list[str]]:
    """For each rank, what it touches in a save that replaces none and drops none."""
    lists = [folder / f"touches-{rank}.json" for rank in range(ranks)]
    watch = [{"do": "nothing", "rank": r, "save": 1, "list": str(path)} for r, path in enumerate(lists)]
    assert not any(runs.run(folder / "watched", method, ranks, watch, steps=EVERY).codes)
    return [json.loads(path.read_text()) for path in lists]


def spread(last: int, count: int) -> list[int]:
    """So many numbers from 1 to `last`, both among them."""
    return sorted({1 + round(i * (last - 1) / (count - 1)) for i in range(count)})


@pytest.mark.faults
@pytest.mark.parametrize("method, points", [(ONE, (12, 4)), (TWO, (12, 4))])
def test_a_rank_killed_at_many_points_of_a_save(
    method: str, points: tuple[int, int], runs: Runs, fault: Fault, tmp_path: Path
) -> None:
    """One run, killed in a save again and again; what a kill has left is what the next start finds."""
    run, steps = tmp_path / "run", 3 * EVERY * sum(points) // 4
    row = fault(4, f"killed while saving, {method}")
    names = touches(runs, tmp_path, method, 2)
    assert len(names[0]) > 30 and len(names[1]) > 5
    kills = [(rank, touch) for rank in (0, 1) for touch in spread(len(names[rank]), points[rank])]
    random.Random(0).shuffle(kills)
    for rank, touch in kills:
        before = saved(run)
        start = time.monotonic()
        ended = runs.run(run, method, 2, [{"do": "kill", "rank": rank, "save": 1, "touch": touch}], steps=steps)
        assert ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] != 0, ended.said[-4000:]
        assert ended.seconds < 15 and not errors(ended.said)
        last = before[-1] if before else 0
        assert saved(run)[-1:] in ([last] * bool(last), [last + EVERY])
        row.tried(seconds=time.monotonic() - start)
    assert saved(run)[-1] > EVERY
    runs.goes_on(run, method, 2, steps=steps)
    lost, differ = runs.difference(run, method, 2, steps)
    row.tried(lost == differ == 0, None, lost, differ)
    assert (lost, differ) == (0, 0) and not list((run / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("touch", [20, *(pytest.param(n, marks=pytest.mark.faults) for n in (4, 12, 28))])
def test_the_grace_period_ends_in_the_save(touch: int, runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """SIGUSR1, then in the save that follows SIGTERM and SIGKILL: the checkpoint before is valid, and found."""
    run = tmp_path / "run"
    in_save = {"do": "SIGTERM SIGKILL", "rank": 0, "save": 2, "touch": touch}  # before the folder is renamed
    ends = [{"do": "SIGUSR1", "rank": 0, "step": 2}, in_save]
    ended = runs.run(run, faults=ends)
    assert ended.codes == [-signal.SIGKILL] and saved(run) == [2]
    assert (run / "checkpoints/latest").read_text() == "step-00000002\n" and not (run / "PREEMPTED").exists()
    seconds, again = runs.goes_on(run)
    assert "resumed from" in again.said
    lost, differ = runs.difference(run)
    assert (lost, differ) == (0, 0)
    fault(3, "grace period over, or signals, in a save").tried(True, seconds, lost, differ)


@pytest.mark.faults
@pytest.mark.parametrize("touch", [2, 16, 42])
def test_signals_in_a_save_do_not_harm_it(touch: int, runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """It is finished, the step that is being taken beside it is saved, and then the run ends, on both ranks.

    A checkpoint that is due waits for the one before, so that no more than one can be saved between them.
    """
    run = tmp_path / "run"
    ended = runs.run(run, ranks=2, faults=[{"do": "SIGTERM SIGUSR1 SIGTERM", "rank": 0, "save": 1, "touch": touch}])
    assert ended.codes == [75, 75], ended.said[-4000:]
    step = int((run / "PREEMPTED").read_text())
    assert step in (3, 4, 5) and saved(run) == sorted({2, step, *([4] if step > 4 else [])})
    seconds, _ = runs.goes_on(run, ranks=2)
    lost, differ = runs.difference(run, ranks=2)
    assert (lost, differ) == (0, 0)
    fault(3, "grace period over, or signals, in a save").tried(True, seconds, lost, differ)


@pytest.fixture(scope="module")
def stopped(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints of steps 2, 4 and 5."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert runs.run(run, ranks=2, faults=[{"do": "SIGTERM", "rank": 0, "step": 4}]).codes == [75, 75]
    return run


@pytest.mark.faults
@pytest.mark.parametrize("damage", [truncate, flip])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_any_kind_costs_its_checkpoint(
    file: str, damage: Callable[[Path], None], stopped: Path, runs: Runs, fault: Fault, tmp_path: Path
) -> None:
    """Both ranks fall back to the one before, in one line, and the run ends as if nothing had been."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    damage(run / "checkpoints" / "step-00000005" / file)
    seconds, ended = runs.goes_on(run, ranks=2)
    said = [line for line in ended.said.splitlines() if "WARNING" in line]
    assert len([line for line in said if "step-00000005 is damaged" in line and file in line]) == 1
    lost, differ = runs.difference(run, ranks=2)
    assert (lost, differ) == (0, 0)
    fault(5, "checkpoint damaged").tried(True, seconds, lost, differ)


@pytest.mark.parametrize(
    "ranks, kills, steps",
    [
        (1, 3, 16),
        pytest.param(1, 50, 160, marks=pytest.mark.faults),
        pytest.param(2, 8, 48, marks=pytest.mark.faults),
    ],
)
def test_random_sigkills(ranks: int, kills: int, steps: int, runs: Runs, fault: Fault, tmp_path: Path) -> None:
    """At any moment, also of the start, one process or all; always the same command, and at last the same weights."""
    run, random_ = tmp_path / "run", random.Random(ranks)
    row = fault(1, f"SIGKILLs at random, {ranks} process{'es' * (ranks > 1)}")
    for left in range(kills, 0, -1):
        launch = runs.start(run, ranks=ranks, steps=steps)
        share = (steps - max(saved(run), default=0)) // (left + 1)  # of the steps, so that none gets to their end
        wait_for(launch.log, random_.randint(0, 3 + share), launch)  # a few lines come before the first step's
        time.sleep(random_.uniform(0, 0.04))
        start = time.monotonic()
        if ranks > 1 and (there := launch.ranks()) and random_.random() < 0.7:
            random_.choice(there).kill()
            ended = launch.wait()
            assert time.monotonic() - start < PATIENCE
        else:
            ended = launch.kill()
        assert not errors(ended.said) and not (run / "DONE").exists(), ended.said[-4000:]
        row.tried()
    seconds, _ = runs.goes_on(run, ranks=ranks, steps=steps)
    lost, differ = runs.difference(run, ranks=ranks, steps=steps)
    row.tried(lost == differ == 0, seconds, lost, differ)
    assert (lost, differ) == (0, 0)
