"""Steps computed twice: nothing of the training changes, and a gradient that is not the same is found in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from distill.methods.base import Losses, Method, Turn
from distill.training.engine import Engine
from distill.training.twice import UnlikeGradients
from tests.training.engine_worker import build, micro_batches

ACCUMULATED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.02}
CASES: dict[str, dict[str, Any]] = {
    "a LoRA with dropout": {"method": "distance", "engine": ACCUMULATED, "dropout": 0.5},
    "losses that are not finite": {"method": "distance", "engine": ACCUMULATED, "poison": {1: [3]}},
    "a whole student, with its average as the target": {"method": "lcm-ema", "engine": {}},
    "a game on checkpointed activations": {"method": "game", "engine": {"gradient_checkpointing": True}},
    "three adapters on one network": {"method": "one-network", "engine": {}},
    "float16 with a loss scale": {"method": "distance", "engine": {**ACCUMULATED, "mixed_precision": "fp16"}},
}


Change = Callable[[Losses], Losses]


def taken(
    engine: Engine, method: Method, steps: range, change: Change = lambda losses: losses
) -> list[dict[str, float]]:
    """The scalars of each turn of some steps."""
    return [
        engine.updated(
            Turn(turn.updates, lambda *a, loss=turn.loss: change(loss(*a))), micro_batches(engine, step), step
        )
        for step in steps
        for turn in method.turns(step)
    ]


@contextmanager
def built(case: dict[str, Any], **settings: Any) -> Iterator[tuple[Engine, Method]]:
    engine, method = build({**case, "engine": {**case["engine"], **settings}})
    try:
        yield engine, method
    finally:
        engine.close()


@pytest.mark.parametrize("name", CASES)
def test_it_changes_no_bit(name: str) -> None:
    found = []
    for every in (None, 2):
        with built(CASES[name], compute_twice_steps=every) as (engine, method):
            rows = taken(engine, method, range(4))
            weights = {(n, ema): engine.export_weights(n, ema) for n in method.trains for ema in (False, True)}
            found.append((rows, weights, torch.get_rng_state()))
    (rows, weights, state), (others, other_weights, other_state) = found
    assert str(rows) == str(others) and torch.equal(state, other_state)  # as text: NaN is unlike itself
    for key, of in weights.items():
        assert of and all(torch.equal(w, other_weights[key][n]) for n, w in of.items()), key


class Nudged(torch.autograd.Function):
    """The loss itself, whose gradient is a little too large the so-manieth time."""

    left = 0
    factor = 1.0

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        Nudged.left -= 1
        return gradient * Nudged.factor if Nudged.left == 0 else gradient


def nudged(losses: Losses) -> Losses:
    return Losses(Nudged.apply(losses.total), losses.parts)


@pytest.mark.parametrize(
    "method, at, network",
    [("distance", 1, "student"), ("distance", 2, "student"), ("duel", 1, "discriminator"), ("duel", 4, "student")],
)
def test_a_wrong_gradient_in_either_pass_is_found_before_the_update(method: str, at: int, network: str) -> None:
    """By the last bit of what a loss sends back, in the second step."""
    with built({"method": method, "engine": {}}, compute_twice_steps=2) as (engine, played):
        taken(engine, played, range(1))
        before = engine.export_weights(network)
        Nudged.left, Nudged.factor = at, 1 + 2**-23
        with pytest.raises(
            UnlikeGradients, match=f"^step 2: computed twice, the gradient of the {network} .* rank 0 on "
        ):
            taken(engine, played, range(1, 2), nudged)
        assert all(torch.equal(w, before[n]) for n, w in engine.export_weights(network).items())


def test_where_bits_are_not_promised_norms_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    with built(CASES["losses that are not finite"], compute_twice_steps=1) as (engine, method):
        Nudged.left, Nudged.factor = 1, 1 + 5e-4
        taken(engine, method, range(3), nudged)
        Nudged.left, Nudged.factor = 1, 1 + 2e-3
        with pytest.raises(UnlikeGradients, match="step 4: "):
            taken(engine, method, range(3, 4), nudged)
