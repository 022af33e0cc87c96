"""A mistake in the settings is one line that names the key, the value and what is allowed, and exit code 2, soon."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distill.commands.running import run_script
from distill.config.loading import MAX_SETTINGS_BYTES, ConfigError, load, read_settings
from distill.config.settings import TrainSettings
from tests.faults.conftest import Outcome
from tests.faults.ranks import ROOT
from tests.forked import python

Fault = Callable[[int, str], Outcome]
WRONG = "a wrong setting"
GIVEN = ["output_dir=runs/a", "data.store=store"]

# Overrides, and what the one line must contain: the key or value that is wrong, and what to do about it.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
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
    "text for a number": (["max_train_steps='12'"], ["max_train_steps='12'", "integer"]),
    "text for a method's number": (["method.skip='20'"], ["method", "skip='20'", "int"]),
    "true for a number": (["max_train_steps=true"], ["max_train_steps=true", "integer"]),
    "true for a fraction": (["learning_rate=true"], ["learning_rate=true", "number"]),
    "true for a method's number": (["method.skip=true"], ["method", "skip=true", "integer"]),
    "true for a step": (["resume_from_checkpoint=true"], ["resume_from_checkpoint=true", "string", "integer"]),
    "fraction for an integer": (["global_batch_size=1.5"], ["global_batch_size=1.5", "integer"]),
    "list for a number": (["max_train_steps=[1,2]"], ["max_train_steps=[1, 2]", "integer"]),
    "number for a list": (["data.keep=3"], ["data.keep='3'", "'all'", "'milestones'", "list"]),
    "three bounds": (["data.guidance=[1,2,3]"], ["data.guidance=[1, 2, 3]", "number"]),
    "zero steps": (["max_train_steps=0"], ["max_train_steps=0", "greater than or equal to 1"]),
    "negative learning rate": (["learning_rate=-1"], ["learning_rate=-1", "greater than 0"]),
    "infinite learning rate": (["learning_rate=inf"], ["learning_rate=inf", "finite"]),
    "no number for a norm": (["max_grad_norm=nan"], ["max_grad_norm=nan", "finite"]),
    "infinite guidance": (["data.guidance=inf"], ["data.guidance=inf", "finite"]),
    "EMA decay of one": (["ema_decay=1"], ["ema_decay=1", "less than 1"]),
    "negative guidance": (["data.guidance=-1"], ["data.guidance", "greater than or equal to 0"]),
    "unknown choice": (["lr_scheduler=cosin"], ["lr_scheduler='cosin'", "cosine"]),
    "unknown tracker": (["tracking=mlflow"], ["tracking", "mlflow", "wandb"]),
    "unknown experiment": (["experiment=lcm_lora_sd51"], ["experiment=lcm_lora_sd51", "lcm_lora_sd15"]),
    "unknown method": (["method=lcd"], ["method=lcd", "lcm"]),
    "unknown engine": (["engine=zero4"], ["engine=zero4", "zero2"]),
    "several methods": (["method=[lcm,mlcm]"], ["unknown method=[lcm,mlcm]", "mlcm_paper"]),
    "missing value": (["data.store=???"], ["data.store", "set data.store="]),
    "interpolation of itself": (["output_dir=${output_dir}"], ["output_dir"]),
    "target that does not exist": (["method._target_=distill.methods.lcm.LCMM"], ["method", "LCMM"]),
    "target of another package": (["method._target_=os.system"], ["method", "os.system", "distill.methods."]),
    "target without a package": (["method._target_=.lcm.LCM"], ["method", ".lcm.LCM", "distill.methods."]),
    "target that was imported": (["method._target_=distill.models.folder.Path"], ["method", "Path", "own module"]),
    "target that is a number": (["method._target_=3"], ["method", "3", "distill.methods."]),
    "target within a node": (["+method.huber_c={_target_:os.getcwd}"], ["method", "huber_c", "_target_"]),
    "target deep within a node": (["+optimizer.betas=[{a:{_target_:os.getcwd}}]"], ["optimizer", "betas", "_target_"]),
    "arguments by their places": (["+method._args_=[1]"], ["method", "_args_", "allowed"]),
    "not an override": (["max_train_steps"], ["max_train_steps"]),
    "brackets a hundred deep": (["data.keep=" + "[" * 100], ["data.keep", "100 brackets", "20"]),
    "a megabyte": (["output_dir=" + "x" * (1 << 20)], ["output_dir", "characters", "20000"]),
    "a number of 5000 digits": (["seed=" + "9" * 5000], ["seed=", "integer"]),
    "a name too long for a file": (["engine=" + "x" * 300], ["unknown engine=xxx", "zero2"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_clear_line(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    overrides, expected = MISTAKES[kind]
    monkeypatch.setattr(sys, "argv", ["train.py", *GIVEN, *overrides])
    started, start = [], time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run_script(started.append, "train", TrainSettings)
    said = capsys.readouterr()
    assert ended.value.code == 2 and not started and not said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and len(said.err) < 500
    assert all(part in said.err for part in expected), said.err
    fault(11, WRONG).tried(seconds=time.monotonic() - start)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["+typo=1"], ["unknown key 'typo'"]),
        (["model.pretrained_model_name_or_path=/nowhere/at/all"], ["/nowhere/at/all", "hub id"]),
        pytest.param(["--config-name", "other"], ["--config-name"], marks=pytest.mark.faults),
        pytest.param(["method.skip=7"], ["method.skip"], marks=pytest.mark.faults),
        pytest.param(["data.store=/nowhere"], ["/nowhere", "index.json is missing"], marks=pytest.mark.faults),
    ],
)
def test_the_command_exits_with_code_2(overrides: list[str], expected: list[str], tmp_path: Path, fault: Fault) -> None:
    command = [python(), "scripts/train.py", "experiment=quickstart", f"output_dir={tmp_path}/run", *overrides]
    start = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(part in lines[0] for part in expected)
    assert not (tmp_path / "run").exists()
    fault(11, WRONG).tried(seconds=time.monotonic() - start)


# ---- settings from a file, be it anyone's ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> str:
    return yaml.safe_dump(load("train", TrainSettings, GIVEN).model_dump(mode="json"), sort_keys=False)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
FILES: dict[str, tuple[Callable[[str], str | bytes], list[str]]] = {
    "not YAML": (lambda text: text + "[", ["not YAML"]),
    "not text": (lambda text: b"\xff\xfe\xff", ["not YAML"]),
    "nothing": (lambda text: "", ["null", "dictionary"]),
    "a list": (lambda text: "- 1\n", ["[1]", "dictionary"]),
    "a setting that is gone": (lambda text: text + "old_setting: 1\n", ["unknown key 'old_setting'"]),
    "a key twice": (lambda text: text + "seed: 1\n", ["'seed' is said twice"]),
    "a key that is a number": (lambda text: text + "1: 1\n", ["key"]),
    "aliases that double": (lambda text: LAUGHS + text, ["aliases are not allowed"]),
    "an object": (
        lambda text: text.replace("seed: 0", "seed: !!python/object/apply:os.getcwd []"),
        ["not YAML", "tag"],
    ),
    "brackets": (lambda text: text.replace("seed: 0", "seed: " + "[" * 5000), ["not YAML"]),
    "a megabyte": (lambda text: text + "#" * (1 << 20), [str(MAX_SETTINGS_BYTES)]),
    "a date that is none": (lambda text: text.replace("seed: 0", "seed: 2001-99-99"), ["not YAML", "month"]),
    "a target that is not for settings": (
        lambda text: text.replace("_target_: distill.methods.lcm.LCM", "_target_: subprocess.run\n  args: [id]"),
        ["method", "subprocess.run", "distill.methods."],
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_of_settings_is_one_clear_line(kind: str, written: str, tmp_path: Path, fault: Fault) -> None:
    change, expected = FILES[kind]
    changed, file = change(written), tmp_path / "config.yaml"
    assert changed != written
    file.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(ConfigError) as error:
        read_settings(file, TrainSettings)
    line = str(error.value)
    assert line.startswith(f"{file}: ") and "\n" not in line and len(line) < 600
    assert all(part in line for part in expected), line
    fault(11, "a damaged file of settings").tried()


def test_a_file_of_settings_is_read_as_it_was_written(written: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(written)
    assert read_settings(tmp_path / "config.yaml", TrainSettings) == load("train", TrainSettings, GIVEN)
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "none.yaml", TrainSettings)
