"""Settings of speed change how networks are computed, and neither what they compute nor the names of their weights."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distill.models.execution import compile_blocks, execute
from distill.training import arithmetic
from distill.training.engine import Engine, EngineSettings
from distill.training.trained_network import TrainingRecipe
from tests.forked import python
from tests.tiny import CHANNELS, tiny_conditioning, tiny_unet
from tests.training.engine_worker import Distance, micro_batches, student

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def engines() -> Iterator[Any]:
    started: list[Engine] = []

    def start(lora: bool, **settings: Any) -> Engine:
        engine = EngineSettings(max_grad_norm=None, **settings).start()
        started.append(engine)
        optimizer = TrainingRecipe(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
        networks = student(lora=lora)
        teacher = networks.get("teacher", student(lora=True)["teacher"])
        engine.prepare({**networks, "teacher": teacher}, {"student": optimizer})
        return engine

    yield start
    for engine in started:
        engine.release()
    torch._dynamo.reset()


def losses(engine: Engine, steps: range) -> list[float]:
    turn = next(iter(Distance().turns(0)))
    return [engine.updated(turn, micro_batches(engine, step), step)["loss"] for step in steps]


@pytest.mark.parametrize(
    ("lora", "settings"),
    [(True, {"compile": "aot_eager"}), (False, {"channels_last": True})],
    ids=["compile", "channels_last"],
)
def test_a_run_has_the_losses_that_it_has_without_and_resumes_with_and_without(
    lora: bool, settings: dict[str, Any], engines: Any, tmp_path: Path
) -> None:
    plain = engines(lora)
    expected = losses(plain, range(4))
    names = list(plain.export_weights("student"))
    plain.release()

    other = engines(lora, **settings)
    assert losses(other, range(2)) == pytest.approx(expected[:2], rel=1e-4)
    assert list(other.export_weights("student")) == names
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    saved = other.describe()
    other.release()

    resumed = engines(lora)
    assert resumed.misfit(saved) is None
    resumed.load(tmp_path / "other", saved)
    assert losses(resumed, range(2, 3)) == pytest.approx(expected[2:3], rel=1e-4)
    (tmp_path / "plain").mkdir()
    resumed.save(tmp_path / "plain")
    resumed.release()

    again = engines(lora, **settings)
    again.load(tmp_path / "plain", saved)
    assert losses(again, range(3, 4)) == pytest.approx(expected[3:], rel=1e-4)


def test_blocks_that_repeat_are_compiled_and_no_others() -> None:
    torch._dynamo.reset()
    unet = tiny_unet()
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    before, given = list(unet.state_dict()), tiny_conditioning("sd15", 2)
    x, t = torch.randn(2, CHANNELS, 6, 6), torch.tensor([3, 999])
    with torch.no_grad():
        expected = unet(x, t, **given).sample
        compile_blocks(unet, backend)  # type: ignore[arg-type]
        torch.testing.assert_close(unet(x, t, **given).sample, expected, **TOLERANCE)
    assert graphs and list(unet.state_dict()) == before
    torch._dynamo.reset()


def test_images_are_kept_with_their_channels_innermost() -> None:
    unet, orders = tiny_unet(), []
    execute(unet, channels_last=True)
    for part in unet.modules():
        if isinstance(part, nn.Conv2d):
            assert part.weight.is_contiguous(memory_format=torch.channels_last)
            part.register_forward_hook(
                lambda _, __, out: orders.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.no_grad():
        unet(torch.randn(2, CHANNELS, 6, 6), torch.tensor([3, 999]), **tiny_conditioning("sd15", 2))
    assert orders and all(orders)


@pytest.mark.parametrize(("kernel", "flash"), [("auto", True), ("flash", True), ("math", False), ("efficient", False)])
def test_attention_is_computed_by_the_kernel_that_is_set(kernel: Any, flash: bool) -> None:
    q = torch.randn(1, 2, 16, 8)
    arithmetic.choose_attention(kernel)
    try:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        names = {event.name for event in seen.events()}
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in names) is flash
        assert ("aten::_scaled_dot_product_attention_math" in names) is not flash
        in_force = arithmetic.in_force()["torch"]["attention"]
        assert "math" in in_force and ("flash" in in_force) is flash
    finally:
        arithmetic.choose_attention()


def test_compiled_blocks_need_whole_weights() -> None:
    zero: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="compile needs all weights on every rank, .*compile=false or zero2"):
        EngineSettings(kind="deepspeed", deepspeed=zero, compile=True)


ZERO = """
import json, sys
import torch
import yaml
from tests.training.engine_worker import Distance, micro_batches, student
from distill.training.engine import EngineSettings
from distill.training.trained_network import TrainingRecipe

def trained(**settings):
    deepspeed = yaml.safe_load(open("configs/engine/zero2.yaml"))["deepspeed"]
    engine = EngineSettings(kind="deepspeed", deepspeed=deepspeed, max_grad_norm=None, **settings).start()
    engine.prepare(student(lora=True), {"student": TrainingRecipe(lambda p: torch.optim.AdamW(p, lr=1e-3))})
    turn = next(iter(Distance().turns(0)))
    losses = [engine.updated(turn, micro_batches(engine, step), step)["loss"] for step in range(3)]
    inside = engine._trained["student"].wrapped
    facts = [inside.optimizer.overlap_comm, str(inside.communication_data_type)]
    engine.release()
    return [losses, facts]

settings = [{}, {"compile": "aot_eager"}, {"channels_last": True}, {"mixed_precision": "bf16"}]
print("RESULT" + json.dumps([trained(**one) for one in settings]))
"""


@pytest.mark.slow
def test_under_zero_too_and_there_gradients_are_summed_in_float32_while_others_are_computed() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([python(), "-c", ZERO], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, *others = json.loads(done.stdout.partition("RESULT")[2])
    assert all(facts == [True, "torch.float32"] for _, facts in (plain, *others))
    for (losses, _), tolerance in zip(others, (1e-5, 1e-5, 2e-2), strict=True):
        assert losses == pytest.approx(plain[0], rel=tolerance)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs g++")
def test_inductors_losses_are_the_eager_ones(engines: Any) -> None:
    plain = engines(True)
    expected = losses(plain, range(3))
    plain.release()
    assert losses(engines(True, compile=True), range(3)) == pytest.approx(expected, rel=1e-4)
