"""Flow matching through the commands: from pipelines that diffusers has saved to pictures that diffusers draws.

The last step is a process that does not import this project, and what it draws is what the trained networks draw. The
tiny pipelines are unlike the published ones in every number; guidance is an input of FLUX.1's network alone.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from distill.commands import evaluate, sample, train
from distill.commands import trajectories as make_trajectories
from distill.config.loading import ConfigError, build, load
from distill.config.settings import EvaluateSettings, SampleSettings, TrainSettings
from distill.data.reader import open_store
from distill.diffusion.guidance import guided
from distill.diffusion.solver import make_times, solve
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.training.card import write_card
from distill.training.checkpoint import read_weights
from distill.training.export import export_run, write_student
from distill.training.run import checkpoints_of, read_run
from tests.evaluation.test_scores import TINY
from tests.forked import python
from tests.tiny import CHANNELS, SHIFT, TOKENS, save_tiny
from tests.tiny_flux import PIXELS, save_tiny_flux
from tests.tiny_qwen import SIDE, save, tiny_klein, tiny_z_image

PROMPTS = ["a red boat", "two owls", "a bridge at night", "snow"]
W = 3.5  # of FLUX.1
SIZES = ["global_batch_size=4", "lora_rank=2", "lora_alpha=3", "max_train_steps=2", "checkpointing_steps=2"]
SIZES += ["lr_warmup_steps=0", "learning_rate=0.01", "mixed_precision=no", "dataloader_num_workers=0", "log_every=1"]
LIGHTNING = ["method.teacher_steps=4", "method.student_steps=2"]
CONDITIONAL = ["method=lightning_adversarial", *LIGHTNING, "networks.discriminator.conditional=true"]
LCM = ["method=lcm", "method.skip=250"]
MLCM = ["method=mlcm", "method.stages=[{segments: 2, skip: 250, iterations: 2, learning_rate: 0.01}]"]
MSE = ["method=lightning_mse", *LIGHTNING]
GAME = ["method=lightning_adversarial", *LIGHTNING]
PLAIN, GUIDED = ["student=full_unguided"], ["student=full"]


@dataclass(frozen=True)
class Kind:
    """A family as these tests take it through the commands.

    Args:
        save: writes its tiny pipeline to a folder, and returns its path.
        settings: of all its commands.
        runs: what it trains, by name.
        side: of its pictures, as its pipeline has to be called; None: its own.
        max_tokens: of a prompt.
    """

    save: Callable[[Path], str]
    settings: tuple[str, ...]
    runs: dict[str, list[str]]
    side: int | None = None
    max_tokens: int | None = None
    samples: int = 8

    def teacher(self, path: str, *parts: str) -> Teacher:
        return load_teacher(path, parts=parts, max_tokens=self.max_tokens).at_resolution(self.side)


def both(methods: dict[str, list[str]], full: list[str]) -> dict[str, list[str]]:
    """Each method for a LoRA and for a full student."""
    return methods | {f"{name}, full": [*how, *full] for name, how in methods.items()}


_W = [f"method.guidance={W}"]
_QWEN = {"lcm": LCM, "mlcm, full": [*MLCM, *PLAIN], "conditional": CONDITIONAL}
_QWEN_SETTINGS = (f"model.resolution={SIDE}", "data.guidance=5", "gradient_checkpointing=false", "data.num_samples=4")
KINDS = {
    "sd3": Kind(
        lambda folder: save_tiny(folder, "sd3"),
        ("data.guidance=5",),
        both({"lcm": LCM, "mlcm": MLCM, "mse": MSE, "game": GAME,
              "conditional": [*CONDITIONAL, "networks.discriminator.rank=2"]}, PLAIN),
    ),
    "flux": Kind(
        save_tiny_flux,
        (f"model.resolution={PIXELS}", f"data.guidance={W}", "model.max_tokens=12"),
        both({"lcm": LCM, "mlcm": MLCM, "mse": [*MSE, *_W], "game": [*GAME, *_W, "networks=adapters"],
              "conditional": [*CONDITIONAL, *_W]}, GUIDED),
        side=PIXELS,
        max_tokens=12,
    ),
    "flux2": Kind(lambda folder: save(tiny_klein(), folder), _QWEN_SETTINGS, _QWEN, side=SIDE),
    "z_image": Kind(lambda folder: save(tiny_z_image(), folder), _QWEN_SETTINGS, _QWEN, side=SIDE),
}  # fmt: skip
RUNS = [(family, name) for family, kind in KINDS.items() for name in kind.runs]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flow")


@cache
def given(place: Path, family: str) -> dict[str, str]:
    """Settings of a tiny teacher whose store is written."""
    folder = place / family
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    settings = {
        "model.pretrained_model_name_or_path": KINDS[family].save(folder / "teacher"),
        "data.prompts": f"{folder}/prompts.txt",
        "data.store": f"{folder}/store",
        "data.num_samples": "8",
        "data.solver_steps": "4",
    }
    settings |= dict(one.split("=", 1) for one in KINDS[family].settings)
    make_trajectories.main(load("train", TrainSettings, lines(settings)))
    return settings


def lines(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def teacher_of(place: Path, family: str) -> str:
    return given(place, family)["model.pretrained_model_name_or_path"]


@cache
def run(place: Path, family: str, name: str) -> Path:
    folder = place / family / name
    how = [*lines(given(place, family)), *SIZES, f"output_dir={folder}", *KINDS[family].runs[name]]
    train.main(load("train", TrainSettings, how))
    return folder


# --- stores ---


@pytest.mark.parametrize("family", KINDS)
def test_a_store_says_its_shift_and_keeps_texts_in_bfloat16(place: Path, family: str) -> None:
    index = open_store(given(place, family)["data.store"]).index
    shifts = {"sd3": SHIFT, "flux": 1.5831, "flux2": 4.946, "z_image": 3.0}
    states = {"sd3": (CHANNELS, 6, 6), "flux": (CHANNELS, 8, 8), "flux2": (12, 6, 6), "z_image": (5, 12, 12)}
    assert index.shift == pytest.approx(shifts[family], abs=1e-3)
    assert index.shapes["states"] == (5, *states[family])
    kinds = {name: spec.dtype for name, spec in index.layout.tensors.items() if name.startswith("conditioning.")}
    assert kinds.pop("conditioning.encoder_hidden_states") == torch.bfloat16
    assert set(kinds.values()) == {"flux2": set(), "z_image": {torch.bool}}.get(family, {torch.bfloat16})
    if family == "sd3":
        assert index.layout.tensors["conditioning.encoder_hidden_states"].shape == (TOKENS + 256, 40)


def test_a_store_of_another_shift_is_refused_with_both(place: Path, tmp_path: Path) -> None:
    settings = lines(given(place, "sd3") | {"model.shift": "4", "output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=f"shift is {SHIFT} in the store and 4.0 in the run.*set model.shift={SHIFT}"):
        train.main(load("train", TrainSettings, [*settings, *SIZES, *LCM]))


def test_a_store_of_flux_holds_its_one_pass_at_its_guidance(place: Path) -> None:
    store = open_store(given(place, "flux")["data.store"])
    assert store.unconditional == {} and store.index.guidance == W
    teacher = KINDS["flux"].teacher(teacher_of(place, "flux"), "network", "text")
    one = store.read(0, tuple(range(5)))
    text = {name: x[None].float() for name, x in one.conditioning.items()}
    ends = []
    for w in (W, 1.0):
        follow = guided(teacher.denoiser(), teacher.unconditional(), w)
        with torch.no_grad():
            times = make_times("trailing", 1000, 4)
            *_, (_, end) = solve(follow, teacher.schedule, one.states[:1].float(), times, text, "ddim")
        ends.append(end)
    torch.testing.assert_close(one.states[-1:].float(), ends[0], atol=0.02, rtol=0)  # stored in half precision
    assert (ends[1] - ends[0]).abs().max() > 0.05


# --- training ---


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_every_method_trains(place: Path, family: str, name: str) -> None:
    rows = [json.loads(line) for line in (run(place, family, name) / "metrics.jsonl").read_text().splitlines()]
    losses = [value for row in rows for key, value in row.items() if key.endswith("loss")]
    assert len(losses) >= 2 and all(math.isfinite(loss) and loss != 0 for loss in losses)


def test_training_opens_no_text_encoder_and_no_autoencoder(place: Path, tmp_path: Path) -> None:
    """A T5 alone would take 9.5 GB on each rank."""
    shutil.copytree(teacher_of(place, "sd3"), tmp_path / "teacher")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        for file in (tmp_path / "teacher" / part).glob("*.safetensors"):
            file.unlink()
    moved = {"model.pretrained_model_name_or_path": f"{tmp_path}/teacher", "output_dir": f"{tmp_path}/run"}
    train.main(load("train", TrainSettings, [*lines(given(place, "sd3") | moved), *SIZES, *LCM]))
    assert (tmp_path / "run" / "DONE").is_file()


def test_a_distilled_teacher_is_refused_unless_that_is_meant(place: Path, tmp_path: Path) -> None:
    schnell = save_tiny_flux(tmp_path / "schnell", guidance_embeds=False)
    settings = given(place, "flux") | {
        "data.store": f"{tmp_path}/store",
        "model.pretrained_model_name_or_path": schnell,
    }
    with pytest.raises(ConfigError, match="it is a student already; take the model .* set model.allow_distilled=true"):
        make_trajectories.main(load("train", TrainSettings, lines(settings)))
    settings["model.allow_distilled"] = "true"
    with pytest.raises(ConfigError, match="takes no guidance, set data.guidance=1"):
        make_trajectories.main(load("train", TrainSettings, lines(settings)))
    make_trajectories.main(load("train", TrainSettings, lines(settings | {"data.guidance": "1"})))


# --- exports ---

DRAWS = """
import json, sys
import diffusers, torch
for wanted in json.loads(sys.argv[1]):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(wanted["pipeline"])
    if wanted["lora"]:
        pipeline.load_lora_weights(wanted["lora"], weight_name=wanted["file"])
    if wanted["network"]:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(wanted["network"])
    if wanted["scheduler"]:
        exec(wanted["scheduler"])
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae):
        part.requires_grad_(False)
    x = torch.load(wanted["noise"])
    if hasattr(pipeline, "_pack_latents") and wanted["packed"]:
        x = pipeline._pack_latents(x, *x.shape)
    images = pipeline(prompt=wanted["prompts"], num_inference_steps=4, guidance_scale=wanted["w"], latents=x,
                      output_type="pt", **wanted["call"]).images
    torch.save(images, wanted["images"])
