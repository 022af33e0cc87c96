"""A mistake in the settings is one line that names the key, and exit code 2, within seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill.training.config import CONFIGS, ConfigError, TrainSettings, load

ROOT = Path(__file__).parents[2]
GIVEN = ["output_dir=runs/a", "data.store=store"]

# Overrides, and what the one line must contain: the key or value that is wrong, and what to do about it.
MISTAKES = {
    "unknown key": (["max_train_step=3"], ["max_train_step", "did you mean 'max_train_steps'"]),
    "unknown key, appended": (["+typo=1"], ["unknown key 'typo'"]),
    "unknown key, forced": (["++max_trian_steps=1"], ["unknown key 'max_trian_steps'", "max_train_steps"]),
    "unknown key in a group": (["data.stroe=x"], ["data.stroe", "data.store"]),
    "unknown key in a group, appended": (["+data.solver_step=40"], ["data.solver_step", "data.solver_steps"]),
    "unknown argument of a method": (["+method.skpi=20"], ["method", "skpi", "skip"]),
    "unknown argument of an optimizer": (["+optimizer.momentum=0.9"], ["optimizer", "momentum"]),
    "unknown argument of a critic": (
        ["+networks.discriminator.depth=3"],
        ["networks.discriminator", "depth", "allowed"],
    ),
    "word for a number": (["max_train_steps=many"], ["max_train_steps", "'many'", "integer"]),
    "word for a method's number": (["method.skip=abc"], ["method", "skip='abc'", "integer"]),
    "word for an optimizer's number": (["learning_rate=fast"], ["learning_rate", "'fast'", "number"]),
    "fraction for an integer": (["global_batch_size=1.5"], ["global_batch_size=1.5", "integer"]),
    "zero steps": (["max_train_steps=0"], ["max_train_steps=0", "greater than or equal to 1"]),
    "negative learning rate": (["learning_rate=-1"], ["learning_rate=-1", "greater than 0"]),
    "EMA decay of one": (["ema_decay=1"], ["ema_decay=1", "less than 1"]),
    "negative guidance": (["data.guidance=-1"], ["data.guidance", "greater than or equal to 0"]),
    "unknown choice": (["lr_scheduler=cosin"], ["lr_scheduler='cosin'", "cosine"]),
    "unknown tracker": (["report_to=[jsonl,mlflow]"], ["report_to", "mlflow", "wandb"]),
    "unknown experiment": (["experiment=lcm_lora_sd51"], ["experiment=lcm_lora_sd51", "lcm_lora_sd15"]),
    "unknown method": (["method=lcd"], ["method=lcd", "lcm"]),
    "unknown engine": (["engine=zero4"], ["engine=zero4", "zero2"]),
    "missing value": (["data.store=???"], ["data.store", "set data.store="]),
    "target that does not exist": (["method._target_=distill.methods.lcm.LCMM"], ["method", "LCMM"]),
    "not an override": (["max_train_steps"], ["max_train_steps"]),
}


@pytest.mark.parametrize("overrides, expected", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_clear_line(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load("train", TrainSettings, GIVEN + overrides)
    line = str(raised.value)
    assert "\n" not in line and len(line) < 300
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["+typo=1"], "typo"),
        (["model.pretrained_model_name_or_path=/nowhere/at/all"], "/nowhere/at/all"),
        (["--config-name", "other"], "--config-name"),
        (["method.skip=7"], "method.skip"),
    ],
)
def test_the_script_exits_with_code_2(overrides: list[str], expected: str, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/train.py", "experiment=quickstart", f"output_dir={tmp_path}/run", *overrides]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]
    assert not (tmp_path / "run").exists()


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
