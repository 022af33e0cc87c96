"""The table of MLCM beside LCM: its means over seeds, and the command that makes it."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from distill.config.loading import ConfigError, load
from distill.config.settings import ShowMLCMSettings
from distill.studies.mlcm import METRICS, main
from distill.studies.seeds import over_seeds
from tests.forked import python

ROOT = Path(__file__).resolve().parents[1]


def row(value: float, error: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, value) | {"frechet_se": error, "caption_accuracy_se": 0.0}


def test_errors_are_those_of_the_mean_and_the_greater_of_two_kinds() -> None:
    """Seeds share their pictures' noise: over pictures, the mean of two is no surer than one."""
    alike = over_seeds([row(1.0, 0.3), row(1.0, 0.4)], METRICS)
    assert alike["frechet"] == 1.0 and alike["frechet_se"] == pytest.approx(0.35)
    apart = over_seeds([row(1.0, 0.3), row(3.0, 0.4)], METRICS)
    assert apart["frechet"] == 2.0 and apart["frechet_se"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert apart["caption_accuracy_se"] == pytest.approx(1.0) and "sharpness_se" not in apart
    assert over_seeds([row(1.0, 0.3)], ["frechet"]) == {"frechet": 1.0, "frechet_se": pytest.approx(0.3)}


def test_more_steps_than_milestones_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    cfg = load("show_mlcm", ShowMLCMSettings, ["steps=[2,9]", f"output_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"^steps: steps must be within 1 ... 8, got 9$"):
        main(cfg)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_trains_both_and_writes_its_table(tmp_path: Path) -> None:
    short = (
        "method.stages.0.iterations=2,method.stages.1.iterations=1,method.stages.1.student_steps=1,max_train_steps=3"
    )
    overrides = [*short.split(","), "data.num_samples=4", "global_batch_size=4", "checkpointing_steps=2"]
    overrides += ["lr_warmup_steps=1", "dataloader_num_workers=0"]
    command = [python(), "scripts/show_mlcm.py", f"output_dir={tmp_path}", "seeds=[0]", "n=100", "tuning_n=100"]
    command += ["steps=[1,2]", "guidances=[1.0]", f"overrides={json.dumps(overrides)}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second time it finds everything done
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    rows, differences = report["rows"], report["differences"]
    assert [r["title"] for r in rows][:3] == ["teacher", "teacher, best tuned", "LCM-LoRA"]
    assert len(rows) == 1 + 2 * 6 and all((tmp_path / f"{name}.png").is_file() for name in ("grid", "curves"))
    assert [(r["title"], r["steps"]) for r in differences[:2]] == [("MLCM, chain − LCM-LoRA", s) for s in (1, 2)]
    known = {(r["title"], r["steps"]): r for r in rows}
    for found in differences:
        a, b = (known[title, found["steps"]] for title in found["title"].split(" − "))
        for name in ("caption_accuracy", "frechet", "teacher_consistency"):
            assert found[name] == pytest.approx(a[name] - b[name], abs=1e-9) and found[f"{name}_se"] >= 0
    text = (tmp_path / "report.md").read_text()
    assert "MLCM, re-noising − LCM-LoRA" in text and "![curves](curves.png)" in text
