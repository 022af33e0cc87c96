"""The engine in one process, against plain torch. Two processes and DeepSpeed: test_distributed.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from omegaconf import OmegaConf
from torch import nn

from distill.diffusion.random import Context
from distill.methods.base import Losses, Turn
from distill.training.engine import Engine, EngineSettings
from distill.training.learning_rate import LearningRate
from distill.training.loop import _take_turns
from distill.training.processes import collectives_timeout
from distill.training.skipped import NonFiniteError
from distill.training.trained_network import TrainingRecipe
from tests.training.engine_worker import Distance, Duel, micro_batches, relative_distance, student, tiny_batch

CONFIGS = Path(__file__).parents[2] / "configs" / "engine"
RATE = 1e-2


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=RATE, weight_decay=0.1)


Make = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[Make]:
    """Starts engines on the LoRA student (or other networks), and releases them afterwards."""
    engines: list[Engine] = []

    def build(networks: dict[str, Any] | None = None, plan: TrainingRecipe | None = None, **settings: Any) -> Engine:
        engine = EngineSettings(**{"max_grad_norm": None, **settings}).start()
        engines.append(engine)
        networks = networks or student(lora=True)
        trained = [name for name in networks if name in ("student", "discriminator")]
        engine.prepare(networks, dict.fromkeys(trained, plan or TrainingRecipe(adamw)))
        return engine

    yield build
    for engine in engines:
        engine.release()


def turn() -> Turn:
    return next(iter(Distance().turns(0)))


def train(engine: Engine, steps: int, turn: Turn | None = None) -> list[dict[str, float]]:
    turn = turn or next(iter(Distance().turns(0)))
    return [engine.updated(turn, micro_batches(engine, step), step) for step in range(steps)]


def copies(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in weights.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- one step ---------------------------------------------------------------------------------------------------


def by_hand(
    steps: int, max_grad_norm: float | None, decay: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """The same training without an engine: one batch a step, torch's clipping, the average written out."""
    networks = student(lora=True)
    weights = {n: p for n, p in networks["student"].module.named_parameters() if p.requires_grad}
    optimizer = adamw(list(weights.values()))
    average, norms = copies(weights), []
    for step in range(steps):
        batch = tiny_batch(step, 0, 8)
        Distance().loss(networks, batch, Context(0, step, batch.positions)).total.backward()
        norms.append(float(torch.sqrt(sum((p.grad**2).sum() for p in weights.values()))))
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norms[-1])
        for p in weights.values():
            p.grad.mul_(scale)
        optimizer.param_groups[0]["lr"] = RATE * (step + 1) / 10
        optimizer.step()
        optimizer.zero_grad()
        average = {n: decay * average[n] + (1 - decay) * p.detach() for n, p in weights.items()}
    return copies(weights), average, norms


@pytest.mark.parametrize("accumulation, max_grad_norm", [(1, None), (4, 0.1)])
def test_training_is_the_textbook_loop(make: Make, accumulation: int, max_grad_norm: float | None) -> None:
    expected, average, norms = by_hand(4, max_grad_norm, decay=0.7)
    plan = TrainingRecipe(adamw, schedule=lambda step: (step + 1) / 10, ema_decay=0.7)
    engine = make(plan=plan, gradient_accumulation_steps=accumulation, max_grad_norm=max_grad_norm)
    scalars = train(engine, 4)
    assert [s["grad_norm"] for s in scalars] == pytest.approx(norms, rel=1e-4)
    assert [s["lr"] for s in scalars] == pytest.approx([RATE * k / 10 for k in (1, 2, 3, 4)])
    assert relative_distance(engine.export_weights("student"), expected) < 1e-5
    assert relative_distance(engine.export_weights("student", ema=True), average) < 1e-5
    assert relative_distance(average, expected) > 1e-2  # or the average would prove nothing


