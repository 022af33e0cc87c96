"""`distill benchmark gpu` on a CPU, at tiny size: what it finds, what it leaves out, and its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.benchmarks import gpu
from distill.benchmarks.gpu_tables import tables
from distill.benchmarks.lcm_recipe import Recipe
from distill.benchmarks.networks import MODELS
from distill.config.settings import BENCHMARKS, GPU_SECTIONS
from tests.forked import ROOT


def found(folder: Path) -> list[dict]:
    return json.loads((folder / "gpu.json").read_text())


def test_sections_are_measured_and_a_failure_of_one_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: gpu.GPUBenchmark) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.SECTIONS, "sdxl", fails)
    torch.use_deterministic_algorithms(False)  # as it is on a GPU by default
    try:
        assert gpu.run("tiny", ["machine", "peak", "sdxl", "repeat"], 300, tmp_path) == 1
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True)
    rows = {row["section"]: row for row in found(tmp_path)}
    assert rows["machine"]["device"] and rows["machine"]["packages"]["torch"] and rows["peak"]["tflops"] > 0
    assert rows["sdxl"]["failed"] == "RuntimeError: no such kernel" and rows["sdxl"]["trace"]
    repeats = [row for row in found(tmp_path) if row["section"] == "repeat"]
    assert [row["deterministic"] for row in repeats] == [False, True] and repeats[1]["step_seconds"] > 0
    assert rows["repeat"]["differ"] == 0 < rows["repeat"]["weights"]  # on a CPU bits repeat themselves
    text = (tmp_path / "gpu.md").read_text()
    assert "failed (RuntimeError: no such kernel)" in text and "three steps twice (deterministic): 0 of" in text
    assert text.strip() in capsys.readouterr().out


def test_what_the_budget_does_not_allow_is_left_out_and_said(tmp_path: Path) -> None:
    assert gpu.run("tiny", ["peak", "quickstart"], 1, tmp_path) == 0
    assert [row.get("skipped") for row in found(tmp_path)] == ["out of time", "out of time", None]
    assert "- peak: left out (out of time)" in (tmp_path / "gpu.md").read_text()


def test_every_section_of_the_settings_is_there() -> None:
    assert tuple(gpu.SECTIONS) == GPU_SECTIONS == tuple(BENCHMARKS["gpu"]["sections"])


def test_the_tables_set_each_step_beside_the_recipe_of_as_many_samples() -> None:
    step = {"section": "lcm", "size": "sdxl", "source": "trajectory", "checkpointed": True}
    fast = {**step, "samples": 4, "samples_per_second": 6.0, "outside_networks": 0.021, "share_of_peak": 0.5}
    rows = [
        {**step, "samples": 1, "samples_per_second": 2.0},
        {**fast, "peak_gib": 12.0},
        {**step, "samples": 64, "out_of_memory": True},
        {"section": "recipe", "size": "sdxl", "samples": 4, "checkpointed": True, "samples_per_second": 3.0}
        | {"peak_gib": 20.0},
        {"section": "lightning", "conditional": True, "samples": 1, "out_of_memory": True},
    ]
    lines = tables(rows).splitlines()
    assert any(line.endswith("| 4 | yes | no | 6 | 50.0 % | 2.1 % | 12 | 2.00 | 0.60 |") for line in lines)
    assert any(line.endswith("| 1 | yes | no | 2 |  |  |  |  |  |") for line in lines)
    assert sum("out of memory" in line for line in lines) == 2
    widths = {line.count("|") for line in lines if "trajectory" in line or line.startswith("| network")}
    assert len(widths) == 1


def test_the_usual_step_follows_its_networks_device_and_dtype() -> None:
    model, where = MODELS["tiny_sdxl"], ("cpu", torch.bfloat16)
    networks = (model.build_unet(*where), model.build_unet(*where), model.build_vae(*where))
    shown = {"batch_size": 1, "pixels": 8 * model.side, "tokens": model.tokens, "rank": model.rank}
    usual = Recipe(*networks, model.build_encoders(*where), **shown)
    before = [p.detach().clone() for p in usual.trained]
    usual.step(0)
    assert (usual.device.type, usual.dtype) == ("cpu", torch.bfloat16)
    assert any(not torch.equal(p, old) for p, old in zip(usual.trained, before, strict=True))


@pytest.mark.slow
def test_all_of_it_runs_at_tiny_size(tmp_path: Path) -> None:
    settings = ["size=tiny", "budget=1500", f"output_dir={tmp_path}"]
    command = [sys.executable, "-m", "distill", "benchmark", "gpu", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = found(tmp_path)
    assert {"lcm", "recipe", "lightning", "repeat", "command"} <= {row["section"] for row in rows}
    assert {row["name"]: row.get("exit", "0") for row in rows if row["section"] == "command"} == {
        "trajectories": "0",
        "train zero2 no": "0",
        "export": "0",
        "quickstart": "0",
    }
