"""Commands that hang end by themselves, with what they were at, where they stood, and a run's exit code for it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings, VerifySettings
from distill.data.progress import Progress, begin, begun
from distill.training import watchdog
from distill.training.watchdog import HUNG, Watchdog
from tests.forked import python

ROOT = Path(__file__).resolve().parents[1]
HANGING = """
import importlib, sys, time
command, module, name = (sys.argv.pop(1) for _ in range(3))

def is_stuck_here(*args, **kwargs):
    time.sleep(60)

setattr(importlib.import_module(module), name, is_stuck_here)
from distill.commands import run
run(command)
"""
MODEL = "model.pretrained_model_name_or_path=FOLDER"
# What hangs in each command, its settings, and what it then says that it is at.
COMMANDS = {
    "trajectories": ("prompts_of", ["data.store=STORE", MODEL], "its start"),
    "latents": ("own_device", ["data=images", "data.images=FOLDER", "data.store=STORE", MODEL], "its start"),
    "sample": ("load_student", ["prompts=[a]", "output_dir=OUT", MODEL], "the pipeline"),
    "evaluate": ("load_teacher", ["output_dir=OUT"], "the teacher, the student and what scores them"),
    "export": ("read_run", ["run=RUN", "output_dir=OUT"], "its start"),
    "verify": ("read_index", ["store=STORE"], "its start"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_hangs_ends_by_itself(command: str, tmp_path: Path) -> None:
    name, settings, at = COMMANDS[command]
    where = [command, f"distill.commands.{command}", name]
    ended = subprocess.run(
        [python(), "-c", HANGING, *where, *settings, "watchdog_minutes=0.02"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == HUNG, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0 has waited ") and f" s for {at} (watchdog_minutes=0.02)" in line
    assert "in is_stuck_here" in ended.stderr


def test_one_that_goes_on_is_left_alone_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(watchdog, "give_up", said.append)
    begin("its start")
    with Watchdog(2 / 60, at=begun):
        progress = Progress("solving", 12, "samples")
        for _ in range(12):
            time.sleep(0.25)
            progress.update(1)
        assert not said
        time.sleep(3.5)
    assert said and " s for solving: 12 of 12 samples done (watchdog_minutes=" in said[0]


@pytest.mark.parametrize("value", ["0", "null"])
def test_nothing_and_no_minutes_watch_nothing(value: str) -> None:
    for config, settings, given in (
        ("train", TrainSettings, ["data.store=STORE", "experiment=quickstart"]),
        ("verify", VerifySettings, ["store=STORE"]),
    ):
        minutes = load(config, settings, [*given, f"watchdog_minutes={value}"]).watchdog_minutes  # type: ignore[attr-defined]
        with Watchdog(minutes) as watching:
            assert not minutes and watching._thread is None
        with pytest.raises(ConfigError, match="watchdog_minutes"):
            load(config, settings, [*given, "watchdog_minutes=-1"])
