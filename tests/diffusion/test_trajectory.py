from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from distill.diffusion.random import generator
from distill.diffusion.segments import Segments
from distill.diffusion.solver import trailing_times
from distill.diffusion.trajectory import Batch, CleanEnd, Pair, Steps

GRID = trailing_times(1000, 50)  # 1000, 980, ... 0


@pytest.mark.parametrize("skip", [20, 40, 100, 1000])
def test_pair_teaches_every_stored_time_alike(skip: int) -> None:
    """Near clean data it is clamped there: were 120 taught by 20, nothing would teach 20."""
    g, n = generator("pick", skip), 4000
    picked = Counter(Pair(skip).pick(GRID, g) for _ in range(n))
    pairs = {(GRID.index(t), GRID.index(max(t - skip, 0))) for t in range(20, 1001, 20)}
    assert set(picked) == pairs
    expected = n / len(pairs)
    assert sum((picked[p] - expected) ** 2 / expected for p in pairs) < len(pairs) + 5 * (2 * len(pairs)) ** 0.5


def test_pair_takes_the_pairs_that_the_store_kept() -> None:
    g, kept = generator("kept"), [1000, 980, 500, 480, 20, 0]
    assert {Pair(20).pick(kept, g) for _ in range(200)} == {(0, 1), (2, 3), (4, 5)}


def test_pair_depends_on_nothing_but_its_generator() -> None:
    draws = [[Pair(20).pick(GRID, g) for _ in range(20)] for g in (generator("a"), generator("a"), generator("b"))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("skip", [1, 30, 130, 1020])
def test_refuses_a_skip_off_the_stored_grid(skip: int) -> None:
    message = rf"^skip {skip} is off the stored grid: no two of \[1000, 980, … 20, 0\] lie so far apart$"
    with pytest.raises(ValueError, match=message):
        Pair(skip).check(GRID)


def test_accepts_a_skip_on_it() -> None:
    for skip in (20, 60, 1000):
        Pair(skip).check(GRID)


def test_clean_end_is_time_0() -> None:
    CleanEnd().check(GRID)
    assert CleanEnd().pick(GRID, generator()) == (50,)
    with pytest.raises(ValueError, match=r"^the store keeps no clean latent: its times \[1000, 20\] lack 0$"):
        CleanEnd().check([1000, 20])


def batch() -> Batch:
    return Batch(
        states=torch.randn(2, 3, 4, 2, 2),
        times=torch.tensor([[60, 40, 20], [1000, 980, 960]]),
        conditioning={"text": torch.randn(2, 7, 8)},
        unconditional={"text": torch.randn(2, 7, 8)},
        guidance=torch.tensor([1.0, 7.5]),
        keys=("a", "b"),
        positions=(4, 5),
    )


@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 2), (1, 2)])
def test_a_transition_is_two_of_the_states(i: int, j: int) -> None:
    b = batch()
    step = b.transition(i, j)
    assert torch.equal(step.x_t, b.states[:, i]) and torch.equal(step.x_s, b.states[:, j])
    assert torch.equal(step.t, b.times[:, i]) and torch.equal(step.s, b.times[:, j]) and (step.s < step.t).all()


def test_a_batch_moves_whole() -> None:
    """The meta device stands for an accelerator: nothing may stay behind."""
    b = batch()
    moved = b.to("meta")
    tensors = [moved.states, moved.times, moved.guidance, *moved.conditioning.values(), *moved.unconditional.values()]
    assert all(x.device.type == "meta" for x in tensors) and len(tensors) == 5
    assert len(moved) == len(b) == 2 and (moved.keys, moved.positions) == (b.keys, b.positions)
    assert moved.states.shape == b.states.shape and moved.times.dtype == torch.int64


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_no_pair_spans_the_start_of_a_segment(count: int) -> None:
    """Every stored time is taught still, and the last pair of a segment ends where the segment starts."""
    grid, segments, g = trailing_times(1000, 40), Segments(1000, count), generator("segments", count)
    pair = Pair(50, segments)
    pair.check(grid)
    picked = {tuple(grid[i] for i in pair.pick(grid, g)) for _ in range(2000)}
    start = segments.start(torch.tensor([t for t, _ in picked])).tolist()
    assert {t for t, _ in picked} == set(grid[:-1])
    assert all(s == max(t - 50, end) for (t, s), end in zip(picked, start, strict=True))


