"""The same sums give the same bits: what commands set before torch is loaded, when they do not, what is recorded."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.config.settings import EvaluateSettings, SampleSettings, TrainSettings
from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.models.denoiser import NetworkDenoiser
from distill.models.lora import add_lora, only_adapter
from distill.training import arithmetic
from distill.training.run import _warn_of_other_bits
from tests.tiny import CHANNELS, FAMILIES, tiny_conditioning, tiny_unet

ROOT = Path(__file__).resolve().parents[2]
T = torch.tensor([7, 1000])


def answer(unet: nn.Module, family: str) -> torch.Tensor:
    denoiser = NetworkDenoiser(unet, NoiseSchedule.scaled_linear(), Prediction.EPSILON)
    x = torch.randn(len(T), CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return denoiser(x, T, tiny_conditioning(family, len(T))).eps


def misaligned(unet: nn.Module) -> None:
    """Moves each weight to another place relative to a line of 64 bytes, as files that are mapped into memory do."""
    for i, weight in enumerate(unet.parameters()):
        weight.data = arithmetic.at(weight.data, 4 * (1 + i % 15))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_answers_the_same_wherever_its_weights_lie_and_with_a_lora_switched_off(family: str) -> None:
    unet = tiny_unet(family).requires_grad_(False)
    aligned = answer(unet, family)
    misaligned(unet)
    assert any(weight.data_ptr() % 64 for weight in unet.parameters())
    assert torch.equal(answer(unet, family), aligned)
    for adapter in add_lora(unet, rank=3, alpha=3):
        nn.init.normal_(adapter, std=0.3)
    student = answer(unet, family)
    misaligned(unet)
    assert torch.equal(answer(unet, family), student) and not torch.allclose(student, aligned, atol=0.1)
    with only_adapter(unet, None):
        assert torch.equal(answer(unet, family), aligned)


def python(code: str, **environment: str) -> list[str]:
    """What a fresh process prints, in which neither the tests nor the user have set what the product sets."""
    ours = (*arithmetic.VARIABLES, *arithmetic.ALLOCATORS)
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", "from distill.training import arithmetic\n" + code]
    kept |= {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=kept, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch multiplies without MKL")
OLDER = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}  # on Intel's processors MKL then sums as it does on AMD's


@MKL
def test_what_is_set_is_what_makes_products_independent_of_alignment() -> None:
    found = "print(arithmetic.products_depend_on_alignment())"
    assert python(found, **OLDER) == ["True"]
    assert python(f"arithmetic.prepare()\n{found}", **OLDER) == ["False"]
    assert not arithmetic.products_depend_on_alignment()  # here, as in every command


def test_nothing_heavy_is_imported_by_what_comes_before_torch() -> None:
    heavy = "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert python(f"import sys\narithmetic.prepare()\n{heavy}") == ["[]"]


@pytest.fixture
def restored() -> Any:
    yield
    arithmetic.settle()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


COMMAND = """
import os, sys
from distill.commands.running import run_script
from distill.config.settings import TrainSettings

def main(settings):
    import torch
    precision = torch.get_float32_matmul_precision()
    print(os.environ.get("MKL_CBWR"), torch.are_deterministic_algorithms_enabled(), precision)
    print(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))

sys.argv[1:] = ["experiment=quickstart", *"%s".split()]
run_script(main, "train", TrainSettings)
"""


@pytest.mark.parametrize(
    "given, found",
    [
        ("deterministic=auto", "AUTO,STRICT True highest"),
        ("deterministic=false matmul_precision=high", "None False high"),
    ],
)
def test_every_command_computes_as_its_settings_say(given: str, found: str) -> None:
    assert python(COMMAND % given, CUDA_VISIBLE_DEVICES="")[-2:] == [found, "expandable_segments:True"]


@pytest.mark.parametrize("schema", [TrainSettings, SampleSettings, EvaluateSettings])
def test_what_multiplies_has_a_setting_of_its_precision(schema: Any, restored: None) -> None:
    assert schema.model_fields["attention"].default == "auto"  # what `run_script` and `distill.sample` look for
    default = schema.model_fields["matmul_precision"].default
    arithmetic.settle(matmul_precision="high")
    assert arithmetic.in_force()["torch"]["float32_matmul_precision"] == "high"
    arithmetic.settle(matmul_precision=default)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_users_own_value_stays_and_false_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in arithmetic.VARIABLES:
        monkeypatch.delenv(name)
    arithmetic.prepare(False)
    assert not arithmetic.VARIABLES.keys() & os.environ.keys()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    arithmetic.prepare("auto")
    assert {name: os.environ[name] for name in arithmetic.VARIABLES} == arithmetic.VARIABLES | {
        "MKL_CBWR": "COMPATIBLE"
    }


@pytest.mark.parametrize("deterministic", ["auto", False])
@pytest.mark.parametrize(
    "given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}]
)
def test_a_gpus_allocator_has_segments_that_grow_unless_the_user_has_said_how(
    given: dict[str, str], deterministic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in arithmetic.ALLOCATORS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    arithmetic.prepare(deterministic)
    found = {name: os.environ[name] for name in arithmetic.ALLOCATORS if name in os.environ}
    assert found == (given or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize("deterministic", ["auto", True, False])
def test_torch_is_told_what_is_asked(deterministic: Any, restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        arithmetic.settle(deterministic)
        expected = not gpu if deterministic == "auto" else deterministic
        assert torch.are_deterministic_algorithms_enabled() is torch.backends.cudnn.deterministic is expected


def test_the_record_names_the_processor_the_libraries_and_what_is_in_force() -> None:
    found = json.loads(json.dumps(arithmetic.in_force()))
    assert found["processor"]["name"] and found["processor"]["cores"] >= 1
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert found["processor"]["vendor"] and "avx2" in found["processor"]["instructions"]
    assert found["torch"]["threads"] == torch.get_num_threads() == 1
    assert found["torch"]["deterministic_algorithms"] is True
    assert found["torch"]["libraries"] and found["torch"]["cpu_capability"]
    assert found["variables"]["MKL_CBWR"] == os.environ["MKL_CBWR"]


def test_a_run_that_goes_on_with_other_arithmetic_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = {"arithmetic": arithmetic.in_force()}
    before = json.loads(json.dumps(now))
    file = tmp_path / "environment.json"
    with caplog.at_level(logging.WARNING):
        for same in ("{}", "", json.dumps(before), '{"arithmetic": null}'):
            file.write_text(same)
            _warn_of_other_bits(tmp_path, now)
        assert not caplog.records
        before["arithmetic"]["processor"] |= {"name": "another", "instructions": ["avx2"], "cores": 128}
        before["arithmetic"]["torch"]["threads"] = 8
        file.write_text(json.dumps(before))
        _warn_of_other_bits(tmp_path, now)
    (record,) = caplog.records
    assert "within rounding, not to the bit" in record.getMessage()
    name = now["arithmetic"]["processor"]["name"]
    assert f"processor.name another, now {name}; processor.instructions; torch.threads 8, now 1" in record.getMessage()


def test_convolutions_round_as_products_of_matrices_do() -> None:
    """On GPUs; what is told to torch can be seen anywhere."""
    try:
        cases: tuple[tuple[Any, bool], ...] = (("high", True), ("highest", False))
        for precision, tf32 in cases:
            arithmetic.settle(matmul_precision=precision)
            assert torch.backends.cudnn.allow_tf32 is tf32
            assert arithmetic.in_force()["torch"]["cudnn"]["allow_tf32"] is tf32
    finally:
        arithmetic.settle()
        torch.use_deterministic_algorithms(True)
