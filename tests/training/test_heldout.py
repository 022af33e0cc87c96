"""Solves that are held out: written beside a store that stays as it is, never learned from, measured at validations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.commands import trajectories
from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings
from distill.data.heldout import heldout_samples, within
from distill.data.reader import Store, open_store
from distill.diffusion.schedule import NoiseSchedule
from distill.methods.lcm import LCM
from distill.methods.lightning import LightningAdversarial
from distill.methods.mlcm import MLCM
from distill.training.assembly import train_run
from distill.training.engine import Engine, EngineSettings
from distill.training.heldout import HELDOUT, TRAINING, HeldOutLoss
from tests.data.stores import PLAN, files, write
from tests.tiny import save_tiny

PROMPTS = [f"prompt {i}" for i in range(6)]
SOLVES = ["data.num_samples=4", "data.heldout_samples=3", "data.solver_steps=10", "data.batch_size=2"]
TRAINED = ["max_train_steps=3", "global_batch_size=2", "lora_rank=2", "log_every=1", "validation_steps=2"]
TRAINED += ["dataloader_num_workers=0"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a tiny teacher and a store that has been written."""
    folder = tmp_path_factory.mktemp("heldout")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    teacher, store = save_tiny(folder / "teacher"), folder / "store"
    model = [f"model.pretrained_model_name_or_path={teacher}", f"data.prompts={folder}/prompts.txt"]
    usual = [
        "experiment=lcm_lora_sd15",
        *model,
        f"data.store={store}",
        "mixed_precision=no",
        "dataloader_num_workers=0",
    ]
    write_solves([*usual, *SOLVES])
    return usual


def write_solves(arguments: Sequence[str]) -> None:
    trajectories.main(load("train", TrainSettings, arguments))


def train(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The metrics of a run that was trained to its end."""
    assert train_run(load("train", TrainSettings, [*arguments, *TRAINED, f"output_dir={folder}"])) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_held_out_solves_lie_beside_a_store_that_is_the_same_with_and_without(given: list[str], tmp_path: Path) -> None:
    store = load("train", TrainSettings, given).data.store
    write_solves([*given, *SOLVES, "data.heldout_samples=0", f"data.store={tmp_path}/without"])
    shards = {path.name: path.read_bytes() for path in Path(store).iterdir() if path.is_file()}
    assert shards == files(tmp_path / "without") and not (tmp_path / "without" / "heldout").exists()
    heldout, learned = open_store(within(store)), open_store(store)
    found = [heldout.read(i, prompts=True) for i in range(len(heldout))]
    assert [sample.prompt for sample in found] == PROMPTS[:2:-1]  # from the end of the file on
    noise = {tuple(learned.read(i, [0]).states.flatten().tolist()) for i in range(len(learned))}
    assert not noise & {tuple(sample.states[0].flatten().tolist()) for sample in found}


def test_a_fiftieth_is_held_out_unless_the_settings_say_how_many() -> None:
    assert [heldout_samples("auto", n) for n in (49, 2000, 50_000)] == [0, 40, 64]
    assert heldout_samples(7, 20) == 7


def test_a_run_learns_the_same_with_them_and_logs_their_loss(given: list[str], tmp_path: Path) -> None:
    without = train(tmp_path / "without", *given, "data.heldout_samples=0")
    rows = train(tmp_path / "with", *given)
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in without if "loss" in row]
    measured = [row for row in rows if HELDOUT in row]
    assert [row["step"] for row in measured] == [2, 3] and not any(HELDOUT in row for row in without)
    assert all(row[HELDOUT] > 0 and row[TRAINING] > 0 and row[HELDOUT] != row[TRAINING] for row in measured)


def test_another_store_takes_their_place_if_it_is_of_the_same_teacher(given: list[str], tmp_path: Path) -> None:
    own = load("train", TrainSettings, given).data.store
    rows = train(tmp_path / "run", *given, f"data.heldout={within(own)}", "data.heldout_samples=0")
    assert HELDOUT in rows[-1]
    with pytest.raises(ConfigError, match=r"data\.heldout: .*teacher_hash is .*set it to solves made as those"):
        train(tmp_path / "other", *given, f"data.heldout={write(tmp_path / 'store', PLAN)}")


def test_ranks_share_the_work_and_every_draw_is_measured(tmp_path: Path) -> None:
    store = open_store(str(write(tmp_path, PLAN)))
    measure = HeldOutLoss(LCM(NoiseSchedule.scaled_linear(), skip=250), store, store, seed=0, most_at_once=5)
    whole = measure._shares([11], 0, 1)
    assert sorted(draw for part in whole.values() for draw in part) == list(range(4 * len(store)))
    for ranks in (2, 3, 4):
        shares = [measure._shares([11], rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1  # as many calls of the network on each
        assert {part: draws for share in shares for part, draws in share.items()} == whole


def test_what_cannot_be_read_is_a_warning_and_the_run_goes_on(
    given: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load("train", TrainSettings, given)
    store = open_store(settings.data.store)
    broken: Store = open_store(within(settings.data.store))
    shard = Path(broken.folder.url) / broken.index.shards[0].name
    data = bytearray(shard.read_bytes())
    try:
        shard.write_bytes(bytes(len(data)))
        engine: Engine = EngineSettings().start()
        measure = HeldOutLoss(LCM(NoiseSchedule.scaled_linear(), skip=100), broken, store, seed=0)
        assert measure(engine, 2) == {} and f"{HELDOUT} is not measured at step 2: sample" in caplog.text
        engine.release()
    finally:
        shard.write_bytes(data)


def test_every_method_says_what_is_measured() -> None:
    """Of an adversarial one the distance to the teacher; of MLCM the consistency without the terms beside it."""
    schedule = NoiseSchedule.scaled_linear()
    stage = {
        "segments": 1,
        "grid": 8,
        "skip": 125,
        "source": "student",
        "iterations": 2,
        "reward": 1.0,
        "matching": 1.0,
    }
    method = MLCM(schedule, [stage])
    turn = method.held_out(0)
    plain = replace(method.stages[0], reward=0.0, matching=0.0)
    assert turn.updates == "student" and turn.loss.args == (plain,)  # type: ignore[attr-defined]
    game = LightningAdversarial(schedule, student_steps=4, teacher_steps=8)
    assert game.held_out(0).loss == game.squared_error
    lcm = LCM(schedule)
    found = lcm.held_out(0)
    assert found is not None and found.loss == lcm.loss
