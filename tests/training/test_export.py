"""An export: files that plain programs draw the student from, a card that is true, and nobody's files lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

from distill.commands.export import main
from distill.config.loading import ConfigError, build, load
from distill.config.settings import ExportSettings, ModelSettings, TrainSettings
from distill.diffusion.prediction import Prediction
from distill.diffusion.random import starting_noise
from distill.evaluation.pipelines import load_pipeline, sampling_of, use_sampler
from distill.methods.sampling import Sampling, sample
from distill.models.exported import open_export, read_export
from distill.models.families.loading import load_teacher
from distill.models.folder import stored_tensors, weights_hash
from distill.models.lora import LORA_FILE
from distill.training.assembly import settled
from distill.training.card import base_licence
from distill.training.checkpoint import Checkpoints
from distill.training.engine import EngineSettings
from distill.training.export import export_run, published, require_login
from distill.training.run import checkpoints_of, open_run, read_run
from distill.training.trained_network import TrainingRecipe
from tests.tiny import FAMILIES, save_tiny

PROMPTS, SEEDS = ["a cat", "two dogs"], [3, 10_000_000]
LORA, LEARNED_W = ("diffusers", "peft", "kohya"), (2.0, 11.0)


@dataclass(frozen=True)
class Trained:
    """A finished run of a tiny teacher, and what its student draws in our own sampler."""

    folder: Path
    teacher: str
    family: str
    kind: str

    @property
    def guidances(self) -> tuple[float, ...]:
        return LEARNED_W if self.kind == "full" else (1.0,)

    def export(self, folder: Path, *overrides: str) -> Path:
        given = [f"run={self.folder}", f"output_dir={folder}", *overrides]
        main(load("export", ExportSettings, given))
        return folder

    def pictures(self, w: float) -> Tensor:
        """[B, 3, H, W] in [0, 1], in the student's own number of steps, or in four."""
        settings = read_run(self.folder)
        teacher = load_teacher(self.teacher, parts=("network", "text", "vae"))
        sampling = build(settings.method, schedule=teacher.schedule).sampling
        student = build(settings.student).networks(teacher, keep_teacher=False)["student"]
        teacher.network.load_state_dict(torch.load(self.folder / "weights.pt"), strict=False)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        x = starting_noise(generators, teacher.latent_shape)
        conditioning = teacher.encode(PROMPTS) | {"guidance": torch.full((len(PROMPTS),), w)}
        times = sampling.times(teacher.schedule.T, 4)
        how = sampling.sampler, generators, sampling.gamma
        latents = sample(student, teacher.schedule, x, times, conditioning, *how)
        return (teacher.decode(latents) + 1) / 2


NOISED = ("method=lcm_noised", f"method.w_min={LEARNED_W[0]}", f"method.w_max={LEARNED_W[1]}")


def a_run(
    folder: Path, family: str, kind: str, *overrides: str, method: Sequence[str] = NOISED, start: Path | None = None
) -> Trained:
    """A run whose checkpoint holds a student far from its teacher, and from the export that it started from."""
    teacher = save_tiny(folder / "teacher", family)
    starts = {} if start is None else {"start": open_export(start)}
    settings = load(
        "train",
        TrainSettings,
        [
            f"student={kind}",
            *method,
            f"model.pretrained_model_name_or_path={teacher}",
            f"data.store={folder}/store",
            f"output_dir={folder}/run",
            "lora_rank=4",
            "lora_alpha=2.5",
            "validation_prompts=[snow, a red boat]",
            *([] if start is None else [f"start={start}"]),
            *overrides,
        ],
    )
    settings = settled(settings, starts)
    run = open_run(settings)
    networks = build(settings.student).networks(load_teacher(teacher), settings.seed, False, starts.get("start"))
    engine = EngineSettings().start()
    plan = TrainingRecipe(torch.optim.SGD, ema_decay=settings.ema_decay)
    engine.prepare({"student": networks["student"]}, {"student": plan})  # an average is kept of how it starts
    weights = {n: p for n, p in networks["student"].module.named_parameters() if p.requires_grad}
    random = torch.Generator().manual_seed(1)
    for name, p in weights.items():
        far = 0.3 if ".lora_" in name or "cond_proj" in name else 0.1 * float(p.detach().std().nan_to_num())
        p.data.add_(far * torch.randn(p.shape, generator=random))
    Checkpoints(checkpoints_of(run)).save(engine, 3)
    engine.release()
    torch.save({name: p.detach() for name, p in weights.items()}, run / "weights.pt")
    return Trained(run, teacher, family, kind)


