"""The bands of losses and gradients: when one has left them, what moves them, and what a resumed run knows of them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from distill.data.order import BatchShare, SizedOrder
from distill.training.rollback import History, Rollback, read_history, samples_between
from distill.training.spikes import Bands, SpikeError, SpikeSettings

SETTINGS = SpikeSettings(window=20, steps=3)


def bands(settings: SpikeSettings = SETTINGS, back: bool = True, **more: object) -> Bands:
    made = Bands(settings, **more)  # type: ignore[arg-type]
    made.way_back = lambda: back
    return made


def healthy(made: Bands, steps: int, start: int = 0, seed: int = 0) -> None:
    numbers = random.Random(seed)
    for step in range(start, start + steps):
        made.read("student", step, math.exp(numbers.gauss(0, 0.3)), math.exp(numbers.gauss(1, 0.5)))


@pytest.mark.parametrize("which", ["loss", "gradient norm"])
def test_a_spike_is_so_many_updates_in_a_row_above_the_band(which: str) -> None:
    made = bands()
    healthy(made, 20)
    numbers = (300.0, 1.0) if which == "loss" else (1.0, 300.0)
    for step in (20, 21):
        made.read("student", step, *numbers)
        assert made.outside
    with pytest.raises(
        SpikeError, match=f"step 23: the student's {which} 300 is above .*, as for 3 updates in a row"
    ) as e:
        made.read("student", 22, *numbers)
    assert e.value.step == 22


def test_one_outlier_is_none_and_does_not_move_the_band() -> None:
    made = bands()
    healthy(made, 20)
    before = made.state_dict()["values"]
    made.read("student", 20, 1e6, 1e6)
    assert made.state_dict()["values"] == before and made.outside
    made.read("student", 21, 1.0, 1.0)
    assert not made.outside


def test_numbers_of_a_normal_distribution_never_leave_the_band_of_the_defaults() -> None:
    made = bands(SpikeSettings())
    healthy(made, 20_000)


def test_a_slow_rise_is_followed_and_an_exponential_one_is_a_spike() -> None:
    made = bands(SpikeSettings())
    for step in range(2000):
        made.read("student", step, 1.0 + step / 100, 1.0)
    with pytest.raises(SpikeError):
        for step in range(2000, 2200):
            made.read("student", step, 21.0 * 1.1 ** (step - 2000), 1.0)


def test_losses_below_0_have_a_band_too() -> None:
    made = bands()
    numbers = random.Random(0)
    for step in range(200):
        made.read("student", step, numbers.gauss(-0.5, 0.5), 1.0)
    with pytest.raises(SpikeError, match="loss 90 is above"):
        for step in range(200, 203):
            made.read("student", step, 90.0, 1.0)


def test_each_stage_and_each_network_has_its_own_band() -> None:
    made = bands(starts=(0, 30))
    healthy(made, 30)
    for step in range(30, 50):
        made.read("student", step, 1000.0, 1000.0)
        made.read("discriminator", step, 1.0, 1e9)
    assert not made.outside


def test_without_a_checkpoint_to_go_back_to_it_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    made = bands(back=False)
    healthy(made, 20)
    for step in range(20, 40):
        made.read("student", step, 300.0, 300.0)
    (line,) = [record.message for record in caplog.records]
    assert line.endswith("there is no checkpoint to go back to, so the run continues")


def test_nothing_is_watched_where_a_run_may_not_go_back() -> None:
    made = bands(SpikeSettings(rollbacks=0))
    for step in range(200):
        made.read("student", step, 10.0**step, 1.0)
    assert made.state_dict() == {} and not made.outside


def test_a_resumed_run_decides_as_one_that_was_not_interrupted() -> None:
    one, other = bands(), bands()
    healthy(one, 20)
    one.read("student", 20, 300.0, 1.0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict() and other.outside
    with pytest.raises(SpikeError):
        for step in (21, 22):
            other.read("student", step, 300.0, 1.0)
    other.load_state_dict({})  # of a checkpoint of before
    assert other.state_dict() == {} and not other.outside


@pytest.mark.parametrize(("name", "value"), [("rollbacks", -1), ("window", 9), ("steps", 0), ("factor", 1.0)])
def test_a_setting_out_of_its_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"spikes.{name} must be"):
        SpikeSettings(**{name: value})  # type: ignore[arg-type]


# ---- what is passed over ------------------------------------------------------------------------------------------


def test_steps_after_a_rollback_take_the_samples_that_follow_those_seen() -> None:
    """With a batch that grows among them, and a second time from the same step."""
    changes = ((3, 6),)
    share, seen = BatchShare(4, 4, changes=changes), list(range(30))
    assert [list(share.positions(step, 0)) for step in (2, 3)] == [seen[8:12], seen[12:18]]
    history = History()
    for diverged, first in ((4, 18), (3, 22)):
        samples = samples_between(share, 2, diverged)
        history = history.and_then(Rollback(2, diverged, samples, "why"))
        share = BatchShare(4, 4, changes=changes, passed=history.passed)
        assert list(share.positions(1, 0)) == seen[4:8]
        assert share.positions(2, 0) == range(first, first + 4) and share.positions(3, 0) == range(
            first + 4, first + 10
        )
        assert share.step_of(first + 5) == 3 and share.following(first + 3) == first
    assert history.passed == ((2, 14),)


def test_going_back_beyond_an_earlier_rollback_passes_over_all_that_was_seen() -> None:
    history = History().and_then(Rollback(10, 12, 8, ""))
    share = BatchShare(4, 4, passed=history.passed)
    last = share.extent(14)[0]
    history = history.and_then(Rollback(5, 14, samples_between(share, 5, 14), ""))
    assert len(history.passed) == 1 and BatchShare(4, 4, passed=history.passed).extent(5)[0] == last


def test_batches_of_images_of_several_sizes_are_passed_over_as_they_were_seen() -> None:
    groups = {0: range(40), 1: range(40, 70)}
    whole = SizedOrder(3, groups, BatchShare(4, 4))
    after = SizedOrder(3, groups, BatchShare(4, 4, passed=((5, 12),)))
    for step in range(20):
        seen = step if step < 5 else step + 3
        assert after.size(step) == whole.size(seen)
        first = after.share.extent(step)[0]
        assert [after.index(first + i) for i in range(4)] == [whole.index(4 * seen + i) for i in range(4)]


def test_what_a_run_has_gone_back_for_is_kept_in_its_folder_or_inherited(tmp_path: Path) -> None:
    assert read_history(tmp_path, {}) == History()
    assert read_history(tmp_path, {"passed_over": [[4, 8]]}) == History((), ((4, 8),))
    history = History((), ((4, 8),)).and_then(Rollback(6, 9, 12, "why"))
    history.write(tmp_path)
    assert read_history(tmp_path, {"passed_over": [[4, 8]]}) == history
    (tmp_path / "rollbacks.json").write_text("{")
    with pytest.raises(ValueError, match="rollbacks.json does not say what the run has passed over"):
        read_history(tmp_path, {})
