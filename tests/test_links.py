"""Runs that take up earlier ones: start from their exports, learn from them, and are refused what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.commands import sample, train
from distill.commands import trajectories as make_trajectories
from distill.config.loading import ConfigError, load
from distill.config.settings import SampleSettings, TrainSettings
from distill.data.reader import open_store
from distill.diffusion.solver import solve
from distill.models.exported import open_export
from distill.models.families.loading import load_teacher
from distill.models.student import as_teacher
from distill.training.export import export_run
from distill.training.run import read_run
from distill.training.used_data import USED, UsedData, data_of
from tests.tiny import save_tiny

PROMPTS = ["a red boat", "two owls", "a bridge at night", "snow"]
SIZES = ["global_batch_size=4", "lora_rank=2", "lora_alpha=3", "max_train_steps=2", "checkpointing_steps=1"]
SIZES += ["lr_warmup_steps=0", "learning_rate=0.01", "mixed_precision=no", "dataloader_num_workers=0", "log_every=1"]


def lightning(stage: str, teacher_steps: int, student_steps: int) -> list[str]:
    return [f"method=lightning_{stage}", f"method.teacher_steps={teacher_steps}"] + [
        f"method.student_steps={student_steps}"
    ]


MSE = [*lightning("mse", 4, 2), "method.source=noised", "method.guidance=1.0"]
CONVERT = ["method=lightning_convert", "student=full_unguided", "student.prediction=sample"]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a tiny teacher whose store is written."""
    folder = tmp_path_factory.mktemp("links")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    settings = [
        f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher')}",
        f"data.prompts={folder}/prompts.txt",
        f"data.store={folder}/store",
        "data.num_samples=8",
        "data.solver_steps=4",
    ]
    make_trajectories.main(load("train", TrainSettings, settings))
    return [*settings, *SIZES]


def run(common: Sequence[str], folder: Path, *overrides: str) -> Path:
    """Trains, or goes on, and returns the run's folder."""
    train.main(load("train", TrainSettings, [*common, f"output_dir={folder}", *overrides]))
    return folder


