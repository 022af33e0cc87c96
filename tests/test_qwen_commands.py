"""FLUX.2 klein and Z-Image through the commands: from pipelines that diffusers has saved to pictures that it draws.

The last step is a process that does not import this project, and what it draws is what the trained network draws.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.commands import sample, train
from distill.commands import trajectories as make_trajectories
from distill.config.loading import ConfigError, build, load
from distill.config.settings import SampleSettings, TrainSettings
from distill.data.reader import open_store
from distill.diffusion.solver import make_times, solve
from distill.models.families.loading import load_teacher
from distill.training.checkpoint import read_weights
from distill.training.export import export_run
from distill.training.run import checkpoints_of, read_run
from tests.tiny_qwen import SIDE, save, tiny_klein, tiny_z_image

FAMILIES = {"flux2": tiny_klein, "z_image": tiny_z_image}
PROMPTS = ["a red boat", "two owls", "a bridge at night", "snow"]
SIZES = ["global_batch_size=2", "lora_rank=2", "lora_alpha=3", "max_train_steps=2", "checkpointing_steps=2"]
SIZES += ["lr_warmup_steps=0", "learning_rate=0.01", "mixed_precision=no", "dataloader_num_workers=0", "log_every=1"]
SIZES += ["gradient_checkpointing=false"]
LIGHTNING = ["method.teacher_steps=4", "method.student_steps=2"]
METHODS = {
    "lcm": ["method=lcm", "method.skip=250"],
    "mlcm": ["method=mlcm", "method.stages=[{segments: 2, skip: 250, iterations: 2, learning_rate: 0.01}]",
             "student=full_unguided"],
    "game": ["method=lightning_adversarial", *LIGHTNING, "networks.discriminator.conditional=true"],
}  # fmt: skip
RUNS = [(family, method) for family in FAMILIES for method in METHODS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen")


@cache
def settings(place: Path, family: str) -> list[str]:
    """Of a tiny teacher whose store is written."""
    folder = place / family
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    given = [
        f"model.pretrained_model_name_or_path={save(FAMILIES[family](), folder / 'teacher')}",
        f"model.resolution={SIDE}",
        f"data.prompts={folder}/prompts.txt",
        f"data.store={folder}/store",
        "data.num_samples=4",
        "data.solver_steps=4",
        "data.guidance=5",
    ]
    make_trajectories.main(load("train", TrainSettings, given))
    return [*given, *SIZES]


@cache
def run(place: Path, family: str, method: str) -> Path:
    folder = place / family / method
    given = [*settings(place, family), f"output_dir={folder}", *METHODS[method]]
    train.main(load("train", TrainSettings, given))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_says_its_shift_and_keeps_texts_in_bfloat16(place: Path, family: str) -> None:
    index = open_store(settings(place, family)[3].removeprefix("data.store=")).index
    assert index.shift == pytest.approx({"flux2": 4.946, "z_image": 3.0}[family], abs=1e-3)
    assert index.shapes["states"] == {"flux2": (5, 12, 6, 6), "z_image": (5, 5, 12, 12)}[family]
    kinds = {name: spec.dtype for name, spec in index.layout.tensors.items() if name.startswith("conditioning.")}
    assert kinds.pop("conditioning.encoder_hidden_states") == torch.bfloat16
    assert kinds == ({} if family == "flux2" else {"conditioning.text_mask": torch.bool})


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_every_method_trains(place: Path, family: str, method: str) -> None:
    lines = [json.loads(line) for line in (run(place, family, method) / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for key, value in line.items() if key.endswith("loss")]
    assert len(losses) >= 2 and all(math.isfinite(loss) and loss != 0 for loss in losses)


DRAWS = """
import json, sys
import diffusers, torch
for wanted in json.loads(sys.argv[1]):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(wanted["pipeline"])
    if wanted["lora"]:
        pipeline.load_lora_weights(wanted["lora"], weight_name=wanted["file"])
    if wanted["network"]:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(wanted["network"])
    if wanted["shift"]:
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=wanted["shift"])
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae):
        part.requires_grad_(False)
    side, x = wanted["side"], torch.load(wanted["noise"])
    images = pipeline(prompt=wanted["prompts"], num_inference_steps=4, guidance_scale=wanted["guidance"],
                      latents=x, output_type="pt", height=side, width=side).images
    torch.save(images, wanted["images"])
