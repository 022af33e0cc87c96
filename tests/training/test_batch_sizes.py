"""Stages with batches of their own size: the data's order, micro-batches, and a run that resumes within them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.commands import trajectories
from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings
from distill.data.order import BatchShare
from distill.training.assembly import train_run
from tests.tiny import save_tiny

CHANGES = ((2, 4), (5, 8))  # of batches of 16
STAGES = (
    "method.stages=[{segments: 1, skip: 100, iterations: 2}, {segments: 1, skip: 100, iterations: 2, batch_size: 2}]"
)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 16), (1, 4), (2, 4), (4, 4)])
def test_shares_partition_every_step_whatever_its_size(world_size: int, micro_batch: int) -> None:
    shares = [BatchShare(16, micro_batch, rank, world_size, CHANGES) for rank in range(world_size)]
    begins = 0
    for step, size in enumerate([16, 16, 4, 4, 4, 8, 8]):
        parts = [[share.positions(step, i) for i in range(share.accumulation)] for share in shares]
        assert {len(part) for of_rank in parts for part in of_rank} == {size * micro_batch // 16}
        taken = [p for of_rank in parts for part in of_rank for p in part]
        assert taken == list(range(begins, begins + size))
        assert {shares[0].step_of(p) for p in taken} == {step}
        assert [shares[0].following(p) for p in taken] == [*taken[1:], taken[0]]
        begins += size


def test_a_first_stage_may_have_another_size_than_the_run() -> None:
    share = BatchShare(4, 4, changes=((0, 8), (1, 2)))
    assert [list(share.positions(step, 0)) for step in range(3)] == [list(range(8)), [8, 9], [10, 11]]


def test_batches_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(
        ValueError, match="the batch of 6 samples from step 3 on must be a multiple of 4: 2 processes x 2"
    ):
        BatchShare(16, 4, 0, 2, ((3, 6),))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sizes")
    teacher = save_tiny(folder / "teacher")
    usual = ["experiment=mlcm_sd15", f"model.pretrained_model_name_or_path={teacher}", f"data.store={folder}/store"]
    usual += ["data.prompts=['snow','a red boat']", "data.solver_steps=10", "data.num_samples=6", "data.batch_size=6"]
    usual += ["lora_rank=2", "mixed_precision=no", "dataloader_num_workers=0", "global_batch_size=4", "log_every=1"]
    usual += [STAGES, "max_train_steps=null", "lr_warmup_steps=0", "checkpointing_steps=1"]
    usual += ["checkpoints_total_limit=null"]
    trajectories.main(load("train", TrainSettings, usual))
    return usual


def train(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    assert train_run(load("train", TrainSettings, [*arguments, f"output_dir={folder}"])) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints/step-00000004/student/weights.safetensors")


def test_a_run_resumes_within_a_stage_and_at_its_border_and_may_accumulate(given: list[str], tmp_path: Path) -> None:
    rows = train(tmp_path / "whole", *given)
    for steps in (2, 3):
        shutil.copytree(tmp_path / "whole", rest := tmp_path / f"from-{steps}")
        (rest / "DONE").unlink()
        for later in range(steps + 1, 5):
            shutil.rmtree(rest / f"checkpoints/step-{later:08d}")
        (rest / "checkpoints" / "latest").unlink(missing_ok=True)
        assert [row["loss"] for row in train(rest, *given)] == [row["loss"] for row in rows]
        assert all(torch.equal(w, weights(tmp_path / "whole")[name]) for name, w in weights(rest).items())
    parts = train(tmp_path / "parts", *given, "gradient_accumulation_steps=2")
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in rows], rel=1e-5)


def test_a_stage_that_the_micro_batches_do_not_divide_is_one_line(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"batch_size=2 from step 2 on must be a multiple of 4: 1 processes? x gradient"
    ):
        train(tmp_path / "run", *given, "gradient_accumulation_steps=4")


def test_the_papers_last_stages_have_its_batches() -> None:
    given = ["experiment=mlcm_sdxl", "data.store=s", "method=mlcm_paper", "max_train_steps=null"]
    settings = load("train", TrainSettings, given)
    assert [stage.get("batch_size") for stage in settings.method["stages"]] == [None, None, 8, 4]
    assert settings.global_batch_size == 16
