"""What a run has recorded stays true: whatever it is started again with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config.loading import ConfigError, build
from distill.config.recorded import chief, differences, given_keys
from distill.config.settings import TrainSettings
from distill.training.checkpoint import _write_manifest
from distill.training.run import checkpoints_of, finished, identity, mark_finished, open_run, read_run
from tests.training.test_run import settings


def begun(folder: Path, step: int, *overrides: str) -> Path:
    """A run with a checkpoint of `step`, as far as its small files are concerned."""
    open_run(settings(folder, *overrides))
    checkpoint = checkpoints_of(folder) / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    _write_manifest(checkpoint, {"format": 1, "run": identity(folder), "step": step, "config": {}, "files": {}})
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mark_finished(run := begun(tmp_path_factory.mktemp("finished") / "run", 8), 8)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def again(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> Path:
    """The run is started with these on its command line."""
    monkeypatch.setattr(sys, "argv", ["train", *overrides])
    return open_run(settings(folder, *overrides))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["learning_rate=2e-4"],
            "holds a run with learning_rate=0.0001, this one has 0.0002: .*the same learning_rate",
        ),
        (["lora_rank=8"], "holds a run with lora_rank=64, this one has 8"),
        (["optimizer.lr=3e-4"], "holds a run with optimizer.lr=0.0001, this one has 0.0003"),
        (["student.rank=8"], "holds a run with student.rank=64, this one has 8"),
        (["seed=3", "learning_rate=2e-4"], "holds a run with (seed=0|learning_rate=0.0001), this one has"),
        (["method=lcm_noised"], "holds a run with method.source='trajectory', this one has 'noised'"),
        (["perceptual=latent_lpips", "perceptual.path=x"], "holds a run with perceptual=None, this one has"),
        (["max_train_steps=3"], "has finished, with 8 steps, and max_train_steps=3 is less: .*above 8 continues"),
        (
            ["resume_from_checkpoint=4"],
            "has finished, with 8 steps: resume_from_checkpoint=4 is for a run that has not",
        ),
        (["resume_from_checkpoint=null"], "has finished, with 8 steps: resume_from_checkpoint=None is for"),
    ],
)
def test_a_finished_run_keeps_its_record_and_says_what_differs(
    overrides: list[str], says: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = finished_run, contents(finished_run)
    with pytest.raises(ConfigError, match=says):
        again(monkeypatch, run, *overrides)
    assert contents(run) == before


def test_free_settings_of_a_finished_run_change_nothing_that_is_recorded(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = finished_run, contents(finished_run)
    assert finished(again(monkeypatch, run, "log_every=1", "engine=zero2"), 8)
    assert contents(run) == before


@pytest.mark.parametrize("steps", [3, 1])
def test_a_stopped_run_that_is_given_fewer_steps_than_it_took_is_one_line(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "run", 4)
    before = contents(run)
    with pytest.raises(ConfigError, match=f"has taken 4 steps, and max_train_steps={steps} is less: .*STEP"):
        again(monkeypatch, run, f"max_train_steps={steps}")
    assert contents(run) == before
    again(monkeypatch, run, f"max_train_steps={steps}", "resume_from_checkpoint=1")  # back to an earlier one


def test_more_steps_continue_and_the_history_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mark_finished(run := begun(tmp_path / "run", 8, "lr_scheduler=cosine"), 8)
    overrides = ("max_train_steps=12", "log_every=1", "lr_scheduler=cosine")
    assert not finished(again(monkeypatch, run, *overrides), 12)
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert (recorded["max_train_steps"], recorded["log_every"]) == (12, 1)
    (row,) = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    assert row["changed"] == {"max_train_steps": [8, 12], "log_every": [10, 1]}
    assert row["newest_step"] == 8 and row["overrides"] == list(overrides)
    assert "max_train_steps was 8, is 12: lr_scheduler=cosine is stretched to it" in caplog.text
    caplog.clear()
    again(monkeypatch, run, *overrides)
    assert len((run / "history.jsonl").read_text().splitlines()) == 2 and "stretched" not in caplog.text


# ---- what differs -----------------------------------------------------------------------------------------------


def differing(recorded: dict[str, Any], *overrides: str) -> dict[str, tuple[Any, Any]]:
    return differences(recorded, settings(Path("run"), *overrides).model_dump(mode="json"), TrainSettings)


def test_a_record_of_an_earlier_version_that_lacks_a_setting_had_its_default() -> None:
    recorded = settings(Path("run")).model_dump(mode="json")
    del recorded["perceptual"], recorded["method"]["huber_c"], recorded["health"]["stop"]
    assert differing(recorded) == {}
    assert differing(recorded, "method.huber_c=0.5") == {"method.huber_c": (0.001, 0.5)}


def test_a_setting_that_is_gone_differs() -> None:
    recorded = settings(Path("run")).model_dump(mode="json")
    recorded["method"]["momentum"] = 0.3
    assert differing(recorded) == {"method.momentum": (0.3, None)}


def test_the_key_that_was_given_is_named() -> None:
    found = {"optimizer.lr": (1, 2), "learning_rate": (1, 2), "seed": (0, 1)}
    assert chief(found, []) == "learning_rate"
    assert chief(found, given_keys(["experiment=x", "+seed=1"])) == "seed"
    assert chief(found, given_keys(["optimizer.lr=2"])) == "optimizer.lr"
    assert chief({"method.skip": (1, 2), "seed": (0, 1)}, given_keys(["method=lcm"])) == "method.skip"


def test_a_run_that_recorded_its_engine_by_an_earlier_name_is_still_read(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", 2)
    recorded = (folder / "config.yaml").read_text()
    assert "distill.training.engine.EngineSettings" in recorded
    (folder / "config.yaml").write_text(recorded.replace("engine.EngineSettings", "engine.Engine"))
    engine = read_run(folder).engine
    assert engine["_target_"] == "distill.training.engine.EngineSettings" and build(engine).name == "single"
    open_run(settings(folder))  # and the same command continues it