assert not any(name.split(".")[0] == "distill" for name in sys.modules)
"""


@torch.no_grad()
def trained(run_folder: Path, prompts: list[str], x: Tensor) -> Tensor:
    """What the network of a run's last checkpoint draws in 4 steps, [B, 3, H, W] in [0, 1]."""
    settings = read_run(run_folder)
    path = settings.model.pretrained_model_name_or_path
    teacher = load_teacher(path, parts=("network", "text", "vae")).at_resolution(SIDE)
    student = build(settings.student).networks(teacher, keep_teacher=False)["student"]
    _, weights = read_weights(checkpoints_of(run_folder), "student", "latest", True)
    teacher.network.requires_grad_(False)
    assert not teacher.network.load_state_dict(dict(weights), strict=False).unexpected_keys
    times = make_times("trailing", teacher.schedule.T, 4)
    *_, (_, latents) = solve(student, teacher.schedule, x, times, teacher.encode(prompts), "ddim")
    return teacher.decode(latents) / 2 + 0.5


def test_what_is_exported_is_drawn_by_diffusers_alone(place: Path, tmp_path: Path) -> None:
    """Without `sigmas`: these pipelines make the grid of the students by themselves. A LoRA, a network, a pipeline."""
    prompts, jobs, expected = ["two owls", "a boat"], [], []
    for family in FAMILIES:
        path = settings(place, family)[0].split("=", 1)[1]
        teacher = load_teacher(path, parts=()).at_resolution(SIDE)
        x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        torch.save(x, tmp_path / f"{family}.pt")
        lora, full = run(place, family, "lcm"), run(place, family, "mlcm")
        first = export_run(lora, tmp_path / family / "l", formats=["diffusers", "comfyui"])
        second = export_run(full, tmp_path / family / "f", formats=["transformer", "pipeline"])
        always = {
            "pipeline": path,
            "lora": "",
            "file": "",
            "network": "",
            "shift": teacher.schedule.shift,
            "side": SIDE,
        }
        always |= {"prompts": prompts, "guidance": teacher.family.guidance.to_pipeline(1.0)}
        always |= {"noise": f"{tmp_path}/{family}.pt"}
        of_lora, of_full = trained(lora, prompts, x), trained(full, prompts, x)
        assert (of_lora - of_full).abs().max() > 1e-3
        jobs += [
            always | {"lora": str(first), "file": "pytorch_lora_weights.safetensors"},
            always | {"lora": str(first / "comfyui"), "file": "l.safetensors"},
            always | {"network": str(second / "transformer")},
            always | {"pipeline": str(second), "shift": None},
        ]
        expected += [of_lora, of_lora, of_full, of_full]
    jobs = [job | {"images": f"{tmp_path}/{i}.pt"} for i, job in enumerate(jobs)]
    subprocess.run([sys.executable, "-c", DRAWS, json.dumps(jobs)], check=True, cwd=tmp_path)
    for job, wanted in zip(jobs, expected, strict=True):
        assert float((torch.load(job["images"]) - wanted).abs().max()) <= 1e-4, job


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_draws_a_student(place: Path, family: str, tmp_path: Path) -> None:
    given = [f"run={run(place, family, 'lcm')}", "prompts=[snow]", "steps=2", f"output_dir={tmp_path}/out"]
    sample.main(load("sample", SampleSettings, given))
    (drawn,) = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert drawn["steps"] == 2 and (tmp_path / "out" / drawn["file"]).is_file()


def test_a_negative_prompt_for_klein_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    path = settings(place, "flux2")[0]
    given = [path, "prompts=[snow]", "steps=1", "negative_prompt=blurry", f"output_dir={tmp_path}/out"]
    with pytest.raises(ConfigError, match="negative_prompt: a Flux2KleinPipeline takes none") as caught:
        sample.main(load("sample", SampleSettings, given))
    assert "\n" not in str(caught.value)
