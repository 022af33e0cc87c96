"""PCM against exact flows: which landings are compared, what the discriminator sees, and how students are sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.diffusion.adversarial import Origin
from distill.diffusion.losses import pseudo_huber
from distill.diffusion.prediction import Conditioning, Denoised
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.segments import Segments
from distill.diffusion.solver import trailing_times
from distill.diffusion.trajectory import Batch, Pair
from distill.methods.mlcm import MLCM
from distill.methods.pcm import PCM
from distill.methods.sampling import Sampling, sample
from tests.methods.test_mlcm import SCHEDULE, context, data, exact, pairs
from tests.methods.test_tcd import Off, fixed_point
from tests.methods.test_tcd import method as tcd

COUNTS = [1, 2, 4, 8]


def of_all_pairs(count: int, n: int, exact_steps: bool = True) -> Batch:
    return pairs(data(), Segments(1000, count), 25, exact_steps, n=n)


class Judge:
    """A discriminator that notes what it is shown, and has an opinion of two places."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Tensor], Tensor, Origin | None]] = []

    def __call__(
        self, samples: Any, t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        self.calls.append((list(samples), t, origin))
        return [x.flatten(1)[:, :2] for x in samples]


# --- consistency ---


@pytest.mark.parametrize("count", COUNTS)
def test_without_its_game_it_is_mlcms_stage_with_huber_bit_for_bit(count: int) -> None:
    pcm = PCM(SCHEDULE, segments=count, adversarial=0.0)
    settings = {"segments": count, "skip": 25, "iterations": 1, "distance": "huber", "huber_c": 0.001}
    mlcm, batch, found = MLCM(SCHEDULE, [settings]), of_all_pairs(count, n=3), []  # type: ignore[list-item]
    (turn,) = pcm.turns(0)
    for loss in (turn.loss, lambda *a: mlcm.loss(mlcm.stages[0], *a)):
        student = Off()
        losses = loss({"student": student}, batch, context(len(batch)))
        losses.total.backward()
        found.append([losses.total.detach(), *(p.grad for p in student.parameters()), losses.parts[f"segment_{count}"]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0] > 0
    assert pcm.reads() == mlcm.reads() == Pair(25, Segments(1000, count))


@pytest.mark.parametrize("count", COUNTS)
def test_the_exact_student_has_no_loss_and_its_chain_of_phases_is_the_flow(count: int) -> None:
    pcm, student, batch = PCM(SCHEDULE, segments=count), exact(data(), Segments(1000, count)), of_all_pairs(count, n=4)
    losses = pcm.loss(0.0, {"student": student}, batch, context(len(batch)))
    assert abs(float(losses.total)) < 1e-12
    assert pcm.sampling == Sampling("ddim", "trailing", count)


def test_its_students_are_right_in_as_many_steps_as_they_have_phases_and_in_no_others() -> None:
    """Data N(0, .8²), exact .801: of four phases the sd of samples in 1, 2, 4 and 8 steps; so steps are said."""
    student = fixed_point(*tcd(ends="start", segments=4), sd=0.8)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    found = [float(sample(student, SCHEDULE, x, trailing_times(1000, n), {}, "ddim")) for n in (1, 2, 4, 8)]
    assert found == pytest.approx([0.10, 0.47, 0.801, 0.88], abs=5e-3)
    assert PCM(SCHEDULE).sampling.steps == 4


def test_no_answer_of_the_student_is_used_where_a_pair_ends_at_its_phases_start() -> None:
    pcm, batch = PCM(SCHEDULE, segments=4), of_all_pairs(4, n=2)
    step, start = batch.transition(), pcm.start(of_all_pairs(4, n=2))

    def nothing(x: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        return Denoised(torch.full_like(x, torch.nan), torch.full_like(x, torch.nan))

    there = pcm.target(nothing, batch, start)
    assert torch.equal(there[step.s == start], step.x_s[step.s == start]) and there[step.s > start].isnan().all()


def test_every_chain_of_pairs_ends_at_the_start_of_its_phase_whatever_the_skip() -> None:
    """Also where the skip does not divide a phase: the last pair is shorter."""
    times, reads = trailing_times(1000, 1000), PCM(SCHEDULE, segments=8, skip=20).reads()
    follows = {times[a]: times[b] for a, b in reads._pairs(tuple(times))}  # type: ignore[attr-defined]
    for t in (1000, 876, 250, 130):
        start = int(Segments(1000, 8).start(torch.tensor([t])))
        while t > start:
            t = follows[t]
        assert t == start


# --- the game ---


def test_what_is_shown_is_within_the_phase_of_t_and_every_time_of_it_comes() -> None:
    pcm, batch = PCM(SCHEDULE, segments=4), of_all_pairs(4, n=100)
    t = batch.times[:, 0]
    shown = pcm.shown_time(batch, context(len(batch)))
    start, end = Segments(1000, 4).start(t), Segments(1000, 4).end(t)
    assert ((start <= shown) & (shown <= end)).all()
    share = ((shown - start) / (end - start)).double()
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02) and share.min() < 0.005 and share.max() > 0.995


def test_landings_that_are_sent_back_up_have_the_law_of_that_time() -> None:
    """Of the exact student: mean and sd of x_t'."""
    pcm, batch, judge = PCM(SCHEDULE, segments=2), of_all_pairs(2, n=100), Judge()
    networks: dict[str, Any] = {"student": exact(data(), Segments(1000, 2)), "discriminator": judge}
    pcm.discriminator_loss(networks, batch, context(len(batch)))
    ((shown, time, origin),) = judge.calls
    assert (
        origin is not None and torch.equal(origin[0], batch.states[:, 0]) and torch.equal(origin[1], batch.times[:, 0])
    )
    for x in shown:
        alpha, sigma = SCHEDULE.alpha(time, x), SCHEDULE.sigma(time, x)
        standard = (x - alpha * 0.3) / (alpha**2 * 0.64 + sigma**2).sqrt()
        assert float(standard.mean()) == pytest.approx(0, abs=0.05) and float(standard.std()) == pytest.approx(
            1, abs=0.03
        )


@pytest.mark.parametrize("shared", [False, True])
def test_both_turns_show_one_fake_and_real_has_a_noise_of_its_own_or_the_same(shared: bool) -> None:
    pcm, batch, judge = PCM(SCHEDULE, segments=4, shared_noise=shared), of_all_pairs(4, n=3), Judge()
    student = exact(data(), Segments(1000, 4))  # whose landings are alike
    networks: dict[str, Any] = {"student": student, "discriminator": judge}
    pcm.loss(0.1, networks, batch, context(len(batch)))
    pcm.discriminator_loss(networks, batch, context(len(batch)))
    ((one,), t, _), ((real, fake), u, _) = judge.calls
    assert torch.equal(one, fake) and torch.equal(t, u)
    later = t > pcm.start(batch)
    assert torch.allclose(real[later], fake[later], atol=1e-9) == shared


def test_losses_are_the_published_ones() -> None:
    """relu(1 - D) for the student, relu(1 - D_real) + relu(1 + D_fake) for D, means over places and samples."""
    pcm, batch, judge, student = PCM(SCHEDULE, adversarial=0.1), of_all_pairs(4, n=3), Judge(), Off()
    networks: dict[str, Any] = {"student": student, "discriminator": judge}
    found = pcm.loss(0.1, networks, batch, context(len(batch)))
    judged = pcm.discriminator_loss(networks, batch, context(len(batch)))
    ((shown,), _, _), ((real, fake), _, _) = judge.calls
    start = pcm.start(batch)
    distance = pseudo_huber(pcm.lands(student, batch, start), pcm.target(student, batch, start)).mean()
    torch.testing.assert_close(found.total, distance + 0.1 * (1 - shown.flatten(1)[:, :2]).relu().mean())
    r, f = (x.flatten(1)[:, :2] for x in (real, fake))
    torch.testing.assert_close(judged.total, ((1 - r).relu() + (1 + f).relu()).mean())
    assert not judged.total.requires_grad and found.total.requires_grad  # of the student no gradient in D's turn


def test_held_out_is_the_distance_alone_and_turns_need_no_critic_without_a_game() -> None:
    pcm, batch = PCM(SCHEDULE), of_all_pairs(4, n=2)
    turn = pcm.held_out(0)
    assert "adversarial_loss" not in turn.loss({"student": data()}, batch, context(len(batch))).parts
    assert [t.updates for t in pcm.turns(0)] == ["discriminator", "student"]
    assert [t.updates for t in PCM(SCHEDULE, adversarial=0.0).turns(0)] == ["student"]
    assert (pcm.learning_rate(0, "discriminator"), pcm.learning_rate(0)) == (None, None)
    assert PCM(SCHEDULE, discriminator_learning_rate=1e-5).learning_rate(3, "discriminator") == 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segments": 0}, "method.segments must be within 1 ... 1000, got 0"),
        ({"skip": 0}, "method.skip must be within 1 ... 1000, got 0"),
        ({"huber_c": 0.0}, "method.huber_c must be above 0, got 0.0"),
        ({"adversarial": -1.0}, "method.adversarial must be at least 0, got -1.0"),
        ({"discriminator_learning_rate": 0.0}, "method.discriminator_learning_rate must be above 0, got 0.0"),
        (
            {"adversarial_loss": "wgan"},
            "method.adversarial_loss must be one of nonsaturating, hinge, hinge_clipped, least_squares, got 'wgan'",
        ),
    ],
    ids=str,
)
def test_refuses_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        PCM(SCHEDULE, **settings)
    assert str(raised.value) == message
    assert PCM(NoiseSchedule.linear(3.0)).sampling == Sampling("ddim", "trailing", 4)
