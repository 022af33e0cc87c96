"""SDXL-Lightning where the right answers are known: its paths, its losses, what its discriminator sees, and that it
distils."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from distill.diffusion.adversarial import Origin
from distill.diffusion.prediction import Conditioning, Denoised, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import ddim_step, solve, trailing_times
from distill.diffusion.trajectory import Batch, CleanEnd, Steps
from distill.methods.lightning import LightningAdversarial, LightningConvert, LightningMSE, Progressive
from tests.analytic import Mixture, gaussian, three_peaks

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (2, 3, 3)
FOUR = (250, 500, 750, 1000)


class Constant(nn.Module):
    """Always the same noise: the flow it names is a straight line in sigma / alpha."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.full(SHAPE, value, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        return to_denoised(Prediction.EPSILON, self.eps.expand_as(x_t), x_t, t, SCHEDULE)


class Critic(nn.Module):
    """A discriminator of one weight; notes what it is shown. `mixed` makes it look at the origin too."""

    def __init__(self, weight: float = 0.7, mixed: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.mixed, self.shown = mixed, []

    def forward(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        self.shown.append((list(samples), t, origin))
        assert origin is not None
        return [self.weight * (x + self.mixed * origin[0]).flatten(1).mean(1) for x in samples]


def clean(n: int = 16) -> Batch:
    x_0 = torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return Batch(x_0[:, None], torch.zeros(n, 1, dtype=torch.int64), {}, {}, torch.ones(n), positions=tuple(range(n)))


def context(n: int = 16, step: int = 0) -> Context:
    return Context(0, step, tuple(range(n)))


def data(sd: float = 0.8) -> Mixture:
    return gaussian(SCHEDULE, torch.full(SHAPE, 0.3, dtype=torch.float64), sd)


# --- times ---


@pytest.mark.parametrize(
    ("teacher", "student", "substeps"), [(128, 32, 4), (32, 8, 4), (8, 4, 2), (8, 2, 4), (4, 1, 4)]
)
def test_the_teacher_lands_on_the_students_times(teacher: int, student: int, substeps: int) -> None:
    method = LightningMSE(SCHEDULE, student, teacher)
    grid = trailing_times(1000, teacher)
    for t, s in pairwise(trailing_times(1000, student)):
        path = method.paths.values[t].tolist()
        assert path == grid[grid.index(t) : grid.index(s) + 1] and len(path) == substeps + 1
        assert method.ends[t] == s


@pytest.mark.parametrize("steps", [128, 32, 8, 4, 2, 1])
def test_the_students_times_are_those_of_both_trailing_schedulers(steps: int) -> None:
    times = [t - 1 for t in LightningMSE(SCHEDULE, steps, steps).ends]
    for kind in (EulerDiscreteScheduler, DDIMScheduler):
        scheduler = kind(timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == times


def test_from_times_off_its_grid_a_student_takes_a_whole_step_to_clean_data_at_most() -> None:
    assert LightningMSE(SCHEDULE, 2, 4, times=FOUR).ends == {1000: 500, 750: 250, 500: 0, 250: 0}
    assert LightningMSE(SCHEDULE, 1, 4, times=FOUR).ends == dict.fromkeys([1000, 750, 500, 250], 0)
    off = LightningMSE(SCHEDULE, 1, 2, times=FOUR).paths.values[750]
    assert off.tolist() == [750, 500, 0]  # the teacher's own times where it meets them


def test_what_is_out_of_range_is_named() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"student_steps": 0}, "student_steps must be within 1"),
        ({"source": "noise"}, "source must be one of noised, trajectory"),
        ({"x_T": "pure"}, "x_T must be one of noise, scaled"),
        ({"x_T": "scaled", "source": "trajectory"}, "x_T=scaled needs method.source=noised"),
        ({"times": [0, 500]}, "times must be within 1 ... 1000"),
        ({"student_steps": 3, "times": [999]}, r"\[999\] are off the student's 3 times"),
        ({"later_from": 5}, "set together"),
        ({"discriminator_warmup": -1}, "discriminator_warmup must be at least 0"),
        ({"renoise_times": [1001]}, "method.renoise_times must be within"),
    ]
    for keys, message in wrong:
        with pytest.raises(ValueError, match=message):
            LightningAdversarial(SCHEDULE, **{"student_steps": 8, "teacher_steps": 32, **keys})


