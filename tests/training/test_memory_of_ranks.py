"""Two real ranks, one of which runs out of memory: both take fewer samples at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import distill
from tests.faults.ranks import Ranks
from tests.training.test_micro_batch import SHORT

pytestmark = pytest.mark.distributed

ONE_RANK = ("+method.room=2", "+method.on=1")  # of four samples, which the other rank has memory for


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    server = Ranks(tmp_path_factory.mktemp("launches"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    written = ["experiment=quickstart", "engine=single", "data.num_samples=24", "data.solver_steps=5"]
    distill.trajectories(*written, f"data.store={folder}", "data.samples_per_shard=24")
    return folder


def trained(ranks: Ranks, store: Path, run: Path, *overrides: str) -> dict[str, Any]:
    """What a run of two steps of 8 samples on two ranks leaves behind."""
    usual = ["experiment=quickstart", f"data.store={store}", "data.solver_steps=5", f"output_dir={run}", *SHORT]
    usual += ["reward@validation_reward=null", "validation_prompts=null", "max_train_steps=2", "lr_warmup_steps=1"]
    usual += ["global_batch_size=8", "log_every=1", "checkpointing_steps=1", "checkpoints_total_limit=null"]
    ended = ranks.run([*usual, "dataloader_num_workers=0", *ONE_RANK, *overrides], ranks=2)
    assert ended.codes == [0, 0], ended.said[-4000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row],
        "files": json.loads((run / "checkpoints/step-00000002/manifest.json").read_text())["files"],
        "used": json.loads((run / "environment.json").read_text())["batch"],
        "said": ended.said,
    }


def interrupted(run: Path, copy: Path) -> Path:
    """The run as it was after its first step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints/step-00000002")
    (copy / "checkpoints/latest").write_text("step-00000001\n")
    (copy / "DONE").unlink()
    return copy


Found = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def found(ranks: Ranks, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By engine, a run that has found how many samples it takes at once, and what it has left behind."""

    @cache
    def under(engine: str) -> tuple[Path, dict[str, Any]]:
        run = tmp_path_factory.mktemp("found") / engine
        return run, trained(ranks, store, run, f"engine={engine}", "micro_batch_size=auto")

    return under


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_where_one_rank_runs_out_of_memory_both_halve_and_the_run_is_that_of_the_size_found(
    engine: str, found: Found, ranks: Ranks, store: Path, tmp_path: Path
) -> None:
    _, halved = found(engine)
    given = trained(ranks, store, tmp_path / "given", f"engine={engine}", "micro_batch_size=2")
    assert halved["said"].count("no memory for 4 samples at once, trying 2") == 1
    assert halved["used"] == given["used"] == {"micro_batch_size": 2, "accumulated": 2, "processes": 2}
    assert len(halved["losses"]) == 2 and halved["losses"] == given["losses"]
    assert halved["files"] == given["files"] and len(halved["files"]) > 2  # every byte of every rank


def test_an_interrupted_run_may_go_on_with_another_size(
    found: Found, ranks: Ranks, store: Path, tmp_path: Path
) -> None:
    run, whole = found("zero2")
    rest = trained(ranks, store, interrupted(run, tmp_path / "rest"), "engine=zero2", "micro_batch_size=1")
    assert rest["used"] == {"micro_batch_size": 1, "accumulated": 4, "processes": 2}
    assert "steps 2 to 2" in rest["said"] and "no memory" not in rest["said"]
    assert rest["losses"][0] == whole["losses"][0] and len(rest["losses"]) == 2
    assert rest["losses"][1] == pytest.approx(whole["losses"][1], rel=1e-4)
