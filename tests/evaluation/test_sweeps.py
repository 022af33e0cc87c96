"""Sweeps change what they say they change and nothing else; what they count is what plain diffusers does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler, LCMScheduler, PNDMScheduler
from PIL import Image
from torch import Tensor, nn

from distill.commands import sample
from distill.config.loading import ConfigError, load
from distill.config.settings import ModelSettings, SampleSettings
from distill.evaluation.figures import CELL, GAP, HEADER, LABEL_WIDTH
from distill.evaluation.pipelines import generate_images, is_student, load_pipeline
from distill.evaluation.sweeps import Models, Sweep, SweepSetting, guidance_sweep, lora_sweep, run_sweep, steps_sweep
from distill.models.lora import LORA_FILE, add_lora, save_lora
from distill.toy.teacher import teacher_folder
from distill.toy.world import CAPTIONS, balanced_labels, render
from tests.tiny import FAMILIES, save_tiny, tiny_pipeline, tiny_unet

PROMPTS, SEEDS = ["a cat", "two dogs", "snow"], [5, 6, 7]
REFERENCE = SweepSetting(False, 4, 3.0)
OWN_SCHEDULERS = {"sd15": PNDMScheduler, "sdxl": HeunDiscreteScheduler}  # the undistilled models'


@pytest.fixture(scope="module", params=FAMILIES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A family, a pipeline of it with a scheduler of its own, and a LoRA that changes much."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    pipeline = tiny_pipeline(family)
    settings = {"timestep_spacing": "leading", "skip_prk_steps": True} if family == "sd15" else {}
    pipeline.scheduler = OWN_SCHEDULERS[family].from_config(pipeline.scheduler.config, **settings)
    pipeline.save_pretrained(folder / "teacher")
    random = torch.Generator().manual_seed(1)
    for parameter in add_lora(pipeline.unet, rank=3, alpha=2.0):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    save_lora(folder / "lora", pipeline.unet)
    return family, str(folder / "teacher"), str(folder / "lora")


@pytest.fixture(scope="module")
def models(files: tuple[str, str, str]) -> Models:
    """One pair for all tests: what was drawn before must not matter."""
    _, teacher, lora = files
    return Models.of(load_pipeline(teacher, lora))


def swept(folder: Path, sweep: Sweep, models: Models, **settings: Any) -> list[dict[str, Any]]:
    run_sweep(folder, sweep, models, PROMPTS, SEEDS, batch_size=2, **settings)
    rows: list[dict[str, Any]] = json.loads((folder / f"{sweep.name}.json").read_text())
    return rows


@cache
def plain(teacher: str, lora: str | None, steps: int, guidance: float) -> Tensor:
    """Pictures by diffusers alone, as a user would draw them."""
    pipeline = DiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():  # as with a LoRA: torch rounds otherwise where weights are trainable
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name=LORA_FILE)
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[:2]]
    with torch.no_grad():
        return pipeline(
            PROMPTS[:2], num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
        ).images


def test_switched_to_and_fro_each_model_draws_what_it_draws_alone(files: tuple[str, str, str], models: Models) -> None:
    """The LoRA off is the teacher to the bit, in its own scheduler with its own settings; on again, the student."""
    _, teacher, lora = files
    student, undistilled = SweepSetting(True, 3), SweepSetting(False, 4, 2.5)
    for way, alone in ((student, plain(teacher, lora, 3, 1.0)), (undistilled, plain(teacher, None, 4, 2.5))) * 2:
        drawn = generate_images(models.ready(way), PROMPTS[:2], SEEDS[:2], way.steps, way.guidance)
        assert torch.equal(drawn, alone)
    restored = models.ready(undistilled).scheduler
    original = DiffusionPipeline.from_pretrained(teacher, safety_checker=None).scheduler
    assert type(restored) is type(original) and dict(restored.config) == dict(original.config)


def test_without_guidance_a_negative_prompt_changes_no_bit(models: Models, tmp_path: Path) -> None:
    rows = swept(tmp_path, guidance_sweep([1.0, 1.5, 2.0], "blurry", 2, REFERENCE), models)
    negative = {row["guidance"]: row for row in rows if row["negative_prompt"]}
    assert negative[1.0]["negative_change"] == 0
    assert 0 < negative[1.5]["negative_change"] < negative[2.0]["negative_change"]
    assert {w: row["nfe"] for w, row in negative.items()} == {1.0: 2, 1.5: 4, 2.0: 4}
    assert (tmp_path / "guidance.md").read_text().count("0, equal to the bit") == 1


def test_the_table_counts_what_the_network_is_asked(
    files: tuple[str, str, str], models: Models, tmp_path: Path
) -> None:
    """Each scheduler has its own count: PLMS asks once more than there are steps, Heun's method nearly twice."""
    family = files[0]
    rows = swept(tmp_path, lora_sweep([1, 3, 4], 1.0, REFERENCE), models)
    counts = {(row["model"], row["steps"]): row["nfe"] for row in rows}
    own = {"sd15": {1: 1, 3: 4, 4: 5}, "sdxl": {1: 1, 3: 5, 4: 7}}[family]
    assert counts == {("undistilled", n): 2 * own[n] for n in own} | {("student", n): n for n in own}
    assert {row["scheduler"] for row in rows} == {"LCMScheduler", OWN_SCHEDULERS[family].__name__}
    assert rows[0]["steps"] == 4 and rows[0]["difference"] == 0
    assert all(row["seconds"] > 0 and row["n"] == 3 and "caption_accuracy" not in row for row in rows)


