"""The preference term of MLCM: its values by hand, what it moves, and when it is not asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.prediction import Conditioning, Denoised, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch
from distill.methods.base import Losses
from distill.methods.mlcm import MLCM, Stage

SCHEDULE = NoiseSchedule.scaled_linear()
PROMPTS = ("red", "green", "blue", "grey")


class Network(nn.Module):
    """A denoiser of one number."""

    def __init__(self, prediction: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(prediction))

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        return to_denoised(Prediction.SAMPLE, self.weight * x_t, x_t, t, SCHEDULE)


class Table:
    """Gives each sample the score that a table has for its prompt, plus the mean of its x0; notes what it is asked."""

    def __init__(self, **scores: float) -> None:
        self.scores = scores
        self.asked: list[tuple[Tensor, tuple[tuple[str, ...], ...]]] = []

    def __call__(self, latents: Tensor, *prompts: Sequence[str]) -> tuple[Tensor, ...]:
        self.asked.append((latents.detach(), tuple(tuple(words) for words in prompts)))
        fit = latents.mean((1, 2, 3))
        return tuple(fit + torch.tensor([self.scores[p] for p in words]) for words in prompts)


def mlcm(**stage: Any) -> MLCM:
    return MLCM(SCHEDULE, [Stage(**{"segments": 4, "skip": 25, "iterations": 5, **stage})])


def batch(prompts: tuple[str, ...] = PROMPTS, mean: float = 0.0) -> Batch:
    n = len(prompts)
    states = torch.randn(n, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    states = states - states.mean((2, 3, 4), keepdim=True) + mean
    times = torch.tensor([[900, 875]]).repeat(n, 1)
    ring = (*prompts[1:], prompts[0])
    return Batch(states, times, {}, {}, torch.ones(n), (), tuple(range(n)), prompts, ring)


def halves(whole: Batch) -> list[Batch]:
    """Two micro-batches of one global batch."""
    n = len(whole) // 2
    rows = [slice(0, n), slice(n, None)]
    return [
        replace(
            whole,
            **{name: getattr(whole, name)[of] for name in ("states", "times", "guidance")},
            **{name: getattr(whole, name)[of] for name in ("positions", "prompts", "next_prompts")},
        )
        for of in rows
    ]


def loss(method: MLCM, networks: dict[str, Any], batch: Batch, step: int = 0) -> Losses:
    (turn,) = method.turns(step)
    return turn.loss(networks, batch, Context(0, step, batch.positions))


def test_the_hinge_by_hand() -> None:
    """With x0 of mean 0: c_neg of (red, green, blue, grey) is (green, blue, grey, red)."""
    scores = {"red": 20.0, "green": 10.0, "blue": -3.0, "grey": 15.5}
    table = Table(**scores)
    found = loss(mlcm(reward=1.0), {"student": Network(), "reward": table}, batch())
    positive = [0, 6, 19, 0.5]
    negative = [10, 0, 15.5, 20]
    assert float(found.parts["reward_loss"]) == pytest.approx(sum(positive + negative) / 4, rel=1e-5)
    assert float(found.parts["reward"]) == pytest.approx(sum(scores.values()) / 4, rel=1e-5)
    assert table.asked[0][1] == (PROMPTS, ("green", "blue", "grey", "red"))

    lower = loss(mlcm(reward=1.0, reward_target=5.0), {"student": Network(), "reward": table}, batch())
    assert float(lower.parts["reward_loss"]) == pytest.approx((8 + sum(negative)) / 4, rel=1e-5)


def test_maximising_by_hand() -> None:
    table = Table(red=20.0, green=10.0, blue=-3.0, grey=15.5)
    found = loss(mlcm(reward=1.0, reward_form="maximise"), {"student": Network(), "reward": table}, batch())
    assert float(found.parts["reward_loss"]) == pytest.approx(-42.5 / 4, rel=1e-5)
    assert table.asked[0][1] == (PROMPTS,)


def test_a_prompt_is_not_its_own_opposite() -> None:
    """Samples 0 and 1 share a prompt: the first has nothing to lower."""
    table = Table(red=16.0, blue=18.0)
    found = loss(mlcm(reward=1.0), {"student": Network(), "reward": table}, batch(("red", "red", "blue")))
    assert float(found.parts["reward_loss"]) == pytest.approx((0 + 18 + 16) / 3, rel=1e-5)
    alone = loss(mlcm(reward=1.0), {"student": Network(), "reward": table}, batch(("red", "red")))
    assert float(alone.parts["reward_loss"]) == pytest.approx(0, abs=1e-5) and alone.total.isfinite()


def test_it_is_added_to_the_consistency_loss_with_its_weight() -> None:
    networks = {"student": Network(), "reward": Table(red=20.0, green=10.0, blue=-3.0, grey=15.5)}
    bare = loss(mlcm(), networks, batch())
    for weight in (0.5, 2.0):
        found = loss(mlcm(reward=weight), networks, batch())
        expected = float(bare.total.detach()) + weight * float(found.parts["reward_loss"])
        assert float(found.total.detach()) == pytest.approx(expected, rel=1e-6)
        assert all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(found.parts[name]))
            for name, x in bare.parts.items()
            if name != "loss"
        )


def test_what_is_scored_is_the_students_answer_at_x_t() -> None:
    """One forward pass with a gradient serves both losses."""
    student, table, calls = Network(), Table(**dict.fromkeys(PROMPTS, 0.0)), []
    student.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    samples = batch()
    loss(mlcm(reward=1.0), {"student": student, "reward": table}, samples)
    assert torch.equal(table.asked[0][0], 0.5 * samples.states[:, 0]) and calls == [False, True]


@pytest.mark.parametrize("form", ["hinge", "maximise"])
def test_its_gradient_moves_the_student_as_it_must(form: str) -> None:
    """x0 is weight · x_t, of mean weight · 2; within the hinges' reach d/dweight is -2 and, for c_neg, 2."""
    scores = {"red": 3.0, "green": -50.0, "blue": 5.0, "grey": -50.0}
    student, table, samples = Network(), Table(**scores), batch(mean=2.0)
    gradients = []
    for weight in (0.0, 1.0):
        found = loss(mlcm(reward=weight, reward_form=form), {"student": student, "reward": table}, samples)
        gradients.append(torch.autograd.grad(found.total, student.weight)[0])
    pulls = {"hinge": [-2, -2 + 2, -2, -2 + 2], "maximise": [-2] * 4}[form]  # c_neg of green is blue, of grey is red
    assert float(gradients[1] - gradients[0]) == pytest.approx(sum(pulls) / 4, abs=1e-4)