OPTIMIZERS = {
    "adamw": adamw,
    "a sum before the first step": partial(torch.optim.Adagrad, lr=RATE, initial_accumulator_value=0.1),
    "a product that begins with 1": partial(torch.optim.NAdam, lr=RATE),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_reset_optimizer_is_a_new_one(make: Make, optimizer: Any) -> None:
    """The step after it is the first step of an engine that starts from these weights and averages."""
    engine = make(plan=TrainingRecipe(optimizer, ema_decay=0.5))
    train(engine, 3)
    weights = engine.export_weights("student")
    engine.reset_optimizers()
    engine.updated(turn(), micro_batches(engine, 3), 3)

    networks = student(lora=True)
    networks["student"].module.load_state_dict(weights, strict=False)
    other = make(networks, TrainingRecipe(optimizer))
    other.updated(turn(), micro_batches(other, 3), 3)
    assert equal(engine.export_weights("student"), other.export_weights("student"))
    assert not equal(engine.export_weights("student", ema=True), engine.export_weights("student"))


def test_a_turn_sees_its_own_network_trainable_and_the_others_frozen_and_bare(make: Make) -> None:
    networks = student(lora=False)
    networks["discriminator"] = dataclasses.replace(networks["student"], module=student(lora=False)["student"].module)
    engine = make(networks)
    seen = {}

    def look(name: str) -> Turn:
        def loss(given: Any, batch: Any, context: Context) -> Losses:
            seen[name] = {n: any(p.requires_grad for p in d.module.parameters()) for n, d in given.items()}
            if name == "student":
                raise KeyError("a loss that fails")
            return Duel().judge(given, batch, context)

        return Turn(name, loss)

    train(engine, 1, look("discriminator"))
    with pytest.raises(KeyError):
        train(engine, 1, look("student"))
    assert seen["discriminator"] == {"student": False, "discriminator": True}
    assert seen["student"] == {"student": True, "discriminator": False}
    assert all(
        p.requires_grad for d in networks.values() for p in d.module.parameters()
    )  # given back, also by a failure


def test_helpers_reach_the_loss_frozen_and_in_their_own_dtype() -> None:
    engine, helper, seen = EngineSettings(mixed_precision="bf16").start(), nn.Linear(2, 2), {}

    def loss(given: Any, batch: Any, context: Context) -> Losses:
        seen["scale"] = given["scale"]
        losses = Distance().loss(given, batch, context)
        total = losses.total * given["scale"](torch.ones(2)).square().mean()
        return Losses(total, {})

    try:
        engine.prepare(student(lora=True), {"student": TrainingRecipe(adamw)}, {"scale": helper})
        before = engine.export_weights("student")
        engine.updated(Turn("student", loss), micro_batches(engine, 0), 0)
        assert seen["scale"] is helper and helper.weight.dtype == torch.float32
        assert not any(p.requires_grad or p.grad is not None for p in helper.parameters())
        assert not equal(before, engine.export_weights("student"))
        assert engine.describe()["networks"].keys() == {"student"}  # no part of a checkpoint
    finally:
        engine.release()


def test_each_turn_changes_its_own_network_only(make: Make) -> None:
    networks = student(lora=False)
    networks["discriminator"] = dataclasses.replace(networks["student"], module=student(lora=False)["student"].module)
    engine = make(networks)
    for current in Duel().turns(0):
        before = {name: engine.export_weights(name) for name in networks}
        scalars = train(engine, 1, current)[0]
        changed = {name for name in networks if not equal(engine.export_weights(name), before[name])}
        assert changed == {current.updates}
        assert f"{current.updates}/loss" in scalars


def test_a_lora_students_teacher_is_the_same_module_and_stays_as_it_was(make: Make) -> None:
    networks = student(lora=True)
    engine = make(networks)
    batch = tiny_batch(0, 0, 2)
    call = (batch.states[:, 0], batch.times[:, 0], batch.conditioning)
    with engine.inference("teacher") as teacher, engine.inference("student") as pupil:
        taught, learnt = teacher(*call).x0, pupil(*call).x0
    train(engine, 2)
    with engine.inference("teacher") as teacher, engine.inference("student") as pupil:
        assert teacher.module is pupil.module  # type: ignore[attr-defined]
        assert torch.equal(teacher(*call).x0, taught)
        assert not torch.allclose(pupil(*call).x0, learnt, atol=1e-4)


def test_the_average_draws_pictures_and_is_put_away_again(make: Make) -> None:
    engine = make(plan=TrainingRecipe(adamw, ema_decay=0.5))
    train(engine, 3)
    weights, average = engine.export_weights("student"), engine.export_weights("student", ema=True)
    elsewhere = student(lora=True)["student"]
    elsewhere.module.load_state_dict(average, strict=False)
    batch = tiny_batch(0, 0, 2)
    call = (batch.states[:, 0], batch.times[:, 0], batch.conditioning)
    with engine.inference("student", ema=True) as denoiser, torch.no_grad():
        assert torch.equal(denoiser(*call).x0, elsewhere(*call).x0)
        assert not denoiser.module.training  # type: ignore[attr-defined]
    assert equal(engine.export_weights("student"), weights)
    with engine.inference("student") as denoiser, torch.no_grad():
        assert not torch.equal(denoiser(*call).x0, elsewhere(*call).x0)


def test_dropout_depends_on_the_step_and_not_on_the_global_generator(make: Make) -> None:
    losses = []
    for noise in (1, 2):
        engine = make(student(lora=True, dropout=0.5))
        torch.manual_seed(noise)
        losses.append([row["loss"] for row in train(engine, 2)])
    assert losses[0] == losses[1]
    assert losses[0] != [row["loss"] for row in train(make(), 2)]


def masks_of(make: Make, steps: list[tuple[int, int]]) -> list[torch.Tensor]:
    """What a network with dropout answers to one input in turns (step, number of the turn); it does not learn."""
    networks, answers = student(lora=True, dropout=0.5), []

    def loss(given: Any, batch: Any, context: Context) -> Losses:
        answer = given["student"](batch.states[:, 0], batch.times[:, 0], batch.conditioning).x0
        answers.append(answer.detach().clone())
        return Losses(answer.square().mean(), {})

    engine = make(networks, TrainingRecipe(adamw, schedule=lambda step: 0.0))
    for step, before in steps:
        engine.updated(Turn("student", loss), micro_batches(engine, 0), step, before)
    return answers


def test_every_step_and_every_turn_of_it_has_dropout_of_its_own(make: Make) -> None:
    first, second, again, later = masks_of(make, [(0, 0), (0, 1), (0, 0), (1, 0)])
    assert torch.equal(first, again)
    assert not torch.equal(first, later) and not torch.equal(first, second) and not torch.equal(second, later)


def test_turns_of_one_network_in_a_step_see_other_times_and_noise(make: Make) -> None:
    """As five updates of a fake score would. The first one sees what the only turn of a method sees."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(given: Any, batch: Any, context: Context) -> Losses:
        x = batch.states[:, 0]
        seen.append((context.integers(1, 1001, "t"), context.normal(x, "noise")))
        return Distance().loss(given, batch, context)

    class Several(Distance):
        def turns(self, step: int) -> Any:
            return [Turn("student", loss)] * 5

    engine = make()
    batches = micro_batches(engine, 3)
    _take_turns(Several(), engine, batches, 3)
    alone = Context(0, 3, batches[0].positions)
    assert torch.equal(seen[0][0], alone.integers(1, 1001, "t"))
    assert torch.equal(seen[0][1], alone.normal(batches[0].states[:, 0], "noise"))
    assert len({tuple(t.tolist()) for t, _ in seen}) == 5
    noises = torch.stack([noise.flatten() for _, noise in seen])
    assert (torch.corrcoef(noises) - torch.eye(5)).abs().max() < 5 / noises.shape[1] ** 0.5


def test_recomputed_activations_change_nothing_but_the_work(make: Make) -> None:
    weights, calls = [], []
    for checkpointing in (False, True):
        networks = student(lora=True)
        networks["student"].module.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(None))
        engine = make(networks, gradient_checkpointing=checkpointing)
        calls.clear()
        train(engine, 1)
        weights.append(engine.export_weights("student"))
        assert len(calls) == (3 if checkpointing else 2)  # the teacher's pass, the student's, and the student's again
    assert equal(*weights)


class Through(Distance):
    """A loss whose gradient passes through the teacher: the student's module without its adapters, or another one."""

    def loss(self, networks: Any, batch: Any, context: Context) -> Losses:
        x, t, c = batch.states[:, 0], batch.times[:, 0], batch.conditioning
        loss = networks["teacher"](networks["student"](x, t, c).x0, t, c).x0.square().mean()
        return Losses(loss, {"loss": loss.detach()})


@pytest.mark.parametrize("lora", [True, False])
def test_a_gradient_passes_through_a_frozen_network_whose_activations_are_recomputed(make: Make, lora: bool) -> None:
    """Without the adapters that were off in the forward pass; and a network beside the student recomputes too."""
    weights, calls = [], []
    for checkpointing in (False, True):
        networks = student(lora)
        networks.setdefault("teacher", dataclasses.replace(student(False, seed=2)["student"]))
        networks["teacher"].module.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(None))
        engine = make(networks, gradient_checkpointing=checkpointing)
        calls.clear()
        train(engine, 1, next(iter(Through().turns(0))))
        weights.append(engine.export_weights("student"))
        assert len(calls) == (1 + checkpointing) * (2 if lora else 1)
    assert equal(*weights)