def test_a_store_of_milestones_serves_whole_segments_and_the_second_stage() -> None:
    milestones = list(reversed(Segments(1000, 8).milestones))
    for pair in (Pair(125, Segments(1000, 8)), Pair(125, Segments(1000, 1), apart=125)):
        pair.check(milestones)
        picked = {pair.pick(milestones, generator("milestones", i)) for i in range(200)}
        assert picked == {(i, i + 1) for i in range(8)}


def test_t_is_drawn_from_multiples_alone() -> None:
    picked = {GRID[Pair(20, apart=200).pick(GRID, generator("apart", i))[0]] for i in range(200)}
    assert picked == {200, 400, 600, 800, 1000}


def test_t_is_not_below_the_lowest() -> None:
    picked = {GRID[Pair(20, lowest=901).pick(GRID, generator("lowest", i))[0]] for i in range(200)}
    assert picked == {920, 940, 960, 980, 1000}
    with pytest.raises(ValueError, match="skip 20 is off the stored grid"):
        Pair(20, lowest=901).check([900, 880, 0])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            Pair(20, Segments(1000, 8)),
            r"the segments start at \[125, 250, 375, 625, 750, 875\], which the store does not keep",
        ),
        (Pair(20, apart=125), r"the store does not keep the times \[125, 250, 375, 625, 750, 875\]"),
        (Pair(25, Segments(1000, 4)), "skip 25 is off the stored grid"),
    ],
)
def test_refuses_a_store_without_the_milestones(pair: Pair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair.check(GRID)


def test_steps_are_drawn_alike_and_refuse_a_store_without_their_times() -> None:
    """Lightning's strides are not whole numbers: 128 solver steps hold 32, whichever way each is rounded."""
    times = trailing_times(1000, 128)
    steps = Steps(tuple(pairwise(trailing_times(1000, 32))))
    steps.check(times)
    picked = Counter(steps.pick(times, generator("steps", i)) for i in range(3200))
    assert {(times[a], times[b]) for a, b in picked} == set(steps.pairs)
    assert all(abs(count - 100) < 50 for count in picked.values())
    with pytest.raises(ValueError, match=r"does not keep the times \[31, 62, … 938, 969\]"):
        steps.check(trailing_times(1000, 8))


def test_weighted_steps_are_sampled_by_their_odds_and_need_no_times_of_odds_0() -> None:
    pairs = ((1000, 0), (750, 0), (500, 0), (250, 0))
    steps, times = Steps(pairs, (0.4, 0.0, 0.4, 0.2)), [1000, 500, 250, 0]
    steps.check(times)
    g, n = generator("odds"), 4000
    found = Counter(steps.pick(times, g) for _ in range(n))
    assert found.keys() == {(0, 3), (1, 3), (2, 3)}
    assert [found[i, 3] / n for i in range(3)] == pytest.approx([0.4, 0.4, 0.2], abs=0.025)
    with pytest.raises(ValueError, match=r"^the store does not keep the times \[250\]"):
        steps.check([1000, 500, 0])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "weights must be 2 as the pairs are, got [1.0]"),
        ((1.0, -1.0), "weights must not be negative, nor all 0, got [1.0, -1.0]"),
        ((0.0, 0.0), "weights must not be negative, nor all 0, got [0.0, 0.0]"),
    ],
)
def test_refuses_weights_that_are_no_odds(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Steps(((1000, 0), (500, 0)), weights)
    assert str(raised.value) == message
