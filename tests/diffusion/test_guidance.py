from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.diffusion.guidance import guide, guided, lcm_guidance
from distill.diffusion.prediction import Conditioning, Denoised
from distill.diffusion.schedule import NoiseSchedule
from tests.analytic import Mixture, three_peaks

SCHEDULE = NoiseSchedule.scaled_linear()


class Recorder:
    """A mixture teacher that remembers what it was asked."""

    def __init__(self, teacher: Mixture) -> None:
        self.teacher = teacher
        self.calls: list[Conditioning] = []

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        self.calls.append(conditioning)
        return self.teacher(x_t, t, conditioning)


@pytest.fixture
def teacher() -> Recorder:
    return Recorder(three_peaks(SCHEDULE))


def prompt() -> Conditioning:
    weights = torch.tensor([[0.0, 0.1, 0.9], [0.6, 0.4, 0.0], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]], dtype=torch.float64)
    return {"weights": weights, "time_ids": torch.arange(24.0).reshape(4, 6)}


UNCONDITIONAL = {"weights": torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)}  # [1, K]: of any batch size
X, T = torch.linspace(-1.5, 2.0, 4, dtype=torch.float64).reshape(4, 1, 1, 1), torch.tensor([20, 400, 800, 1000])


def two_passes(teacher: Recorder, w: Tensor | float) -> Denoised:
    empty = {**prompt(), "weights": UNCONDITIONAL["weights"].expand(4, 3)}
    return guide(teacher.teacher(X, T, prompt()), teacher.teacher(X, T, empty), w)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5, 8.0])
def test_formula(w: float) -> None:
    cond, uncond = Denoised(*torch.randn(2, 4, 1, 1, 1)), Denoised(*torch.randn(2, 4, 1, 1, 1))
    ours = guide(cond, uncond, w)
    for got, c, u in ((ours.x0, cond.x0, uncond.x0), (ours.eps, cond.eps, uncond.eps)):
        torch.testing.assert_close(got, (1 - w) * u + w * c)


def test_1_is_conditional_and_0_unconditional(teacher: Recorder) -> None:
    conditional = teacher.teacher(X, T, prompt())
    unconditional = teacher.teacher(X, T, {"weights": UNCONDITIONAL["weights"].expand(4, 3)})
    ones, zeros = torch.ones(4), torch.zeros(4)  # tensors, so that both passes are made
    torch.testing.assert_close(guided(teacher, UNCONDITIONAL, ones)(X, T, prompt()).x0, conditional.x0)
    torch.testing.assert_close(guided(teacher, UNCONDITIONAL, zeros)(X, T, prompt()).x0, unconditional.x0)


@pytest.mark.parametrize("printed", [0.0, 4.0, 7.5])
def test_the_printed_w_of_lcm_is_this_w_minus_1(printed: float) -> None:
    cond, uncond = Denoised(*torch.randn(2, 4, 1, 1, 1)), Denoised(*torch.randn(2, 4, 1, 1, 1))
    ours = guide(cond, uncond, lcm_guidance(printed))
    torch.testing.assert_close(ours.x0, cond.x0 + printed * (cond.x0 - uncond.x0))
    torch.testing.assert_close(ours.eps, cond.eps + printed * (cond.eps - uncond.eps))


@pytest.mark.parametrize("w", [0.0, 3.0, torch.tensor(3.0), torch.tensor([0.0, 1.0, 3.0, 8.0])], ids=str)
def test_one_batched_forward_equals_two_separate_passes(teacher: Recorder, w: Tensor | float) -> None:
    ours, theirs = guided(teacher, UNCONDITIONAL, w)(X, T, prompt()), two_passes(teacher, w)
    torch.testing.assert_close((ours.x0, ours.eps), (theirs.x0, theirs.eps), rtol=0, atol=1e-13)
    assert len(teacher.calls) == 1


def test_guidance_keeps_x_t_the_sum_of_its_parts(teacher: Recorder) -> None:
    ours = guided(teacher, UNCONDITIONAL, torch.tensor([0.0, 1.0, 3.0, 8.0]))(X, T, prompt())
    back = SCHEDULE.alpha(T, X) * ours.x0 + SCHEDULE.sigma(T, X) * ours.eps
    torch.testing.assert_close(back, X, rtol=0, atol=1e-13)


def test_the_unconditional_pass_differs_only_in_what_it_names(teacher: Recorder) -> None:
    guided(teacher, UNCONDITIONAL, 5.0)(X, T, prompt())
    (seen,) = teacher.calls
    assert torch.equal(seen["weights"], torch.cat([prompt()["weights"], UNCONDITIONAL["weights"].expand(4, 3)]))
    assert torch.equal(seen["time_ids"], torch.cat([prompt()["time_ids"]] * 2))


@pytest.mark.parametrize("w", [1, 1.0])
def test_no_unconditional_pass_without_guidance(teacher: Recorder, w: float) -> None:
    ours = guided(teacher, UNCONDITIONAL, w)(X, T, prompt())
    assert torch.equal(ours.x0, teacher.teacher(X, T, prompt()).x0)
    assert [len(c["weights"]) for c in teacher.calls] == [4]


def test_refuses_an_unconditional_entry_that_replaces_nothing() -> None:
    follow = guided(lambda x_t, t, c: Denoised(x_t, x_t), {"txet": torch.zeros(1, 3)}, 2.0)
    with pytest.raises(ValueError, match="^the conditioning lacks 'txet', which the unconditional pass replaces$"):
        follow(torch.zeros(2, 3, 1, 1), torch.tensor([5, 5]), {"text": torch.ones(2, 3)})
