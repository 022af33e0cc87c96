"""The plug-in comparison, at a few steps of training: all parts in place, nothing done twice."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from distill.config.loading import ConfigError, load
from distill.config.settings import PlugInSettings
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Setting
from distill.evaluation.pipelines import load_pipeline
from distill.evaluation.toy import JudgeScorer
from distill.methods.sampling import Sampling
from distill.models.exported import FACTS
from distill.models.families.loading import load_teacher
from distill.models.lora import LORA_FILE, add_lora, save_lora
from distill.studies import plug_in
from distill.studies.plug_in_bench import Bench, Line
from distill.toy.judge import load_judge
from distill.toy.styles import UPRIGHT
from distill.toy.teacher import teacher_folder

TINY = ["n=100", "steps=[1]", "weights=[0,1]", "teacher_steps=2", "guidances=[1]", "fine_tune_steps=2", "style_steps=2"]
TINY += ["pictures=100", "train_batch_size=8", "style_rank=2", "style_alpha=3"]


def random_lora(folder: Path, seed: int) -> Path:
    """A LoRA for the toy teacher that changes much."""
    unet = load_teacher(str(teacher_folder())).unet
    random = torch.Generator().manual_seed(seed)
    for parameter in add_lora(unet, rank=2, alpha=1.0):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    save_lora(folder, unet)
    return folder


def test_the_command_trains_once_and_writes_a_report(tmp_path: Path) -> None:
    given = [f"lora={random_lora(tmp_path / 'lora', 0)}", f"output_dir={tmp_path / 'out'}", *TINY]
    plug_in.main(load("plug_in", PlugInSettings, given))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    models = {
        name: [(row["model"], row.get("steps"), row.get("weight")) for row in rows] for name, rows in report.items()
    }
    pair = ("teacher + style", "teacher + style + LoRA")
    assert models == {
        "fine_tune": [
            ("other real pictures", None, None),
            ("fine-tune", 2, None),
            ("fine-tune", 1, None),
            ("fine-tune + LoRA", 1, None),
        ],
        "teacher": [("other real pictures", None, None), ("teacher + LoRA", 1, None)],
        "style_lora": [
            ("other real pictures", None, None),
            *[(pair[0], 2, 0), (pair[0], 1, 0), (pair[1], 1, 0)],
            *[(pair[0], 2, 1), (pair[0], 1, 1), (pair[1], 1, 1)],
        ],
    }
    assert {rows[0]["style"] for rows in report.values()} == {1.0}
    trained = [tmp_path / "out" / "night" / "unet" / "config.json", tmp_path / "out" / "upright" / "peft"]
    tuned = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out" / "night").unet.state_dict()
    original = load_teacher(str(teacher_folder())).unet.state_dict()
    assert any(not torch.equal(tuned[name], weight) for name, weight in original.items())
    before = [path.stat().st_mtime_ns for path in trained]
    lines = (tmp_path / "out" / "evaluation" / "cache.jsonl").read_text()

    plug_in.main(load("plug_in", PlugInSettings, given))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert [path.stat().st_mtime_ns for path in trained] == before
    assert (tmp_path / "out" / "evaluation" / "cache.jsonl").read_text() == lines
    with pytest.raises(ConfigError, match='upright was trained with other settings, .*"rank": 2'):
        plug_in.main(load("plug_in", PlugInSettings, [*given, "style_rank=3"]))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "rank 2 and alpha 3" in text
    for name in report:
        assert f"({name}.png)" in text and (tmp_path / "out" / f"{name}.png").stat().st_size > 1000


def test_a_lora_that_is_not_there_is_one_clear_line_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^lora=nowhere: no LoRA in that folder"):
        plug_in.main(load("plug_in", PlugInSettings, ["lora=nowhere", f"output_dir={tmp_path / 'out'}", *TINY]))
    assert not (tmp_path / "out").exists()


def test_a_lightning_lora_is_drawn_as_it_was_exported_and_in_its_own_steps_only(tmp_path: Path) -> None:
    folder = random_lora(tmp_path / "lora", 0)
    cfg = load("plug_in", PlugInSettings, [f"lora={folder}", f"output_dir={tmp_path / 'out'}", *TINY])
    assert plug_in.student(cfg, "any", 2) == Setting("any", "lcm", 2, 1.0, "lcm")
    facts = {"format": 1, "formats": ["diffusers"], "files": {}, "step": 1, "base": "", "base_hash": "", "weights": ""}
    (folder / FACTS).write_text(json.dumps(facts | {"sampling": asdict(Sampling("euler", "trailing", 2))}))
    assert plug_in.student(cfg, "any", 2) == Setting("any", "euler", 2, 1.0, "trailing")
    with pytest.raises(ConfigError, match=r"was made for 2 steps: set steps=\[2\]$"):
        plug_in.main(cfg)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """The toy teacher with two LoRAs."""
    pipeline = load_pipeline(str(teacher_folder()))
    for seed, name in enumerate(("lcm", "style")):
        folder = random_lora(tmp_path / name, seed)
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=name)
    return Bench(pipeline, UPRIGHT, JudgeScorer(load_judge(), UPRIGHT.render), Cache(tmp_path / "cache"), 100, 60)


def test_only_the_loras_of_a_line_act(bench: Bench) -> None:
    """Weight 0 is no LoRA, to the bit of the pixels; every other combination draws something else."""
    setting, places = Setting("any", "ddim", 1), range(4)
    row = {"model": "any", "sampler": "ddim", "steps": 1, "guidance": 1.0, "spacing": setting.spacing}
    worn: list[dict[str, float]] = [{}, {"lcm": 1.0}, {"style": 1.0}, {"style": 0.5}, {"lcm": 1.0, "style": 1.0}]
    images = [bench.pictures(row, adapters, places) for adapters in worn]
    assert torch.allclose(bench.pictures(row, {"style": 0.0}, places), images[0], atol=1e-5)
    assert torch.allclose(bench.pictures(row, {"lcm": 1.0, "style": 0.0}, places), images[1], atol=1e-5)
    for i, one in enumerate(images):
        assert all((one - other).abs().max() > 0.05 for other in images[:i])


def test_a_line_reports_the_best_of_its_settings(bench: Bench) -> None:
    tried = [Setting("any", "ddim", 1, 1.0, spacing) for spacing in ("leading", "trailing")]
    alone = [bench.rows("test", [Line({}, [setting])])[0] for setting in tried]
    best = bench.rows("test", [Line({}, tried, {"weight": 0.0})])[0]
    assert best == min(alone, key=lambda row: row["frechet"]) | {"weight": 0.0}
    assert alone[0]["frechet"] != alone[1]["frechet"] and best["nfe"] == 1
