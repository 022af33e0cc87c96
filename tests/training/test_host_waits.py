"""What passes between host and device in a step: the turns of all methods on GPU tensors that hold no numbers.

Such tensors have a shape, a type and a device, and no GPU is needed for them: an operation whose operands lie on two
devices fails, and what crosses from one to the other is seen.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill.diffusion.prediction import Prediction, to_denoised
from distill.diffusion.random import Context, RandomRequest, packed
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch
from distill.methods.base import Method, Turn
from distill.methods.lcm import LCM
from distill.methods.lightning import LightningAdversarial, LightningConvert, LightningMSE
from distill.methods.mlcm import MLCM
from distill.methods.pcm import PCM
from distill.methods.tcd import TCD, TCDStage
from distill.models.discriminator import LatentDiscriminator
from distill.models.fake_score import FakeScore
from distill.models.families.loading import load_teacher
from distill.models.student import LoRAStudent
from distill.training.engine import Engine, EngineSettings
from distill.training.trained_network import TrainingRecipe
from tests.tiny import CHANNELS, TOKENS, save_tiny

B = 4
GPU = torch.device("cuda", 0)
FOUR = [250, 500, 750, 1000]
MILESTONES = {"segments": 1, "grid": 8, "skip": 125, "iterations": 10, "source": "student", "substeps": 3}
CRITICS = {**MILESTONES, "matching": 1.0, "adversarial": 1.0}
Make = Callable[[NoiseSchedule], Method]

METHODS: dict[str, tuple[Make, list[int]]] = {
    "lcm": (lambda s: LCM(s), [900, 880]),
    "lcm, noised": (lambda s: LCM(s, source="noised"), [0]),
    "lcm, average": (lambda s: LCM(s, target="ema"), [900, 880]),
    "lightning, mse": (lambda s: LightningMSE(s, 32, 128, source="trajectory"), [1000, 969]),
    "lightning, mse, noised": (lambda s: LightningMSE(s, 8, 32, guidance=6.0), [0]),
    "lightning, 8 steps": (lambda s: LightningAdversarial(s, 8, 32, renoise_times=()), [0]),
    "lightning, 2 steps": (lambda s: LightningAdversarial(s, 2, 8, times=FOUR, r1=1.0), [0]),
    "lightning, convert": (lambda s: LightningConvert(s, times=FOUR), [0]),
    "mlcm": (lambda s: MLCM(s, [stage(loss_space="v", distance="huber")]), [900, 875]),
    "mlcm, rollout": (lambda s: MLCM(s, [stage(source="rollout")]), [0]),
    "mlcm, student": (lambda s: MLCM(s, [MILESTONES]), [0]),
    "mlcm, critics": (lambda s: MLCM(s, [CRITICS]), [0]),
    "tcd": (lambda s: TCD(s, ends="inference"), [900, 880]),
    "tcd, stages": (lambda s: TCD(s, 25, stages=[TCDStage(4, 10, adversarial=0.5)]), [900, 875]),
    "pcm": (lambda s: PCM(s), [900, 875]),
}
"""Of each a method, and the times of the states that a batch has of each sample."""


def stage(**settings: Any) -> dict[str, Any]:
    return {"segments": 8, "skip": 25, "iterations": 10, **settings}


class Crossings(TorchDispatchMode):
    """Counts copies to the GPU, and numbers that are read from it, by the line of this package that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        devices = [x.device.type for x in (*args, result) if isinstance(x, Tensor)]
        if name == "aten::_local_scalar_dense" and devices != ["cpu"]:
            self.waits[_asker()] += 1
        if name in ("aten::_to_copy", "aten::copy_") and len(set(devices)) > 1:
            self.copies[_asker()] += 1
        return result


def _asker() -> str:
    frames = [f for f in traceback.extract_stack() if "/distill/" in f.filename]
    return f"{frames[-1].filename.rpartition('/distill/')[2]}:{frames[-1].lineno} {frames[-1].line}" if frames else "?"


def tiny_batch(times: list[int], shape: tuple[int, ...], text: Mapping[str, int]) -> Batch:
    """On the CPU; of `text` the widths of the prompts' entries."""
    states, given = torch.randn(B, len(times), *shape), {"time_ids": torch.ones(B, 6)}
    given["encoder_hidden_states"] = torch.randn(B, TOKENS, text["encoder_hidden_states"])
    given["text_embeds"] = torch.randn(B, text["text_embeds"])
    return Batch(states, torch.tensor([times] * B), given, dict(given), torch.full((B,), 2.0), positions=(0, 1, 2, 3))


def to_fake_gpu(module: nn.Module) -> None:
    for part in module.modules():
        for name, p in [*part._parameters.items()]:
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device=GPU)
                part._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, b in [*part._buffers.items()]:
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=GPU)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("teacher"), "sdxl")


@dataclass(frozen=True)
class Plain:
    """A denoiser, or a discriminator, of one convolution, behind the wall that UNets are behind."""

    module: nn.Conv2d
    schedule: NoiseSchedule

    def __call__(self, x: Any, t: Tensor, conditioning: Any, origin: Any = None) -> Any:
        if isinstance(x, list):
            return [self.module(one).flatten(1).mean(1) for one in x]
        return to_denoised(Prediction.EPSILON, self.module(x), x, t, self.schedule)


