"""A run learns the same, to the bit, whether the samples of a prompt share its text in the store or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distill.commands import trajectories
from distill.config.loading import load
from distill.config.settings import PlanSettings, TrainSettings
from distill.data import tar
from distill.data.reader import Store, open_store
from distill.planning.phases import store_bytes as planned_store
from distill.training.assembly import train_run
from distill.training.checkpoint import read_weights
from distill.training.run import checkpoints_of

GIVEN = ["experiment=quickstart", "data.num_samples=24", "data.solver_steps=4", "data.samples_per_shard=10"]
GIVEN += ["data.guidance=2", "data.heldout_samples=4", "data.keep=milestones", "data.segments=4"]
RUN = ["global_batch_size=4", "micro_batch_size=null", "lr_scheduler=constant", "lr_warmup_steps=0", "log_every=1"]
RUN += ["validation_prompts=null", "dataloader_num_workers=0", "mixed_precision=no", "method.skip=250"]
RUN += ["engine=single", "max_train_steps=5", "checkpointing_steps=5", "learning_rate=1e-3", "ema_decay=null"]

SEPARATE = ("data.share_texts=false",)


def store(folder: Path, model: str, share: str) -> Store:
    (folder / "prompts.txt").write_text("a red circle\na large blue square\ntwo green triangles\n")
    given = [*GIVEN, f"data.prompts={folder}/prompts.txt", f"data.share_texts={share}"]
    given += [f"model={model}", f"data.store={folder}/{share}"]
    trajectories.main(load("train", TrainSettings, given))
    return open_store(f"{folder}/{share}")


def learned(folder: Path, model: str, share: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = folder / f"run-{share}"
    given = [*GIVEN, *RUN, f"model={model}", f"data.store={folder}/{share}", f"output_dir={run}"]
    train_run(load("train", TrainSettings, given))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], read_weights(checkpoints_of(run), "student")[1]


@pytest.mark.parametrize(("model", "shares"), [("toy_flow", "auto"), ("toy", "true")])
def test_samples_are_the_same(tmp_path: Path, model: str, shares: str) -> None:
    """Solved and encoded in batches of 8, 2 and 4, of which each text is that of the first."""
    shared, alone = store(tmp_path, model, shares), store(tmp_path, model, "false")
    assert shared.index.shared and not alone.index.shared and len(shared) == len(alone) == 24
    held = [shard.texts.split().count("0") if shard.texts else shard.samples for shard in shared.index.shards]
    assert held == [3, 0, 0]
    for i in range(24):
        found, expected = shared.read(i, prompts=True), alone.read(i, prompts=True)
        assert torch.equal(found.states, expected.states) and found.prompt == expected.prompt
        assert found.conditioning.keys() == expected.conditioning.keys()
        assert all(torch.equal(x, expected.conditioning[name]) for name, x in found.conditioning.items())


def test_a_run_learns_the_same(tmp_path: Path) -> None:
    for share in ("true", "false"):
        store(tmp_path, "toy_flow", share)
    (losses, weights), (others, expected_weights) = (learned(tmp_path, "toy_flow", s) for s in ("true", "false"))
    assert losses == others and len(losses) == 5
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(x, expected_weights[name]) for name, x in weights.items())


def test_stores_of_unets_are_what_they_were_unless_sharing_is_asked_for(tmp_path: Path) -> None:
    found = store(tmp_path, "toy", "auto")
    assert found.index.shared == () and '"schema": 1' in (tmp_path / "auto" / "index.json").read_text()


def test_a_plan_counts_the_store(tmp_path: Path) -> None:
    found = store(tmp_path, "toy_flow", "auto")
    given = [*GIVEN, "model=toy_flow", f"data.prompts={tmp_path}/prompts.txt"]
    planned = {share: planned_store(load("plan", PlanSettings, [*given, *share]), 24) for share in ((), SEPARATE)}
    written = sum(shard.bytes - len(tar.END) for shard in found.index.shards)
    assert planned[()] == written
    text = sum(found.read(0).conditioning[name].nbytes for name in found.index.shared)
    assert abs(planned[SEPARATE] - planned[()] - 21 * text) <= 21 * tar.BLOCK
    unknown = [*given, "data.prompts=null"]  # as if each sample had a prompt of its own
    assert planned_store(load("plan", PlanSettings, unknown), 24) == planned[SEPARATE]
