from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from distill.diffusion.losses import l2, pseudo_huber


@pytest.mark.parametrize("c", [0.001, 0.5])
def test_values(c: float) -> None:
    a, b = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64)
    d = (a - b).numpy().reshape(5, -1)
    np.testing.assert_allclose(l2(a, b), (d**2).mean(1), rtol=1e-14)
    np.testing.assert_allclose(pseudo_huber(a, b, c), (np.sqrt(d**2 + c**2) - c).mean(1), rtol=1e-12)
    torch.testing.assert_close(l2(a, b).mean(), mse_loss(a, b))


def test_pseudo_huber_is_l2_over_2c_near_0_and_the_distance_far_from_it() -> None:
    a, c = torch.randn(5, 4, 2, 2, dtype=torch.float64), 0.01
    near, far = 1e-4 * a, 1e4 * a
    torch.testing.assert_close(pseudo_huber(near, 0 * a, c), l2(near, 0 * a) / (2 * c), rtol=1e-3, atol=0)
    torch.testing.assert_close(pseudo_huber(far, 0 * a, c), far.abs().flatten(1).mean(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [l2, pseudo_huber])
def test_a_distance_for_each_sample(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = torch.randn(2, 5, 4, 3, 2)
    assert loss(a, b).shape == (5,)
    torch.testing.assert_close(loss(a, b), torch.cat([loss(a[i : i + 1], b[i : i + 1]) for i in range(5)]))
    assert (loss(a, a) == 0).all() and torch.equal(loss(a, b), loss(b, a))


@pytest.mark.parametrize("loss", [l2, pseudo_huber])
def test_half_precision_is_compared_in_float32(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In bf16 the difference would be rounded to 3 digits and, with huber's c = 0.001, its root to 0."""
    a, b = torch.randn(4, 4, 8, 8).bfloat16(), torch.randn(4, 4, 8, 8).bfloat16()
    assert loss(a, b).dtype == torch.float32
    torch.testing.assert_close(loss(a, b).double(), loss(a.double(), b.double()), rtol=1e-5, atol=0)


def test_pseudo_huber_has_a_gradient_at_0() -> None:
    a = torch.zeros(2, 4, 2, 2, requires_grad=True)
    pseudo_huber(a, torch.zeros(2, 4, 2, 2)).sum().backward()
    assert a.grad is not None and (a.grad == 0).all()
