"""A student of each method, exported as a LoRA, samples in diffusers' own pipeline as it does here.

What differs between methods is how their students are sampled: the sampler, its times, and what the call is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from distill.evaluation.pipelines import plain_pipeline_agrees, sampling_of
from tests.training.test_export import PROMPTS, SEEDS, Trained, a_run

METHODS: dict[str, tuple[str, ...]] = {
    "lcm": ("method=lcm",),
    "rectified": ("method=rectified",),
    "scm": ("method=scm",),  # rcm and flash are sampled alike
    "dmd2": ("method=dmd2",),  # sid is sampled alike, in one step
    "tcd": ("method=tcd",),
    "pcm": ("method=pcm",),
}
"""Settings that choose each method, by its name; one row for every way in which its students are sampled."""
STEPS = 4
"""Of students whose method leaves the number open."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    return cache(lambda name: a_run(tmp_path_factory.mktemp(name), "sd15", "lora", method=METHODS[name]))


@pytest.mark.parametrize("name", METHODS)
def test_a_plain_pipeline_generates_the_students_pictures(
    name: str, runs: Callable[[str], Trained], tmp_path: Path
) -> None:
    run = runs(name)
    exported = run.export(tmp_path / "export", "formats=[diffusers]", "dtype=float32", "card_prompts=[]")
    sampling = sampling_of(exported)
    assert sampling is not None
    steps, ours = sampling.steps or STEPS, 2 * run.pictures(1.0) - 1
    assert ours.std() > 0.1  # not one grey
    assert plain_pipeline_agrees(run.teacher, exported, PROMPTS, SEEDS, steps, ours) < 1e-4