assert not any(name.split(".")[0] == "distill" for name in sys.modules)
"""


@dataclass
class Drawn:
    """What is to be drawn by diffusers alone, and what it has to be."""

    jobs: list[dict[str, Any]] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)

    def add(self, expected: Tensor, always: dict[str, Any], **job: Any) -> None:
        self.jobs.append({"lora": "", "file": "", "network": "", "scheduler": ""} | always | job)
        self.expected.append(expected)


@torch.no_grad()
def trained(family: str, run_folder: Path, prompts: list[str], x: Tensor) -> Tensor:
    """What the network of a run's last checkpoint draws in 4 steps, [B, 3, H, W] in [0, 1]."""
    settings = read_run(run_folder)
    teacher = KINDS[family].teacher(settings.model.pretrained_model_name_or_path, "network", "text", "vae")
    student = build(settings.student).networks(teacher, keep_teacher=False)["student"]
    _, weights = read_weights(checkpoints_of(run_folder), "student", "latest", True)
    teacher.network.requires_grad_(False)
    assert not teacher.network.load_state_dict(dict(weights), strict=False).unexpected_keys
    c, times = teacher.encode(prompts), make_times("trailing", teacher.schedule.T, 4)
    if teacher.takes_guidance:
        c = {**c, "guidance": torch.full((len(x),), W)}
    *_, (_, latents) = solve(student, teacher.schedule, x, times, c, "ddim")
    return teacher.decode(latents) / 2 + 0.5