def test_a_stage_of_weight_zero_asks_for_nothing_and_calls_nothing() -> None:
    method = MLCM(SCHEDULE, [Stage(4, 25, 5), Stage(4, 25, 5, reward=1.0)])
    table = Table(**dict.fromkeys(PROMPTS, 0.0))
    networks = {"student": Network(), "reward": table}
    parts = loss(method, networks, batch(), step=4).parts
    assert table.asked == [] and "reward" not in parts and "reward_loss" not in parts
    assert "reward" in loss(method, networks, batch(), step=5).parts and len(table.asked) == 1
    assert method.requires == ("reward",) and method.needs_prompts and method.least_samples == 2
    assert mlcm().requires == () and not mlcm().needs_prompts and mlcm().least_samples == 1
    assert mlcm(reward=1.0, reward_form="maximise").least_samples == 1
    loss(mlcm(), {"student": Network()}, batch())  # no reward among the networks


@pytest.mark.parametrize("form", ["hinge", "maximise"])
def test_it_is_a_mean_over_samples_however_they_are_grouped(form: str) -> None:
    """c_neg of the second, green, is blue, of the other micro-batch; each of one sample is scored, too."""
    networks = {"student": Network(), "reward": Table(red=20.0, green=10.0, blue=-3.0, grey=15.5)}
    method, whole = mlcm(reward=1.0, reward_form=form), batch()
    parts = halves(whole)
    expected = float(loss(method, networks, whole).total.detach())
    for grouped in (parts, [one for part in parts for one in halves(part)]):
        found = [float(loss(method, networks, part).total.detach()) for part in grouped]
        assert sum(found) / len(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("missing", ["prompts", "next_prompts"])
def test_a_batch_that_cannot_be_scored(missing: str) -> None:
    networks = {"student": Network(), "reward": Table(red=0.0)}
    with pytest.raises(ValueError, match="the batch has [04] and [04] for 4 samples"):
        loss(mlcm(reward=1.0), networks, replace(batch(), **{missing: ()}))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"reward": -1.0}, "reward must be at least 0, got -1.0"),
        ({"reward": float("nan")}, "reward must be at least 0, got nan"),
        ({"reward_form": "raise"}, "reward_form must be one of hinge, maximise, got 'raise'"),
        ({"reward_target": float("inf")}, "reward_target must be a number, got inf"),
    ],
)
def test_settings_out_of_range(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"method.stages\[0\]: a stage's {message}"):
        MLCM(SCHEDULE, [{"segments": 4, "skip": 25, "iterations": 5, **stage}])  # type: ignore[list-item]