# ---- precision --------------------------------------------------------------------------------------------------


HALVES = [("bf16", torch.bfloat16), ("fp16", torch.float16)]


@pytest.mark.parametrize("precision, dtype", HALVES)
@pytest.mark.parametrize("lora", [True, False])
def test_a_half_precision_multiplies_in_it_and_keeps_what_it_trains_in_float32(
    make: Make, lora: bool, precision: str, dtype: torch.dtype
) -> None:
    def loss(networks: Any, batch: Any, context: Context) -> Losses:
        distance = networks["student"](batch.states[:, 0], batch.times[:, 0], batch.conditioning).x0.square().mean()
        return Losses(distance, {})

    networks = student(lora)
    seen = []
    networks["student"].module.mid_block.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    tiny_rate = TrainingRecipe(lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0))
    engine = make(networks, plan=tiny_rate, mixed_precision=precision)
    before = engine.export_weights("student")
    while train(engine, 1, Turn("student", loss))[0]["skipped"]:  # until the loss scale of fp16 has been found
        pass
    after = engine.export_weights("student")
    assert set(seen) == {dtype}
    assert {w.dtype for w in after.values()} == {torch.float32}
    moved = torch.cat([(after[n] - before[n]).flatten() for n in after]).abs()
    assert moved.median() == pytest.approx(1e-6, rel=0.1)  # Adam's first step is its rate; halves would not feel it
    frozen = {p.dtype for n, p in networks["student"].module.named_parameters() if n not in after}
    assert frozen == ({dtype} if lora else set())


