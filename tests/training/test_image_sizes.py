"""Runs on images of several sizes: solves, latents, training, validation and pictures, each at its own size."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from distill.commands import latents, sample, trajectories
from distill.config.loading import ConfigError, load
from distill.config.settings import DataSettings, SampleSettings, TrainSettings
from distill.data.heldout import within
from distill.data.images import Accept, list_pictures
from distill.data.reader import open_store
from distill.data.sizes import read_sizes
from distill.models.families.loading import load_teacher
from distill.planning.counting import architecture
from distill.training.assembly import train_run
from distill.training.heldout import HELDOUT, TRAINING
from distill.training.sizes import chosen_sizes, latent_shape, require_sizes
from distill.training.trajectories import TrajectorySolver
from distill.training.used_data import USED
from tests.data.stores import PLAN
from tests.forked import python
from tests.tiny import save_tiny, tiny_pipeline
from tests.tiny_flux import save_tiny_flux, tiny_flux_pipeline

ROOT = Path(__file__).parents[2]
SIZES = ("24x24", "32x16", "16x32")
LIST = f"data.sizes=[{','.join(SIZES)}]"
TRAINED = ["global_batch_size=4", "lora_rank=2", "lr_warmup_steps=0", "log_every=1", "dataloader_num_workers=0"]


@dataclass(frozen=True)
class Given:
    folder: Path
    usual: list[str]

    @property
    def teacher(self) -> str:
        return str(self.folder / "teacher")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A tiny SDXL, and a store of three sizes with held-out solves."""
    folder = tmp_path_factory.mktemp("sizes")
    usual = ["experiment=lcm_lora_sdxl", f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher', 'sdxl')}"]
    usual += ["data.prompts=['snow','a red boat','hills']", f"data.store={folder}/store", "data.num_samples=14"]
    usual += ["mixed_precision=no", "data.batch_size=3", "data.solver_steps=10", "data.heldout_samples=5"]
    usual += ["data.samples_per_shard=7", "data.dtype=float32"]
    trajectories.main(load("train", TrainSettings, [*usual, LIST, "data.size_weights=[1,2,1]"]))
    return Given(folder, usual)


def train(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    assert train_run(load("train", TrainSettings, [*arguments, *TRAINED, f"output_dir={folder}"])) == 0
    return rows_of(folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_solves_of_every_size_are_those_of_the_diffusers_pipeline(given: Given) -> None:
    """From the same noise it gets to the same latents, with the same time ids: those of its height and width."""
    store, seen = open_store(str(given.folder / "store")), []
    assert {str(store.index.image_sizes[n]) for n in store.by_size()} == set(SIZES)
    pipeline = tiny_pipeline("sdxl")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["added_cond_kwargs"]["time_ids"])

    pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    for number, group in store.by_size().items():
        size, found = store.index.image_sizes[number], store.read(int(group[0]), prompts=True)
        assert found.states.shape[1:] == (5, size.height // 2, size.width // 2)
        seen.clear()
        end = pipeline(
            found.prompt,
            height=size.height,
            width=size.width,
            num_inference_steps=10,
            guidance_scale=found.guidance,
            latents=found.states[:1],
            output_type="latent",
        ).images
        assert torch.allclose(end[0], found.states[-1], atol=1e-4)
        assert torch.equal(seen[0][-1], found.conditioning["time_ids"])
        assert found.conditioning["time_ids"].tolist() == [*size, 0, 0, *size]


def test_training_is_of_one_size_a_step_and_measures_held_out_solves_of_all(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = train(
        *(tmp_path, *given.usual, "max_train_steps=4", "engine=single", "validation_steps=4"),
        *(
            "validation_prompts=['snow','hills','boats']",
            "validation_sizes=[24x24,16x32]",
            "validation_teacher_steps=2",
        ),
    )
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    last = [row for row in rows if HELDOUT in row][-1]
    assert last[HELDOUT] > 0 and last[TRAINING] > 0 and last["validation/teacher_consistency"] > 0
    pictures = [Image.open(tmp_path / f"samples/step-000004/validation-{i:02d}.png").size for i in range(3)]
    assert pictures == [(24, 24), (16, 32), (24, 24)]
    assert set(json.loads((tmp_path / USED).read_text())["sizes"]) == set(SIZES)


@pytest.mark.slow
def test_two_processes_train_on_several_sizes_as_one_does(given: Given, tmp_path: Path) -> None:
    steps = ["max_train_steps=4", "validation_prompts=null", "checkpointing_steps=4", "data.heldout_samples=0"]
    alone = train(tmp_path / "one", *given.usual, "engine=single", *steps)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [python(), "-m", "distill", "launch", "--num_processes", "2", "train", *given.usual, *TRAINED, *steps]
        + ["engine=ddp", f"output_dir={tmp_path}/two"],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=300,
    )
    together = rows_of(tmp_path / "two")
    assert [row["loss"] for row in together] == pytest.approx([row["loss"] for row in alone], rel=1e-4)
    one, two = (
        load_file(tmp_path / name / "checkpoints/step-00000004/student/weights.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.slow
def test_compiled_blocks_take_all_sizes(given: Given, tmp_path: Path) -> None:
    steps = ["max_train_steps=6", "validation_prompts=null", "checkpointing_steps=6", "data.heldout_samples=0"]
    usual = [*given.usual, "engine=single", *steps]
    plain, compiled = (train(tmp_path / kind, *usual, f"compile={kind}") for kind in ("false", "eager"))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in plain], rel=1e-4)
    assert len(plain) == 6


@pytest.mark.slow
def test_a_run_resumes_among_sizes_as_if_it_had_not_stopped(given: Given, tmp_path: Path) -> None:
    usual = [
        *given.usual,
        "engine=single",
        "validation_prompts=null",
        "data.heldout_samples=0",
        "checkpointing_steps=2",
    ]
    whole = train(tmp_path / "whole", *usual, "max_train_steps=5", "lr_scheduler=constant")
    train(tmp_path / "rest", *usual, "max_train_steps=2", "lr_scheduler=constant")
    rest = train(tmp_path / "rest", *usual, "max_train_steps=5", "lr_scheduler=constant")
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole] and len(whole) == 5


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [False, True])
def test_critics_learn_from_several_sizes(conditional: bool, given: Given, tmp_path: Path) -> None:
    """A discriminator and a fake score beside the student, whose samples have the size of the step."""
    critics = "{segments: 1, grid: 5, skip: 200, source: student, student_steps: 2, matching: 0.5, adversarial: 0.5, "
    stages = f"method.stages=[{{segments: 1, skip: 100, iterations: 1}}, {critics} iterations: 6}}]"
    rows = train(
        *(tmp_path, *given.usual, "method=mlcm_critics", stages, "max_train_steps=7", "engine=single"),
        *("validation_prompts=null", "ema_decay=0.9", f"networks.discriminator.conditional={conditional}".lower()),
    )
    assert all(
        np.isfinite(row["student/adversarial_loss"]) for row in rows if row["step"] > 1 and "student/loss" in row
    )


def test_settings_that_are_not_the_stores_are_refused(given: Given, tmp_path: Path, monkeypatch: Any) -> None:
    arguments = [*given.usual, *TRAINED, "max_train_steps=1", f"output_dir={tmp_path}", "data.sizes=[24x24,32x16]"]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(ConfigError, match=r"sizes is .* set data.sizes=\[24x24,32x16,16x32\]"):
        train_run(load("train", TrainSettings, arguments))


def test_prompts_may_bring_their_sizes(given: Given, tmp_path: Path) -> None:
    rows = [("snow", 32, 16), ("hills", 16, 32), ("boats", 32, 16), ("rain", 24, 24)]
    (tmp_path / "prompts.csv").write_text("prompt,width,height\n" + "\n".join(",".join(map(str, row)) for row in rows))
    changed = [f"data.store={tmp_path}/store", f"data.prompts={tmp_path}/prompts.csv", "data.sizes=prompts"]
    trajectories.main(load("train", TrainSettings, [*given.usual, *changed, "data.num_samples=7"]))
    for url, order in ((f"{tmp_path}/store", rows), (within(f"{tmp_path}/store"), rows[::-1])):
        store = open_store(url)
        for i in range(len(store)):
            found, (prompt, width, height) = store.read(i, prompts=True), order[i % 4]
            assert (found.prompt, found.states.shape[2:]) == (prompt, (height // 2, width // 2))
    other = tmp_path / "prompts.csv"
    other.write_text(other.read_text().replace("rain,24,24", "rain,16,32"))
    with pytest.raises(ConfigError, match="sizes is .*Set data.sizes"):
        trajectories.main(load("train", TrainSettings, [*given.usual, *changed, "data.num_samples=7"]))


def test_pictures_are_cut_to_the_nearest_size_and_say_so(given: Given, tmp_path: Path) -> None:
    """Their time ids: size before they were resized, where the cut begins, and the size they were cut to."""
    source = tmp_path / "pictures"
    source.mkdir()
    for i, (width, height) in enumerate([(40, 18), (24, 24), (20, 50), (64, 32), (30, 26)]):
        values = torch.randint(
            0, 256, (height, width, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )
        Image.fromarray(values.numpy()).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"no {i}")
    images = ["experiment=lcm_lora_sdxl", "data=images", f"model.pretrained_model_name_or_path={given.teacher}"]
    images += [f"data.images={source}", f"data.store={tmp_path}/store", LIST, "data.max_aspect_ratio=3"]
    images += ["data.dtype=float32", "data.batch_size=2"]
    latents.main(load("train", TrainSettings, images))
    store = open_store(f"{tmp_path}/store")
    found = {i: store.read(i, prompts=True) for i in range(len(store))}
    assert {i: one.conditioning["time_ids"].tolist() for i, one in found.items()} == {
        0: [18, 40, 0, 1, 16, 32],  # 35 x 16 once it was resized
        1: [24, 24, 0, 0, 24, 24],
        2: [50, 20, 4, 0, 32, 16],
        3: [32, 64, 0, 0, 16, 32],
        4: [26, 30, 0, 1, 24, 24],
    }
    assert [one.states.shape[2:] for one in found.values()] == [(8, 16), (12, 12), (16, 8), (8, 16), (12, 12)]
    listing = list_pictures(str(source), f"{tmp_path}/store", Accept(0, 3.0, sizes=SIZES))
    assert len(listing.pictures) == 5
    with pytest.raises(ConfigError, match="the size of a picture follows from its aspect ratio"):
        latents.main(load("train", TrainSettings, [*images, "data.sizes=prompts"]))
    rows = train(tmp_path / "run", *images, "method=lcm_noised", "max_train_steps=3", "engine=single")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(np.isfinite(row["loss"]) for row in rows)


def test_solves_of_flow_matching_have_their_sizes_too(tmp_path: Path) -> None:
    """SD3 in two sizes: from the same noise to where the diffusers pipeline gets at that height and width."""
    teacher = load_teacher(save_tiny(tmp_path, "sd3"), parts=("network", "text"))
    plan = replace(PLAN, resolution=24, guidance=5.0, times=(1000, 0), sizes=("24x24", "32x16"), dtype="float32")
    plan = replace(plan, text_dtype="float32")
    require_sizes(teacher, plan.image_sizes)
    solve, pipeline = TrajectorySolver(teacher, plan, "cpu", lambda i: i), tiny_pipeline("sd3")
    pipeline.set_progress_bar_config(disable=True)
    for i, size in enumerate(plan.image_sizes):
        solved = solve([i], ["snow"])
        assert solved.states.shape[3:] == (size.height // 4, size.width // 4)
        end = pipeline(
            "snow",
            height=size.height,
            width=size.width,
            sigmas=[1 - k / 4 for k in range(4)],
            guidance_scale=5.0,
            latents=solved.states[:, 0],
            output_type="latent",
        ).images
        assert torch.allclose(end, solved.states[:, -1], atol=1e-4)


def test_solves_of_flux_have_their_sizes_once_its_shift_is_fixed(tmp_path: Path) -> None:
    loaded = load_teacher(save_tiny_flux(tmp_path), parts=("network", "text")).at_resolution(32)
    plan = replace(PLAN, resolution=32, guidance=3.5, times=(1000, 0), sizes=("32x32", "48x16"), dtype="float32")
    plan = replace(plan, text_dtype="float32")
    with pytest.raises(ValueError, match="depends on the size of its images"):
        require_sizes(loaded, plan.image_sizes)
    teacher = loaded.at_shift(2.0)
    require_sizes(teacher, plan.image_sizes)
    solve, pipeline = TrajectorySolver(teacher, plan, "cpu", lambda i: i), tiny_flux_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pinned = {"use_dynamic_shifting": False, "shift": 2.0}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **pinned)
    for i, size in enumerate(plan.image_sizes):
        solved = solve([i], ["snow"]).states
        noise, end = (pipeline._pack_latents(x, *x.shape) for x in (solved[:, 0], solved[:, -1]))
        found = pipeline(
            "snow",
            height=size.height,
            width=size.width,
            num_inference_steps=4,
            guidance_scale=3.5,
            latents=noise,
            output_type="latent",
        ).images
        assert torch.allclose(found, end, atol=1e-4)


def test_a_teacher_whose_noise_depends_on_the_size_is_refused_several(tmp_path: Path) -> None:
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    folder = save_tiny(tmp_path, "sd3", **dynamic)
    teacher = load_teacher(folder, parts=())
    require_sizes(teacher, read_sizes("24x24"))
    with pytest.raises(ValueError, match="the noise schedule of .* depends on the size of its images.*model.shift"):
        require_sizes(teacher, read_sizes(["24x24", "32x16"]))
    require_sizes(teacher.at_shift(2.0), read_sizes(["24x24", "32x16"]))


def test_sizes_that_a_teacher_cannot_have_are_one_line(given: Given) -> None:
    teacher = load_teacher(given.teacher, parts=())
    assert latent_shape(teacher, read_sizes("32x16")[0]) == (5, 8, 16) and latent_shape(teacher) == (5, 12, 12)
    with pytest.raises(ValueError, match="33x16 is no size for teacher: resolution must be a multiple of 2 pixels"):
        require_sizes(teacher, read_sizes(["33x16"]))

    def data(**changes: Any) -> DataSettings:
        return DataSettings(store="STORE", guidance=1.0, **changes)

    assert chosen_sizes(data(sizes=["24x24"]), teacher) == () == chosen_sizes(data(), teacher)
    with pytest.raises(ConfigError, match="data.size_weights has 1 numbers: set one for each size"):
        chosen_sizes(data(sizes=["24x24", "32x16"], size_weights=[1.0]), teacher)
    with pytest.raises(ConfigError, match="data.size_weights has 1 numbers"):
        chosen_sizes(data(size_weights=[1.0]), teacher)


def test_a_plan_counts_the_largest_size(given: Given) -> None:
    model = load("train", TrainSettings, given.usual).model
    assert architecture(model, ["24x24", "48x32"]).teacher.latent_shape == (5, 16, 24)
    assert (
        architecture(model).teacher.latent_shape == architecture(model, "prompts").teacher.latent_shape == (5, 12, 12)
    )
    with pytest.raises(ConfigError, match="data.sizes: 33x16 is no size"):
        architecture(model, ["33x16"])


def test_pictures_are_sampled_in_the_sizes_that_are_asked_for(given: Given, tmp_path: Path) -> None:
    usual = [f"model.pretrained_model_name_or_path={given.teacher}", "prompts=[red,green]", "steps=1"]

    def draw(folder: Path, *settings: str) -> None:
        sample.main(load("sample", SampleSettings, [*usual, f"output_dir={folder}", *settings]))

    draw(tmp_path / "one", "size=32x16")
    assert Image.open(tmp_path / "one/00001.png").size == (32, 16)
    assert json.loads((tmp_path / "one/pictures.json").read_text())[0]["size"] == "32x16"
    draw(tmp_path / "two", "size=[24x24,16x32]")
    assert Image.open(tmp_path / "two/24x24/00000.png").size == (24, 24)
    assert Image.open(tmp_path / "two/16x32/00001.png").size == (16, 32) and (tmp_path / "two/grid.png").is_file()
    pipeline = tiny_pipeline("sdxl")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    plain = pipeline("red", height=16, width=32, num_inference_steps=1, guidance_scale=7.5,
                     generator=torch.Generator().manual_seed(0)).images[0]  # fmt: skip
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(Image.open(tmp_path / "one/00000.png"))).max() <= 1
    for setting, line in {
        "size=20x24": "the sides of 20x24 must be multiples of 8 pixels",
        "size=tall": "is no list of sizes|is no size",
    }.items():
        with pytest.raises(ConfigError, match=line):
            draw(tmp_path / "no", setting)
    with pytest.raises(ConfigError, match="size and model.resolution are both set"):
        draw(tmp_path / "no", "size=24x24", "model.resolution=24")
