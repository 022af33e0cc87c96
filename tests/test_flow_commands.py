"""Flow matching through the commands: from a pipeline that diffusers has saved to pictures that diffusers draws.

The last step is a process that does not import this project, and what it draws is what the trained network draws.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
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
from tests.tiny import CHANNELS, SHIFT, TOKENS, save_tiny

PROMPTS = ["a red boat", "two owls", "a bridge at night", "snow"]
SIZES = ["global_batch_size=4", "lora_rank=2", "lora_alpha=3", "max_train_steps=2", "checkpointing_steps=2"]
SIZES += ["lr_warmup_steps=0", "learning_rate=0.01", "mixed_precision=no", "dataloader_num_workers=0", "log_every=1"]
LIGHTNING = ["method.teacher_steps=4", "method.student_steps=2"]
METHODS = {
    "lcm": ["method=lcm", "method.skip=250"],
    "mlcm": ["method=mlcm", "method.stages=[{segments: 2, skip: 250, iterations: 2, learning_rate: 0.01}]"],
    "mse": ["method=lightning_mse", *LIGHTNING],
    "game": ["method=lightning_adversarial", *LIGHTNING],
    "conditional": ["method=lightning_adversarial", *LIGHTNING, "networks.discriminator.conditional=true",
                    "networks.discriminator.rank=2"],
}  # fmt: skip
FULL = ["student=full_unguided"]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a tiny teacher whose store is written."""
    folder = tmp_path_factory.mktemp("flow")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    settings = [
        f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher', 'sd3')}",
        f"data.prompts={folder}/prompts.txt",
        f"data.store={folder}/store",
        "data.num_samples=8",
        "data.solver_steps=4",
        "data.guidance=5",
    ]
    make_trajectories.main(load("train", TrainSettings, settings))
    return [*settings, *SIZES]


def run(common: Sequence[str], folder: Path, *overrides: str) -> Path:
    train.main(load("train", TrainSettings, [*common, f"output_dir={folder}", *overrides]))
    return folder


# --- the store ---


def test_a_store_says_its_shift_and_keeps_texts_in_bfloat16(common: list[str]) -> None:
    index = open_store(common[2].removeprefix("data.store=")).index
    assert (index.shift, index.text_dtype, index.dtype) == (SHIFT, "bfloat16", "float16")
    assert index.shapes["states"] == (5, CHANNELS, 6, 6)
    text = index.layout.tensors["conditioning.encoder_hidden_states"]
    assert (text.dtype, text.shape) == (torch.bfloat16, (TOKENS + 256, 40))


def test_a_store_of_another_shift_is_refused_with_both(common: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"shift is {SHIFT} in the store and 4.0 in the run.*set model.shift={SHIFT}"):
        run(common, tmp_path / "run", *METHODS["lcm"], "model.shift=4")


# --- training ---


