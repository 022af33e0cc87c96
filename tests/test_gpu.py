"""What only a GPU can show: pytest -m gpu. The other tests hide GPUs from themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from distill.benchmarks import gpu
from distill.benchmarks.common import SCHEDULE
from distill.benchmarks.gpu_tables import of
from distill.methods.lcm import LCM
from distill.models.devices import described, own_device
from distill.training.engine import EngineSettings
from distill.training.trained_network import TrainingRecipe
from tests.forked import ROOT
from tests.training.engine_worker import student, tiny_batch

pytestmark = pytest.mark.gpu
QUICK = ["experiment=quickstart", "data.num_samples=64", "data.samples_per_shard=32", "data.solver_steps=10"]


def said(*arguments: str, **environment: str) -> str:
    """What a command prints, on the GPU unless the environment says otherwise."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "distill", *arguments]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_gpu_is_taken_and_named() -> None:
    device = own_device()
    assert device.type == "cuda"
    assert torch.cuda.get_device_name(device) in described(device) and str(torch.version.cuda) in described(device)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loss and of the gradient's norm, within what the precision rounds."""
    found = []
    for cpu in ("true", "false"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", cpu)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        engine = EngineSettings(mixed_precision=precision).start()  # type: ignore[arg-type]
        assert engine.processes.device.type == ("cpu" if cpu == "true" else "cuda")
        recipe = TrainingRecipe(partial(torch.optim.AdamW, lr=1e-3))
        engine.prepare(student(True), {"student": recipe})
        (turn,) = LCM(SCHEDULE).turns(0)
        found.append(engine.updated(turn, [tiny_batch(0, 0, 4)], 0))
        engine.release()
    tolerance = 1e-3 if precision == "no" else 5e-2
    for name in ("loss", "grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=tolerance)


def test_a_store_and_a_training_use_the_gpu_and_leave_it_when_told(tmp_path: Path) -> None:
    store, name = f"data.store={tmp_path}/store", torch.cuda.get_device_name()
    assert name in said("trajectories", *QUICK, store)
    few = [
        "max_train_steps=2",
        "lr_warmup_steps=1",
        "global_batch_size=8",
        "validation_prompts=null",
        "method.skip=100",
    ]
    engines = ["single", "zero2"] if _has_deepspeed() else ["single"]
    for engine in engines:
        settings = [*QUICK, store, *few, f"engine={engine}"]
        assert name in said("train", *settings, f"output_dir={tmp_path}/{engine}")
        kept_off = said("train", *settings, f"output_dir={tmp_path}/{engine}-cpu", ACCELERATE_USE_CPU="true")
        assert "the CPU" in kept_off and name not in kept_off


def test_two_processes_keep_off_the_only_gpu_when_told(tmp_path: Path) -> None:
    store = f"data.store={tmp_path}/store"
    said("launch", "--num_processes", "2", "trajectories", *QUICK, store, ACCELERATE_USE_CPU="true")
    said("verify", str(tmp_path / "store"))


def test_the_benchmark_measures_the_memory_of_the_gpu(tmp_path: Path) -> None:
    assert gpu.run("tiny", ["machine", "peak", "sd15", "repeat"], 400, tmp_path) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert of(rows, "machine")[0]["device"] == torch.cuda.get_device_name()
    for row in [*of(rows, "lcm"), *of(rows, "recipe")]:
        assert row["peak_gib"] > 0


def _has_deepspeed() -> bool:
    from distill.config.packages import is_installed

    return is_installed("deepspeed")