def scheduler_line(card: str) -> str:
    """What a card says to make the scheduler of, with its import."""
    (line,) = {line for line in card.splitlines() if line.startswith("pipeline.scheduler = ")}
    return f"from diffusers import FlowMatchEulerDiscreteScheduler\n{line}"


def test_what_is_exported_is_drawn_by_diffusers_alone(place: Path, tmp_path: Path) -> None:
    """Of each family LoRAs by diffusers' names and folded for ComfyUI, a network, a pipeline; of FLUX.1 w built in."""
    prompts, drawn = ["two owls", "a boat"], Drawn()
    for family, kind in KINDS.items():
        teacher = kind.teacher(teacher_of(place, family))
        x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        torch.save(x, tmp_path / f"{family}.pt")
        names = {"sd3": ("mlcm", "mlcm, full"), "flux": ("mse", "mse, full")}.get(family, ("lcm", "mlcm, full"))
        lora, full = (run(place, family, name) for name in names)
        of_lora, of_full = (trained(family, folder, prompts, x) for folder in (lora, full))
        assert (of_lora - of_full).abs().max() > 1e-3
        first, second = tmp_path / family / "l", tmp_path / family / "f"
        first.mkdir(parents=True)
        formats = ["diffusers", "peft", "comfyui", "pipeline", *(["kohya"] if family == "flux" else [])]
        export = write_student(first, lora, "l", formats=formats)
        card = write_card(first, export).read_text()
        export_run(full, second, formats=["transformer", "pipeline"])
        call = {} if kind.side is None else {"height": kind.side, "width": kind.side}
        call |= {"sigmas": [1, 0.75, 0.5, 0.25]} if family == "sd3" else {}
        call |= {"max_sequence_length": kind.max_tokens} if kind.max_tokens else {}
        always = {"pipeline": teacher_of(place, family), "prompts": prompts, "noise": f"{tmp_path}/{family}.pt"}
        always |= {"call": call, "packed": family == "flux", "scheduler": scheduler_line(card)}
        always |= {"w": teacher.family.guidance.to_pipeline(export.guidance_scale)}
        drawn.add(of_lora, always, lora=str(first), file="pytorch_lora_weights.safetensors")
        drawn.add(of_lora, always, lora=str(first / "comfyui"), file="l.safetensors")
        drawn.add(of_full, always, network=str(second / "transformer"))
        drawn.add(of_lora, always, pipeline=str(first), scheduler="")
        drawn.add(of_full, always, pipeline=str(second), scheduler="")
        if family == "flux":
            assert export.guidance_scale == W and f"guidance_scale={W}" in card
            assert f"CFG scale 1, and {W:g} for the model's own input of guidance" in card
            pinned = json.loads((second / "scheduler/scheduler_config.json").read_text())
            assert not pinned["use_dynamic_shifting"] and pinned["shift"] == pytest.approx(1.5831, abs=1e-4)
            export_run(full, tmp_path / "built", formats=["pipeline"], guidance=W)
            drawn.add(of_full, always, pipeline=f"{tmp_path}/built", scheduler="", w=1.0)
            with pytest.raises(ConfigError, match="a LoRA leaves the model its input of guidance"):
                export_run(lora, tmp_path / "w", formats=["diffusers"], guidance=W)
    jobs = [job | {"images": f"{tmp_path}/{i}.pt"} for i, job in enumerate(drawn.jobs)]
    subprocess.run([python(), "-c", DRAWS, json.dumps(jobs)], check=True, cwd=tmp_path)
    for job, wanted in zip(jobs, drawn.expected, strict=True):
        assert float((torch.load(job["images"]) - wanted).abs().max()) <= 1e-4, job