Runs = Callable[[str, str], Trained]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return cache(lambda family, kind: a_run(tmp_path_factory.mktemp(family), family, kind))


@pytest.fixture(params=[(f, k) for f in FAMILIES for k in ("lora", "full")], ids="-".join)
def trained(request: Any, runs: Runs) -> Trained:
    return runs(*request.param)


@pytest.fixture(params=[("sd15", "lora"), ("sdxl", "full")], ids="-".join)
def either(request: Any, runs: Runs) -> Trained:
    return runs(*request.param)


@pytest.fixture
def lora(runs: Runs) -> Trained:
    return runs("sd15", "lora")


@pytest.fixture
def full(runs: Runs) -> Trained:
    return runs("sd15", "full")


def drawn(pipeline: Any, w: float, steps: int = 4, output_type: str = "pt") -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=PROMPTS, num_inference_steps=steps, guidance_scale=w, generator=generators, output_type=output_type
    ).images


def dtypes(folder: Path) -> set[torch.dtype]:
    (file,) = folder.glob("*.safetensors")
    return {tensor.dtype for _, tensor in stored_tensors([file])}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- what the files draw ------------------------------------------------------------------------------------------


def test_the_pipeline_draws_what_our_sampler_draws(trained: Trained, tmp_path: Path) -> None:
    folder = trained.export(tmp_path / "a", "formats=[pipeline]", "dtype=float32", "card_prompts=[]")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    ours = [trained.pictures(w) for w in trained.guidances]
    for w, expected in zip(trained.guidances, ours, strict=True):
        torch.testing.assert_close(drawn(pipeline, w), expected, rtol=0, atol=1e-4)
    assert len(ours) == 1 or (ours[0] - ours[1]).abs().max() > 0.01  # told guidance matters

    teacher = DiffusionPipeline.from_pretrained(trained.teacher)
    teacher.scheduler = pipeline.scheduler
    assert (drawn(teacher, 1.0) - ours[0]).abs().max() > 0.02
    assert pipeline.vae.state_dict().keys() == teacher.vae.state_dict().keys()
    parts = ("vae", "text_encoder") + (("text_encoder_2",) if trained.family == "sdxl" else ())
    for part in parts:
        ours_, theirs = (getattr(p, part).state_dict() for p in (pipeline, teacher))
        assert all(torch.equal(ours_[name], theirs[name]) for name in theirs)


