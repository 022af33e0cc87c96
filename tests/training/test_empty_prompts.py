"""A store in which a share of the samples has no prompt, for students that keep classifier-free guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.commands import trajectories
from distill.config.loading import load
from distill.config.settings import TrainSettings
from distill.data.reader import open_store
from distill.diffusion.solver import make_times, solve
from distill.models.families.loading import load_teacher
from tests.data.stores import PLAN
from tests.tiny import save_tiny

PROMPTS = ["snow", "a red boat", "hills"]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])  # of sdxl "no prompt" is zeros
def test_samples_without_a_prompt_hold_the_unconditional_solve(family: str, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", family)
    given = [f"experiment=lcm_lora_{family}", f"model.pretrained_model_name_or_path={teacher}", f"model={family}"]
    given += ["data.prompts=['snow','a red boat','hills']", "data.num_samples=16", "data.heldout_samples=0"]
    given += ["data.solver_steps=5", "data.samples_per_shard=8", "data.dtype=float32", "data.keep=[0,1000]"]
    stores = []
    for name, share in (("all", "0"), ("some", "0.4")):
        url = str(tmp_path / name)
        trajectories.main(load("train", TrainSettings, [*given, f"data.store={url}", f"data.empty_prompts={share}"]))
        stores.append(open_store(url))
    (all_prompts, some), plan = stores, stores[1].index
    assert plan.prompt_source.startswith("3 prompts of the settings (")
    assert (all_prompts.index.empty_prompts, some.index.empty_prompts) == (0.0, 0.4)

    loaded, empty = load_teacher(teacher, parts=("network", "text")), []
    without = loaded.unconditional()
    for i in range(16):
        (one, other) = (store.read_many([(i, (0, 1))])[0] for store in (all_prompts, some))
        assert torch.equal(one.states[0], other.states[0])  # the same noise
        if plan.prompt_of(i, PROMPTS) == PROMPTS[i % 3]:
            assert torch.equal(one.states, other.states)
            for name, x in loaded.encode([PROMPTS[i % 3]]).items():
                torch.testing.assert_close(other.conditioning[name], x[0], rtol=1e-4, atol=1e-4)
            continue
        assert all(torch.equal(other.conditioning[name], x[0]) for name, x in without.items())
        empty.append(other)
    assert 2 <= len(empty) <= 10
    c = {name: x[None] for name, x in empty[0].conditioning.items()}
    steps = dict(solve(loaded.denoiser(), loaded.schedule, empty[0].states[:1], make_times("trailing", 1000, 5), c))
    torch.testing.assert_close(steps[0][0], empty[0].states[1], rtol=1e-4, atol=1e-4)  # unguided, whatever w was


def test_the_share_is_as_large_as_it_says_and_belongs_to_the_sample() -> None:
    plan = replace(PLAN, empty_prompts=0.1)
    found = [plan.prompt_of(i, PROMPTS) == "" for i in range(3000)]
    assert sum(found) / 3000 == pytest.approx(0.1, abs=0.02)
    assert plan.identity != PLAN.identity == replace(PLAN, empty_prompts=0.0).identity


@pytest.mark.parametrize("share", [1.0, -0.1, "half", True])
def test_refuses_what_is_no_share(share: Any) -> None:
    with pytest.raises(ValueError, match="empty_prompts must be a share of at least 0 and below 1"):
        replace(PLAN, empty_prompts=share)
