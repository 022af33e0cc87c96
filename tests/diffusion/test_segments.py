from __future__ import annotations

import pytest
import torch

from distill.diffusion.segments import Segments


@pytest.mark.parametrize("T", [1000, 999])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 500, 999])
def test_every_time_is_in_exactly_one_segment(T: int, count: int) -> None:
    segments, t = Segments(T, count), torch.arange(1, T + 1)
    start, end, index = segments.start(t), segments.end(t), segments.index(t)
    assert ((start < t) & (t <= end)).all()
    for i in range(count):
        inside = t[index == i]
        assert (inside[0], inside[-1]) == (segments.milestones[i] + 1, segments.milestones[i + 1])
        assert torch.equal(inside, torch.arange(int(inside[0]), int(inside[-1]) + 1)), "one run of times"
        assert set(start[index == i].tolist()) == {segments.milestones[i]}
    assert segments.milestones[0] == 0 and segments.milestones[-1] == T and len(segments.milestones) == count + 1


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 300])
def test_segments_are_of_one_length(count: int) -> None:
    lengths = torch.tensor(Segments(1000, count).milestones).diff()
    assert lengths.max() - lengths.min() <= 1


def test_milestones_of_mlcm() -> None:
    assert Segments(1000, 8).milestones == (0, 125, 250, 375, 500, 625, 750, 875, 1000)
    assert Segments(1000, 8).start(torch.tensor([125, 126, 1000])).tolist() == [0, 125, 875]


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_refuses_a_count_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match=f"^segments must be within 1 ... 1000, got {count}$"):
        Segments(1000, count)
