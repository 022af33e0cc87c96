"""FLUX.1 through the commands: from a pipeline that diffusers has saved to pictures that diffusers draws.

Guidance is an input of its network: the store's w is the student's, and that of its pictures.
"""

from __future__ import annotations

import json
import math
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
from distill.diffusion.guidance import guided
from distill.diffusion.solver import make_times, solve
from distill.models.families.loading import load_teacher
from distill.training.card import write_card
from distill.training.checkpoint import read_weights
from distill.training.export import export_run, write_student
from distill.training.run import checkpoints_of, read_run
from tests.tiny import CHANNELS
from tests.tiny_flux import PIXELS, save_tiny_flux

PROMPTS = ["a red boat", "two owls", "a bridge at night", "snow"]
W = 3.5
SIZES = ["global_batch_size=4", "lora_rank=2", "lora_alpha=3", "max_train_steps=2", "checkpointing_steps=2"]
SIZES += ["lr_warmup_steps=0", "learning_rate=0.01", "mixed_precision=no", "dataloader_num_workers=0", "log_every=1"]
LIGHTNING = ["method.teacher_steps=4", "method.student_steps=2", f"method.guidance={W}"]
STAGES = "method.stages=[{segments: 2, skip: 250, iterations: 2, learning_rate: 0.01}]"
METHODS = {
    "lcm": ["method=lcm", "method.skip=250"],
    "mlcm": ["method=mlcm", STAGES],
    "mse": ["method=lightning_mse", *LIGHTNING],
    "game": ["method=lightning_adversarial", *LIGHTNING, "networks=adapters"],
    "conditional": ["method=lightning_adversarial", *LIGHTNING, "networks.discriminator.conditional=true"],
}
FULL = ["student=full"]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a tiny teacher whose store is written."""
    folder = tmp_path_factory.mktemp("flux")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    settings = [
        f"model.pretrained_model_name_or_path={save_tiny_flux(folder / 'teacher')}",
        f"model.resolution={PIXELS}",
        f"data.prompts={folder}/prompts.txt",
        f"data.store={folder}/store",
        "data.num_samples=8",
        "data.solver_steps=4",
        f"data.guidance={W}",
        "model.max_tokens=12",
    ]
    make_trajectories.main(load("train", TrainSettings, settings))
    return [*settings, *SIZES]


def run(common: Sequence[str], folder: Path, *overrides: str) -> Path:
    train.main(load("train", TrainSettings, [*common, f"output_dir={folder}", *overrides]))
    return folder


def test_a_store_holds_the_teachers_one_pass_at_its_guidance(common: list[str]) -> None:
    store = open_store(common[3].removeprefix("data.store="))
    assert store.unconditional == {} and store.index.guidance == W
    assert store.index.shift == pytest.approx(1.5831, abs=1e-4)
    teacher = load_teacher(common[0].split("=", 1)[1], parts=("network", "text"), max_tokens=12).at_resolution(PIXELS)
    one = store.read(0, tuple(range(5)))
    follow = guided(teacher.denoiser(), teacher.unconditional(), W)
    text = {name: x[None].float() for name, x in one.conditioning.items()}
    with torch.no_grad():
        steps = solve(follow, teacher.schedule, one.states[:1].float(), make_times("trailing", 1000, 4), text, "ddim")
        *_, (_, end) = steps
        other = guided(teacher.denoiser(), {}, 1.0)
        *_, (_, unguided) = solve(
            other, teacher.schedule, one.states[:1].float(), make_times("trailing", 1000, 4), text, "ddim"
        )
    torch.testing.assert_close(one.states[-1:].float(), end, atol=0.02, rtol=0)  # stored in half precision
    assert (unguided - end).abs().max() > 0.05


@pytest.mark.parametrize("student", [[], FULL], ids=["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(common: list[str], method: str, student: list[str], tmp_path: Path) -> None:
    """A full student's guidance is the network's own input."""
    folder = run(common, tmp_path / "run", *METHODS[method], *student)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for key, value in line.items() if key.endswith("loss")]
    assert len(losses) >= 2 and all(math.isfinite(loss) and loss != 0 for loss in losses)


# --- exports ---

DRAWS = """
import json, sys
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
for wanted in json.loads(sys.argv[1]):
    pipeline = FluxPipeline.from_pretrained(wanted["pipeline"])
    if wanted["lora"]:
        pipeline.load_lora_weights(wanted["lora"])
    if wanted["network"]:
        pipeline.transformer = FluxTransformer2DModel.from_pretrained(wanted["network"])
    if wanted["lora"] or wanted["network"]:
        exec(wanted["scheduler"])
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae):
        part.requires_grad_(False)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = pipeline(wanted["prompts"], num_inference_steps=wanted["steps"], guidance_scale=wanted["w"],
                      height=16, width=16, max_sequence_length=12, generator=generators, output_type="pt").images
    torch.save(images, wanted["images"])
