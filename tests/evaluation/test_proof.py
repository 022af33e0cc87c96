"""What is exported is what was trained: a plain diffusers pipeline with the LoRA draws our sampler's pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import Tensor

from distill.diffusion.samplers import pairs
from distill.evaluation.compare import Setting, generate
from distill.evaluation.pipelines import (
    arguments_of,
    generate_images,
    load_pipeline,
    plain_pipeline_agrees,
    use_export_sampler,
    use_sampler,
)
from distill.models.exported import read_export
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.lora import ADAPTER, add_lora, save_lora
from tests.tiny import FAMILIES, save_tiny

PROMPTS, SEEDS = ["a cat", "two dogs"], [3, 10_000_000]


def trained_student(folder: str) -> Teacher:
    """The pipeline's teacher with a LoRA that is not zero."""
    teacher = load_teacher(folder, parts=("network", "text", "vae"))
    random = torch.Generator().manual_seed(1)
    for parameter in add_lora(teacher.network, rank=3, alpha=2.0):
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    return teacher


def ours(teacher: Teacher, steps: int, adapter: str | None = ADAPTER) -> Tensor:
    student = replace(teacher.denoiser(), adapter=adapter)
    batches = generate(teacher, student, PROMPTS, SEEDS, Setting("student", "lcm", steps, 1.0, "lcm"))
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_pipeline_draws_the_same(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", family)
    teacher = trained_student(folder)
    save_lora(tmp_path / "lora", teacher.network)
    assert plain_pipeline_agrees(folder, tmp_path / "lora", PROMPTS, SEEDS, 4, ours(teacher, 4)) < 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Teacher, Any]:
    """Ours, and the plain pipeline with its exported files, whose own scheduler has the teacher's odd settings."""
    folder = tmp_path_factory.mktemp(request.param)
    teacher = trained_student(
        save_tiny(folder / "teacher", request.param, thresholding=True, timestep_spacing="linspace")
    )
    save_lora(folder / "lora", teacher.network)
    return teacher, load_pipeline(str(folder / "teacher"), folder / "lora")


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize(("sampler", "spacing"), sorted(pairs()))
def test_a_plain_pipeline_generates_the_same_by_every_sampler_at_all_its_times(
    student: tuple[Teacher, Any], sampler: str, spacing: str, steps: int
) -> None:
    """With the scheduler that is made for the pair, and the times given to the call where it needs them."""
    teacher, pipeline = student
    setting = Setting("student", sampler, steps, 1.0, spacing)
    expected = torch.cat(
        [b.images for b in generate(teacher, replace(teacher.denoiser(), adapter=ADAPTER), PROMPTS, SEEDS, setting)]
    )
    use_sampler(pipeline, sampler, spacing)
    arguments = arguments_of(pipeline, spacing, steps)
    drawn = generate_images(pipeline, PROMPTS, SEEDS, steps, arguments=arguments) * 2 - 1
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert (drawn[0] - drawn[1]).abs().max() > 0.05


def test_it_would_notice_another_network(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher")
    teacher = trained_student(folder)
    save_lora(tmp_path / "lora", teacher.network)
    without = ours(teacher, 4, adapter=None)
    assert plain_pipeline_agrees(folder, tmp_path / "lora", PROMPTS, SEEDS, 4, without) > 1e-2


def test_numbers_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="^2 pictures need as many prompts and seeds, got 1 and 2$"):
        plain_pipeline_agrees("nowhere", "nowhere", ["a"], [1, 2], 4, torch.zeros(2, 3, 8, 8))


def test_an_export_of_flow_matching_is_drawn_at_the_shift_that_it_learned(tmp_path: Path) -> None:
    """Whatever the pipeline's own scheduler would make of the picture's size."""
    said = {"formats": ["diffusers"], "base_hash": "x", "prediction": "flow_prediction"}
    how = {"sampler": "lcm", "spacing": "trailing", "steps": 4}
    (tmp_path / "distill.json").write_text(json.dumps(said | {"sampling": how, "noise": {"shift": 2.5}}))
    assert read_export(tmp_path).shift == 2.5
    pipeline = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    use_export_sampler(pipeline, tmp_path)
    assert isinstance(pipeline.scheduler, FlowMatchLCMScheduler)
    assert (pipeline.scheduler.config.shift, pipeline.scheduler.config.use_dynamic_shifting) == (2.5, False)
    (tmp_path / "distill.json").write_text(json.dumps(said | {"noise": {"beta_start": 0.1}}))
    assert read_export(tmp_path).shift is None
