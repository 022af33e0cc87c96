"""Score identity distillation where both scores are known: its gradient, which networks it reaches, and that it leads
to the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.guidance import guided
from distill.diffusion.matching import fake_score_loss, identity_loss, matching_loss
from distill.diffusion.prediction import Conditioning, Denoised
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.trajectory import CleanEnd
from distill.methods.sid import SiD
from tests.analytic import Mixture
from tests.learned import train
from tests.methods.test_dmd2 import (
    FLOW,
    MEAN,
    SCHEDULES,
    SD,
    SHAPE,
    VP,
    Score,
    batch_of,
    context,
    data,
    parties,
    slopes,
)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient_of(loss: Any, schedule: NoiseSchedule, real: Any, fake: Any, alpha: float | None = None) -> Tensor:
    """Of samples at all times, by one of the two losses."""
    n = 32
    x, t = (MEAN + 0.5 * normal(n, 1)).requires_grad_(), torch.linspace(20, 980, n).long()
    options = {} if alpha is None else {"alpha": alpha}
    (found,) = torch.autograd.grad(loss(schedule, real, fake, x, t, normal(n, 2), {}, **options).sum(), x)
    return found


def stopped(network: Any) -> Any:
    """A network that passes no gradient on to its input."""

    def call(x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        with torch.no_grad():
            return network(x_t, t, c)

    return call


# --- the loss ---


@SCHEDULES
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_without_gradients_through_the_networks_it_is_distribution_matching(
    schedule: NoiseSchedule, alpha: float
) -> None:
    real, fake = data(schedule), Score(-0.1, 0.5, schedule)
    matched = gradient_of(matching_loss, schedule, real, fake)
    bare = gradient_of(identity_loss, schedule, stopped(real), stopped(fake), alpha)
    torch.testing.assert_close(bare, matched, rtol=1e-12, atol=1e-15)
    whole = gradient_of(identity_loss, schedule, real, fake, alpha)
    assert float((whole - matched).abs().max()) > 1e-2 * float(matched.abs().max())  # what they pass on is not nothing


@SCHEDULES
def test_its_value_and_gradient_are_those_of_the_formula(schedule: NoiseSchedule) -> None:
    n, real, fake = 32, data(schedule), Score(-0.1, 0.5, schedule)
    x, t, noise = (MEAN + 0.5 * normal(n, 1)).requires_grad_(), torch.linspace(20, 980, n).long(), normal(n, 2)
    x_t = add_noise(schedule, x, noise, t)
    r, f = real(x_t, t, {}).x0, fake(x_t, t, {}).x0
    weight = 1 / (x - r).abs().mean((1, 2, 3), keepdim=True).detach()
    for alpha, plain in {1.0: weight * (r - f) * (f - x), 1.2: weight * (r - f) * ((r - x) - 1.2 * (r - f))}.items():
        expected = plain.flatten(1).mean(1)
        found = identity_loss(schedule, real, fake, x, t, noise, {}, alpha)
        torch.testing.assert_close(found, expected)
        both = (torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (found, expected))
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-15)
    assert float(found.detach().min()) < 0  # it is an estimate, and no distance


@pytest.mark.parametrize("sd", [SD, 0.0])
def test_nothing_is_left_where_both_distributions_are_one(sd: float) -> None:
    """Of a single point too, where the sample is what the teacher says it is: 0 / 0."""
    n, x, t = 16, MEAN + sd * normal(16, 1), torch.linspace(20, 980, 16).long()
    x.requires_grad_()
    loss = identity_loss(VP, data(sd=sd), data(sd=sd), x, t, normal(n, 2), {})
    assert (loss == 0).all() and (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


@SCHEDULES
def test_it_leads_a_students_mean_and_spread_to_the_datas(schedule: NoiseSchedule) -> None:
    method, n = SiD(schedule, guidance=1.0, fake_guidance=1.0), 150

    def slope(mean: float, sd: float) -> tuple[float, float]:
        networks = parties(schedule, (mean, sd))
        (turn,) = (turn for turn in method.turns(0) if turn.updates == "student")
        return slopes(turn.loss(networks, batch_of(n, schedule), context(n)), networks["student"])

    assert slope(MEAN, SD) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert slope(MEAN, 0.5)[1] < -0.02 < 0.0 < slope(MEAN, 1.1)[1]
    assert slope(-0.3, SD)[0] < -0.02 < 0.02 < slope(0.6, SD)[0]


# --- whom it reaches ---


def test_frozen_networks_get_no_gradient_and_their_states_pass_one_on() -> None:
    networks = {**parties(), "teacher": Score(MEAN, SD)}
    method = SiD(VP, 2, guidance=1.0, fake_guidance=1.0)
    (turn,) = (turn for turn in method.turns(0) if turn.updates == "student")
    turn.loss(networks, batch_of(8), context(8)).total.backward()
    reached = {key for key, n in networks.items() if isinstance(n, nn.Module) and next(n.parameters()).grad is not None}
    assert reached == {"student"}
    for name in ("teacher", "fake_score"):
        ((x_t, _, _, graded),) = networks[name].calls
        assert graded and x_t.requires_grad


def test_a_turn_of_the_fake_score_leaves_the_student_alone() -> None:
    networks = parties()
    turn = next(iter(SiD(VP, 2, guidance=1.0, fake_guidance=1.0).turns(0)))
    turn.loss(networks, batch_of(8), context(8)).total.backward()
    assert networks["student"].mean.grad is None and networks["fake_score"].mean.grad is not None
    assert not any(call[3] for call in networks["student"].calls)


# --- guidance ---


def prompted(n: int) -> tuple[Any, Any, Any]:
    """A teacher of two peaks, a batch whose prompts prefer one, and the empty prompt."""
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, *SHAPE)
    teacher = Mixture(VP, means, torch.tensor([0.3, 0.3]), torch.tensor([0.5, 0.5]))
    told, empty = ({"weights": torch.tensor([w], dtype=torch.float64).expand(n, 2)} for w in ([0.9, 0.1], [0.5, 0.5]))
    return teacher, replace(batch_of(n), conditioning=told, unconditional=empty), empty


class Counted:
    """A denoiser that notes how many rows it is shown."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rows = inner, []

    def __call__(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        self.rows.append(len(x_t))
        return self.inner(x_t, t, c)


@pytest.mark.parametrize("w, kappa", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0), (3.0, 2.0)])
def test_each_score_has_its_own_guidance_and_one_of_1_makes_no_second_pass(w: float, kappa: float) -> None:
    n = 6
    teacher, batch, empty = prompted(n)
    off = Mixture(VP, 0.8 * teacher.means, teacher.sds, teacher.weights)
    networks = {**parties(), "teacher": Counted(teacher), "fake_score": Counted(off)}
    method = SiD(VP, guidance=w, fake_guidance=kappa)
    learning, student = method.turns(0)
    found = student.loss(networks, batch, context(n)).total
    learned = learning.loss(networks, batch, context(n)).total
    assert networks["teacher"].rows == [n if w == 1 else 2 * n]
    assert networks["fake_score"].rows == [n if kappa == 1 else 2 * n] * 2

    x, at = networks["student"].calls[0][0], torch.full((n,), 1000)
    answer = networks["student"](x, at, {}).x0
    t, noise = context(n).integers(20, 981, "t'"), context(n).normal(answer, "noise'")
    real, fake = guided(teacher, empty, w), guided(off, empty, kappa)
    torch.testing.assert_close(found, identity_loss(VP, real, fake, answer, t, noise, batch.conditioning).mean())
    expected = fake_score_loss(VP, fake, answer, batch.conditioning, context(n)).mean()
    torch.testing.assert_close(learned.detach(), expected.detach())


