"""The methods on flow matching, where the right answers are known; and that none of them asks which noise it has."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distill.methods
from distill.diffusion.consistency import inverse_jump
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.segments import Segments
from distill.diffusion.solver import ddim_step
from distill.diffusion.trajectory import Batch
from distill.methods.lcm import LCM
from distill.methods.lightning import LightningAdversarial, LightningConvert, LightningMSE
from distill.methods.mlcm import MLCM, SPACES, Stage
from distill.methods.sampling import sample
from tests.analytic import Mixture, exact_student, gaussian, gaussian_flow
from tests.learned import LinearCritic
from tests.methods.test_lightning import Critic

FLOW = NoiseSchedule.linear(3.0)
SHAPE = (2, 3, 1)
CPU = torch.device("cpu")


def data(sd: float = 0.8) -> Mixture:
    return gaussian(FLOW, torch.full(SHAPE, 0.3, dtype=torch.float64), sd)


def exact(teacher: Mixture, segments: Segments) -> Denoiser:
    """The student whose jump to its segment's start is the exact flow."""

    def call(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        s = segments.start(t.clamp(min=1))
        x0 = inverse_jump(FLOW, gaussian_flow(teacher, x_t, t, s), x_t, t, s)
        return to_denoised(Prediction.SAMPLE, torch.where(x0.isfinite(), x0, 0.0), x_t, t, FLOW)

    return call


def batch_of(states: Tensor, times: Tensor) -> Batch:
    n = len(states)
    return Batch(states, times, {}, {}, torch.ones(n), positions=tuple(range(n)))


def clean(teacher: Mixture, n: int = 400) -> Batch:
    states = teacher.sample(n, torch.Generator().manual_seed(0))[:, None]
    return batch_of(states, torch.zeros(n, 1, dtype=torch.int64))


def pairs(teacher: Mixture, segments: Segments, skip: int, exact_steps: bool = True, n: int = 16) -> Batch:
    """(x_t, x_s) at every time of the solver's grid, s no further than the segment's start."""
    t = torch.arange(skip, 1001, skip).repeat_interleave(n)
    x_0 = teacher.sample(len(t), torch.Generator().manual_seed(0))
    x_t = add_noise(FLOW, x_0, torch.randn_like(x_0), t)
    s = torch.maximum(t - skip, segments.start(t))
    x_s = gaussian_flow(teacher, x_t, t, s) if exact_steps else ddim_step(FLOW, teacher(x_t, t, {}), s)
    return batch_of(torch.stack([x_t, x_s], 1), torch.stack([t, s], 1))


def context(n: int = 400) -> Context:
    return Context(0, 0, tuple(range(n)))


def total(method: Any, networks: dict[str, Any], batch: Batch) -> float:
    """The student's loss."""
    (turn,) = (turn for turn in method.turns(0) if turn.updates == "student")
    return float(turn.loss(networks, batch, context(len(batch))).total)


# --- the exact student, and data of a single point ---


@pytest.mark.parametrize("loss", ["huber", "l2"])
@pytest.mark.parametrize("skip", [20, 100])
def test_lcms_exact_student_has_no_loss(loss: str, skip: int) -> None:
    batch = pairs(data(), Segments(1000, 1), skip)
    assert total(LCM(FLOW, skip=skip, loss=loss), {"student": exact_student(data())}, batch) < 1e-12
    assert total(LCM(FLOW, skip=skip, loss=loss), {"student": exact_student(data(0.7))}, batch) > 1e-9


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_mlcms_exact_student_has_no_loss(space: str, count: int) -> None:
    segments = Segments(1000, count)
    method = MLCM(FLOW, [Stage(segments=count, skip=25, iterations=1, loss_space=space)])
    batch = pairs(data(), segments, 25)
    assert total(method, {"student": exact(data(), segments)}, batch) < 1e-12
    assert total(method, {"student": exact(data(0.7), segments)}, batch) > 1e-9


def test_lcms_loss_of_the_teacher_itself_falls_nearly_fourfold_as_the_skip_halves() -> None:
    """What a student has to learn: of first order in the skip, and squared; fourfold in the limit of short skips."""
    left = []
    for skip in (100, 50, 25):
        batch = pairs(data(), Segments(1000, 1), skip, exact_steps=False, n=200)
        left.append(total(LCM(FLOW, skip=skip, loss="l2"), {"student": data()}, batch))
    assert [a / b for a, b in zip(left, left[1:], strict=False)] == pytest.approx([3.4, 3.65], rel=0.08)


def methods_of_a_point() -> dict[str, Any]:
    stages = {space: Stage(segments=4, skip=125, iterations=1, loss_space=space) for space in SPACES}
    rollout = Stage(segments=4, skip=50, iterations=1, source="rollout")
    student = Stage(segments=1, skip=250, iterations=1, source="student", grid=4)
    return {
        "LCM": LCM(FLOW, "noised", skip=20, w_min=1, w_max=1),
        **{f"MLCM, {space}": MLCM(FLOW, [stage]) for space, stage in stages.items()},
        "MLCM, rollout": MLCM(FLOW, [rollout], guidance=1.0),
        "MLCM, student": MLCM(FLOW, [student], guidance=1.0),
        "Lightning, MSE": LightningMSE(FLOW, 4, 32),
        "Lightning, 1 step": LightningMSE(FLOW, 1, 8, times=(250, 500, 750, 1000)),
        "Lightning, convert": LightningConvert(FLOW, 2),
    }


@pytest.mark.parametrize("name", methods_of_a_point())
def test_a_single_point_leaves_nothing_to_learn(name: str) -> None:
    """Dirac data: every jump is exact, so that the teacher is the student."""
    method, point = methods_of_a_point()[name], data(0.0)
    stored = name in [f"MLCM, {space}" for space in SPACES]
    batch = pairs(point, Segments(1000, 4), 125, exact_steps=False) if stored else clean(point)
    assert total(method, {"student": point, "teacher": point}, batch) < 1e-12
    assert total(method, {"student": data(0.3), "teacher": point}, batch) > 1e-9


# --- turns with other networks ---


def trainable(mean: float = 0.0) -> tuple[Tensor, Denoiser]:
    """A student of one number, whose velocity is that of a point at it."""
    at = torch.tensor(mean, dtype=torch.float64, requires_grad=True)

    def call(x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        return to_denoised(Prediction.SAMPLE, at.expand_as(x_t), x_t, t.clamp(min=1), FLOW)

    return at, call


def test_every_turn_of_adversarial_training_and_matching_reaches_its_network() -> None:
    """Also at pure noise, where a student starts."""
    at, student = trainable()
    fake_at, fake = trainable(-0.5)
    stage = Stage(
        segments=1, skip=100, iterations=1, grid=8, source="student", loss_space="v", matching=1.0, adversarial=1.0
    )
    games: list[tuple[Any, Any]] = [
        (MLCM(FLOW, [stage], guidance=1.0), LinearCritic()),
        (LightningAdversarial(FLOW, 1, 4, times=(1000,)), Critic()),
    ]
    for method, critic in games:
        networks = {"student": student, "teacher": data(), "fake_score": fake, "discriminator": critic}
        parameters = {"student": [at], "fake_score": [fake_at], "discriminator": list(critic.parameters())}
        for turn in method.turns(0):
            losses = turn.loss(networks, clean(data(), 64), context(64))
            gradients = torch.autograd.grad(losses.total, parameters[turn.updates])
            assert losses.total.isfinite() and all(g.isfinite() and g != 0 for g in gradients), turn.updates


def test_lightnings_critic_is_shown_the_papers_noise_levels_at_their_times() -> None:
    critic = Critic()
    method = LightningAdversarial(FLOW, 1, 4, times=(1000,), renoise_times=[10, 250, 500, 750])
    turn = next(iter(method.turns(0)))
    turn.loss({"student": data(), "teacher": data(), "discriminator": critic}, clean(data()), context())
    _, t, _ = critic.shown[0]
    assert sorted(set(t.tolist())) == [30, 188, 350, 576]


# --- what has no meaning here ---


def test_scaled_noise_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(
        ValueError, match="^method.x_T=scaled multiplies .* flow-matching teacher: set method.x_T=noise"
    ):
        LightningMSE(FLOW, 1, 4, x_T="scaled")
    with pytest.raises(ValueError, match="^sampler=euler multiplies .* for a flow-matching teacher: set sampler=ddim$"):
        sample(data(), FLOW, torch.zeros(1, *SHAPE), [1000, 0], {}, "euler")


def test_pure_noise_is_the_state_that_lightning_starts_from() -> None:
    method, noise = LightningMSE(FLOW, 1, 4), torch.randn(2, *SHAPE)
    assert torch.equal(method.noised(torch.ones(2, *SHAPE), noise, torch.tensor([1000, 1000])), noise)
    assert torch.equal(add_noise(FLOW, torch.ones(2, *SHAPE), noise, 1000), noise)


ASKING = {"is_linear", "kind", "shift", "alphas_cumprod", "published", "boundary_scalings", "Noise", "FlowNoise"}


def test_no_method_asks_which_noise_it_has() -> None:
    """Neither by an attribute of the schedule, nor by a name that only one kind of noise has."""
    files = sorted(Path(distill.methods.__path__[0]).glob("*.py"))
    assert len(files) >= 5
    for file in files:
        tree = ast.parse(file.read_text())
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        of_schedules = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        attributes -= set() if any(name.endswith("schedule.kind") for name in of_schedules) else {"kind"}  # of a turn
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"kind"}
        imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
        assert not (attributes | names | imported) & ASKING, file.name
        called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        asked = [ast.unparse(node) for node in called if ast.unparse(node.func) in ("isinstance", "type", "getattr")]
        assert not [line for line in asked if "schedule" in line], file.name