def test_the_difference_is_from_the_undistilled_model(
    files: tuple[str, str, str], models: Models, tmp_path: Path
) -> None:
    _, teacher, lora = files
    run_sweep(tmp_path, steps_sweep([2], 1.0, None, REFERENCE), models, PROMPTS[:2], SEEDS[:2])
    row = json.loads((tmp_path / "steps.json").read_text())[1]
    gap = plain(teacher, lora, 2, 1.0) - plain(teacher, None, REFERENCE.steps, REFERENCE.guidance)
    assert row["difference"] == pytest.approx(float(gap.square().mean((1, 2, 3)).sqrt().mean()), rel=1e-5)


def test_the_grid_has_a_row_for_each_prompt_and_a_column_for_each_number_of_steps(
    files: tuple[str, str, str], models: Models, tmp_path: Path
) -> None:
    _, teacher, lora = files
    swept(tmp_path, steps_sweep([1, 2], 1.0, None, REFERENCE), models)
    grid = np.asarray(Image.open(tmp_path / "steps.png"))
    columns = [plain(teacher, lora, 1, 1.0), plain(teacher, lora, 2, 1.0), plain(teacher, None, 4, 3.0)]
    for column, images in enumerate(columns):
        for line, image in enumerate(images):
            top, left = HEADER + line * (CELL + 4 * GAP), LABEL_WIDTH + column * (CELL + GAP)
            cell = grid[top : top + CELL, left : left + CELL]
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            block = CELL // len(pixels)
            assert np.abs(cell.astype(int) - pixels.repeat(block, 0).repeat(block, 1)).max() <= 1


@pytest.fixture
def whole(tmp_path: Path) -> Any:
    """A student that is a whole network, which guidance is an input of; its pipeline comes with LCM's sampler."""
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=tiny_unet(seed=1, time_cond_proj_dim=16))
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "whole")
    return load_pipeline(str(tmp_path / "whole"))


def test_a_whole_network_is_a_student_that_needs_no_reference(whole: Any, tmp_path: Path) -> None:
    assert is_student(whole) and not is_student(load_pipeline(save_tiny(tmp_path / "teacher")))
    rows = swept(tmp_path, steps_sweep([1, 3], 7.5, None, None), Models.of(whole))
    assert [row["nfe"] for row in rows] == [1, 3]  # guidance is an input: a guided step is one evaluation
    assert all("difference" not in row for row in rows)
    rows = swept(tmp_path, guidance_sweep([1.0, 4.0], "blurry", 2, None), Models.of(whole))
    assert [row["negative_change"] for row in rows if row["negative_prompt"]] == [0, 0]
    assert rows[0]["energy"] != rows[1]["energy"]


