"""Teachers that are no pipeline folder as they come: a checkpoint in one file, and a base model with LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config.loading import ConfigError
from distill.config.settings import ModelSettings
from distill.diffusion.prediction import Prediction
from distill.evaluation.pipelines import generate_images, is_student, load_pipeline
from distill.models.derived import CACHE, WeightedLoRA, made_once
from distill.models.families.loading import load_teacher
from distill.models.folder import read_json
from distill.models.from_file import folder_of_file
from distill.models.lora import adapters, add_lora, save_lora
from distill.models.merged import folder_with_loras
from distill.models.single_file import save_single_file
from distill.training.teacher import located, open_teacher
from tests.tiny import save_tiny

PARTS = ("network", "text", "vae")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, velocity: bool = False) -> tuple[str, str]:
    """A tiny pipeline's folder, and the same model in one file."""
    pipeline = save_tiny(folder / "pipeline", family)
    network = load_teacher(pipeline).network
    prediction = Prediction.V if velocity else Prediction.EPSILON
    file = folder / "Fine Tune.v2.safetensors"
    save_single_file(file, network, pipeline, dtype, prediction)
    return pipeline, str(file)


def style(path: Path, pipeline: str, seed: int, rank: int = 2) -> str:
    """The file of a LoRA with random weights, whose alpha is not its rank."""
    network = load_teacher(pipeline).network
    add_lora(network, rank, 3.0, seed=seed, targets=["to_q", "conv1"])
    random = torch.Generator().manual_seed(seed)
    for parameter in adapters(network).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    save_lora(path, network, formats=("diffusers",))
    return str(path)


# ---- a single file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_single_file_is_the_same_teacher_as_the_folder_that_it_was_made_of(tmp_path: Path, family: str) -> None:
    pipeline, file = saved(tmp_path, family)
    model = ModelSettings(pretrained_model_name_or_path=file, config=pipeline, family=family)
    teacher, expected = open_teacher(model, PARTS), load_teacher(pipeline, parts=PARTS)
    assert teacher.teacher_hash == expected.teacher_hash and teacher.vae_hash == expected.vae_hash
    assert teacher.teacher_id == "Fine Tune.v2"
    for name, entry in expected.encode(["a cat"]).items():
        assert torch.equal(teacher.encode(["a cat"])[name], entry)
    assert teacher.schedule.fingerprint == expected.schedule.fingerprint


def test_a_file_keeps_its_dtype_and_a_part_that_it_lacks_is_that_of_the_configs_folder(tmp_path: Path) -> None:
    pipeline, file = saved(tmp_path, "sdxl", torch.float16)
    tensors = {name: x for name, x in load_file(file).items() if not name.startswith("first_stage_model.")}
    save_file(tensors, file)
    folder = folder_of_file(file, pipeline)
    assert (folder / "vae").is_symlink() and not (folder / "unet").is_symlink()
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float16}
    assert load_teacher(folder, parts=("vae",)).vae_hash == load_teacher(pipeline, parts=("vae",)).vae_hash


def test_a_file_that_says_that_it_predicts_velocities_is_believed(tmp_path: Path) -> None:
    pipeline, file = saved(tmp_path, "sdxl", velocity=True)
    assert load_teacher(pipeline).prediction is Prediction.EPSILON
    assert load_teacher(folder_of_file(file, pipeline)).prediction is Prediction.V
    save_file(load_file(file) | {"ztsnr": torch.empty(0)}, file)
    assert read_json(folder_of_file(file, pipeline), "scheduler/scheduler_config.json")["rescale_betas_zero_snr"]


def test_a_folder_is_made_once_and_anew_when_its_file_changes(tmp_path: Path, own_cache: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "model_index.json").write_text("{}")
        (folder / "weights").symlink_to(tmp_path / "weights")

    (tmp_path / "weights").mkdir()
    first = made_once("a", {"file": 1}, "making", make)
    assert made_once("a", {"file": 1}, "making", make) == first and len(made) == 1
    assert made_once("a", {"file": 2}, "making", make) != first and len(made) == 2
    (tmp_path / "weights").rmdir()
    (tmp_path / "weights").touch()
    (first / "weights").unlink()
    (first / "weights").symlink_to(tmp_path / "gone")
    assert made_once("a", {"file": 1}, "making", make) == first and len(made) == 3
    assert not list(own_cache.rglob("*.partial"))


def test_what_fails_leaves_nothing_behind(own_cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "model_index.json").write_text("{}")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        made_once("a", {}, "making", make)
    assert [path.suffix for path in (own_cache / "teachers").iterdir()] == [".lock"]


def test_what_cannot_be_a_teacher_is_refused_in_a_line(tmp_path: Path) -> None:
    pipeline, file = saved(tmp_path, "sd15")

    def refused(words: str, path: str = file, **settings: Any) -> None:
        with pytest.raises((ConfigError, FileNotFoundError), match=words) as error:
            located(ModelSettings(pretrained_model_name_or_path=path, **settings))
        assert "\n" not in str(error.value)

    refused("set model.config to a pipeline folder")
    refused("there is no file", str(tmp_path / "none.safetensors"), config=pipeline)
    refused("model.config is for a model in a single .safetensors file", pipeline, config=pipeline)
    refused("a single file has neither", config=pipeline, variant="fp16")
    (tmp_path / "a.ckpt").write_bytes(b"pickle")
    refused("pickle, which could run code", str(tmp_path / "a.ckpt"), config=pipeline)
    refused("is a LoRA, not a model", f"{style(tmp_path / 'style', pipeline, 0)}/pytorch_lora_weights.safetensors",
            config=pipeline)  # fmt: skip
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(file).read_bytes()[:1000])
    refused("not a complete safetensors file", str(cut), config=pipeline)
    quantized = {name: x.to(torch.float8_e4m3fn) for name, x in load_file(file).items()}
    save_file(quantized, tmp_path / "fp8.safetensors")
    refused("holds quantized weights", str(tmp_path / "fp8.safetensors"), config=pipeline)
    refused("cannot be opened", config=save_tiny(tmp_path / "other", "sdxl"))
    some = {name: x for name, x in load_file(file).items() if "middle_block" not in name}
    save_file(some, tmp_path / "some.safetensors")
    refused("some.safetensors cannot be opened", str(tmp_path / "some.safetensors"), config=pipeline)


