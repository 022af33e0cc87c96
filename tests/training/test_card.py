"""The card of another person's run: nothing of theirs is code, a link, a cell of its own or HTML; facts as used."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distill.config.loading import load
from distill.config.settings import TrainSettings
from distill.diffusion.noise import Noise
from distill.diffusion.schedule import NoiseSchedule
from distill.methods.lcm import LCM
from distill.methods.lightning import LightningMSE
from distill.methods.mlcm import MLCM
from distill.methods.sampling import Sampling
from distill.training.card import write_card
from distill.training.export import Export
from distill.training.used_data import USED, UsedData, data_of

HOSTILE = (
    'x"); import os; os.system("id',
    "a|b|c",
    "two\nlines\n\n# Heading",
    "`tick` ```\n```python\nimport os\n```",
    "<script>alert(1)</script>",
    "[a](javascript:alert(1)) ![b](https://evil.example/x.png) https://evil.example www.evil.example a@evil.example",
    "---\nlicense: mit\n---",
    "\\\u2028\x00\x1b[31m\ud800\U0001f600'\"",
    "$x$ **bold** _it_ ~~no~~ &lt;b&gt;",
)


def settings(*overrides: str) -> TrainSettings:
    given = ["model.pretrained_model_name_or_path=t", "data.store=s", "output_dir=o", *overrides]
    return load("train", TrainSettings, given)


def an_export(**changes: object) -> Export:
    facts = {
        "name": "a",
        "formats": ("diffusers", "peft", "kohya", "unet", "checkpoint", "pipeline"),
        "dtype": "float16",
        "base_model": "org/model",
        "base_hash": "0123456789abcdef",
        "family": "sdxl",
        "step": 3,
        "ema": False,
        "guidance": (2.0, 11.0),
        "takes_guidance": False,
        "built_in_guidance": None,
        "prediction": "epsilon",
        "noise": Noise(),
        "sampling": Sampling(),
        "method": "Latent consistency distillation",
        "paper": "LCM",
        "tag": "lcm",
        "data": UsedData("trajectories", 8, "ddim", 10, (7.5, 7.5)),
        "settings": settings(),
    }
    return Export(**facts | changes)  # type: ignore[arg-type]


def card(folder: Path, export: Export) -> str:
    return write_card(folder, export).read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_run_leaves_its_place_on_the_card(text: str, tmp_path: Path) -> None:
    run = settings()
    model = run.model.model_copy(update={"revision": text, "variant": text})
    method = run.method | {"source": text, text: text}
    hostile = run.model_copy(update={"model": model, "method": method, "start": text, "lr_scheduler": text})
    export = an_export(settings=hostile, base_model=text, method=text, paper=text, name="a", tag="lcm")
    page = card(tmp_path, export)
    plain = card(tmp_path, an_export())

    blocks, usual = (re.findall(r"^```python\n(.*?)^```$", p, re.DOTALL | re.MULTILINE) for p in (page, plain))
    assert len(blocks) == len(usual) == 6
    for block, known in zip(blocks, usual, strict=True):  # the same statements, other literals at most
        found, expected = ast.parse(block), ast.parse(known)
        assert [type(s) for s in found.body] == [type(s) for s in expected.body]
        names = [sorted({n.id for n in ast.walk(t) if isinstance(n, ast.Name)}) for t in (found, expected)]
        assert names[0] == names[1]
    outside = re.sub(
        r"^```python\n.*?^```$|(`+)(?!`).*?(?<!`)\1(?!`)",
        "",
        page.split("\n---\n", 1)[1],
        flags=re.DOTALL | re.MULTILINE,
    )
    assert not re.search(r"(?<!\\)<script", outside) and not re.search(
        r"(?<!\\)\]\(", outside.replace("![samples](samples.png)", "")
    )
    assert not re.search(r"(://|www\.|@)evil", outside)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("#")
    ]
    cells = [line for line in page.splitlines() if line.startswith("|")]
    assert len(cells) == len([line for line in plain.splitlines() if line.startswith("|")]) + 2  # start, one key
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in cells} == {3, 6}
    header = ModelCard.load(tmp_path / "README.md").data
    assert header.license == "other" and header.tags == [
        "text-to-image",
        "stable-diffusion-xl",
        "distillation",
        "lcm",
        "lora",
    ]


def test_the_card_counts_what_the_store_held(tmp_path: Path) -> None:
    export = an_export()
    row = next(line for line in card(tmp_path, export).splitlines() if line.startswith("| data |"))
    assert row == "| data | 8 trajectories of the teacher, 10 steps of ddim, 288 taken in training |"
    assert "| data | 1 picture, 288" in card(tmp_path, replace(export, data=UsedData("pictures", 1, "none", 0, (1, 1))))
    unknown = card(tmp_path, replace(export, data=None))
    assert "| data | trajectories of the teacher (how many is not recorded), 288" in unknown


def test_what_a_run_learned_from_is_its_note_and_no_guess(tmp_path: Path) -> None:
    run = settings(f"data.store={tmp_path}/none", "data.guidance=3.0")
    assert data_of(tmp_path, run) is None
    noted = {"kind": "trajectories", "samples": 8, "solver": "ddim", "solver_steps": 10, "guidance": [2, 5.5]}
    (tmp_path / USED).write_text(json.dumps(noted))
    assert data_of(tmp_path, run) == UsedData("trajectories", 8, "ddim", 10, (2.0, 5.5))
    for broken in ("", "[]", json.dumps(noted | {"samples": "8"}), json.dumps(noted | {"guidance": 7})):
        (tmp_path / USED).write_text(broken)
        assert data_of(tmp_path, run) is None


def test_the_guidance_learned_is_the_methods_own_and_that_of_trajectories_it_reads() -> None:
    schedule, stored = NoiseSchedule.scaled_linear(), (2.0, 3.0)
    grid: dict = {"segments": 1, "skip": 125, "iterations": 2, "grid": 8}
    rollout, read = {**grid, "source": "rollout"}, {**grid, "source": "trajectory"}
    own = {**grid, "source": "student"}
    assert LCM(schedule, source="noised", w_min=4.0, w_max=16.0).guidance_learned(stored) == (4.0, 16.0)
    assert LCM(schedule, source="trajectory", w_min=4.0).guidance_learned(stored) == stored
    assert MLCM(schedule, [rollout]).guidance_learned(None) == (8.0, 8.0)  # type: ignore[list-item]
    assert MLCM(schedule, [read]).guidance_learned(stored) == stored  # type: ignore[list-item]
    assert MLCM(schedule, [read, own]).guidance_learned(stored) == (2.0, 8.0)  # type: ignore[list-item]
    assert LightningMSE(schedule, 4, 8, guidance=6.0).guidance_learned(stored) == (6.0, 6.0)
    assert LightningMSE(schedule, 4, 8, source="trajectory", guidance=6.0).guidance_learned(stored) == stored
    assert LCM(schedule, source="trajectory").guidance_learned(None) == (1.0, 1.0)


def test_no_card_says_that_a_pipeline_needs_no_settings(tmp_path: Path) -> None:
    text = card(tmp_path, an_export())
    assert "diffusers' own are 50 and 7.5" in text and text.count("num_inference_steps=4, guidance_scale=1.0") == 6


def test_a_card_names_files_samplers_and_nodes_of_other_programs(tmp_path: Path) -> None:
    text = card(tmp_path, an_export())
    comfy, web, invoke = (
        next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        for name in ("ComfyUI", "A1111", "Invoke")
    )
    assert "`kohya/a.safetensors`<br>`unet/diffusion_pytorch_model.safetensors`<br>`checkpoint/a.safetensors`" in comfy
    assert "| `lcm` | `simple` | node ModelSamplingDiscrete, sampling `lcm` |" in comfy
    assert "`LCM`" in web and "the whole folder" in invoke and "sgm_uniform" not in text
    told = card(tmp_path, an_export(formats=("unet",), takes_guidance=True))
    assert "leave out the network's input of guidance" in told and "`guidance=W`" in told
    assert "## In other programs" not in card(tmp_path, an_export(formats=("peft",)))
