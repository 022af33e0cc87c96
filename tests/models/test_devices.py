"""Which device a process computes on, and what is said of GPUs that torch cannot use."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill.models import devices
from distill.models.devices import UnusableGPU, cpu_is_asked_for, found_gpus, hide_gpus_if_asked, own_device, reason
from tests.forked import ROOT, python

NAMES = ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment that says nothing about devices, in which torch has been kept from GPUs already."""
    torch.cuda.is_available()
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    devices.nvidia_smi.cache_clear()
    yield monkeypatch
    devices.nvidia_smi.cache_clear()


def program(folder: Path, name: str, said: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{said}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"ACCELERATE_USE_CPU": "true"}, True),
        ({"ACCELERATE_USE_CPU": "1"}, True),
        ({"ACCELERATE_USE_CPU": "False"}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, True),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, False),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"}, False),
        ({"CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_USE_CPU": "true"}, True),
    ],
)
def test_the_cpu_is_asked_for_by_either_variable(environment: dict[str, str], asked: bool) -> None:
    assert cpu_is_asked_for(environment) is asked
    before = environment.get("CUDA_VISIBLE_DEVICES")
    hide_gpus_if_asked(environment)
    assert environment.get("CUDA_VISIBLE_DEVICES") == ("" if asked else before)


def test_gpus_are_found_by_slurm_by_their_files_and_by_nvidia_smi(tmp_path: Path, bare: pytest.MonkeyPatch) -> None:
    bare.setenv("PATH", str(tmp_path))
    assert found_gpus({}, tmp_path) is None
    assert found_gpus({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": ""}, tmp_path) is None
    assert "SLURM_GPUS_ON_NODE=8" in str(found_gpus({"SLURM_GPUS_ON_NODE": "8"}, tmp_path))
    assert "SLURM_JOB_GPUS=0,1" in str(found_gpus({"SLURM_JOB_GPUS": "0,1"}, tmp_path))
    program(tmp_path, "nvidia-smi", "echo NVIDIA A100; echo NVIDIA A100")
    devices.nvidia_smi.cache_clear()
    assert "2 x NVIDIA A100" in str(found_gpus({}, tmp_path))
    (tmp_path / "nvidiactl").touch()  # the driver's own file says nothing of a GPU
    (tmp_path / "nvidia0").touch()
    assert "/dev/nvidia0" in str(found_gpus({}, tmp_path))


def test_the_reason_says_which_driver_is_needed(tmp_path: Path, bare: pytest.MonkeyPatch) -> None:
    bare.setenv("PATH", str(tmp_path))
    program(tmp_path, "nvidia-smi", "echo 535.183.01")
    assert "driver 535.183.01 is too old for CUDA 13.0, which needs 580 or newer" in reason("2.14.1", "13.0")
    assert "cannot start CUDA with driver 535.183.01" in reason("2.10.0", "12.8")
    assert "is for CPUs only" in reason("2.14.1+cpu", None)
    bare.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES=7 names none that is there" in reason("2.10.0", "12.8")
    program(tmp_path, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    devices.nvidia_smi.cache_clear()
    assert "no driver that runs" in reason("2.14.1", "13.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU that is here")
def test_gpus_that_torch_cannot_use_are_an_error_unless_the_cpu_is_asked_for(bare: pytest.MonkeyPatch) -> None:
    assert own_device().type == "cpu"
    bare.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UnusableGPU, match=r"SLURM_GPUS_ON_NODE=8.*torch can use none.*ACCELERATE_USE_CPU=true"):
        own_device()
    bare.setenv("ACCELERATE_USE_CPU", "true")
    assert own_device().type == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU that is here")
def test_a_training_that_would_leave_out_a_gpu_ends_with_one_line(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    settings = ["experiment=quickstart", "engine=single", f"data.store={tmp_path}/s", f"output_dir={tmp_path}/run"]
    done = subprocess.run(
        [python(), "-m", "distill", "train", *settings],
        env={**environment, "SLURM_GPUS_ON_NODE": "2", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: SLURM has given this job GPUs (SLURM_GPUS_ON_NODE=2)")
    assert len(done.stderr.splitlines()) == 1


def test_the_line_names_what_computes() -> None:
    assert devices.described(torch.device("cpu")).startswith(f"the CPU ({torch.get_num_threads()} threads); torch ")
    assert devices.described(torch.device("cpu"), 4).startswith("4 x CPU")
    assert torch.__version__ in devices.described(torch.device("cpu"))
