"""A run whose method trains networks beside the student: made of the teacher, trained, saved and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.clocks import is_clock
from tests.forked import python
from tests.test_user_commands import ROOT, run, write_store

CONSISTENCY = "{segments: 1, skip: 20, iterations: 3}"
FROM_STUDENT = "segments: 1, grid: 8, skip: 125, source: student, student_steps: 2"
CRITICS = f"{{{FROM_STUDENT}, matching: 0.5, adversarial: 0.5, iterations: 5}}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A store of a tiny SDXL-shaped teacher, and a method of two stages on it."""
    common = write_store(tmp_path_factory.mktemp("critics"))
    method = ["method=mlcm_critics", f"method.stages=[{CONSISTENCY},{CRITICS}]", "max_train_steps=8"]
    sizes = ["global_batch_size=4", "lora_rank=2", "lora_alpha=2", "lr_warmup_steps=0", "log_every=1", "ema_decay=0.9"]
    return [*common, *method, *sizes, "checkpointing_steps=4", "gradient_checkpointing=true"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not is_clock(k)} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / "step-00000008").rglob("*.safetensors"))
    return {f"{f.parent.name}/{f.name}/{name}": w for f in files for name, w in load_file(f).items()}


@pytest.mark.distributed
def test_stages_with_critics_are_trained_stopped_and_gone_on_with_to_the_bit(
    settings: list[str], tmp_path: Path
) -> None:
    """The rates are the method's own. The signal falls into the second stage."""
    command = [python(), "scripts/train.py", *settings]
    run(*command, f"output_dir={tmp_path}/whole")
    whole = metrics(tmp_path / "whole")
    assert [{key.partition("/")[0] for key in row if "/" in key} for row in whole] == [{"student"}] * 3 + [
        {"student", "discriminator", "fake_score", "alarm"}
    ] * 5
    rates = {name: whole[5][f"{name}/lr"] for name in ("student", "discriminator", "fake_score")}
    assert rates == {"student": 1e-4, "discriminator": 1e-4, "fake_score": 1e-4}
    assert {"student/matching_loss", "student/adversarial_loss", "discriminator/real_accuracy"} <= whole[5].keys()

    process = subprocess.Popen(
        [*command, f"output_dir={tmp_path}/stopped"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75 and 4 <= len(metrics(tmp_path / "stopped")) < 8
    run(*command, f"output_dir={tmp_path}/stopped")
    assert metrics(tmp_path / "stopped") == whole
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert first.keys() == second.keys() and all(torch.equal(w, second[name]) for name, w in first.items())
    trained = {name.partition("/")[0] for name in first}
    assert trained == {"student", "discriminator", "fake_score"}
    assert {name.split("/")[0] for name in first if "/ema." in name} == {"student"}

    run(python(), "scripts/export.py", f"run={tmp_path}/whole", f"output_dir={tmp_path}/lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.distributed
def test_an_alarm_ends_a_run_that_is_told_to_stop(settings: list[str], tmp_path: Path) -> None:
    """A discriminator's last layer is zero in its first step: it can only guess. Saved, and neither done nor to be run
    again as it is."""
    command = [python(), "scripts/train.py", *settings, f"output_dir={tmp_path}/run"]
    command += ["health.stop=true", "health.logged_steps=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.count("WARNING chance: discriminator does no better than guessing") == 1
    assert ended.stderr.splitlines()[-1].endswith("ended at step 4, for chance; health.stop=false continues")
    assert [row.get("alarm/chance") for row in metrics(tmp_path / "run")] == [None, None, None, 1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000004\n"
    assert not any((tmp_path / "run" / name).exists() for name in ("DONE", "PREEMPTED"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("~networks.fake_score", ["trains a fake_score", "networks=critics"]),
        ("networks.fake_score.rank=0", ["networks.fake_score.rank must be at least 1", "got 0"]),
    ],
)
def test_a_mistake_about_them_is_one_line(settings: list[str], tmp_path: Path, override: str, words: list[str]) -> None:
    command = [python(), "scripts/train.py", *settings, f"output_dir={tmp_path}/run", override]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 2 and lines[-1].startswith("error: "), ended.stderr
    assert all(word in lines[-1] for word in words), lines[-1]
    assert not (tmp_path / "run").exists()
