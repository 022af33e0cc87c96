"""Checkpoints that other numbers of ranks load: nothing of the state changes, and no process holds all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.training.resharding import WholeState
from distill.training.sharding import read_whole
from tests.faults.ranks import Ranks
from tests.training.resharding_worker import shapes

pytestmark = pytest.mark.distributed

RANKS = (2, 3, 1, 2)
# What it is saved by on two ranks, and then loaded by on three, on one, and on two again.
JOURNEYS = {
    "zero2": ("zero2", "zero3", "single", "zero2"),
    "zero3": ("zero3", "zero2", "zero3", "zero3"),
}
STATE_BYTES = 4 * 4 * sum(shape.numel() for shape in shapes().values())  # weights, average and two moments


def engine(name: str) -> dict[str, Any]:
    if name == "single":
        return {"kind": "single"}
    stage = int(name.removeprefix("zero"))
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
    return {"kind": "deepspeed", "deepspeed": {"zero_optimization": zero}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With the checkpoints of each journey, `NAME-0` to `NAME-3`."""
    folder = tmp_path_factory.mktemp("journeys")
    server = Ranks(folder)
    for i, ranks in enumerate(RANKS):
        legs = [
            {"engine": engine(stages[i]), "from": str(folder / f"{name}-{i - 1}") if i else None}
            | {"to": str(folder / f"{name}-{i}")}
            for name, stages in JOURNEYS.items()
        ]
        plan = folder / f"legs-{i}.json"
        plan.write_text(json.dumps(legs))
        ended = server.run([str(plan)], ranks=ranks, script="../tests/training/resharding_worker")
        assert not any(ended.codes), ended.said[-4000:]
    yield folder
    server.close()


def state(folder: Path) -> tuple[dict[str, bytes], WholeState]:
    """The bytes of weights and average, and the optimizer's state, of a checkpoint of the student."""
    student = folder / "step-00000002" / "student"
    files = {name: (student / f"{name}.safetensors").read_bytes() for name in ("weights", "ema")}
    return files, read_whole(student, shapes())


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.flatten().view(torch.int32)


def files_of(folder: Path) -> dict[str, Any]:
    """Size and hash of each file but those in which DeepSpeed notes how many steps this process has taken."""
    files = json.loads((folder / "step-00000002" / "manifest.json").read_text())["files"]
    return {path: about for path, about in files.items() if not path.endswith("model_states.pt")}


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_checkpoint_of_two_ranks_is_the_same_on_three_and_one_and_on_two_again(name: str, folder: Path) -> None:
    """Every bit of weights, average and optimizer's state; back on two ranks, every byte of their files."""
    files, optimizer = state(folder / f"{name}-0")
    assert files["weights"] != files["ema"] and optimizer.keys == ("exp_avg", "exp_avg_sq")
    for i in range(1, len(RANKS)):
        found, moved = state(folder / f"{name}-{i}")
        assert found == files and moved.keys == optimizer.keys
        assert float(moved.shared["step"]) == float(optimizer.shared["step"]) == 2
        for weight in shapes():
            for key, value in optimizer.of(weight).items():
                assert value.count_nonzero() > 0 and torch.equal(bits(moved.of(weight)[key]), bits(value)), (i, weight)
    assert files_of(folder / f"{name}-3") == files_of(folder / f"{name}-0")


@pytest.mark.parametrize("name", JOURNEYS)
def test_no_process_of_three_holds_the_whole_state_while_it_loads(name: str, folder: Path) -> None:
    """Pages of the files that are mapped into memory count; what a rank keeps afterwards does, too."""
    added = [int((folder / f"{name}-1.rank-{rank}").read_text()) for rank in range(3)]
    assert max(added) < 0.9 * STATE_BYTES  # a rank's share twice, in the file and out of it, and ZeRO-2's weights
