"""Several processes on one comparison: the numbers of one, nothing twice, and a clear end where one is gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch

from distill.evaluation.blocks import Cache, WorkShare
from distill.evaluation.compare import Comparison
from tests.evaluation.world import PixelScorer, comparison

BLOCK = 10  # of 64 pictures and of 32: the last blocks are smaller


def shared(folder: Path, rank: int, world_size: int, **arguments: object) -> Comparison:
    study = comparison(folder, block_size=BLOCK, batch_size=4, **arguments)  # type: ignore[arg-type]
    return replace(study, share=WorkShare(rank, world_size), cache=Cache(folder, writes=rank == 0))


def evaluations(study: Comparison) -> int:
    return sum(denoiser.evaluations for denoiser in study.denoisers.values())  # type: ignore[attr-defined]


def together(studies: list[Comparison]) -> list[dict[str, object]]:
    """The rows of rank 0, the others working beside it."""
    others = [Thread(target=lambda s=study: s.generate(s.settings())) for study in studies[1:]]
    for other in others:
        other.start()
    rows = studies[0].rows()
    for other in others:
        other.join()
    return rows


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_rows_are_those_of_one_process_to_the_bit(tmp_path: Path, world_size: int) -> None:
    whole = shared(tmp_path / "one", 0, 1)
    expected = whole.rows()
    studies = [shared(tmp_path / "several", rank, world_size) for rank in range(world_size)]
    assert together(studies) == expected
    assert sum(map(evaluations, studies)) == evaluations(whole)  # nothing is drawn twice
    assert all(evaluations(study) > evaluations(whole) / world_size / 3 for study in studies)


def test_blocks_that_do_not_divide_the_pictures_hold_each_once(tmp_path: Path) -> None:
    study = shared(tmp_path, 0, 1)
    measured = study.measured(study.plan.student(4))
    assert len(measured["pixels"]) == 64 and len(measured["pixels"].unique(dim=0)) == 64
    in_one = replace(study, plan=replace(study.plan, block_size=64), cache=Cache(tmp_path / "other"))
    torch.testing.assert_close(in_one.measured(study.plan.student(4))["pixels"], measured["pixels"], rtol=0, atol=1e-6)


def test_after_a_kill_another_number_of_processes_goes_on_at_the_block(tmp_path: Path) -> None:
    whole = shared(tmp_path / "whole", 0, 1)
    expected = whole.rows()
    first = shared(tmp_path / "killed", 0, 1, scorer=PixelScorer(lives=61))
    with pytest.raises(KeyboardInterrupt):
        first.rows()
    again = [shared(tmp_path / "killed", rank, 2) for rank in range(2)]
    assert together(again) == expected
    twice = sum(map(evaluations, [first, *again])) - evaluations(whole)
    assert 0 <= twice <= BLOCK * 2 * 50  # of one block at most, of however many steps


def test_a_process_that_is_gone_is_one_clear_line(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.make({"block": 0}, lambda: {"x": torch.zeros(1)})
    with pytest.raises(TimeoutError, match="^1 of 2 blocks of other processes are missing in .* none came for 0.3 s$"):
        cache.awaited([{"block": 0}, {"block": 1}], patience=0.3)


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, WorkShare(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, WorkShare(3, 8, 1)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}, WorkShare(2, 4, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, WorkShare(0, 1, 0)),  # a batch script, no step of srun's
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "RANK": "5", "WORLD_SIZE": "6"}, WorkShare(5, 6, 0)),
    ],
)
def test_who_this_process_is(environment: dict[str, str], share: WorkShare) -> None:
    assert WorkShare.launched(environment) == share


def test_pieces_are_dealt_out_whole() -> None:
    dealt = [list(WorkShare(rank, 3).own(range(10))) for rank in range(3)]
    assert dealt == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    with pytest.raises(ValueError, match="^rank must be within 0 ... 1, got 2$"):
        WorkShare(2, 2)
