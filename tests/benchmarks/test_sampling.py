"""`distill benchmark sample`: both programs generate the same pictures, of which the seconds are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.benchmarks import sampling
from distill.benchmarks.networks import MODELS, build_pipeline, teacher_of
from distill.evaluation.pipelines import use_sampler

MODEL = replace(MODELS["tiny_sd15"], side=4)


def tiny(rank: int = 4) -> sampling.SampledModel:
    torch.manual_seed(0)
    pipeline = build_pipeline(MODEL, "cpu", torch.float32)
    return sampling.SampledModel(pipeline, teacher_of(pipeline, MODEL), rank)


def test_both_programs_generate_the_same_pictures() -> None:
    models = tiny()
    use_sampler(models.pipeline, "lcm", "lcm")
    with torch.no_grad():
        theirs = sampling.theirs(models, "lcm", 1.0, 2, 4)
        ours = sampling.ours(models.teacher, models.teacher.denoiser(), "lcm", "lcm", 2, 4)
    assert theirs.shape == (2, 3, 32, 32) and float(theirs.std()) > 0.01
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), theirs, atol=2e-3)


def test_all_steps_are_measured_with_the_lora_as_it_is_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "TEACHER_STEPS", 2)
    monkeypatch.setattr(sampling, "STUDENT_STEPS", (1, 2))
    monkeypatch.setattr(sampling, "load", lambda size, device: tiny())
    sampling.run("sd15", 1, 2, tmp_path)
    found = json.loads((tmp_path / "sample.json").read_text())
    kinds = [(row["network"], row["program"], row["steps"]) for row in found["rows"]]
    both = ("diffusers", "distill")
    students = [(n, p, s) for n in ("LoRA", "LoRA, merged") for s in (1, 2) for p in both]
    assert kinds == [*(("teacher", program, 2) for program in both), *students]
    assert all(row["seconds"] > 0 and row["pictures_per_second"] > 0 for row in found["rows"])
    text = (tmp_path / "sample.md").read_text()
    assert "| LoRA, merged, 2 steps | distill |" in text and "| teacher, 2 steps | diffusers |" in text
    assert text.count("\n|") == 2 + len(kinds) and text.strip() in capsys.readouterr().out
