"""Rows against stored end points: those of the very solver are met, those of another are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distill.data.reader import open_store
from distill.data.writer import write_store
from distill.diffusion.guidance import guided
from distill.diffusion.random import generator
from distill.diffusion.solver import make_times, solve
from distill.diffusion.trajectory import Trajectory
from distill.evaluation.compare import Setting
from distill.evaluation.stored import HeldOut
from tests.data.stores import PLAN
from tests.evaluation.world import SCHEDULE, SHAPE, GaussianDenoiser, Surroundings, comparison

W, STEPS, SAMPLES = 3.0, 4, 11
TIMES = make_times("trailing", 1000, STEPS)
SAME = Setting("teacher", "ddim", STEPS, W)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Guided solves of four steps."""

    def trajectories(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        conditioning = Surroundings().encode(prompts)
        x = torch.cat([torch.randn(1, *SHAPE, generator=generator("stored", i)) for i in indices])
        follow = guided(GaussianDenoiser(), Surroundings().unconditional(), W)
        states = [state for _, state in solve(follow, SCHEDULE, x, TIMES, conditioning, "ddim")]
        return Trajectory(
            torch.stack(states, dim=1), tuple(TIMES), dict(conditioning), torch.full((len(x),), W), tuple(indices)
        )

    url = tmp_path_factory.mktemp("stored") / "store"
    plan = replace(PLAN, guidance=W, times=tuple(TIMES), samples=SAMPLES)
    write_store(str(url), plan, ["up", "down"], Surroundings().unconditional(), trajectories)
    return str(url)


def test_the_same_solve_ends_where_it_ended(store: str) -> None:
    held = HeldOut(open_store(store), SCHEDULE, SAMPLES)
    measured = held.measure(GaussianDenoiser(), SAME, range(SAMPLES), 4)
    assert {name: len(values) for name, values in measured.items()} == {"consistency": SAMPLES, "cosine": SAMPLES}
    assert measured["consistency"].max() < 1e-5 and measured["cosine"].min() > 0.9999  # stored as float16
    unguided = held.measure(GaussianDenoiser(), replace(SAME, guidance=1.0), range(SAMPLES), 4)
    assert unguided["consistency"].min() > 1e-2


def test_it_measures_what_it_says(store: str) -> None:
    opened = open_store(store)
    held = HeldOut(opened, SCHEDULE, 5)
    setting = Setting("student", "ddim", 1)
    measured = held.measure(GaussianDenoiser(), setting, range(1, 3), 2)
    for place, distance, cosine in zip((7, 8), measured["consistency"], measured["cosine"], strict=True):  # 11 - 5 + 1
        sample = opened.read(place)
        x, end = sample.states[0].float()[None], sample.states[-1].float()[None]
        conditioning = {name: value.float()[None] for name, value in sample.conditioning.items()}
        drawn = GaussianDenoiser()(x, torch.tensor([1000]), conditioning).x0
        assert float(distance) == pytest.approx(float((drawn - end).square().mean()), rel=1e-4)
        assert float(cosine) == pytest.approx(float(F.cosine_similarity(drawn.flatten(), end.flatten(), 0)), abs=1e-5)


def test_rows_hold_it_and_know_it_from_rows_without(store: str, tmp_path: Path) -> None:
    study = comparison(tmp_path, guidance=W, steps=(STEPS,), guidances=(W,), spacings=("trailing",), block_size=20)
    plain = study.rows()
    held = replace(study, stored=HeldOut(open_store(store), SCHEDULE, SAMPLES, notes=("Held out.",)))
    rows = held.rows()
    assert [row | plain_row for row, plain_row in zip(rows, plain, strict=True)] == rows
    same = next(row for row in rows if row["sampler"] == "ddim" and row["steps"] == STEPS)
    assert same["stored_consistency"] < 1e-5 and same["stored_n"] == SAMPLES and same["stored_cosine_se"] < 1e-4
    assert rows[0]["stored_consistency"] > same["stored_consistency"] and "stored_n" not in plain[0]


def test_what_cannot_be_held_against_is_one_clear_line(store: str) -> None:
    opened = open_store(store)
    with pytest.raises(ValueError, match="holds 11 samples, and 12 are needed$"):
        HeldOut(opened, SCHEDULE, 12)
    opened.index = replace(opened.index, times=(1000, 750, 500, 250, 10))
    with pytest.raises(ValueError, match="holds no complete solves: its times run from 1000 to 10$"):
        HeldOut(opened, SCHEDULE, 3)
