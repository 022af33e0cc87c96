"""The comparison of `scripts/toy_control.py`, at a few steps of training: all parts in place, nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from distill.config.loading import ConfigError, load
from distill.config.settings import ToyControlSettings
from distill.evaluation.compare import Setting
from distill.evaluation.pipelines import load_pipeline
from distill.studies import control as toy_control
from distill.studies.control_bench import ControlRow
from distill.toy.teacher import teacher_folder
from distill.toy.world import balanced_labels, draw_scene, paint
from tests.studies.test_plug_in import random_lora

TINY = ["n=100", "steps=[1]", "teacher_steps=2", "guidances=[1]", "control_steps=2", "pictures=100"]
TINY += ["train_batch_size=8"]


@pytest.mark.slow
def test_the_command_trains_once_and_writes_a_report(tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = [f"lora={random_lora(tmp_path / 'lora', 0)}", f"output_dir={output}", *TINY]
    toy_control.main(load("toy_control", ToyControlSettings, given))
    report = json.loads((output / "report.json").read_text())
    rows = {
        name: [(row["model"], row.get("strength"), row.get("steps"), row.get("from")) for row in rows]
        for name, rows in report.items()
    }
    best = (toy_control.BEST, None, None, None)
    control = [("student", 0, 1), ("teacher", 0, 2), ("teacher", 1, 2), ("teacher", 1, 1), ("student", 1, 1)]
    assert rows["control"] == [best, *[(*row, None) for row in control]]
    restyle = [("student", 1, 1, 1000), ("teacher", 0.6, 2, 500), ("teacher", 0.6, 1, 500), ("student", 0.6, 1, 500)]
    assert rows["restyle"] == [best, ("sources, as they are", None, None, None), *restyle]
    for part in report.values():
        assert part[0]["caption_accuracy"] == 1 and part[0]["follows"] > 0.95
    source = report["restyle"][1]
    assert source["caption_accuracy"] == 0 and source["follows"] > 0.9999
    learnt = ControlNetModel.from_pretrained(output / "controlnet")
    assert learnt.controlnet_mid_block.weight.abs().max() > 0

    files = [output / "controlnet" / "config.json", output / "evaluation" / "cache.jsonl"]
    before = [path.stat().st_mtime_ns for path in files]
    toy_control.main(load("toy_control", ToyControlSettings, given))
    assert json.loads((output / "report.json").read_text()) == report
    assert [path.stat().st_mtime_ns for path in files] == before
    with pytest.raises(ConfigError, match="controlnet was trained with other settings"):
        toy_control.main(load("toy_control", ToyControlSettings, [*given, "seed=1"]))
    text = (output / "report.md").read_text()
    for name in report:
        assert f"({name}.png)" in text and (output / f"{name}.png").stat().st_size > 1000


def test_a_lora_that_is_not_there_is_one_clear_line_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^lora=nowhere: no LoRA in that folder"):
        toy_control.main(load("toy_control", ToyControlSettings, ["lora=nowhere", f"output_dir={tmp_path / 'out'}"]))
    assert not (tmp_path / "out").exists()


def test_weak_image_to_image_gives_the_picture_back(tmp_path: Path) -> None:
    """Prompted with its own caption, at the least noise there is, through the pipeline, in the order of the prompts."""
    cfg = load("toy_control", ToyControlSettings, ["lora=-", f"output_dir={tmp_path}", "n=100"])
    part = toy_control.restyle_part(cfg, load_pipeline(str(teacher_folder())))
    source = paint(draw_scene((balanced_labels(100) - 4) % 20, toy_control.generator("toy control", 0, "sources")))
    assert torch.allclose(part.use.images * 2 - 1, source, atol=1e-6)
    setting, places = Setting("teacher", "ddim", 1, 1.0), [0, 7, 51]
    row = {"model": "teacher", "sampler": "ddim", "steps": 1, "guidance": 1.0, "spacing": "trailing", "embedded": False}
    drawn = part.use.pictures(row, ControlRow([setting], {}, 0.02), places)
    assert (drawn - source[places]).abs().mean() < 0.1
    assert (drawn - source[places].roll(1, 0)).abs().mean() > 0.3
