"""`distill quickstart`: its parts run for real, in this process; what is done is skipped, what fails is said."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from distill.commands import COMMANDS, quickstart
from distill.commands.chain import PREEMPTED
from distill.config.loading import ConfigError, load
from distill.config.settings import QuickstartSettings

ROOT = Path(__file__).resolve().parents[1]
TINY = "data.num_samples=8,data.samples_per_shard=8,data.solver_steps=10,global_batch_size=4,max_train_steps=2"
TINY += ",lr_warmup_steps=0,dataloader_num_workers=0,validation_prompts=null,engine=single"
NAMES = ["store", "run", "lora", "pictures", "report"]


def settings(folder: Path, *more: str) -> QuickstartSettings:
    given = ["processes=1", f"overrides=[{TINY}]", "n=100", "tuning_n=0", "steps=[1,2]", "prompts=[red stripes]", *more]
    return load("quickstart", QuickstartSettings, [*given, f"output_dir={folder}"])


def in_this_process(command: list[str]) -> int:
    """Runs `python -m distill NAME ...` here; the evaluation, whose tests are elsewhere, is stopped at once."""
    assert command[:3] == [sys.executable, "-m", "distill"]
    if command[3] == "evaluate":
        return PREEMPTED
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", command[3:])
        return COMMANDS[command[3]].run()


def test_the_parts_make_a_student_and_are_not_made_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distill")
    parts = quickstart.parts_of(settings(tmp_path))
    assert [part.name for part in parts] == NAMES
    assert not any(part.done() for part in parts)
    assert quickstart.run_parts(parts, in_this_process) == PREEMPTED
    assert [part.name for part in parts if not part.done()] == ["report"]
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "pictures/steps-2/00000.png").is_file()
    assert json.loads((tmp_path / "lora/distill.json").read_text())["step"] == 2

    again: list[list[str]] = []
    assert quickstart.run_parts(quickstart.parts_of(settings(tmp_path)), lambda c: again.append(c) or 0) == 0
    ((*_, name, student, output_dir, steps, n, tuning),) = [command[3:] for command in again]
    assert (name, student, output_dir) == ("evaluate", f"student={tmp_path}/run", f"output_dir={tmp_path}")
    assert (steps, n, tuning) == ("steps=[1, 2]", "n=100", "protocol.tuning_n=0")
    assert all(part.done() for part in quickstart.parts_of(settings(tmp_path)))

    others = quickstart.parts_of(settings(tmp_path, "n=200", "prompts=[blue dots]"))
    assert [part.name for part in others if not part.done()] == ["pictures", "report"]
    with pytest.raises(
        ConfigError, match=r"store was made with seed=0, this quickstart has 1: choose another output_dir"
    ):
        quickstart.parts_of(settings(tmp_path, f"overrides=[{TINY},seed=1]"))


def test_a_part_that_fails_ends_it_and_the_log_says_where_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "distill")
    codes = iter([0, 3])
    parts = quickstart.parts_of(settings(tmp_path))
    assert quickstart.run_parts(parts, lambda command: next(codes)) == 3
    lines = [record.getMessage() for record in caplog.records]
    assert lines[-2].startswith("part 1 of 5: the teacher's trajectories; about ") and lines[-2].endswith(
        " left in all"
    )
    assert lines[-1].startswith("part 2 of 5: training; about ")
    assert "error: training ended with exit code 3" in capsys.readouterr().err


def test_two_quickstarts_do_not_share_a_folder(tmp_path: Path) -> None:
    with quickstart.alone(tmp_path), pytest.raises(ConfigError, match="another quickstart is running there"):
        with quickstart.alone(tmp_path):
            pass


def test_processes_share_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, expected in ((0, 2), (1, 1), (8, 8), (6, 4)):
        monkeypatch.setattr(quickstart, "gpu_count", lambda gpus=gpus: gpus)
        assert quickstart.processes_of(load("quickstart", QuickstartSettings, [])) == expected
    store, trained, *_ = quickstart.parts_of(settings(tmp_path, "processes=2"))
    for part, name in ((store, "trajectories"), (trained, "train")):
        at = part.command.index("launch")
        assert part.command[at + 1 : at + 4] == ["--num_processes", "2", "-m"] and name in part.command


def test_a_setting_that_cannot_work_is_refused_before_anything_begins(tmp_path: Path) -> None:
    for wrong in ("n=50", "steps=[0]", "processes=0"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            settings(tmp_path, wrong)
    with pytest.raises(ConfigError, match="max_train_stps"):
        quickstart.parts_of(settings(tmp_path, "overrides=[max_train_stps=3]"))


@pytest.mark.slow
def test_the_command_does_it_all_and_resumes(tmp_path: Path) -> None:
    given = [f"overrides=[{TINY.replace('single', 'zero2')}]", "n=100", "tuning_n=0", "steps=[1]"]
    command = [sys.executable, "-m", "distill", "quickstart", *given, f"output_dir={tmp_path}/out"]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count(" is done") == 5
    assert (tmp_path / "out/report/index.html").is_file()