@pytest.mark.parametrize("precision, dtype", HALVES)
def test_a_separate_teacher_is_frozen_and_takes_the_working_precision(
    make: Make, precision: str, dtype: torch.dtype
) -> None:
    networks = {**student(lora=False), "teacher": student(lora=False)["student"]}
    make(networks, mixed_precision=precision)
    teacher = networks["teacher"].module
    assert {(p.dtype, p.requires_grad) for p in teacher.parameters()} == {(dtype, False)}
    assert not teacher.training


# ---- the loss scale of fp16 -------------------------------------------------------------------------------------


def test_scaling_the_loss_saves_gradients_that_float16_cannot_hold(make: Make) -> None:
    """Of a loss so small that its gradients underflow: without a scale float16 has none of them left."""

    def faint(networks: Any, batch: Any, context: Context) -> Losses:
        losses = Distance().loss(networks, batch, context)
        return Losses(losses.total * 1e-8, {})

    norms = {}
    for precision, scale in (("no", 1.0), ("fp16", 1.0), ("fp16", 2.0**20)):
        engine = make(mixed_precision=precision)
        if precision == "fp16":
            engine.load_state_dict(engine.state_dict() | {"loss_scales": {"student": {"value": scale, "since": 0}}})
        norms[precision, scale] = train(engine, 1, Turn("student", faint))[0]["grad_norm"]
    assert norms["fp16", 2.0**20] == pytest.approx(norms["no", 1.0], rel=0.01)
    assert norms["fp16", 1.0] < 0.9 * norms["no", 1.0]