@pytest.fixture(scope="module")
def lora(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a first link, which its teacher has taught."""
    folder = tmp_path_factory.mktemp("first")
    return export_run(run(common, folder / "run", *MSE), folder / "export")


@pytest.fixture(scope="module")
def full(common: list[str], lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a second one, which starts from that LoRA merged, and is taught by it."""
    folder = tmp_path_factory.mktemp("second")
    given = [*MSE, "student=full_unguided", f"start={lora}", f"teacher={lora}"]
    return export_run(run(common, folder / "run", *given), folder / "export")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_chain_of_links_ends_in_pictures(common: list[str], full: Path, steps: int, tmp_path: Path) -> None:
    """LoRA, whole network, and one that predicts clean data; a game of the last with a discriminator of the model."""
    first = run(common, tmp_path / "convert", *CONVERT, f"start={full}", f"teacher={full}")
    converted = export_run(first, tmp_path / "export")
    assert json.loads((converted / "distill.json").read_text())["prediction"] == "sample"
    game = [*lightning("adversarial", 2, steps), "student=full_unguided", f"start={converted}", f"teacher={full}"]
    last = run(common, tmp_path / "game", *game)
    settings = load("sample", SampleSettings, [f"run={last}", "prompts=[snow]", f"output_dir={tmp_path}/pictures"])
    sample.main(settings)
    (drawn,) = json.loads((tmp_path / "pictures" / "pictures.json").read_text())
    assert (drawn["sampler"], drawn["steps"], drawn["guidance"]) == ("ddim", steps, 1.0)


def test_a_run_notes_what_its_store_holds_whatever_the_command_says(
    common: list[str], lora: Path, tmp_path: Path
) -> None:
    """The training command need not repeat `data.num_samples`; without the store, the note still says it."""
    folder = run(common, tmp_path / "run", *MSE, "data.num_samples=2000", "max_train_steps=1")
    gone = read_run(folder).model_copy(deep=True)
    gone.data.store = str(tmp_path / "gone")
    assert data_of(folder, gone) == UsedData("trajectories", 8, "ddim", 4, (7.5, 7.5))
    (folder / USED).unlink()  # as runs of earlier versions: from the store, while it is there
    assert data_of(folder, gone) is None and data_of(folder, read_run(folder)).samples == 8
    facts = json.loads((lora / "distill.json").read_text())
    assert facts["data"]["samples"] == 8 and facts["guidance"] == [1.0, 1.0]  # what its method asked the teacher at


def test_a_run_goes_on_with_its_store_moved_and_with_no_other(common: list[str], tmp_path: Path) -> None:
    """Another one of the same teacher, at the same settings, has other samples: it would be noticed by nobody."""
    other = [*common, f"data.store={tmp_path}/other"]
    make_trajectories.main(load("train", TrainSettings, [*other, "seed=1"]))
    folder = run(common, tmp_path / "run", *MSE, "max_train_steps=1")
    with pytest.raises(ConfigError, match=r"data.store=.*other is not the store that the run has learned from"):
        run(other, folder, *MSE)
    store = next(setting for setting in common if setting.startswith("data.store=")).removeprefix("data.store=")
    moved = shutil.copytree(store, tmp_path / "moved")
    run([*common, f"data.store={moved}"], folder, *MSE)
    assert (folder / "DONE").read_text() == "2\n"


def test_a_lora_goes_on_from_its_start_and_from_its_checkpoint(
    common: list[str], lora: Path, full: Path, tmp_path: Path
) -> None:
    """Without a step taken it is its start; stopped and gone on with, it is as if it had not been."""
    given = [*MSE, f"start={lora}", f"teacher={full}"]
    still = run(common, tmp_path / "still", *given, "learning_rate=1e-30")
    start = load_file(lora / "pytorch_lora_weights.safetensors")
    own = load_file(export_run(still, tmp_path / "export") / "pytorch_lora_weights.safetensors")
    assert own.keys() == start.keys() and all(torch.equal(own[name], start[name]) for name in own)

    run(common, tmp_path / "whole", *given)
    run(common, tmp_path / "parts", *given, "max_train_steps=1")
    run(common, tmp_path / "parts", *given)
    whole, parts = (
        load_file(tmp_path / name / "checkpoints" / "step-00000002" / "student" / "weights.safetensors")
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_other_bytes_under_the_same_name_are_refused_when_a_run_goes_on(
    common: list[str], lora: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(lora, tmp_path / "moved"))
    run(common, tmp_path / "run", *MSE, f"start={lora}", f"teacher={lora}", "max_train_steps=1")
    run(common, tmp_path / "run", *MSE, f"start={moved}", f"teacher={moved}")  # elsewhere it is the same
    file = moved / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[min(tensors)] += 1
    save_file(tensors, file, metadata=metadata)
    for key, other in (("start", "teacher"), ("teacher", "start")):
        words = f"does not fit this run: SHA-256 of the weights of {key} was '.*', is '"
        with pytest.raises(ConfigError, match=words):
            run(common, tmp_path / "run", *MSE, f"{key}={moved}", f"{other}={lora}", "max_train_steps=3")


def test_what_does_not_fit_is_a_line_before_anything_is_opened(
    common: list[str], lora: Path, full: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    for given, words in (
        ([f"start={tmp_path}/nowhere"], "^start: .*/nowhere is not an export: it has no distill.json"),
        ([f"teacher={tmp_path}"], "^teacher: .* is not an export"),
        ([f"start={full}"], "^start: .* holds no LoRA for diffusers, and a LoRA cannot start from anything else$"),
        ([f"start={lora}", "lora_rank=4"], "^start: .* has a LoRA of rank 2, this run has lora_rank=4$"),
        ([f"start={lora}", "lora_alpha=2"], "^start: .* has a LoRA of alpha 3, this run has lora_alpha=2$"),
        ([f"teacher={lora}", f"model.pretrained_model_name_or_path={other}"], "^teacher: .* an export of another mod"),
        ([f"teacher={lora}", "method.source=trajectory"], "the trajectory store does not fit this run: teacher_hash"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(common, tmp_path / "run", *MSE, *given)
        assert not (tmp_path / "run").exists()


def test_solves_of_an_earlier_student_are_data_for_the_next(
    common: list[str], lora: Path, full: Path, tmp_path: Path
) -> None:
    """Written by its network, read by a run that has no teacher in memory, and by no other run."""
    given = [*common, f"teacher={full}", f"data.store={tmp_path}/solves", "data.guidance=1.0", "data.solver_steps=2"]
    make_trajectories.main(load("train", TrainSettings, given))
    student = [*lightning("mse", 2, 1), "method.source=trajectory", f"start={full}", "student=full_unguided"]
    run(given, tmp_path / "run", *student, "learning_rate=1e-30")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])

    model = next(setting.partition("=")[2] for setting in common if setting.startswith("model."))
    teacher = load_teacher(model, parts=("network",))
    solver = as_teacher(teacher, open_export(full)).denoiser()
    store = open_store(tmp_path / "solves")
    sample_ = store.read(0, (0, 1, 2))
    conditioning = {name: x[None].float() for name, x in sample_.conditioning.items()}
    x = sample_.states[:1].float()
    with torch.no_grad():
        *_, (_, end) = solve(solver, teacher.schedule, x, [1000, 500, 0], conditioning)
    assert torch.allclose(end[0], sample_.states[2].float(), rtol=1e-2, atol=2e-2) and row["loss"] > 0
    with pytest.raises(ConfigError, match="does not fit this run: teacher_hash"):
        run(given, tmp_path / "other", *student, f"teacher={lora}")