def turns_seen(method: Method, networks: Mapping[str, Any], batch: Batch) -> Iterator[tuple[Turn, Crossings, Context]]:
    """Of each turn what crosses in its second step, and its draws; within the mode for tensors without numbers."""
    moved = batch.to(GPU)
    for turn in method.turns(0):
        asked: tuple[RandomRequest, ...] = ()
        for step in (0, 1):
            seen, context = Crossings(), Context(0, step, batch.positions)
            with seen:
                context.foresee(asked, GPU)
                losses = turn.loss(networks, moved, context)
            asked = context.requested
        scalars = [x for x in (losses.total, *losses.parts.values()) if isinstance(x, Tensor)]
        assert {x.device for x in scalars} == {GPU}
        yield turn, seen, context


@pytest.mark.parametrize("name", METHODS)
def test_of_what_a_turn_draws_there_is_one_copy_to_the_device_and_no_wait(name: str) -> None:
    """From the second step on; in the first one nobody knows yet what the losses are going to ask for."""
    make, times = METHODS[name]
    method = make(NoiseSchedule.scaled_linear())
    with FakeTensorMode(allow_non_fake_inputs=True):
        names = ("student", "teacher", "student_ema", "discriminator", "fake_score")
        networks = {n: Plain(nn.Conv2d(CHANNELS, CHANNELS, 1, device=GPU), method.schedule) for n in names}
        batch = tiny_batch(times, (CHANNELS, 4, 4), {"encoder_hidden_states": 32, "text_embeds": 28})
        for turn, seen, context in turns_seen(method, networks, batch):
            assert not seen.waits
            assert sum(seen.copies.values()) == bool(context.requested), f"{turn.updates}: {dict(seen.copies)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lcm", "lightning, 2 steps", "mlcm, critics"])
def test_nor_do_the_networks_of_a_turn_copy_or_wait(name: str, pipeline: str) -> None:
    make, times = METHODS[name]
    teacher = load_teacher(pipeline)
    method = make(teacher.schedule)
    networks: dict[str, Any] = {
        "discriminator": LatentDiscriminator(conditional=True).network(teacher),
        "fake_score": FakeScore(4).network(teacher),
    }
    networks |= LoRAStudent(4, 4).networks(teacher, 0, True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in {id(n.module): n.module for n in networks.values()}.values():
            to_fake_gpu(module)
        batch = tiny_batch(times, teacher.latent_shape, {"encoder_hidden_states": 32, "text_embeds": 28})
        for turn, seen, context in turns_seen(method, networks, batch):
            assert not seen.waits
            assert sum(seen.copies.values()) == bool(context.requested), f"{turn.updates}: {dict(seen.copies)}"


def test_a_number_that_is_made_or_read_within_a_turn_is_seen() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Crossings() as seen:
        x = torch.zeros(3, device=GPU)
        torch.zeros(3).to(GPU)
        with pytest.raises(Exception, match="aten._local_scalar_dense"):
            float(x.sum())
    assert sum(seen.copies.values()) == 1


def test_what_is_packed_comes_out_as_it_was() -> None:
    random = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, 5, generator=random),
        torch.randint(0, 1000, (3,), generator=random),
        torch.randn(3, 2, 1, generator=random, dtype=torch.float64),
        torch.tensor([True, False]),
        torch.empty(0, 4),
    ]
    found = packed(tensors, torch.device("cpu"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, found, strict=True))


# --- the engine ---


class Reads(TorchFunctionMode):
    """Counts calls by which the host reads numbers of tensors."""

    READING = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.numpy}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READING:
            self.found.append(_asker())
        return func(*args, **(kwargs or {}))


def test_a_step_of_several_turns_reads_numbers_once(pipeline: str) -> None:
    """A GPU's queue of work runs empty at each read. On a CPU nothing waits, but the reads are the same."""
    teacher = load_teacher(pipeline)
    method = LightningAdversarial(teacher.schedule, 4, 8)
    networks = {"discriminator": LatentDiscriminator(conditional=True).network(teacher)}
    networks |= LoRAStudent(2, 2).networks(teacher, 0, True)
    engine: Engine = EngineSettings().start()
    recipe = TrainingRecipe(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), ema_decay=0.9)
    engine.prepare(networks, {"discriminator": TrainingRecipe(recipe.optimizer), "student": recipe})
    try:
        batch = tiny_batch([0], teacher.latent_shape, {"encoder_hidden_states": 32, "text_embeds": 28})
        for step in range(3):
            reads = Reads()
            with reads:
                for turn in method.turns(step):
                    engine.update(turn, [batch], step)
                inside = len(reads.found)
                scalars, flags = engine.read(False, True)
            if step:  # the optimizers' first steps
                assert inside == 0, reads.found
                assert len(reads.found) == 1, reads.found
            assert flags == (False, True)
            assert scalars["student/skipped"] == scalars["discriminator/skipped"] == 0
            assert scalars["student/grad_norm"] > 0 and scalars["discriminator/loss"] > 0
    finally:
        engine.close()
