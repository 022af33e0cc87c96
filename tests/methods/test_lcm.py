from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.guidance import guided, lcm_guidance
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, predictions_of
from distill.diffusion.random import Context, generator
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import ddim_step, solve, trailing_times
from distill.diffusion.trajectory import Batch, CleanEnd, Pair
from distill.methods.lcm import LCM
from distill.methods.sampling import sample
from tests.analytic import Mixture, denoiser_of, exact_student, gaussian, quantile_flow, three_peaks

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (3, 2, 2)


class Net(nn.Module):
    """A raw network as diffusers knows it: x_t, timestep index and a prompt to an output like x_t."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12 + 4 + 5, width), nn.Tanh(), nn.Linear(width, 12)).double()

    def forward(self, x: Tensor, index: Tensor, conditioning: Conditioning) -> Tensor:
        angle = index.double()[:, None] / 1000 * torch.tensor([1.0, 5.0], dtype=torch.float64)
        seen = torch.cat([x.flatten(1), angle.sin(), angle.cos(), conditioning["prompt"].to(x)], 1)
        return self.layers(seen).reshape(x.shape)


def clean_batch(n: int) -> Batch:
    return Batch(
        states=torch.randn(n, 1, *SHAPE, dtype=torch.float64),
        times=torch.zeros(n, 1, dtype=torch.int64),
        conditioning={"prompt": torch.randn(n, 5)},
        unconditional={"prompt": torch.zeros(n, 5)},
        guidance=torch.ones(n),
        positions=tuple(range(n)),
    )


def gradients(*nets: nn.Module) -> list[Tensor | None]:
    return [p.grad for net in nets for p in net.parameters()]


# --- the recipe of diffusers' consistency-distillation scripts, from its formulas: network indices, the printed w ---


Raw = Callable[[Tensor, Tensor, Conditioning], Tensor]


def recipe(
    student: Raw,
    target: Raw,
    teacher: Raw,
    prediction: Prediction,
    z0: Tensor,
    noise: Tensor,
    i: Tensor,
    w: Tensor,
    prompt: Tensor,
    empty: Tensor,
    k: int,
    loss_type: str,
    huber_c: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, z_s, z_n) for solver intervals i [B] and printed guidance weights w [B]; `target` is theta'."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    tau = torch.arange(1, 1000 // k + 1) * k - 1
    abar_prev = torch.cat([abar[:1], abar[tau[:-1]]])
    start, ended = tau[i], (tau[i] - k).clamp(min=0)

    def wide(values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1, 1)

    def x0_and_eps(output: Tensor, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = wide(abar[index].sqrt()), wide((1 - abar[index]).sqrt())
        if prediction.value == "epsilon":
            return (z - sigma * output) / alpha, output
        if prediction.value == "sample":
            return output, (z - alpha * output) / sigma
        return alpha * z - sigma * output, alpha * output + sigma * z

    def consistency(network: Raw, z: Tensor, index: Tensor) -> Tensor:
        scaled = 10.0 * index.double()
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        x0, _ = x0_and_eps(network(z, index, {"prompt": prompt}), z, index)
        return wide(c_skip) * z + wide(c_out) * x0

    z_s = wide(abar[start].sqrt()) * z0 + wide((1 - abar[start]).sqrt()) * noise
    f_s = consistency(student, z_s, start)
    with torch.no_grad():
        x0_c, e_c = x0_and_eps(teacher(z_s, start, {"prompt": prompt}), z_s, start)
        x0_u, e_u = x0_and_eps(teacher(z_s, start, {"prompt": empty}), z_s, start)
        x0, e = x0_c + wide(w) * (x0_c - x0_u), e_c + wide(w) * (e_c - e_u)
        z_n = wide(abar_prev[i].sqrt()) * x0 + wide((1 - abar_prev[i]).sqrt()) * e
        y = consistency(target, z_n, ended)
    if loss_type == "l2":
        loss = ((f_s - y) ** 2).mean()
    else:
        loss = (((f_s - y) ** 2 + huber_c**2).sqrt() - huber_c).mean()
    return loss, z_s, z_n


class Setting:
    """One student, teacher and batch, seen by both implementations."""

    def __init__(self, prediction: Prediction, loss: str, lowest: bool, target: str = "student") -> None:
        self.lcm = LCM(SCHEDULE, "noised", target, skip=20, w_min=4.0, w_max=16.0, loss=loss, huber_c=0.01)
        self.prediction, self.student, self.average, self.teacher = prediction, Net(), Net(), Net()
        several = Context(seed=1, step=5, positions=tuple(range(400)))
        is_lowest = several.integers(1, 51, "t") == 1
        self.context = replace(several, positions=tuple(torch.where(is_lowest == lowest)[0][:60].tolist()))
        self.batch = clean_batch(len(self.context.positions))

    @property
    def networks(self) -> dict[str, Denoiser]:
        nets = {"student": self.student, "student_ema": self.average, "teacher": self.teacher}
        return {name: denoiser_of(net, self.prediction, SCHEDULE) for name, net in nets.items()}

    def theirs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The recipe on the draws of this context."""
        x = self.batch.states[:, 0]
        i = self.context.integers(1, 1000 // self.lcm.skip + 1, "t") - 1
        w = self.context.uniform(4.0, 16.0, "w").double() - 1
        c, u = self.batch.conditioning["prompt"], self.batch.unconditional["prompt"]
        noise = self.context.normal(x, "noise")
        arguments = (self.prediction, x, noise, i, w, c, u, self.lcm.skip, self.lcm.distance, self.lcm.huber_c)
        target = self.average if self.lcm.target == "student_ema" else self.student
        return recipe(self.student, target, self.teacher, *arguments)

    def gradients_of(self, loss: Tensor) -> list[Tensor | None]:
        self.student.zero_grad()
        loss.backward()
        return gradients(self.student)


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
@pytest.mark.parametrize("loss", ["huber", "l2"])
@pytest.mark.parametrize("target", ["student", "ema"])
def test_noised_source_is_the_recipe_number_for_number(prediction: Prediction, loss: str, target: str) -> None:
    """Loss and gradients, on every interval but the lowest."""
    both = Setting(prediction, loss, lowest=False, target=target)
    theirs, z_s, z_n = both.theirs()
    ours = both.lcm.loss(both.networks, both.batch, both.context).total
    step, _ = both.lcm.noised(both.networks["teacher"], both.batch, both.context)

    assert len(set(step.t.tolist())) > 30 and step.t.min() == 40
    torch.testing.assert_close((step.x_t, step.x_s), (z_s, z_n), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    torch.testing.assert_close(both.gradients_of(ours), both.gradients_of(theirs), rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for net in (both.teacher, both.average) for p in net.parameters())


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_trajectory_source_is_the_recipe_number_for_number(prediction: Prediction, loss: str) -> None:
    """The stored states being the recipe's z_s and z_n: no teacher is asked, and none need be there."""
    both = Setting(prediction, loss, lowest=False)
    theirs, z_s, z_n = both.theirs()
    t = 20 * both.context.integers(1, 51, "t")
    stored = replace(both.batch, states=torch.stack([z_s, z_n], 1), times=torch.stack([t, t - 20], 1))
    lcm = LCM(SCHEDULE, "trajectory", loss=loss, huber_c=0.01)
    ours = lcm.loss({"student": both.networks["student"]}, stored, both.context).total

    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    torch.testing.assert_close(both.gradients_of(ours), both.gradients_of(theirs), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
def test_the_lowest_interval_ends_at_clean_data_and_the_recipes_at_index_0(prediction: Prediction) -> None:
    """Ours compares with the guided teacher's x0 itself; theirs with what still has the noise of index 0 on it."""
    both = Setting(prediction, "l2", lowest=True)
    theirs, z_s, z_n = both.theirs()
    step, _ = both.lcm.noised(both.networks["teacher"], both.batch, both.context)
    assert set(step.t.tolist()) == {20} and set(step.s.tolist()) == {0}
    torch.testing.assert_close(step.x_t, z_s, rtol=0, atol=1e-12)

    w = both.context.uniform(4.0, 16.0, "w")
    belief = guided(both.networks["teacher"], both.batch.unconditional, w)(step.x_t, step.t, both.batch.conditioning)
    abar = SCHEDULE.alphas_cumprod[1]
    torch.testing.assert_close(step.x_s, belief.x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(z_n, abar.sqrt() * belief.x0 + (1 - abar).sqrt() * belief.eps, rtol=0, atol=1e-11)

    f_t = both.lcm.f(both.networks["student"], step.x_t, step.t, both.batch.conditioning)
    ours = both.lcm.loss(both.networks, both.batch, both.context).total
    torch.testing.assert_close(ours, (f_t - belief.x0).pow(2).mean())
    torch.testing.assert_close(theirs, (f_t - z_n).pow(2).mean())
    assert abs(ours - theirs) > 1e-3 * theirs


def test_a_trajectorys_pair_is_the_noised_sources_pair() -> None:
    """From the same x_t at the same w, one DDIM step of a stored solve is the step of the noised source."""
    both = Setting(Prediction.EPSILON, "l2", lowest=False)
    step, _ = both.lcm.noised(both.networks["teacher"], both.batch, both.context)
    w = both.context.uniform(4.0, 16.0, "w")
    for i in range(0, len(w), 7):
        c, u = ({"prompt": x["prompt"][i : i + 1]} for x in (both.batch.conditioning, both.batch.unconditional))
        times = [int(step.t[i]), int(step.s[i])]
        teacher = guided(both.networks["teacher"], u, float(w[i]))
        *_, (_, x_s) = solve(teacher, SCHEDULE, step.x_t[i : i + 1], times, c)
        torch.testing.assert_close(x_s, step.x_s[i : i + 1], rtol=0, atol=1e-11)


# --- what the loss is ---


def stored_batch(times: Tensor, states: Tensor | None = None) -> Batch:
    n = len(times)
    states = torch.randn(n, 2, *SHAPE, dtype=torch.float64) if states is None else states
    return replace(clean_batch(n), states=states, times=times)


@pytest.mark.parametrize("prediction", predictions_of(SCHEDULE))
def test_the_consistency_function_is_the_identity_at_clean_data(prediction: Prediction) -> None:
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    student, c = denoiser_of(Net(), prediction, SCHEDULE), {"prompt": torch.randn(4, 5)}
    f = LCM(SCHEDULE).f(student, x, torch.tensor([0, 0, 1, 20]), c)
    assert torch.equal(f[:2], x[:2]), "at t = 0"
    assert torch.equal(f[2], x[2]), "and at network index 0, as in the papers"
    assert (f[3] - x[3]).abs().max() > 1e-3


def test_no_gradient_goes_through_the_target() -> None:
    times = torch.tensor([[20, 0], [40, 20], [1000, 980]])
    batch = stored_batch(times)
    batch.states.requires_grad_()
    student = denoiser_of(Net(), Prediction.EPSILON, SCHEDULE)
    LCM(SCHEDULE).loss({"student": student}, batch, Context(0, 0, ())).total.backward()
    assert batch.states.grad is not None
    assert (batch.states.grad[:, 0] != 0).all() and (batch.states.grad[:, 1] == 0).all()


@pytest.mark.parametrize("source", ["trajectory", "noised"])
def test_the_teacher_gets_no_gradient(source: str) -> None:
    student, teacher = Net(), Net()
    networks = {k: denoiser_of(n, Prediction.V, SCHEDULE) for k, n in {"student": student, "teacher": teacher}.items()}
    batch = stored_batch(torch.tensor([[40, 20], [1000, 980]]))
    losses = LCM(SCHEDULE, source).loss(networks, batch, Context(0, 0, (0, 1)))
    losses.total.backward()
    assert all(g is None for g in gradients(teacher)) and all(g is not None and g.any() for g in gradients(student))
    assert losses.total.shape == () and not losses.parts["loss"].requires_grad
    assert losses.parts["loss"] == losses.total


def test_no_graph_of_the_teacher_is_kept() -> None:
    both = Setting(Prediction.EPSILON, "l2", lowest=False)
    step, _ = both.lcm.noised(both.networks["teacher"], both.batch, both.context)
    assert not step.x_t.requires_grad and not step.x_s.requires_grad


@pytest.mark.parametrize("source", ["trajectory", "noised"])
def test_nothing_is_left_to_learn_of_a_single_point(source: str) -> None:
    """Dirac data, where the teacher's x0 is the answer; what remains is c_skip(20) = 7e-6, squared."""
    point = gaussian(SCHEDULE, torch.randn(SHAPE, dtype=torch.float64), 0.0)
    t = torch.arange(20, 1001, 20)
    x_t = torch.randn(50, *SHAPE, dtype=torch.float64)
    x_s = ddim_step(SCHEDULE, point(x_t, t, {}), t - 20)
    batch = stored_batch(torch.stack([t, t - 20], 1), torch.stack([x_t, x_s], 1))
    if source == "noised":
        batch = replace(batch, states=point.means.expand(50, 1, *SHAPE), conditioning={}, unconditional={})
    lcm = LCM(SCHEDULE, source, loss="l2")
    assert lcm.loss({"student": point, "teacher": point}, batch, Context(0, 0, tuple(range(50)))).total < 1e-10


@pytest.mark.parametrize(("loss", "huber_c", "factor"), [("l2", 0.001, 8.0), ("huber", 1e-8, 4.0)])
def test_what_is_left_at_the_exact_solution_falls_with_the_skip(loss: str, huber_c: float, factor: float) -> None:
    """A halving of k divides the distance by 4, and its square by 8 for the sake of the interval next to the data."""
    teacher = gaussian(SCHEDULE, torch.full(SHAPE, 0.3, dtype=torch.float64), 0.8)

    left = []
    for skip in (40, 20, 10):
        t = torch.arange(skip, 1001, skip).repeat_interleave(16)
        x_0 = teacher.sample(16, torch.Generator().manual_seed(0)).repeat(1000 // skip, 1, 1, 1)
        x_t = add_noise(SCHEDULE, x_0, torch.randn_like(x_0), t)
        x_s = ddim_step(SCHEDULE, teacher(x_t, t, {}), t - skip)
        batch = stored_batch(torch.stack([t, t - skip], 1), torch.stack([x_t, x_s], 1))
        lcm = LCM(SCHEDULE, skip=skip, loss=loss, huber_c=huber_c)
        left.append(float(lcm.loss({"student": exact_student(teacher)}, batch, Context(0, 0, ())).total))
    assert [left[0] / left[1], left[1] / left[2]] == pytest.approx([factor, factor], rel=0.2)


def test_states_stored_in_half_precision_are_compared_in_float32() -> None:
    t = torch.arange(20, 1001, 20)
    batch = stored_batch(torch.stack([t, t - 20], 1), torch.randn(50, 2, 1, 1, 1).half())
    networks, context = {"student": three_peaks(SCHEDULE)}, Context(0, 0, ())
    stored = LCM(SCHEDULE).loss(networks, batch, context).total
    assert stored.dtype == torch.float32
    assert stored == LCM(SCHEDULE).loss(networks, replace(batch, states=batch.states.float()), context).total


def test_the_loss_does_not_ask_how_the_batch_is_split() -> None:
    both = Setting(Prediction.EPSILON, "huber", lowest=False)
    total = both.lcm.loss(both.networks, both.batch, both.context).total
    parts = []
    for rows in (slice(0, 20), slice(20, 40), slice(40, 60)):
        part = Batch(
            both.batch.states[rows],
            both.batch.times[rows],
            {"prompt": both.batch.conditioning["prompt"][rows]},
            {"prompt": both.batch.unconditional["prompt"][rows]},
            both.batch.guidance[rows],
        )
        context = replace(both.context, positions=both.context.positions[rows])
        parts.append(both.lcm.loss(both.networks, part, context).total)
    torch.testing.assert_close(torch.stack(parts).mean(), total, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("skip", "w_min", "w_max"), [(20, 4.0, 16.0), (100, 8.0, 8.0), (1000, 0.0, 1.0)])
def test_noised_source_draws_its_times_and_guidance_as_told(skip: int, w_min: float, w_max: float) -> None:
    """Every grid time as often, s a skip below; w is found again in what the guided teacher answers."""
    n = 2000
    lcm = LCM(SCHEDULE, "noised", skip=skip, w_min=w_min, w_max=w_max)

    def teacher(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        told = conditioning["prompt"][:, :1, None, None].expand_as(x_t)
        return Denoised(told, torch.zeros_like(x_t))  # x0 is 1 with a prompt and 0 without: guided, it is w

    ones = {"prompt": torch.ones(n, 1, dtype=torch.float64)}
    batch = Batch(
        torch.zeros(n, 1, 1, 1, 1, dtype=torch.float64),
        torch.zeros(n, 1),
        ones,
        {"prompt": torch.zeros(1, 1)},
        torch.ones(n),
    )
    step, drawn = lcm.noised(teacher, batch, Context(0, 0, tuple(range(n))))
    w = step.x_s.flatten() / SCHEDULE.alpha(step.s, step.x_s).flatten()
    torch.testing.assert_close(w, drawn.double())
    counts = torch.bincount(step.t // skip)[1:]
    assert torch.equal(step.s, step.t - skip) and len(counts) == 1000 // skip
    assert (counts - n * skip / 1000).abs().max() <= 4 * (n * skip / 1000) ** 0.5
    assert w.min() >= w_min - 1e-6 and w.max() <= w_max + 1e-6
    assert float(w.mean()) == pytest.approx((w_min + w_max) / 2, abs=0.1 * (w_max - w_min) + 1e-6)


def test_default_guidance_is_the_papers_3_to_15() -> None:
    lcm = LCM(SCHEDULE)
    assert (lcm.w_min, lcm.w_max) == (lcm_guidance(3), lcm_guidance(15))


# --- what a method is ---


def test_reads_and_turns() -> None:
    assert LCM(SCHEDULE, "trajectory", skip=40).reads() == Pair(40)
    assert LCM(SCHEDULE, "noised").reads() == CleanEnd()
    lcm = LCM(SCHEDULE)
    (turn,) = lcm.turns(0)
    assert lcm.trains == (turn.updates,) == ("student",) and turn.loss == lcm.loss
    assert tuple(lcm.turns(10_000)) == (turn,)


@pytest.mark.parametrize(
    ("source", "target", "requires"),
    [
        ("trajectory", "student", ()),
        ("trajectory", "ema", ("student_ema",)),
        ("noised", "student", ("teacher",)),
        ("noised", "ema", ("teacher", "student_ema")),
    ],
)
def test_asks_for_the_networks_that_its_loss_calls_and_no_others(
    source: str, target: str, requires: tuple[str, ...]
) -> None:
    lcm = LCM(SCHEDULE, source, target)
    assert lcm.requires == requires
    networks = {name: denoiser_of(Net(), Prediction.EPSILON, SCHEDULE) for name in ("student", *requires)}
    batch = stored_batch(torch.tensor([[40, 20]]))
    lcm.loss(networks, batch, Context(0, 0, (0,)))
    for name in requires:
        with pytest.raises(KeyError, match=name):
            lcm.loss({n: d for n, d in networks.items() if n != name}, batch, Context(0, 0, (0,)))


@pytest.mark.parametrize("source", ["trajectory", "noised"])
def test_the_student_is_told_the_guidance_of_its_step_and_the_teacher_is_not(source: str) -> None:
    told: dict[str, list[Tensor | None]] = {"student": [], "teacher": []}

    def spy(name: str) -> Denoiser:
        def call(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
            told[name].append(c.get("guidance"))
            return Denoised(x, x)

        return call

    batch = replace(stored_batch(torch.tensor([[40, 20], [60, 40]])), guidance=torch.tensor([3.0, 8.0]))
    context = Context(0, 0, (0, 1))
    LCM(SCHEDULE, source).loss({name: spy(name) for name in told}, batch, context)
    w = batch.guidance if source == "trajectory" else context.uniform(4.0, 16.0, "w")
    assert len(told["student"]) == 2 and all(torch.equal(seen, w) for seen in told["student"])  # type: ignore[arg-type]
    assert all(seen is None for seen in told["teacher"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"source": "images"}, "method.source must be one of trajectory, noised, got 'images'"),
        ({"target": "mean"}, "method.target must be one of student, ema, got 'mean'"),
        ({"loss": "l1"}, "method.loss must be one of huber, l2, got 'l1'"),
        ({"skip": 0}, "method.skip must divide the schedule's 1000 times, got 0"),
        ({"skip": -20}, "method.skip must divide the schedule's 1000 times, got -20"),
        ({"skip": 30}, "method.skip must divide the schedule's 1000 times, got 30"),
        ({"skip": 2000}, "method.skip must divide the schedule's 1000 times, got 2000"),
        ({"w_min": -1.0}, "method.w_min and w_max must satisfy 0 <= w_min <= w_max, got -1.0 and 16.0"),
        ({"w_min": 17.0}, "method.w_min and w_max must satisfy 0 <= w_min <= w_max, got 17.0 and 16.0"),
        ({"w_max": float("nan")}, "method.w_min and w_max must satisfy 0 <= w_min <= w_max, got 4.0 and nan"),
        ({"w_max": float("inf")}, "method.w_min and w_max must satisfy 0 <= w_min <= w_max, got 4.0 and inf"),
        ({"huber_c": 0.0}, "method.huber_c must be above 0, got 0.0"),
        ({"huber_c": float("nan")}, "method.huber_c must be above 0, got nan"),
    ],
    ids=str,
)
def test_refuses_a_bad_value_in_one_line_that_names_its_key(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        LCM(SCHEDULE, **bad)
    assert str(error.value) == message


# --- it distils ---


class Student(nn.Module):
    """The teacher with a correction of x0 that begins at 0, as a LoRA does."""

    def __init__(self, teacher: Mixture, channels: int) -> None:
        super().__init__()
        self.teacher, shape = teacher, teacher.means.shape[1:]
        self.layers = nn.Sequential(
            nn.Linear(channels + 4, 64),
            nn.SiLU(),
            nn.Linear(64, 64),
            nn.SiLU(),
            nn.Linear(64, channels),
            nn.Unflatten(1, shape),
        )
        for p in self.layers[-2].parameters():
            nn.init.zeros_(p)

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        angle = t[:, None] / 1000 * torch.tensor([1.5, 6.0])
        belief = self.teacher(x_t, t, conditioning)
        return Denoised(belief.x0 + self.layers(torch.cat([x_t.flatten(1), angle.sin(), angle.cos()], 1)), belief.eps)


def distil(lcm: LCM, teacher: Mixture, steps: int = 600, batch_size: int = 256) -> Student:
    """A training loop of a few lines over trajectories that the teacher solved beforehand."""
    shape, times = teacher.means.shape[1:], trailing_times(1000, 50)
    states = torch.stack([x for _, x in solve(teacher, SCHEDULE, torch.randn(4096, *shape), times, {})], 1)
    student, g = Student(teacher, shape.numel()), generator("distil")
    pairs = torch.tensor([lcm.reads().pick(times, g) for _ in range(2000)])  # [2000, 2], places in `times`
    optimizer = torch.optim.Adam(student.parameters(), 3e-3, betas=(0.5, 0.99))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for step in range(steps):
        row = torch.randint(len(states), (batch_size, 1), generator=g)
        pair = pairs[torch.randint(len(pairs), (batch_size,), generator=g)]
        batch = Batch(states[row, pair], torch.tensor(times)[pair], {}, {}, torch.ones(batch_size))
        (turn,) = lcm.turns(step)
        optimizer.zero_grad()
        turn.loss({turn.updates: student}, batch, Context(0, step, ())).total.backward()
        optimizer.step()
        decay.step()
    return student


@pytest.mark.parametrize(("loss", "skip"), [("l2", 100), ("huber", 200)])
def test_a_student_learns_to_go_in_one_step_where_the_ode_goes(loss: str, skip: int) -> None:
    teacher, x = three_peaks(SCHEDULE), torch.randn(1000, 1, 1, 1)
    exact = quantile_flow(teacher, x.double(), 1000, 0)

    def distance(denoiser: Denoiser) -> float:
        return float((sample(denoiser, SCHEDULE, x, [1000, 0], {}) - exact).pow(2).mean().sqrt())

    student = distil(LCM(SCHEDULE, skip=skip, loss=loss), teacher)
    assert distance(teacher) > 1.1, "one step of the teacher draws the mean of the data"
    assert distance(student) < 0.22
