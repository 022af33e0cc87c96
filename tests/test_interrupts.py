"""Ctrl-C long before a command has anything to save, and in one that works: a line, exit code 130, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.ranks import ROOT
from tests.tiny import save_tiny


def interrupted(seconds: float, *command: str, until: Path | None = None) -> tuple[int, str]:
    """Exit code and what was said by a command whose process group, as by a terminal, got a SIGINT."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + (seconds if until is None else 120.0)
    while (
        process.poll() is None
        and time.monotonic() < end
        and not (until is not None and any(until.glob("shard-*.json")))
    ):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


@pytest.mark.parametrize(
    ("seconds", "how"),
    [(0.3, ("scripts/train.py",)), (2.0, ("scripts/train.py",)), (0.6, ("-m", "distill.commands.train"))],
)
def test_ctrl_c_before_anything_is_done_is_a_line(seconds: float, how: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ("experiment=quickstart", f"output_dir={tmp_path}/run", f"data.store={tmp_path}/none")
    command = (str(ROOT / how[0]),) if len(how) == 1 else how
    code, said = interrupted(seconds, *command, *arguments)
    assert "Traceback" not in said and code in (130, 2)  # 2 where it had found out already that there is no store
    assert len(said.splitlines()) == 1


def test_an_interrupted_store_says_what_it_keeps_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a boat\ntwo owls\n")
    teacher = save_tiny(tmp_path / "teacher", "sd15")
    settings = ["experiment=lcm_lora_sd15", f"model.pretrained_model_name_or_path={teacher}", "mixed_precision=no"]
    settings += [f"data.prompts={tmp_path}/prompts.txt", "data.num_samples=5000", "data.samples_per_shard=4"]
    settings += ["data.solver_steps=8", f"data.store={tmp_path}/store", f"output_dir={tmp_path}/out"]
    script = str(ROOT / "scripts/make_trajectories.py")
    code, said = interrupted(120.0, script, *settings, until=tmp_path / "store")
    assert code == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1] == (
        "interrupted: the shards that are finished are kept, and the same command continues"
    )
    assert list((tmp_path / "store").glob("shard-*.json")) and not list((tmp_path / "store").glob("*.tmp"))
