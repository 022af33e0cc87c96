"""The table of MLCM beside LCM: its means over seeds, and the command that makes it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from show_mlcm import METRICS, over_seeds  # noqa: E402

SETTING = {"steps": 2, "guidance": 1.0, "nfe": 2, "sampler": "lcm", "spacing": "lcm", "n": 100}


def row(value: float, error: float) -> dict[str, object]:
    return SETTING | dict.fromkeys(METRICS, value) | {"frechet_se": error, "caption_accuracy_se": 0.0}


def test_errors_are_those_of_the_mean_and_the_greater_of_two_kinds() -> None:
    alike = over_seeds([row(1.0, 0.3), row(1.0, 0.4)])
    assert alike["frechet"] == 1.0 and alike["frechet_se"] == pytest.approx(0.25)  # sqrt(.3² + .4²) / 2
    apart = over_seeds([row(1.0, 0.3), row(3.0, 0.4)])
    assert apart["frechet"] == 2.0 and apart["frechet_se"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert apart["caption_accuracy_se"] == pytest.approx(1.0) and "sharpness_se" not in apart
    assert over_seeds([row(1.0, 0.3)])["frechet_se"] == pytest.approx(0.3)


@pytest.mark.slow
def test_the_command_trains_both_and_writes_its_table(tmp_path: Path) -> None:
    short = (
        "method.stages.0.iterations=2,method.stages.1.iterations=1,method.stages.1.student_steps=1,max_train_steps=3"
    )
    overrides = [*short.split(","), "data.num_samples=4", "global_batch_size=4", "checkpointing_steps=2"]
    overrides += ["lr_warmup_steps=1", "dataloader_num_workers=0"]
    command = [sys.executable, "scripts/show_mlcm.py", f"output_dir={tmp_path}", "seeds=[0]", "n=100", "tuning_n=100"]
    command += ["steps=[1,2]", "guidances=[1.0]", f"overrides={json.dumps(overrides)}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second time it finds everything done
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [r["title"] for r in rows][:3] == ["teacher", "teacher, best tuned", "LCM-LoRA"]
    assert len(rows) == 1 + 2 * 6 and (tmp_path / "grid.png").is_file()
