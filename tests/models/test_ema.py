"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch

from distill.models.ema import EMA, average_


def _walk(steps: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(3, generator=random).to(dtype), "b": torch.randn((), generator=random)} for _ in range(steps)
    ]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_the_average_is_the_weighted_sum_of_all_values(decay):
    start, *values = _walk(9)
    ema = EMA(start, decay)
    for value in values:
        ema.update(value)
    for name in start:
        expected = decay**8 * start[name].double()
        for age, value in enumerate(reversed(values)):
            expected = expected + (1 - decay) * decay**age * value[name].double()
        torch.testing.assert_close(ema.shadows[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_weights_are_averaged_in_float32():
    """An update of 0.1 % vanishes in bfloat16, where neighbours of 1 lie 0.8 % apart."""
    one, two = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0, dtype=torch.bfloat16)
    ema = EMA({"w": one}, decay=0.999)
    ema.update({"w": two})
    torch.testing.assert_close(ema.shadows["w"], torch.tensor([1.001]))
    assert one.item() == 1


def test_swapped_lends_the_average_and_gives_the_weights_back():
    weight = torch.nn.Parameter(torch.zeros(2))
    ema = EMA({"w": weight}, decay=0.5)
    with torch.no_grad():
        weight.fill_(4.0)
    ema.update({"w": weight})
    with pytest.raises(RuntimeError), ema.swapped({"w": weight}):
        assert weight.tolist() == [2.0, 2.0]
        assert weight.requires_grad
        raise RuntimeError
    assert weight.tolist() == [4.0, 4.0]
    assert ema.shadows["w"].tolist() == [2.0, 2.0]


def test_the_state_resumes_it_to_the_bit():
    start, *values = _walk(6)
    straight, first, second = (EMA(start, 0.9) for _ in range(3))
    for value in values:
        straight.update(value)
    for value in values[:3]:
        first.update(value)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for value in values[3:]:
        second.update(value)
    assert all(torch.equal(straight.shadows[name], second.shadows[name]) for name in start)


def test_a_list_of_tensors_is_averaged_in_place():
    shadows, values = [torch.zeros(2), torch.ones(1)], [torch.ones(2), torch.zeros(1, dtype=torch.bfloat16)]
    average_(shadows, values, decay=0.75)
    assert [s.tolist() for s in shadows] == [[0.25, 0.25], [0.75]]
    with pytest.raises(ValueError):
        average_(shadows, values[:1], decay=0.75)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_wrong_decay_is_named(decay):
    with pytest.raises(ValueError, match=f"decay must lie in .*got {decay}"):
        EMA({}, decay)


def test_other_names_are_refused():
    ema = EMA({"a": torch.zeros(1)}, 0.5)
    with pytest.raises(ValueError, match="'a' is missing"):
        ema.update({})
    with pytest.raises(ValueError, match="'b' is not among the averaged tensors"):
        ema.load_state_dict({"a": torch.zeros(1), "b": torch.zeros(1)})
