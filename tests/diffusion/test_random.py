from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.diffusion.random import Context, generator, seed_of

DRAWS: dict[str, Callable[[Context], Tensor]] = {
    "normal": lambda c: c.normal(torch.empty(len(c.positions), 4, 2, 2), "noise"),
    "uniform": lambda c: c.uniform(4.0, 16.0, "w"),
    "integers": lambda c: c.integers(1, 51, "t"),
}
CONTEXT = Context(seed=7, step=3, positions=tuple(range(96, 112)))  # a global batch of 16


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_draws_do_not_ask_how_the_batch_is_split(draw: Callable[[Context], Tensor], ranks: int, micro: int) -> None:
    parts = [
        draw(replace(CONTEXT, positions=CONTEXT.positions[rank::ranks][i::micro]))
        for rank in range(ranks)
        for i in range(micro)
    ]
    order = [p for rank in range(ranks) for i in range(micro) for p in CONTEXT.positions[rank::ranks][i::micro]]
    together = draw(CONTEXT)
    assert torch.equal(torch.cat(parts), together[[CONTEXT.positions.index(p) for p in order]])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_differ_between_seeds_steps_and_positions(draw: Callable[[Context], Tensor]) -> None:
    others = [CONTEXT, replace(CONTEXT, seed=8), replace(CONTEXT, step=4), replace(CONTEXT, positions=tuple(range(16)))]
    for a, b in combinations(others, 2):
        assert (draw(a) == draw(b)).double().mean() < 0.3, "whole numbers may coincide here and there"
    assert len(draw(CONTEXT).flatten(1 if draw(CONTEXT).ndim > 1 else 0).unique(dim=0)) > 8, "so do samples of a batch"


def test_draws_differ_between_streams() -> None:
    like = torch.empty(16, 4, 2, 2)
    assert not torch.isclose(CONTEXT.normal(like, "noise"), CONTEXT.normal(like, "renoise")).any()
    assert not torch.isclose(CONTEXT.uniform(0, 1, "w"), CONTEXT.uniform(0, 1, "v")).any()


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_asking_twice_or_in_another_order_changes_nothing(draw: Callable[[Context], Tensor]) -> None:
    first = draw(CONTEXT)
    for other in DRAWS.values():
        other(CONTEXT)
    assert torch.equal(draw(CONTEXT), first)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_global_generator_is_neither_read_nor_moved(draw: Callable[[Context], Tensor]) -> None:
    before, first = torch.get_rng_state(), draw(CONTEXT)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    assert torch.equal(draw(CONTEXT), first)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_first_turn_draws_what_it_always_has_and_the_next_something_else(draw: Callable[[Context], Tensor]) -> None:
    keyed = torch.rand((), generator=generator(7, 3, 100, "w"))  # as it was before turns were numbered
    assert torch.equal(CONTEXT.uniform(0, 1, "w")[4], keyed)
    assert not torch.equal(draw(replace(CONTEXT, turn=1)), draw(CONTEXT))
    assert not torch.equal(draw(replace(CONTEXT, turn=2)), draw(replace(CONTEXT, turn=1)))


def test_normal_is_standard_and_independent() -> None:
    n = 2000
    x = Context(0, 0, tuple(range(n))).normal(torch.empty(n, 2, 2), "noise").flatten(1)
    assert x.mean().abs() < 4 / math.sqrt(4 * n) and abs(x.var() - 1) < 4 * math.sqrt(2 / (4 * n))
    assert (torch.corrcoef(x.T) - torch.eye(4)).abs().max() < 4 / math.sqrt(n), "within a sample"
    assert abs((x[1:] * x[:-1]).mean()) < 4 / math.sqrt(4 * n), "between neighbouring positions"


def test_uniform_and_integers_are_uniform() -> None:
    n, context = 5000, Context(0, 0, tuple(range(5000)))
    u, k = context.uniform(4.0, 16.0, "w").double(), context.integers(1, 51, "t")
    gap = (u.sort().values - torch.linspace(4, 16, n, dtype=torch.float64)).abs().max() / 12
    assert gap < 1.63 / math.sqrt(n), "Kolmogorov-Smirnov at 1 %"
    counts = torch.bincount(k, minlength=52)
    chi2 = ((counts[1:51] - n / 50) ** 2 / (n / 50)).sum()
    assert counts[0] == counts[51] == 0 and 25 < chi2 < 85, "chi squared of 49 degrees within its 0.1 % ends"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_noise_has_the_shape_and_wide_dtype_of_what_it_is_like(given: torch.dtype, wanted: torch.dtype) -> None:
    noise = CONTEXT.normal(torch.empty(16, 4, 3, 5, dtype=given), "noise")
    assert noise.shape == (16, 4, 3, 5) and noise.dtype == wanted
    assert CONTEXT.uniform(0, 1, "w").dtype == torch.float32 and CONTEXT.integers(0, 2, "t").dtype == torch.int64


def test_seeds_are_the_same_in_every_version_and_hold_63_bits() -> None:
    """A stored trajectory's noise is found again by its seed."""
    assert seed_of(0, "x_T", 5) == 4632897748706828414
    seeds = [seed_of(0, i) for i in range(1000)]
    assert min(seeds) >= 0 and 2**62 < max(seeds) < 2**63 and len(set(seeds)) == 1000


@pytest.mark.parametrize(
    ("one", "other"),
    [((1,), ("1",)), (("a", "b"), ("ab",)), ((1, 23), (12, 3)), ((0, 1), (1, 0)), ((), ("",)), ((0,), (0, 0))],
)
def test_other_parts_are_another_seed(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert seed_of(*one) != seed_of(*other)
    assert not torch.equal(torch.rand(4, generator=generator(*one)), torch.rand(4, generator=generator(*other)))


@pytest.mark.parametrize("part", [np.int64(3), 3.0, True, None], ids=repr)
def test_refuses_parts_that_only_look_like_a_number(part: Any) -> None:
    with pytest.raises(TypeError, match="^a seed is made of int and str, got "):
        seed_of(0, part)
