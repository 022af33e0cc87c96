"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch

from distill.models.ema import average_


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_the_average_is_the_weighted_sum_of_all_values(decay: float) -> None:
    random = torch.Generator().manual_seed(0)
    start, *values = [torch.randn(3, generator=random) for _ in range(9)]
    average = start.clone()
    for value in values:
        average_([average], [value], decay)
    expected = decay**8 * start.double()
    for age, value in enumerate(reversed(values)):
        expected = expected + (1 - decay) * decay**age * value.double()
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    """An update of 0.1 % vanishes in bfloat16, where neighbours of 1 lie 0.8 % apart."""
    average, weight = torch.ones(1), torch.full((1,), 2.0, dtype=torch.bfloat16)
    average_([average], [weight], decay=0.999)
    torch.testing.assert_close(average, torch.tensor([1.001]))


def test_a_list_of_tensors_is_averaged_in_place() -> None:
    averages, values = [torch.zeros(2), torch.ones(1)], [torch.ones(2), torch.zeros(1, dtype=torch.bfloat16)]
    average_(averages, values, decay=0.75)
    assert [a.tolist() for a in averages] == [[0.25, 0.25], [0.75]]
    with pytest.raises(ValueError):
        average_(averages, values[:1], decay=0.75)