def test_a_scale_that_overflows_is_lowered_and_costs_a_step_that_counts_apart(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []
    engine = make(mixed_precision="fp16", max_nonfinite_steps=2, on_skipped=told.append)
    start = engine.export_weights("student")
    engine.load_state_dict(engine.state_dict() | {"loss_scales": {"student": {"value": 2.0**40, "since": 7}}})
    with caplog.at_level("INFO"):
        rows = train(engine, 4)
    assert [row["skipped"] for row in rows] == [1, 1, 1, 1]  # more in a row than may be of other reasons
    assert [row["loss_scale"] for row in rows] == [2.0**40, 2.0**39, 2.0**38, 2.0**37]
    assert equal(start, engine.export_weights("student"))
    assert (engine.skipped.count, engine.skipped.overflows, told) == (0, 4, [])
    assert "step 3: student skipped, its gradient overflows float16: the loss scale is lowered to" in caplog.text
    assert engine.is_skipping and not engine.is_healthy()  # a checkpoint that is due waits
    saved = json.loads(json.dumps(engine.state_dict()))

    other = make(mixed_precision="fp16")
    other.load_state_dict(saved)
    assert other.is_skipping and other.state_dict() == saved
    other.load_state_dict(saved | {"loss_scales": {"student": {"value": 2.0**16, "since": 1999}}})
    taken = [*train(other, 2)]
    assert [(row["skipped"], row["loss_scale"]) for row in taken] == [(0, 2.0**16), (0, 2.0**17)]  # tried after 2000
    assert not other.is_skipping and other.skipped.overflows == 4


@pytest.mark.parametrize("factor, keep_gradient", [(float("nan"), False), (float("inf"), True)])
def test_a_loss_that_is_not_finite_is_not_taken_for_an_overflow(make: Make, factor: float, keep_gradient: bool) -> None:
    engine = make(mixed_precision="fp16", max_nonfinite_steps=2)
    bad = poisoned(factor, keep_gradient)
    rows = [engine.updated(bad, micro_batches(engine, step), step) for step in (0, 1)]
    assert [row["loss_scale"] for row in rows] == [2.0**16, 2.0**16]
    assert (engine.skipped.count, engine.skipped.overflows) == (1, 0)
    with pytest.raises(NonFiniteError, match="2 in a row"):
        engine.updated(bad, micro_batches(engine, 1), 1)


def test_at_the_least_scale_a_gradient_that_is_not_finite_ends_the_run(make: Make) -> None:
    def steep(networks: Any, batch: Any, context: Context) -> Losses:
        losses = Distance().loss(networks, batch, context)
        return Losses(losses.total * 1e30, {})

    engine = make(mixed_precision="fp16", max_nonfinite_steps=2)
    engine.load_state_dict(engine.state_dict() | {"loss_scales": {"student": {"value": 2.0, "since": 0}}})
    rows = train(engine, 2, Turn("student", steep))
    assert [row["loss_scale"] for row in rows] == [2.0, 1.0]
    assert (engine.skipped.overflows, engine.skipped.count) == (1, 1)
    with pytest.raises(NonFiniteError, match="2 in a row"):
        train(engine, 1, Turn("student", steep))


# ---- steps that are skipped -------------------------------------------------------------------------------------


def poisoned(value: float, keep_gradient: bool) -> Turn:
    """At step 1, a loss that is not finite; its gradient may stay finite all the same."""

    def loss(networks: Any, batch: Any, context: Context) -> Losses:
        losses = Distance().loss(networks, batch, context)
        if context.step != 1:
            return losses
        return Losses(losses.total + value if keep_gradient else losses.total * value, losses.parts)

    return Turn("student", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("keep_gradient", [True, False])
def test_a_step_that_is_not_finite_leaves_no_trace(
    make: Make, caplog: pytest.LogCaptureFixture, value: float, keep_gradient: bool
) -> None:
    engine = make(plan=TrainingRecipe(adamw, ema_decay=0.5), gradient_accumulation_steps=2)
    turn = poisoned(value, keep_gradient)
    rows = [engine.updated(turn, micro_batches(engine, step), step) for step in (0, 1)]
    skipped = engine.export_weights("student"), engine.export_weights("student", ema=True)
    rows.append(engine.updated(turn, micro_batches(engine, 2), 2))
    assert [row["skipped"] for row in rows] == [0, 1, 0]
    assert engine.skipped.count == 1

    undisturbed = make(plan=TrainingRecipe(adamw, ema_decay=0.5), gradient_accumulation_steps=2)
    undisturbed.updated(turn, micro_batches(undisturbed, 0), 0)
    assert equal(skipped[0], undisturbed.export_weights("student"))
    assert equal(skipped[1], undisturbed.export_weights("student", ema=True))
    undisturbed.updated(turn, micro_batches(undisturbed, 2), 2)
    assert equal(engine.export_weights("student"), undisturbed.export_weights("student"))  # the optimizer's state too
    assert "step 1: student skipped" in caplog.text and "sample-8 " in caplog.text and "sample-15" in caplog.text


def test_too_many_skipped_steps_in_a_row_end_the_run(make: Make) -> None:
    engine = make(max_nonfinite_steps=2)
    bad = poisoned(float("nan"), keep_gradient=False)
    for step in (1, 0, 1):  # step 0 is taken, and starts the count anew
        engine.updated(bad, micro_batches(engine, step), step)
    with pytest.raises(NonFiniteError, match="2 in a row"):
        engine.updated(bad, micro_batches(engine, 1), 1)


# ---- settings ---------------------------------------------------------------------------------------------------

ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"kind": "fsdp"}, "engine.kind"),
        ({"kind": "single", "deepspeed": ZERO2}, "engine.deepspeed"),
        ({"kind": "deepspeed"}, "engine.deepspeed.zero_optimization.stage"),
        ({"kind": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 4}}}, "got 4"),
        ({"kind": "deepspeed", "deepspeed": {**ZERO2, "gradient_clipping": 1.0}}, "engine.deepspeed.gradient_clipping"),
        ({"kind": "ddp", "stages": {"student": 2}}, "engine.stages has no meaning for engine.kind=ddp"),
        (
            {"kind": "deepspeed", "deepspeed": ZERO2, "stages": {"student": 4}},
            "engine.stages.student must be 1, 2 or 3",
        ),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps"),
    ],
)
def test_a_setting_out_of_range_is_named_before_anything_starts(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        EngineSettings(**settings)


@pytest.mark.parametrize("name", ["single", "ddp", "zero1", "zero2", "zero3"])
def test_every_engine_file_builds_the_engine_of_its_name(name: str) -> None:
    node = OmegaConf.create({"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "max_grad_norm": None})
    node = OmegaConf.merge(
        node,
        {"gradient_checkpointing": True, "seed": 3, "compile": False, "channels_last": True},
        {"engine": OmegaConf.load(CONFIGS / f"{name}.yaml")},
    )
    settings: Any = OmegaConf.to_container(node.engine, resolve=True)
    assert settings.pop("_target_") == "distill.training.engine.EngineSettings"
    engine = EngineSettings(**settings)
    assert (engine.name, engine.mixed_precision, engine.gradient_accumulation_steps) == (name, "bf16", 2)
    assert (engine.compile, engine.channels_last) == (False, True)


def test_a_stage_of_a_network_that_is_not_trained_is_named_before_anything_is_wrapped() -> None:
    settings = EngineSettings(kind="deepspeed", deepspeed=ZERO2, stages={"critic": 1})
    engine = Engine(settings, settings.sharding(), EngineSettings().start().processes)
    with pytest.raises(ValueError, match="engine.stages.critic: no such network is trained; trained are: student"):
        engine.prepare(student(lora=True), {"student": TrainingRecipe(adamw)})


def test_ddp_without_a_launcher_says_how_to_launch() -> None:
    with pytest.raises(ValueError, match="distill launch --multi_gpu"):
        EngineSettings(kind="ddp").start()


def test_more_processes_than_the_engine_knows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched"):
        EngineSettings(kind="single").start()


def test_networks_that_cannot_be_trained_are_named(make: Make) -> None:
    frozen = student(lora=False)
    frozen["student"].module.requires_grad_(False)
    with pytest.raises(ValueError, match="'student'.*none of its weights"):
        make(frozen)
    twice = student(lora=False)
    with pytest.raises(ValueError, match="shares its module"):
        make({**twice, "discriminator": twice["student"]})
    with pytest.raises(ValueError, match="'discriminator' is not trained; trained are: student"):
        train(make(), 1, Turn("discriminator", turn().loss))


def test_micro_batches_that_would_skew_the_mean_are_refused(make: Make) -> None:
    engine = make(gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 micro-batches, got 1"):
        engine.updated(turn(), [tiny_batch(0, 0, 4)], 0)
    with pytest.raises(ValueError, match=r"one size, got \[3, 5\]"):
        engine.updated(turn(), [tiny_batch(0, 0, 5), tiny_batch(0, 5, 3)], 0)


# ---- learning rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_schedules_are_those_of_diffusers(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40)
    ours = LearningRate(name, warmup_steps=5, total_steps=40)
    for step in range(40):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    "arguments, names",
    [(("step",), "lr_scheduler"), (("linear", -1), "lr_warmup_steps"), (("cosine", 10, 10), "lr_warmup_steps")],
)
def test_a_schedule_out_of_range_is_named(arguments: tuple[Any, ...], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        LearningRate(*arguments)


def test_an_average_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        TrainingRecipe(adamw, ema_decay=1.0)


def limits() -> list[timedelta]:
    """Of the collectives of every process group."""
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_float16_that_deepspeed_does_not_compute_here_is_one_line() -> None:
    deepspeed = pytest.importorskip("deepspeed")
    if deepspeed.accelerator.get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed computes float16 on this processor")
    ways = EngineSettings(kind="deepspeed", deepspeed={"zero_optimization": {"stage": 2}}).sharding()
    ways.check_precision("bf16")
    with pytest.raises(ValueError, match="^mixed_precision=fp16: DeepSpeed computes no float16 here, for engine=zero2"):
        ways.check_precision("fp16")


@pytest.mark.parametrize("kind", ["ddp", "deepspeed"])
def test_collectives_wait_longer_than_the_watchdog_in_groups_of_libraries_too(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    else:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in alone.items():
            monkeypatch.setenv(name, value)
    settings = EngineSettings(kind=kind, deepspeed=ZERO2 if kind == "deepspeed" else None)
    engine = settings.start(collectives_timeout(45))
    try:
        assert limits() == [timedelta(minutes=50)]
        torch.distributed.new_group([0])  # a library's own, made while networks are wrapped
        assert len(set(limits())) == 2
        engine.prepare(student(lora=True), {"student": TrainingRecipe(adamw)})
        assert len(limits()) >= 2 and set(limits()) == {timedelta(minutes=50)}
        assert collectives_timeout(None) > timedelta(days=7)
    finally:
        engine.close()