# --- its rhythm ---


def test_both_networks_train_in_every_step_or_the_student_in_the_last_of_several() -> None:
    assert [turn.updates for turn in SiD(VP).turns(0)] == ["fake_score", "student"]
    method = SiD(VP, every=2, fake_warmup=2, fake_learning_rate=1e-3)
    rows = [[turn.updates for turn in method.turns(step)] for step in range(4)]
    assert rows == [["fake_score"]] * 3 + [["fake_score", "student"]]
    assert (method.period, method.starts) == (2, (0, 2))
    assert [method.learning_rate(0, name) for name in method.trains] == [None, 1e-3]
    assert method.reads() == CleanEnd() and method.held_out(1) is None  # type: ignore[func-returns-value]
    assert method.sampling.steps == 1 and method.guidance_learned(None) == (2.0, 2.0)


def test_it_brings_a_student_to_the_data_of_a_flow_matching_teacher() -> None:
    n, networks = 32, parties(FLOW, (-0.4, 0.5))
    method = SiD(FLOW, guidance=1.0, fake_guidance=1.0)
    train(method, networks, batch_of(n, FLOW), {"student": 0.03, "fake_score": 0.1}, steps=120)
    student = networks["student"]
    assert (student.mean.item(), student.sd.item()) == pytest.approx((MEAN, SD), abs=0.12)


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_steps": 0}, "method.student_steps must be within 1 ... 1000, got 0"),
        ({"guidance": -1.0}, "method.guidance must be at least 0, got -1.0"),
        ({"fake_guidance": -1.0}, "method.fake_guidance must be at least 0, got -1.0"),
        ({"alpha": -1.0}, "method.alpha must be at least 0, got -1.0"),
        ({"every": 0}, "method.every must be at least 1, got 0"),
        ({"every": 5, "fake_warmup": 7}, "method.fake_warmup must be 0 or a multiple of every=5, got 7"),
        ({"fake_learning_rate": 0.0}, "method.fake_learning_rate must be above 0, got 0.0"),
    ],
    ids=str,
)
def test_refuses_a_bad_value_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SiD(VP, **settings)
    assert str(error.value) == message