def test_a_whole_network_has_its_teacher_beside_it(whole: Any, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher")
    models = Models.of(whole, load_pipeline(teacher))
    rows = swept(tmp_path, steps_sweep([2], 7.5, None, REFERENCE), models)
    assert [row["model"] for row in rows] == ["undistilled", "student"]
    assert rows[0]["nfe"] == 2 * REFERENCE.steps and rows[1]["difference"] > 0


def test_a_student_keeps_the_settings_of_its_own_sampler(whole: Any, tmp_path: Path) -> None:
    whole.scheduler = LCMScheduler.from_config(whole.scheduler.config, original_inference_steps=20)
    models = Models.of(whole, load_pipeline(save_tiny(tmp_path / "teacher")))
    assert models.ready(SweepSetting(True, 2)).scheduler.config.original_inference_steps == 20


def test_an_undistilled_model_that_is_not_there_is_one_clear_line(whole: Any) -> None:
    with pytest.raises(ValueError, match="^there is no undistilled model.*teacher=...$"):
        Models.of(whole).ready(REFERENCE)


def test_an_exported_network_replaces_the_teachers(whole: Any, tmp_path: Path) -> None:
    whole.unet.save_pretrained(tmp_path / "export" / "unet")
    pipeline = load_pipeline(save_tiny(tmp_path / "teacher"), tmp_path / "export")
    assert is_student(pipeline)
    drawn, expected = (generate_images(one, PROMPTS, SEEDS, 2, 7.5) for one in (pipeline, whole))
    assert torch.equal(drawn, expected)


MISTAKES = {
    "guidance=[1,2]": "only sweep=guidance",
    "sweep=guidance": "set negative_prompt=",
    "sweep=guidance steps=[1,2] negative_prompt=blurry": "takes one number",
    "sweep=steps sampler=ddim": "leave sampler, spacing and gamma null",
    "teacher=elsewhere": "reference of a sweep",
    "sweep=steps": "a sweep needs a student",
    "sweep=stpes": "sweep='stpes'",
}


@pytest.mark.parametrize("overrides, said", MISTAKES.items())
def test_settings_that_do_not_go_together_are_one_clear_line(overrides: str, said: str, tmp_path: Path) -> None:
    given = [f"output_dir={tmp_path}/out", "prompts=[a]", *overrides.split()]
    with pytest.raises(ConfigError, match=said) as raised:
        teacher = save_tiny(tmp_path / "teacher")
        sample.main(load("sample", SampleSettings, [f"model.pretrained_model_name_or_path={teacher}", *given]))
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_the_command_sweeps_over_what_it_is_given(
    files: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, teacher, lora = files
    given = [f"model.pretrained_model_name_or_path={teacher}", f"lora={lora}", f"output_dir={tmp_path}"]
    given += ["prompts=[a cat]", "sweep=lora", "steps=[1,2]", "teacher_steps=3", "num_images_per_prompt=2"]
    given += ["negative_prompt=blurry"]
    sample.main(load("sample", SampleSettings, given))
    rows = json.loads((tmp_path / "lora.json").read_text())
    assert {(row["model"], row["steps"], row["guidance"]) for row in rows} == {
        ("undistilled", 3, 7.5),
        *((model, n, w) for model, w in (("student", 1.0), ("undistilled", 7.5)) for n in (1, 2)),
    }
    assert {(row["n"], row["negative_prompt"]) for row in rows} == {(2, "blurry")}
    assert (tmp_path / "lora.md").read_text() in capsys.readouterr().out


def test_an_exported_network_is_swept_beside_the_teacher_that_it_replaced(whole: Any, tmp_path: Path) -> None:
    whole.unet.save_pretrained(tmp_path / "export" / "unet")
    given = [f"model.pretrained_model_name_or_path={save_tiny(tmp_path / 'teacher')}", f"lora={tmp_path / 'export'}"]
    given += ["prompts=[a cat]", "sweep=steps", "steps=2", "teacher_steps=3", f"output_dir={tmp_path}"]
    sample.main(load("sample", SampleSettings, given))
    rows = json.loads((tmp_path / "steps.json").read_text())
    assert [(row["model"], row["guidance"], row["nfe"]) for row in rows] == [
        ("undistilled", 7.5, 6),
        ("student", 7.5, 2),
    ]
    with pytest.raises(ConfigError, match="^sweep=lora needs a LoRA"):
        sample.main(load("sample", SampleSettings, [*given, "sweep=lora"]))


def test_the_toy_has_a_judge_and_others_have_none() -> None:
    toy, captions = ModelSettings(pretrained_model_name_or_path=str(teacher_folder())), list(CAPTIONS[:3])
    judge = sample.judge_of(toy, captions)
    assert judge is not None
    images = render(balanced_labels(3), torch.Generator().manual_seed(0))
    assert judge(images, captions).tolist() == [1, 1, 1] and judge(images, captions[::-1]).tolist() == [0, 1, 0]
    assert sample.judge_of(toy, ["a lighthouse"]) is None
    assert sample.judge_of(ModelSettings(pretrained_model_name_or_path="elsewhere"), captions) is None