@pytest.mark.parametrize("student", [[], FULL], ids=["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(common: list[str], method: str, student: list[str], tmp_path: Path) -> None:
    folder = run(common, tmp_path / "run", *METHODS[method], *student)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for key, value in line.items() if key.endswith("loss")]
    assert len(losses) >= 2 and all(math.isfinite(loss) and loss != 0 for loss in losses)


def test_training_opens_no_text_encoder_and_no_autoencoder(common: list[str], tmp_path: Path) -> None:
    """A T5 alone would take 9.5 GB on each rank."""
    shutil.copytree(common[0].split("=", 1)[1], tmp_path / "teacher")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        for file in (tmp_path / "teacher" / part).glob("*.safetensors"):
            file.unlink()
    given = [f"model.pretrained_model_name_or_path={tmp_path}/teacher", *METHODS["lcm"]]
    assert (run(common, tmp_path / "run", *given) / "DONE").is_file()


# --- exports ---

DRAWS = """
import json, sys
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
import diffusers
for wanted in json.loads(sys.argv[1]):
    pipeline = DiffusionPipeline.from_pretrained(wanted["pipeline"])
    if wanted["lora"]:
        pipeline.load_lora_weights(wanted["lora"])
    if wanted["network"]:
        pipeline.transformer = SD3Transformer2DModel.from_pretrained(wanted["network"])
    pipeline.scheduler = eval(wanted["scheduler"], {"FlowMatchEulerDiscreteScheduler":
        diffusers.FlowMatchEulerDiscreteScheduler, "FlowMatchLCMScheduler": diffusers.FlowMatchLCMScheduler})
    pipeline.set_progress_bar_config(disable=True)
    x = torch.load(wanted["noise"])
    for part in (pipeline.transformer, pipeline.vae):
        part.requires_grad_(False)
    n = len(wanted["sigmas"])
    images = pipeline(wanted["prompts"], num_inference_steps=n, sigmas=wanted["sigmas"], guidance_scale=1.0,
                      latents=x, output_type="pt").images
    torch.save(images, wanted["images"])
assert not any(name.split(".")[0] == "distill" for name in sys.modules)
"""


@torch.no_grad()
def trained(run_folder: Path, prompts: list[str], x: Tensor, steps: int) -> Tensor:
    """What the network of a run's last checkpoint draws, [B, 3, H, W] in [0, 1]."""
    settings = read_run(run_folder)
    teacher = load_teacher(settings.model.pretrained_model_name_or_path, parts=("network", "text", "vae"))
    student = build(settings.student).networks(teacher, keep_teacher=False)["student"]
    _, weights = read_weights(checkpoints_of(run_folder), "student", "latest", True)
    teacher.network.requires_grad_(False)
    missing = teacher.network.load_state_dict(dict(weights), strict=False)
    assert not missing.unexpected_keys
    times = make_times("trailing", teacher.schedule.T, steps)
    *_, (_, latents) = solve(student, teacher.schedule, x, times, teacher.encode(prompts), "ddim")
    return teacher.decode(latents) / 2 + 0.5


def test_what_is_exported_is_drawn_by_diffusers_alone(common: list[str], tmp_path: Path) -> None:
    """LoRAs by diffusers' names and folded for ComfyUI, a whole network, and a whole pipeline."""
    base = common[0].split("=", 1)[1]
    steps, x = 4, torch.randn(2, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    prompts = ["two owls", "a boat"]
    how = [*METHODS["mlcm"], "lora_alpha=3"]
    lora, full = run(common, tmp_path / "lora", *how), run(common, tmp_path / "full", *METHODS["mlcm"], *FULL)
    first = export_run(lora, tmp_path / "l", formats=["diffusers", "peft", "comfyui", "pipeline"])
    second = export_run(full, tmp_path / "f", formats=["transformer", "pipeline"])
    assert (first / "comfyui" / "l.safetensors").is_file() and (first / "peft").is_dir()
    scheduler = f"FlowMatchEulerDiscreteScheduler(shift={SHIFT})"
    ways = [
        (lora, {"pipeline": base, "lora": str(first), "network": ""}),
        (lora, {"pipeline": base, "lora": str(first / "comfyui" / "l.safetensors"), "network": ""}),
        (lora, {"pipeline": str(first), "lora": "", "network": ""}),
        (full, {"pipeline": base, "lora": "", "network": str(second / "transformer")}),
        (full, {"pipeline": str(second), "lora": "", "network": ""}),
    ]
    wanted = [
        given
        | {"scheduler": scheduler, "noise": f"{tmp_path}/x.pt", "sigmas": [1 - i / steps for i in range(steps)]}
        | {"prompts": prompts, "images": f"{tmp_path}/{i}.pt"}
        for i, (_, given) in enumerate(ways)
    ]
    subprocess.run([sys.executable, "-c", DRAWS, json.dumps(wanted)], check=True, cwd=tmp_path)
    expected = {folder: trained(folder, prompts, x, steps) for folder in (lora, full)}
    for i, (folder, _) in enumerate(ways):
        drawn = torch.load(tmp_path / f"{i}.pt")
        assert float((drawn - expected[folder]).abs().max()) <= 1e-4, ways[i]
    assert float((expected[lora] - expected[full]).abs().max()) > 1e-3


def test_sample_draws_a_student_and_its_teacher(common: list[str], tmp_path: Path) -> None:
    folder = run(common, tmp_path / "run", *METHODS["lcm"])
    export_run(folder, tmp_path / "export")
    ways = {"export": [common[0], f"lora={tmp_path}/export"], "teacher": [common[0]], "run": [f"run={folder}"]}
    for name, given in ways.items():
        out = tmp_path / f"pictures-{name}"
        more = ["prompts=[snow]", f"output_dir={out}", "steps=2"]
        sample.main(load("sample", SampleSettings, [*given, *more]))
        (drawn,) = json.loads((out / "pictures.json").read_text())
        assert (drawn["steps"], drawn["sampler"]) == (2, "ddim") and (out / drawn["file"]).is_file()
