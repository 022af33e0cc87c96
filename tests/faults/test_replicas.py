"""A rank that computes or remembers wrongly: a bit of a weight flips, or a gradient is another one the second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.training.replicas import checksum
from tests.faults.runs import Runs, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_any_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    weights = [
        torch.arange(24).to(dtype).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.ones(3).to(dtype),
    ]
    before, bits = checksum(weights), weights[1].view(torch.uint8)
    for byte in range(bits.numel()):
        for bit in range(8):
            bits[byte] ^= 1 << bit
            assert checksum(weights) != before
            bits[byte] ^= 1 << bit
    assert checksum(weights) == before


@pytest.mark.distributed
def test_ranks_whose_shared_weights_differ_end_and_keep_what_agreed(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flip = [{"do": "flip", "rank": 1, "step": 4}]
    ended = runs.run(run, ranks=2, faults=flip, more=["compare_replicas_steps=3"])
    assert ended.codes == [76, 76], ended.said[-4000:]
    (line,) = errors(ended.said)
    assert "step 6: the weights of the " in line and "differ between rank 0 on " in line and "rank 1 on " in line
    found = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert found == ["step-00000002", "step-00000004.set-aside"]
    runs.goes_on(run, ranks=2, more=["compare_replicas_steps=3"])
    assert runs.difference(run, ranks=2) == (0, 0)


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["one network", "two networks"])
def test_a_rank_that_computes_another_gradient_the_second_time_is_named(
    runs: Runs, tmp_path: Path, method: str
) -> None:
    """Before the update of step 6; step 3 was the last one that was computed twice and found right."""
    run = tmp_path / "run"
    nudge = [{"do": "nudge", "rank": 1, "step": 5, "of": "gradient"}]
    notes = {"JOB_NOTES": str(tmp_path), "SLURMD_NODENAME": "node7"}  # of a supervisor that leaves the machine out
    ended = runs.run(run, method, ranks=2, faults=nudge, more=["compute_twice_steps=3"], environment=notes)
    assert ended.codes == [76, 76], ended.said[-4000:]
    (line,) = errors(ended.said)
    assert "step 6: computed twice, the gradient of the " in line and "rank 1 on node7 (" in line
    assert "rank 0" not in line and (tmp_path / "wrong-machines").read_text() == "node7\n"
    found = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert found == ["step-00000002", "step-00000004.set-aside"]
    runs.goes_on(run, method, ranks=2, more=["compute_twice_steps=3"])
    assert runs.difference(run, method, ranks=2) == (0, 0)