# --- samples and reports ---


@pytest.mark.parametrize("family", KINDS)
def test_sample_draws_a_student_and_its_teacher(place: Path, family: str, tmp_path: Path) -> None:
    """At the guidance that a student of FLUX.1 has learned, unless another one is set."""
    folder = run(place, family, "lcm")
    export_run(folder, tmp_path / "export")
    settings = given(place, family)
    teacher = [f"{key}={settings[key]}" for key in settings if key.startswith("model.p") or key == "model.resolution"]
    ways = {"export": [*teacher, f"lora={tmp_path}/export"], "run": [f"run={folder}"], "teacher": teacher}
    ways |= {"set": [f"run={folder}", "guidance=2"]} if family == "flux" else {}
    for name, how in ways.items():
        out = tmp_path / f"pictures-{name}"
        sample.main(load("sample", SampleSettings, [*how, "prompts=[snow]", f"output_dir={out}", "steps=2"]))
        (drawn,) = json.loads((out / "pictures.json").read_text())
        assert (drawn["steps"], drawn["sampler"]) == (2, "ddim") and (out / drawn["file"]).is_file()
        if family == "flux":
            assert drawn["guidance"] == {"teacher": 7.5, "set": 2.0}.get(name, W)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_evaluate_measures_a_student_beside_its_teacher(place: Path, family: str, tmp_path: Path) -> None:
    """By what needs no real pictures: prompts, the teacher's own pictures, and stored ends."""
    settings = given(place, family)
    (tmp_path / "tiny-flow.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-flow.json")
    torch.save(open_clip.create_model("tiny-flow").state_dict(), tmp_path / "clip.pt")
    how = ["protocol=coco2014-10k", f"protocol.prompts={settings['data.prompts']}", "n=2", "protocol.clip=tiny-flow"]
    how += ["protocol.metrics=[clip_score]", f"weights.clip={tmp_path}/clip.pt"]
    how += [f"student={run(place, family, 'lcm')}", f"store={settings['data.store']}", "store_samples=4", "steps=[2]"]
    how += ["teacher_steps=2", f"output_dir={tmp_path}/out"]
    if KINDS[family].side:
        how.append(f"protocol.resolution={KINDS[family].side}")
    evaluate.main(load("evaluate", EvaluateSettings, how))
    rows = json.loads((tmp_path / "out" / "report" / "metrics.json").read_text())
    student = next(row for row in rows if row["model"] == "student")
    assert student["nfe"] == 2 and student["guidance"] == (W if family == "flux" else 1.0)
    teacher = next(row for row in rows if row["model"] == "teacher")
    assert teacher["nfe"] == (2 if family == "flux" else 4)
    for row in (student, teacher):
        assert row["stored_consistency"] > 0 and row["stored_cosine"] <= 1
        assert math.isfinite(row["clip_score"])
    assert math.isfinite(student["teacher_consistency"]) and (tmp_path / "out/report/index.html").is_file()


def test_a_negative_prompt_for_klein_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    path = f"model.pretrained_model_name_or_path={teacher_of(place, 'flux2')}"
    how = [path, "prompts=[snow]", "steps=1", "negative_prompt=blurry", f"output_dir={tmp_path}/out"]
    with pytest.raises(ConfigError, match="negative_prompt: a Flux2KleinPipeline takes none") as caught:
        sample.main(load("sample", SampleSettings, how))
    assert "\n" not in str(caught.value)