def test_every_block_of_code_on_the_card_draws_the_student(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = ["unet", "pipeline"] + ([*LORA, "checkpoint"] if trained.kind == "lora" else [])
    folder = trained.export(tmp_path / "a", f"formats=[{','.join(formats)}]", "dtype=float32", "card_prompts=[]")
    (tmp_path / "teacher").symlink_to(trained.teacher)  # by the names on the card
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == len(formats)
    w = 7.5 if trained.kind == "full" else 1.0
    expected = trained.pictures(w)
    for block in blocks:
        assert f"num_inference_steps=4, guidance_scale={w})" in block
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["image"].size == expected.shape[:1:-1]
        torch.testing.assert_close(drawn(names["pipeline"], w), expected, rtol=0, atol=1e-4)


def test_a_pipeline_of_half_the_size_draws_as_it_is_loaded(either: Trained, tmp_path: Path) -> None:
    folder = either.export(tmp_path / "a", "formats=[pipeline]", "card_prompts=[]")
    w = either.guidances[0]
    assert (drawn(DiffusionPipeline.from_pretrained(folder), w) - either.pictures(w)).abs().mean() < 1e-3
    assert dtypes(folder / "unet") == {torch.float16} and dtypes(folder / "vae") == {torch.float32}


def test_the_pipeline_of_a_teacher_of_half_the_size_draws_as_it_is_loaded(tmp_path: Path) -> None:
    run = a_run(tmp_path, "sdxl", "lora")
    DiffusionPipeline.from_pretrained(run.teacher).to(torch.float16).save_pretrained(run.teacher)
    assert dtypes(Path(run.teacher) / "text_encoder") == {torch.float16}
    folder = run.export(tmp_path / "a", "formats=[pipeline]", "card_prompts=[]")
    pictures = drawn(DiffusionPipeline.from_pretrained(folder), 1.0)
    assert (pictures - run.pictures(1.0)).abs().mean() < 1e-3


@pytest.mark.parametrize(
    "chosen", [["diffusers"], ["kohya"], ["peft"], ["unet"], ["pipeline"], ["checkpoint"]], ids="".join
)
def test_the_samples_are_drawn_from_whatever_was_exported(lora: Trained, chosen: list[str], tmp_path: Path) -> None:
    everything = lora.export(tmp_path / "all", f"formats=[{','.join(LORA)}]", "dtype=float32")
    folder = lora.export(tmp_path / "a", f"formats=[{chosen[0]}]", "dtype=float32", "card_prompts=[snow, a red boat]")
    a, b = (Image.open(f / "samples.png").convert("RGB") for f in (folder, everything))
    assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 2


def test_the_average_is_exported_where_one_is_kept(tmp_path: Path) -> None:
    run = a_run(tmp_path, "sd15", "full", "ema_decay=0.9")
    start = UNet2DConditionModel.from_pretrained(run.teacher, subfolder="unet").state_dict()
    last = torch.load(run.folder / "weights.pt")
    for use_ema, words, expected in ((True, "0.9, exported", start), (False, "0.9, left out", last)):
        folder = run.export(tmp_path / f"{use_ema}", f"use_ema={use_ema}", "dtype=float32", "card_prompts=[]")
        exported = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
        assert all(torch.equal(exported[name], weight) for name, weight in expected.items())
        assert f"| EMA | {words} |" in (folder / "README.md").read_text()


# ---- students of few, fixed steps, and of other predictions ---------------------------------------------------------

DDIM, EULER = ("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler)


def lightning(steps: int, x_T: str) -> list[str]:
    return ["method=lightning_mse", f"method.student_steps={steps}", f"method.teacher_steps={2 * steps}"] + [
        f"method.x_T={x_T}",
        "method.source=noised",
    ]


@pytest.mark.parametrize(
    ("family", "kind", "steps", "x_T", "how", "overrides"),
    [
        ("sd15", "lora", 2, "noise", DDIM, ()),
        ("sdxl", "lora", 4, "scaled", EULER, ()),
        ("sd15", "full_unguided", 2, "scaled", EULER, ("student.prediction=v_prediction",)),
        ("sd15", "full_unguided", 1, "noise", DDIM, ("student.prediction=sample",)),
    ],
)
def test_every_file_draws_as_its_method_says(
    family: str,
    kind: str,
    steps: int,
    x_T: str,
    how: tuple[str, type],
    overrides: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The code on the card, the pipeline's folder, and our own loader by what the export says of itself."""
    run = a_run(tmp_path, family, kind, *overrides, method=lightning(steps, x_T))
    formats = ["diffusers" if kind == "lora" else "unet", "pipeline"]
    folder = run.export(tmp_path / "a", f"formats=[{','.join(formats)}]", "dtype=float32", "card_prompts=[snow]")
    expected = run.pictures(1.0)
    sampler, scheduler = how
    assert sampling_of(folder) == Sampling(sampler, "trailing", steps)

    monkeypatch.chdir(tmp_path)
    card = (folder / "README.md").read_text()
    count = f"{steps} {'step' if steps == 1 else 'steps'}"
    assert f"It generates in exactly {count}." in card and f"diffusers pipeline in {count}, `guidance_scale=1`" in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == len(formats)
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        assert type(names["pipeline"].scheduler) is scheduler
        torch.testing.assert_close(drawn(names["pipeline"], 1.0, steps), expected, rtol=0, atol=2e-5)
    assert torch.equal(drawn(names["pipeline"], 0.0, steps), drawn(names["pipeline"], 1.0, steps))  # both are none
    assert (expected[0] - expected[1]).abs().max() > 0.05

    loaded = load_pipeline(run.teacher, folder)
    torch.testing.assert_close(drawn(loaded, 1.0, steps), expected, rtol=0, atol=2e-5)
    use_sampler(loaded, "euler" if sampler == "ddim" else "ddim", "trailing")  # the other start is another picture
    assert (drawn(loaded, 1.0, steps) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("x_T", ["noise", "scaled"])
def test_one_step_of_a_network_of_clean_data_is_what_it_says(x_T: str, tmp_path: Path) -> None:
    run = a_run(tmp_path, "sd15", "full_unguided", "student.prediction=sample", method=lightning(1, x_T))
    folder = run.export(tmp_path / "a", "formats=[pipeline]", "dtype=float32", "card_prompts=[]")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    said: list[Tensor] = []
    pipeline.unet.register_forward_hook(lambda *args: said.append(args[-1][0]))
    latents = drawn(pipeline, 1.0, 1, output_type="latent")
    assert len(said) == 1 and pipeline.scheduler.config.prediction_type == "sample"
    tolerance = 0 if x_T == "noise" else 1e-5  # Euler's adds x_T, and takes it away again
    torch.testing.assert_close(latents, said[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["lora", "full_unguided"])
def test_a_student_that_started_from_another_is_exported_without_it(kind: str, tmp_path: Path) -> None:
    """Its checkpoint holds all that it trained; a LoRA is relative to the model, not to where it started."""
    first = a_run(tmp_path / "first", "sd15", "lora", method=lightning(4, "noise"))
    start = first.export(tmp_path / "start", "dtype=float32", "card_prompts=[]")
    run = a_run(tmp_path / "second", "sd15", kind, method=lightning(2, "noise"), start=start)
    expected = run.pictures(1.0)
    assert (expected - first.pictures(1.0)).abs().max() > 0.02
    shutil.rmtree(start)
    folder = run.export(tmp_path / "a", "dtype=float32", "card_prompts=[]")
    torch.testing.assert_close(drawn(load_pipeline(run.teacher, folder), 1.0, 2), expected, rtol=0, atol=1e-4)
    assert "| start | start |" in (folder / "README.md").read_text()


def test_what_a_network_predicts_is_handed_on_from_run_to_run(tmp_path: Path) -> None:
    convert = ["student.prediction=sample"]
    first = a_run(tmp_path / "first", "sd15", "full_unguided", *convert, method=lightning(1, "noise"))
    start = first.export(tmp_path / "start", "dtype=float32", "card_prompts=[]")
    run = a_run(tmp_path / "second", "sd15", "full_unguided", method=lightning(1, "noise"), start=start)
    shutil.rmtree(start)
    folder = run.export(tmp_path / "a", "dtype=float32", "card_prompts=[]")
    assert read_export(folder).prediction is Prediction.SAMPLE
    torch.testing.assert_close(drawn(load_pipeline(run.teacher, folder), 1.0, 1), run.pictures(1.0), rtol=0, atol=1e-4)


def test_an_export_of_before_is_drawn_by_lcm(full: Trained, tmp_path: Path) -> None:
    folder = full.export(tmp_path / "a", "card_prompts=[]")
    facts = json.loads((folder / "distill.json").read_text())
    assert (facts.pop("prediction"), facts.pop("sampling")) == (
        "epsilon",
        {"sampler": "lcm", "spacing": "lcm", "steps": None, "gamma": 0.0},
    )
    (folder / "distill.json").write_text(json.dumps(facts))
    assert sampling_of(folder) == Sampling() and read_export(folder).prediction is None
    assert isinstance(load_pipeline(full.teacher, folder).scheduler, LCMScheduler)


# ---- which files ----------------------------------------------------------------------------------------------------


def test_each_student_has_its_usual_formats(lora: Trained, full: Trained, tmp_path: Path) -> None:
    pictures = {"README.md", "distill.json", "samples.png"}
    assert files(lora.export(tmp_path / "l")) == pictures | {
        "pytorch_lora_weights.safetensors",
        "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
        "kohya/l.safetensors",
    }
    assert files(full.export(tmp_path / "f")) == pictures | {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "f" / "unet")
    assert unet.config["time_cond_proj_dim"] == 256


def test_a_format_that_the_student_cannot_give_is_one_line_before_anything(full: Trained, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="^formats: a FullStudent cannot .* 'kohya'; allowed: network, pipeline, checkpoint$"
    ):
        full.export(tmp_path / "deep" / "a", "formats=[unet,kohya]")
    assert not (tmp_path / "deep").exists()


def test_a_guidance_is_built_in_for_programs_that_cannot_give_one(full: Trained, tmp_path: Path) -> None:
    """The unet and the checkpoint at any guidance_scale are the student at the one that was fixed."""
    given = ["formats=[unet,checkpoint]", "dtype=float32", "card_prompts=[]", "guidance=7.5"]
    folder = full.export(tmp_path / "a", *given)
    unets = [UNet2DConditionModel.from_pretrained(folder, subfolder="unet")]
    file = str(folder / "checkpoint" / "a.safetensors")
    unets.append(UNet2DConditionModel.from_single_file(file, config=full.teacher, subfolder="unet"))
    pipeline = load_pipeline(full.teacher)
    use_sampler(pipeline, "lcm", "lcm")
    for unet in unets:
        pipeline.register_modules(unet=unet)
        torch.testing.assert_close(drawn(pipeline, 1.0), full.pictures(7.5), rtol=0, atol=1e-4)
    facts, card = json.loads((folder / "distill.json").read_text()), (folder / "README.md").read_text()
    assert (facts["takes_guidance"], facts["built_in_guidance"], facts["guidance"]) == (False, 7.5, list(LEARNED_W))
    assert "| guidance w built in here | 7.5 |" in card and "guidance_scale=1.0)" in card


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("full", ["formats=[checkpoint]"], "^formats: no program .* guidance=6.5 .this student learned 2 to 11.$"),
        ("full", ["guidance=12"], "^guidance=12 is not what this student learned, which is 2 to 11$"),
        ("lora", ["guidance=7.5"], "^guidance=7.5: this student takes no guidance as an input"),
    ],
)
def test_a_guidance_that_does_not_fit_is_one_line(
    kind: str, given: list[str], message: str, runs: Runs, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        runs("sd15", kind).export(tmp_path / "a", "card_prompts=[]", *given)
    assert not (tmp_path / "a").exists()


def test_the_export_that_sample_makes_is_exact(lora: Trained, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    folder = export_run(lora.folder, tmp_path / "scratch")
    pipeline = DiffusionPipeline.from_pretrained(lora.teacher)
    pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    torch.testing.assert_close(drawn(pipeline, 1.0), lora.pictures(1.0), rtol=0, atol=1e-4)


def test_no_file_tells_of_this_machine(either: Trained, tmp_path: Path) -> None:
    formats = [*LORA, "pipeline"] if either.kind == "lora" else ["pipeline"]
    folder = either.export(tmp_path / "a", f"formats=[{','.join(formats)}]")
    for name in files(folder):
        content = (folder / name).read_bytes()
        assert str(tmp_path).encode() not in content and str(Path(either.teacher).parent).encode() not in content, name


def test_facts_for_machines(full: Trained, tmp_path: Path) -> None:
    facts = json.loads((full.export(tmp_path / "a", "card_prompts=[]") / "distill.json").read_text())
    weights = Path(full.teacher) / "unet" / "diffusion_pytorch_model.safetensors"
    assert facts["base_hash"] == weights_hash(stored_tensors([weights]))
    assert facts["step"] == 3 and facts["guidance"] == list(LEARNED_W) and facts["takes_guidance"] is True
    assert facts["settings"]["method"]["skip"] == 20
    assert facts["files"].keys() == files(tmp_path / "a") - {"distill.json"}


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_header_of_the_card(either: Trained, tmp_path: Path) -> None:
    card = ModelCard.load(either.export(tmp_path / "my-student", "card_prompts=[]") / "README.md")
    assert card.data.base_model == "teacher"
    assert card.data.license == "other" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    lora = either.kind == "lora"
    assert card.data.to_dict()["base_model_relation"] == ("adapter" if lora else "finetune")
    assert ("lora" in card.data.tags) == lora
    assert {"text-to-image", "latent-consistency-distillation"} <= set(card.data.tags)
    assert ("stable-diffusion-xl" in card.data.tags) == (either.family == "sdxl")


def test_the_text_of_the_card(lora: Trained, full: Trained, tmp_path: Path) -> None:
    rows = [{"model": "student", "steps": 4, "guidance": 1.0, "frechet": 0.25, "frechet_se": 0.03}]
    (tmp_path / "metrics.json").write_text(json.dumps(rows))
    folder = lora.export(tmp_path / "a", f"metrics={tmp_path}/metrics.json")
    text, facts = (folder / "README.md").read_text(), json.loads((folder / "distill.json").read_text())
    assert text.count(facts["base_hash"]) == 1 and len(facts["base_hash"]) == 16
    for row in (
        "| method | LCM |",
        "| method.source | noised |",
        "| method.skip | 20 |",
        "| student.rank | 4 |",
        "| student.alpha | 2.5 |",
        "| guidance w learned from (1 is none) | 2 to 11 |",
        "| steps | 3 of 4000 |",
        "| batch size | 96 |",
        "| learning rate | 0.0001, constant_with_warmup, 50 steps of warm-up |",
        "| EMA | none |",
    ):
        assert row in text
    assert "arXiv 2311.05556" in text and "![samples](samples.png)" in text and "0.250 ± 0.030" in text
    assert "kohya/a.safetensors" in text
    picture = Image.open(folder / "samples.png")
    assert picture.width > 2 * 192 and picture.height > 4 * 192

    text = (full.export(tmp_path / "b", "card_prompts=[]") / "README.md").read_text()
    assert "which learned 2 to 11" in text and "samples.png" not in text and "Metrics" not in text


def test_w_of_a_trajectorys_student_is_its_trajectories(tmp_path: Path) -> None:
    run = a_run(tmp_path, "sd15", "full", "model.resolution=32", method=["method=lcm", "data.guidance=3.0"])
    text = (run.export(tmp_path / "a", "card_prompts=[]") / "README.md").read_text()
    assert "guidance_scale=3.0, height=32, width=32)" in text and "| guidance w learned from (1 is none) | 3 |" in text


@pytest.mark.parametrize(
    "header, expected",
    [
        ("license: creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        (
            "license: other\nlicense_name: sai-nc\nlicense_link: https://example.org/licence",
            {"license": "other", "license_name": "sai-nc", "license_link": "https://example.org/licence"},
        ),
        ("tags: [a]", {"license": "other"}),
        ("license: [unclosed", {"license": "other"}),
        (None, {"license": "other"}),
    ],
)
def test_the_licence_is_the_base_models(header: str | None, expected: dict[str, str], tmp_path: Path) -> None:
    if header is not None:
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
    assert base_licence(ModelSettings(pretrained_model_name_or_path=str(tmp_path))) == expected


def test_a_base_model_that_the_hub_does_not_give_has_another_licence() -> None:
    assert base_licence(ModelSettings(pretrained_model_name_or_path="nobody/nothing")) == {"license": "other"}


def test_the_licence_reaches_the_card(tmp_path: Path) -> None:
    run = a_run(tmp_path, "sd15", "lora")
    (Path(run.teacher) / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    card = ModelCard.load(run.export(tmp_path / "a", "card_prompts=[]") / "README.md")
    assert card.data.license == "creativeml-openrail-m"
    assert "That of the base model, `teacher`: creativeml-openrail-m." in card.text


@pytest.mark.parametrize("content", [None, "no JSON", '{"a": 1}', "[1]"])
def test_metrics_that_are_none_are_named(lora: Trained, content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    with pytest.raises((ConfigError, FileNotFoundError), match=r"^metrics=.*m\.json"):
        lora.export(tmp_path / "a", f"metrics={tmp_path}/m.json")
    assert not (tmp_path / "a").exists()


# ---- nobody's files are lost ----------------------------------------------------------------------------------------


def write(folder: Path, **contents: str) -> None:
    for name, content in {"distill": "{}", **contents}.items():
        (folder / f"{name}.json").write_text(content)


def test_what_fails_leaves_nothing_and_the_export_before_it_stays(tmp_path: Path) -> None:
    final = tmp_path / "x" / "a"
    with pytest.raises(KeyboardInterrupt), published(final) as folder:
        write(folder, weights="1")
        raise KeyboardInterrupt
    assert files(tmp_path) == set()
    with published(final) as folder:
        assert folder.parent == final.parent and not final.exists()
        write(folder, weights="1")
    with pytest.raises(RuntimeError), published(final) as folder:
        write(folder, other="2")
        raise RuntimeError
    assert files(tmp_path) == {"x/a/distill.json", "x/a/weights.json"}


def test_an_export_replaces_an_export_and_leftovers_of_a_killed_one(tmp_path: Path) -> None:
    for name in (".a.partial", ".a.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torn").touch()
    for content in ("one", "two"):
        with published(tmp_path / "a") as folder:
            write(folder, **{content: content})
    assert files(tmp_path) == {"a/distill.json", "a/two.json"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "mine.txt").write_text("precious"), "holds an export, but mine.txt is not of it"),
        (lambda f: (f / "weights.json").write_text("edited"), "holds an export, but weights.json was changed since"),
        (lambda f: (f / "distill.json").unlink(), "holds something else than an export"),
        (lambda f: (f / "distill.json").write_text("[]"), "holds something else than an export"),
        (lambda f: (f / "distill.json").write_text("{}"), "holds something else than an export"),
    ],
)
def test_anything_else_is_left_alone(change: Any, message: str, tmp_path: Path) -> None:
    with published(tmp_path / "a") as folder:
        write(folder, weights="1")
    change(tmp_path / "a")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(ConfigError, match=message), published(tmp_path / "a"):
        raise AssertionError("not reached")
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_files_that_appear_while_an_export_is_written_stay(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds something else"), published(tmp_path / "a") as folder:
        write(folder)
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine.txt").touch()
    assert files(tmp_path) == {"a/mine.txt"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match="a is a file"), published(tmp_path / "a"):
        raise AssertionError("not reached")


# ---- the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["me", "me/", "/a", "a/b/c", "me/a b", "me/a--b", "https://huggingface.co/me/a"])
def test_a_wrong_repository_is_one_line_about_the_setting(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^push_to_hub: must be organisation/name, .*, or null$"):
        load("export", ExportSettings, ["run=r", "output_dir=o", f"push_to_hub='{name}'"])


def test_nothing_is_pushed_by_default_and_what_is_pushed_is_private() -> None:
    settings = load("export", ExportSettings, ["run=r", "output_dir=o"])
    assert settings.push_to_hub is None and settings.hub_private is True
    assert load("export", ExportSettings, ["run=r", "output_dir=o", "push_to_hub=me/a.b"]).push_to_hub == "me/a.b"


def test_a_push_without_a_login_ends_before_anything_is_written(
    lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="^push_to_hub=me/a needs a login, .* `hf auth login`$"):
        lora.export(tmp_path / "a", "push_to_hub=me/a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    require_login("me/a")


def test_of_two_exports_into_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    """Each would remove what the other one is about to write; once the first is done, the next may replace it."""
    with published(tmp_path / "a") as folder:
        (folder / "distill.json").write_text("{}")
        with pytest.raises(ConfigError, match="another export is being written there; wait for it"):
            with published(tmp_path / "a"):
                pass
        assert folder.is_dir()
    with published(tmp_path / "a") as folder:
        (folder / "distill.json").write_text('{"step": 2}')
    assert json.loads((tmp_path / "a" / "distill.json").read_text())["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("name", "says"), [("x" * 300, "name too long"), ("file/a", "file is a file")])
def test_an_export_that_cannot_be_written_there_is_one_line(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"(?i)^output_dir=.*{says}"), published(tmp_path / name):
        pass
