"""Settings that compose, and reach what uses them. Mistakes among them are in tests/faults/test_config.py."""

from __future__ import annotations

import pytest

from distill.training.config import CONFIGS, load
from distill.training.settings import TrainSettings

GIVEN = ["output_dir=runs/a", "data.store=store"]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "override", [f"experiment={e}" for e in names("experiment")] + [f"engine={e}" for e in names("engine")]
)
def test_every_experiment_and_every_engine_composes(override: str) -> None:
    settings = load("train", TrainSettings, [override, *GIVEN])
    assert settings.output_dir == "runs/a"


def test_settings_reach_the_objects_that_use_them() -> None:
    settings = load("train", TrainSettings, [*GIVEN, "learning_rate=3e-5", "lora_rank=8", "method.loss=l2"])
    assert settings.optimizer["lr"] == 3e-5
    assert settings.student["rank"] == 8
    assert settings.method["loss"] == "l2"