assert not any(name.split(".")[0] == "distill" for name in sys.modules)
"""


@torch.no_grad()
def trained(run_folder: Path, prompts: list[str], steps: int) -> Tensor:
    """What the network of a run's last checkpoint draws, [B, 3, H, W] in [0, 1]."""
    path = read_run(run_folder).model.pretrained_model_name_or_path
    teacher = load_teacher(path, parts=("network", "text", "vae"), max_tokens=12).at_resolution(PIXELS)
    student = build(read_run(run_folder).student).networks(teacher, keep_teacher=False)["student"]
    _, weights = read_weights(checkpoints_of(run_folder), "student", "latest", True)
    assert not teacher.network.load_state_dict(dict(weights), strict=False).unexpected_keys
    teacher.network.requires_grad_(False)
    x = torch.stack([torch.randn(CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    times, c = make_times("trailing", 1000, steps), teacher.encode(prompts) | {"guidance": torch.full((2,), W)}
    *_, (_, latents) = solve(student, teacher.schedule, x, times, c, "ddim")
    return teacher.decode(latents) / 2 + 0.5


def scheduler_line(card: str) -> str:
    """What a card says to make the scheduler of, with its import."""
    (line,) = {line for line in card.splitlines() if line.startswith("pipeline.scheduler = ")}
    return f"from diffusers import FlowMatchEulerDiscreteScheduler\n{line}"


def test_what_is_exported_is_drawn_by_diffusers_alone_at_the_guidance_that_it_learned(
    common: list[str], tmp_path: Path
) -> None:
    """LoRAs by diffusers' names and folded for ComfyUI, a whole network, a whole pipeline, and w built in."""
    base, prompts, steps = common[0].split("=", 1)[1], ["two owls", "a boat"], 4
    lora = run(common, tmp_path / "lora", *METHODS["mse"])
    full = run(common, tmp_path / "full", *METHODS["mse"], *FULL)
    first, second, third = tmp_path / "l", tmp_path / "f", tmp_path / "b"
    first.mkdir()
    export = write_student(first, lora, "l", formats=["diffusers", "peft", "comfyui", "kohya", "pipeline"])
    card = write_card(first, export).read_text()
    assert export.guidance_scale == W and f"guidance_scale={W}" in card
    assert "a shift of 1.58308" in card and f"CFG scale 1, and {W:g} for the model's own input of guidance" in card
    export_run(full, second, formats=["transformer", "pipeline"])
    export_run(full, third, formats=["pipeline"], guidance=W)
    pinned = json.loads((second / "scheduler/scheduler_config.json").read_text())
    assert not pinned["use_dynamic_shifting"] and pinned["shift"] == pytest.approx(1.5831, abs=1e-4)
    file = first / "comfyui/l.safetensors"
    ways = [
        (lora, {"pipeline": base, "lora": str(first), "network": "", "w": W}),
        (lora, {"pipeline": base, "lora": str(file), "network": "", "w": W}),
        (lora, {"pipeline": str(first), "lora": "", "network": "", "w": W}),
        (full, {"pipeline": base, "lora": "", "network": str(second / "transformer"), "w": W}),
        (full, {"pipeline": str(second), "lora": "", "network": "", "w": W}),
        (full, {"pipeline": str(third), "lora": "", "network": "", "w": 1.0}),
    ]
    usual = {"scheduler": scheduler_line(card), "prompts": prompts, "steps": steps}
    wanted = [given | usual | {"images": f"{tmp_path}/{i}.pt"} for i, (_, given) in enumerate(ways)]
    subprocess.run([sys.executable, "-c", DRAWS, json.dumps(wanted)], check=True, cwd=tmp_path)
    expected = {folder: trained(folder, prompts, steps) for folder in (lora, full)}
    for i, (folder, _) in enumerate(ways):
        drawn = torch.load(tmp_path / f"{i}.pt")
        assert float((drawn - expected[folder]).abs().max()) <= 1e-4, ways[i]
    assert float((expected[lora] - expected[full]).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match="a LoRA leaves the model its input of guidance"):
        export_run(lora, tmp_path / "w", formats=["diffusers"], guidance=W)


def test_sample_takes_the_guidance_that_a_student_learned(common: list[str], tmp_path: Path) -> None:
    folder = run(common, tmp_path / "run", *METHODS["lcm"])
    export_run(folder, tmp_path / "export")
    size = f"model.resolution={PIXELS}"
    for name, given, w in (
        ("export", [common[0], size, f"lora={tmp_path}/export"], W),
        ("run", [f"run={folder}"], W),
        ("teacher", [common[0], size], 7.5),
        ("set", [f"run={folder}", "guidance=2"], 2.0),
    ):
        out = tmp_path / f"pictures-{name}"
        more = ["prompts=[snow]", f"output_dir={out}", "steps=2"]
        sample.main(load("sample", SampleSettings, [*given, *more]))
        (drawn,) = json.loads((out / "pictures.json").read_text())
        assert drawn["guidance"] == w and (out / drawn["file"]).is_file()


def test_a_distilled_teacher_is_refused_unless_that_is_meant(common: list[str], tmp_path: Path) -> None:
    schnell = save_tiny_flux(tmp_path / "schnell", guidance_embeds=False)
    given = [
        f"model.pretrained_model_name_or_path={schnell}",
        *common[1:3],
        f"data.store={tmp_path}/store",
        *common[4:6],
    ]
    with pytest.raises(ConfigError, match="it is a student already; take the model .* set model.allow_distilled=true"):
        make_trajectories.main(load("train", TrainSettings, [*given, "data.guidance=3.5"]))
    given += ["model.allow_distilled=true"]
    with pytest.raises(ConfigError, match="takes no guidance, set data.guidance=1"):
        make_trajectories.main(load("train", TrainSettings, [*given, "data.guidance=3.5"]))
    make_trajectories.main(load("train", TrainSettings, [*given, "data.guidance=1", "model.max_tokens=12"]))