# --- where x_t comes from and the teacher takes it ---


def test_the_noisiest_input_is_noise_alone() -> None:
    n = 6
    noise = torch.randn(n, *SHAPE, dtype=torch.float64)
    t = torch.tensor([1000, 750] * 3)
    method, scaled = LightningMSE(SCHEDULE, 4, 8), LightningMSE(SCHEDULE, 4, 8, x_T="scaled")
    here, there = (method.noised(torch.full_like(noise, value), noise, t) for value in (1.0, -5.0))
    assert torch.equal(here[::2], noise[::2]) and torch.equal(there[::2], noise[::2])
    assert torch.equal(here[1::2], add_noise(SCHEDULE, torch.ones_like(noise), noise, t)[1::2])
    sigma = math.sqrt(1 - float(SCHEDULE.alphas_cumprod[1000]))
    assert torch.allclose(scaled.noised(noise, noise, t)[::2], sigma * noise[::2], rtol=1e-12)


def test_both_conventions_of_the_noisiest_input_are_a_schedulers_first_step() -> None:
    """From one noise n: DDIM's step from n itself, Euler's from sigma_T n."""
    noise = torch.randn(4, *SHAPE, dtype=torch.float64)
    config: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ddim = DDIMScheduler(**config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    euler = EulerDiscreteScheduler(**config, timestep_spacing="trailing")
    network = Constant(0.4)
    for scheduler, x_T in ((ddim, "noise"), (euler, "scaled")):
        method = LightningMSE(SCHEDULE, 4, 8, x_T=x_T)
        scheduler.set_timesteps(4)
        t = torch.full((4,), 1000)
        x_t = method.noised(torch.zeros_like(noise), noise, t)
        start = noise * scheduler.init_noise_sigma
        assert torch.allclose(scheduler.scale_model_input(start, scheduler.timesteps[0]).double(), x_t, atol=2e-6)
        eps = network.eps.detach().expand_as(noise)
        after = scheduler.step(eps, scheduler.timesteps[0], start).prev_sample.double()
        if x_T == "scaled":  # Euler's samples are x / alpha
            after = after * float(SCHEDULE.alphas_cumprod[750]) ** 0.5
        with torch.no_grad():
            expected = ddim_step(SCHEDULE, network(x_t, t, {}), 750)
        assert torch.allclose(after, expected, atol=2e-5)


def test_the_teacher_takes_the_steps_of_its_own_solve() -> None:
    """A stored solve in 128 steps passes where the teacher on the fly arrives, whatever the time of each sample."""
    teacher = three_peaks(SCHEDULE)
    x = torch.randn(8, 1, 1, 1, dtype=torch.float64)
    solved = dict(solve(teacher, SCHEDULE, x, trailing_times(1000, 128), {}))
    method = LightningMSE(SCHEDULE, 32, 128)
    t = torch.tensor(trailing_times(1000, 32)[:-1]).repeat_interleave(8)[:: 32 * 8 // 8]  # eight times, all apart
    s = method.next_time(t)
    x_t, x_s = (torch.stack([solved[int(r)][i] for i, r in enumerate(times)]) for times in (t, s))
    batch = Batch(x_t[:, None], t[:, None], {}, {}, torch.ones(8), positions=tuple(range(8)))
    found = method.teacher_target({"teacher": teacher}, batch, x_t, t)
    assert torch.allclose(found, x_s, rtol=1e-10, atol=1e-12)

    stored = Batch(torch.stack([x_t, x_s], 1), torch.stack([t, s], 1), {}, {}, torch.ones(8), positions=tuple(range(8)))
    read = LightningMSE(SCHEDULE, 32, 128, source="trajectory")
    assert read.requires == () and isinstance(read.reads(), Steps) and isinstance(method.reads(), CleanEnd)
    assert all(torch.equal(a, b) for a, b in zip(read.state(stored, context(8)), (x_t, t, s), strict=True))
    assert torch.equal(read.teacher_target({}, stored, x_t, t), x_s)


def test_samples_that_need_fewer_of_the_teachers_steps_wait_for_the_others() -> None:
    teacher, method = data(), LightningMSE(SCHEDULE, 2, 8, times=FOUR)
    t = torch.tensor([1000, 750, 500, 250])
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    batch = Batch(x[:, None], t[:, None], {}, {}, torch.ones(4), positions=tuple(range(4)))
    found = method.teacher_target({"teacher": teacher}, batch, x, t)
    for i, time in enumerate(t.tolist()):
        grid = [g for g in trailing_times(1000, 8) if method.ends[time] <= g <= time]
        *_, (_, alone) = solve(teacher, SCHEDULE, x[i : i + 1], grid, {})
        assert torch.allclose(found[i : i + 1], alone, rtol=1e-12)


def test_only_a_guided_run_asks_the_teacher_without_a_prompt() -> None:
    asked: list[int] = []

    def teacher(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        asked.append(len(x))
        return data()(x, t, {})

    batch = clean(4)
    batch = Batch(
        batch.states,
        batch.times,
        {"e": torch.ones(4, 1)},
        {"e": torch.zeros(4, 1)},
        batch.guidance,
        positions=(0, 1, 2, 3),
    )
    for guidance, passes in ((6.0, 2), (1.0, 1)):
        asked.clear()
        LightningMSE(SCHEDULE, 32, 128, guidance=guidance).loss(
            {"teacher": teacher, "student": data()}, batch, context(4)
        )
        assert asked == [passes * 4] * 4


# --- mean squared error ---


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    for student_steps, teacher_steps, teacher in ((8, 8, data()), (8, 32, Constant(0.3)), (1, 4, Constant(-1.0))):
        method = LightningMSE(SCHEDULE, student_steps, teacher_steps)
        loss = method.loss({"teacher": teacher, "student": teacher}, clean(), context()).total
        assert float(loss.detach()) < 1e-20


def test_its_gradient_is_that_of_the_noises_error_weighted() -> None:
    """d/d eps of |x_fake - x_real|² is alpha_s² (sigma_s/alpha_s - sigma_t/alpha_t)² that of |eps - eps*|²."""
    method, student, batch = LightningMSE(SCHEDULE, 32, 128), Constant(0.2), clean(1)
    method.loss({"teacher": data(), "student": student}, batch, context(1)).total.backward()
    x_t, t, s = method.state(batch, context(1))
    x_real = method.teacher_target({"teacher": data()}, batch, x_t, t)
    alpha, sigma = ([float(f(r, x_t)) for r in (t, s)] for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    u_t, u_s = sigma[0] / alpha[0], sigma[1] / alpha[1]
    wanted = (x_real / alpha[1] - x_t / alpha[0]) / (u_s - u_t)
    inner = 2 * (student.eps.detach() - wanted) / wanted.numel()
    assert student.eps.grad is not None
    assert torch.allclose(student.eps.grad, (alpha[1] * (u_s - u_t)) ** 2 * inner[0], rtol=1e-7)


class Affine(nn.Module):
    """At each of the student's times an eps that is affine in x_t: of Gaussian data every composition of steps is."""

    def __init__(self, times: Sequence[int], prediction: Prediction = Prediction.EPSILON) -> None:
        super().__init__()
        self.place = {t: i for i, t in enumerate(times)}
        self.a = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))
        self.prediction = prediction

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        i = torch.tensor([self.place[int(time)] for time in t])
        a, b = (p[i].reshape(-1, 1, 1, 1) for p in (self.a, self.b))
        return to_denoised(self.prediction, a * x_t + b, x_t, t, SCHEDULE)


def minimise(network: nn.Module, loss: Any, steps: int) -> float:
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=steps, history_size=50, line_search_fn="strong_wolfe")
    optimizer.param_groups[0].update(tolerance_grad=0.0, tolerance_change=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        total = loss()
        total.backward()
        return total

    optimizer.step(closure)
    return float(loss().detach())


def test_of_gaussian_data_the_student_becomes_the_teachers_composition() -> None:
    teacher, method = data(0.5), LightningMSE(SCHEDULE, 4, 16)
    student, batch = Affine(list(method.ends)), clean(64)
    networks = {"teacher": teacher, "student": student}
    assert minimise(student, lambda: method.loss(networks, batch, context(64)).total, 200) < 1e-16
    x = torch.randn(8, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        *_, (_, fast) = solve(student, SCHEDULE, x, trailing_times(1000, 4), {})
    *_, (_, slow) = solve(teacher, SCHEDULE, x, trailing_times(1000, 16), {})
    assert torch.allclose(fast, slow, atol=1e-6)


def test_converting_to_clean_data_has_the_old_network_as_its_solution() -> None:
    method = LightningConvert(SCHEDULE, times=FOUR)
    student, batch = Affine(FOUR, Prediction.SAMPLE), clean(64)
    networks = {"teacher": data(0.5), "student": student}
    assert method.requires == ("teacher",)
    assert minimise(student, lambda: method.loss(networks, batch, context(64)).total, 200) < 1e-16


# --- the game ---


def game(**keys: Any) -> LightningAdversarial:
    return LightningAdversarial(SCHEDULE, **{"student_steps": 2, "teacher_steps": 4, "times": FOUR, **keys})


def networks(critic: Critic) -> dict[str, Any]:
    return {"student": Constant(0.1), "teacher": data(), "discriminator": critic}


@pytest.mark.parametrize("renoise", [(), (10, 250, 500, 750)])
def test_the_discriminator_sees_where_both_steps_end_beside_where_they_began(renoise: tuple[int, ...]) -> None:
    method, critic = game(renoise_times=renoise), Critic()
    nets = networks(critic)
    method.discriminator_loss(nets, clean(), context())
    (real, fake), seen, origin = critic.shown[0]
    x_t, t, s = method.state(clean(), context())
    ends = method.teacher_target(nets, clean(), x_t, t), ddim_step(SCHEDULE, nets["student"](x_t, t, {}), s)
    assert torch.equal(origin[0], x_t) and torch.equal(origin[1], t)
    noisy, at_end = s > 0, s == 0
    assert noisy.any() and at_end.any()
    assert torch.equal(seen[noisy], s[noisy])
    for shown, end in zip((real, fake), ends, strict=True):
        assert torch.equal(shown[noisy], end[noisy])  # noisy enough to be judged as it is
        if not renoise:
            assert torch.equal(shown, end) and torch.equal(seen, s)
    if renoise:
        assert set(seen[at_end].tolist()) <= set(renoise)
        apart, alpha = real - fake, SCHEDULE.alpha(seen, real)
        assert torch.allclose(apart[at_end], (alpha * (ends[0] - ends[1]))[at_end], rtol=1e-9)  # one noise for both


def test_an_undecided_game_costs_log_2_a_verdict() -> None:
    method, critic = game(), Critic(weight=0.0)
    judged, student = (
        f(networks(critic), clean(), context()).total.detach() for f in (method.discriminator_loss, method.loss)
    )
    assert float(judged) == pytest.approx(2 * math.log(2)) and float(student) == pytest.approx(math.log(2))


def test_the_students_gradient_comes_through_a_frozen_discriminator_and_the_noise() -> None:
    """Of one step that ends clean it is alpha(t*) times the discriminator's own, at each t*."""
    for time in (10, 250, 500, 750):
        method = game(student_steps=1, times=(1000,), renoise_times=[time], renoise_weights=[1.0])
        critic = Critic(weight=0.7).requires_grad_(False)
        nets, n = networks(critic), 4
        method.loss(nets, clean(n), context(n)).total.backward()
        grad = nets["student"].eps.grad
        assert critic.weight.grad is None
        (shown,), _, _ = critic.shown[0]
        logits = 0.7 * shown.flatten(1).mean(1)
        own = -torch.sigmoid(-logits).mean() * 0.7 / shown[0].numel()  # d softplus(-l) / d sample
        moves = -float(SCHEDULE.sigma(1000, shown) / SCHEDULE.alpha(1000, shown)) * float(SCHEDULE.alpha(time, shown))
        assert torch.allclose(grad, (own * moves).expand_as(grad), rtol=1e-6)


def test_the_teacher_is_asked_in_the_discriminators_turn_alone() -> None:
    """The student's own loss needs no real sample: its turn costs no step of the teacher."""

    def never(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        raise AssertionError("asked")

    nets = {**networks(Critic()), "teacher": never}
    method = game()
    method.loss(nets, clean(), context())
    with pytest.raises(AssertionError, match="asked"):
        method.discriminator_loss(nets, clean(), context())


def test_a_warm_up_trains_the_discriminator_alone_and_later_odds_come_later() -> None:
    method = game(discriminator_warmup=2, later_weights=(5, 1, 1, 1), later_from=3, discriminator_learning_rate=0.1)
    assert [[turn.updates for turn in method.turns(step)] for step in (1, 2)] == [
        ["discriminator"],
        ["discriminator", "student"],
    ]
    assert method.adversary(2).weights == (1.0, 1.0, 1.0, 1.0) and method.adversary(3).weights == (5, 1, 1, 1)
    assert method.learning_rate(0, "discriminator") == 0.1 and method.learning_rate(0) is None


class Shift(nn.Module):
    """The one-step student of a line: where the noise lands is one number away from it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.3, -1.0))

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        return to_denoised(Prediction.SAMPLE, self.a * x_t + self.b, x_t, t, SCHEDULE)


class Features(nn.Module):
    """A discriminator by a quadratic in (sample, origin): enough to tell two joint Gaussians apart."""

    def __init__(self, conditional: bool) -> None:
        super().__init__()
        self.conditional = conditional
        self.weights = nn.Linear(5 if conditional else 2, 1).double()

    def forward(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        assert origin is not None
        o = origin[0].flatten(1)
        rows = [x.flatten(1) for x in samples]
        maps = [torch.cat([x, x**2, o, x * o, o**2] if self.conditional else [x, x**2], 1) for x in rows]
        return [self.weights(m)[:, 0] for m in maps]


@pytest.mark.parametrize("conditional", [True, False])
def test_the_game_ends_where_the_teachers_distribution_is(conditional: bool) -> None:
    """Both objectives find the distribution; which noise becomes what only the conditional one can see (sec. 3.4)."""
    sd, mean, n = 0.5, 0.7, 256
    teacher = gaussian(SCHEDULE, torch.full((1, 1, 1), mean, dtype=torch.float64), sd)
    x_T = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_T = (x_T - x_T.mean()) / x_T.std()
    *_, (_, x_0) = solve(teacher, SCHEDULE, x_T, trailing_times(1000, 16), {})
    times = torch.tensor([[1000, 0]]).expand(n, 2)
    batch = Batch(torch.stack([x_T, x_0], 1), times, {}, {}, torch.ones(n), positions=tuple(range(n)))
    method = LightningAdversarial(SCHEDULE, 1, 16, source="trajectory", renoise_times=[])
    student, critic = Shift(), Features(conditional)
    if not conditional:  # it starts with the sign of every noise turned round
        student.a.data.fill_(-0.3)
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=3e-3, betas=(0.0, 0.99)),
        # a weight decay, or the two would circle around where they ought to meet
        "discriminator": torch.optim.Adam(critic.parameters(), lr=2e-2, betas=(0.0, 0.99), weight_decay=1e-2),
    }
    for step in range(800):
        for turn in method.turns(step):
            optimizers[turn.updates].zero_grad()
            nets = {"student": student, "discriminator": critic}
            turn.loss(nets, batch, Context(0, step, batch.positions)).total.backward()
            optimizers[turn.updates].step()
    a, b = float(student.a.detach()), float(student.b.detach())
    assert abs(abs(a) - float(x_0.std())) < 0.03 and abs(b - float(x_0.mean())) < 0.03
    assert a > 0 if conditional else a < 0


def test_all_of_them_are_drawn_with_the_scheduler_they_belong_to() -> None:
    for kind in (LightningMSE, LightningAdversarial):
        for x_T, sampler in (("noise", "ddim"), ("scaled", "euler")):
            method: Progressive = kind(SCHEDULE, 4, 8, x_T=x_T)
            assert (method.sampling.sampler, method.sampling.spacing, method.sampling.steps) == (sampler, "trailing", 4)