# ---- base + LoRAs ---------------------------------------------------------------------------------------------------


def test_a_model_with_loras_is_what_diffusers_computes_with_them(tmp_path: Path) -> None:
    pipeline = save_tiny(tmp_path / "base", "sd15")
    loras = [style(tmp_path / "one", pipeline, 1), style(tmp_path / "two", pipeline, 2, rank=3)]
    model = ModelSettings(pretrained_model_name_or_path=pipeline, loras=[f"{loras[0]}:0.8", f"{loras[1]}:-0.5"])
    teacher = open_teacher(model)
    assert teacher.teacher_id == "base+one@0.8+two@-0.5"
    plain = load_pipeline(pipeline)
    for i, lora in enumerate(loras):
        plain.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors", adapter_name=f"a{i}")
    plain.set_adapters(["a0", "a1"], [0.8, -0.5])
    merged = load_pipeline(located(model).pretrained_model_name_or_path)
    found, expected = (generate_images(one, ["a cat"], [0], steps=2, guidance=3.0) for one in (merged, plain))
    base = generate_images(load_pipeline(pipeline), ["a cat"], [0], steps=2, guidance=3.0)
    assert (found - expected).abs().max() < 1e-5 < 100 * 1e-5 < (found - base).abs().max()


def test_the_hash_of_a_teacher_with_loras_is_of_what_it_computes_with(tmp_path: Path) -> None:
    pipeline = save_tiny(tmp_path / "base", "sd15")
    lora = style(tmp_path / "one", pipeline, 1)

    def hash_of(*loras: str) -> str:
        return open_teacher(ModelSettings(pretrained_model_name_or_path=pipeline, loras=list(loras))).teacher_hash

    hashes = [hash_of(), hash_of(f"{lora}:0.8"), hash_of(lora), hash_of(lora, lora)]
    assert len(set(hashes)) == 4 and hash_of(f"{lora}:0.8") == hashes[1]


def test_loras_go_into_a_model_in_one_file_too(tmp_path: Path) -> None:
    pipeline, file = saved(tmp_path, "sd15")
    lora = style(tmp_path / "one", pipeline, 1)
    of_file = ModelSettings(pretrained_model_name_or_path=file, config=pipeline, loras=[lora])
    of_folder = ModelSettings(pretrained_model_name_or_path=pipeline, loras=[lora])
    assert open_teacher(of_file).teacher_hash == open_teacher(of_folder).teacher_hash


def test_what_the_loras_leave_alone_stays_where_it_is(tmp_path: Path) -> None:
    pipeline = save_tiny(tmp_path / "base", "sdxl")
    folder = folder_with_loras(pipeline, [WeightedLoRA(style(tmp_path / "one", pipeline, 1))])
    links = {path.name for path in folder.iterdir() if path.is_symlink()}
    assert links == {path.name for path in Path(pipeline).iterdir() if path.is_dir()} - {"unet"}


def test_loras_that_cannot_be_merged_are_refused_in_a_line(tmp_path: Path) -> None:
    pipeline = save_tiny(tmp_path / "base", "sd15")
    other = style(tmp_path / "other", save_tiny(tmp_path / "xl", "sdxl"), 1)
    for lora, words in [
        (other, "is not of this model|cannot be opened"),
        (str(tmp_path / "none"), "no such LoRA file"),
        (pipeline, "no such LoRA file"),
    ]:
        with pytest.raises((ConfigError, FileNotFoundError), match=words) as error:
            located(ModelSettings(pretrained_model_name_or_path=pipeline, loras=[lora]))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [("a.safetensors", "a.safetensors", 1.0), ("a:0.8", "a", 0.8), ("C:a", "C:a", 1.0), ("a:-1e-1", "a", -0.1)],
)
def test_a_lora_is_written_with_its_weight(text: str, path: str, weight: float) -> None:
    assert WeightedLoRA.read(text) == WeightedLoRA(path, weight)


@pytest.mark.parametrize("text", [":0.5", "a:nan", "a:inf"])
def test_a_lora_without_a_path_or_a_weight_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="PATH:WEIGHT"):
        WeightedLoRA.read(text)


# ---- several in a pipeline ------------------------------------------------------------------------------------------


def test_loras_beside_a_students_add_up_by_their_weights_and_make_no_student(tmp_path: Path) -> None:
    pipeline = save_tiny(tmp_path / "base", "sd15")
    student, one = style(tmp_path / "student", pipeline, 1), style(tmp_path / "one", pipeline, 2)
    both = load_pipeline(pipeline, student, 0.7, own_scheduler=True, beside=[WeightedLoRA(one, 0.4)])
    beside = load_pipeline(pipeline, beside=[WeightedLoRA(one, 0.4), WeightedLoRA(student, 0.7)])
    assert is_student(both) and not is_student(beside)
    (found, expected) = (generate_images(p, ["a cat"], [0], 2, 3.0) for p in (both, beside))
    assert (found - expected).abs().max() < 1e-5
    alone = generate_images(load_pipeline(pipeline, student, 0.7, own_scheduler=True), ["a cat"], [0], 2, 3.0)
    assert (found - alone).abs().max() > 1e-3
