"""From a tar of somebody's pictures to a trained student, in the commands that people type."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.images import Accept, Listing, list_pictures
from distill.data.index import INDEX, StorePlan
from distill.data.reader import open_store
from distill.diffusion.random import generator
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.training.latents import LatentEncoder
from tests.data.stores import PICTURES, files
from tests.data.test_images import encoded, noise, picture
from tests.data.test_prompts import shard
from tests.forked import python
from tests.tiny import save_tiny, tiny_pipeline

ROOT = Path(__file__).parents[1]
SIZES = [(24, 24), (30, 24), (24, 40), (50, 60), (100, 70), (25, 25), (26, 40)]
TORN = (1, 4)


def run(script: str, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), f"scripts/{script}", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def shard_of_pictures(folder: Path) -> Path:
    """A tar in which two pictures have sound headers and end early, and one is too small."""
    folder.mkdir()
    members = {"9.png": picture(20, 24), "9.txt": b"small"}
    for i, size in enumerate(SIZES):
        data = picture(*size, seed=i)
        members |= {
            f"{i}.png": data[:-400] if i in TORN else data,
            f"{i}.json": json.dumps({"caption": f"no {i}"}).encode(),
        }
    (folder / "00000.tar").write_bytes(shard(members))
    return folder / "00000.tar"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    shard_of_pictures(folder / "in")
    return [
        "experiment=lcm_lora_sdxl",
        f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher', 'sdxl')}",
        "data=images",
        f"data.images={folder}/in/*.tar",
        "data.samples_per_shard=2",
        "data.batch_size=2",
        "data.crop=random",
        "mixed_precision=no",
    ]


@pytest.fixture(scope="module")
def folder(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their store."""
    folder = tmp_path_factory.mktemp("store")
    made = run("make_latents.py", *settings, f"data.store={folder}")
    assert made.returncode == 0, made.stderr
    said = made.stdout + made.stderr
    assert "7 pictures in" in said and "too small: 1" in said and "2 of 7 pictures were skipped" in said
    return folder


def test_from_a_tar_to_a_student(settings: list[str], folder: Path, tmp_path: Path) -> None:
    skipped = [line.split(" ")[:2] for line in (folder / "skipped.txt").read_text().splitlines()]
    assert skipped == [["000000-000001", "00000.tar/1.png:"], ["000002-000000", "00000.tar/4.png:"]]
    for rank in ("1", "0"):
        two = run("make_latents.py", *settings, f"data.store={tmp_path}/two", RANK=rank, WORLD_SIZE="2")
        assert two.returncode == 0, two.stderr
    assert files(tmp_path / "two") == files(folder)

    index = json.loads((folder / INDEX).read_bytes())
    assert (index["kind"], index["solver"], index["times"], index["crop"]) == ("pictures", "none", [0], "random")
    store = open_store(str(folder))
    assert [store.read(row).conditioning["time_ids"][:2].tolist() for row in range(len(store))] == [
        [height, width] for i, (width, height) in enumerate(SIZES) if i not in TORN
    ]

    student = ["global_batch_size=2", "lora_rank=2", "lora_alpha=2", "max_train_steps=2", "lr_warmup_steps=0"]
    student += ["log_every=1", "dataloader_num_workers=1"]
    student += [f"data.store={folder}", "method=lcm_noised", f"output_dir={tmp_path}/run"]
    trained = run("train.py", *settings, *student)
    assert trained.returncode == 0, trained.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["loss"] < 100 for row in rows)


MISTAKES = {
    "no images": ("make_latents.py", ["data.images=null"], ["data.images has no value", "data=images"]),
    "not so many": ("make_latents.py", ["data.num_samples=8"], ["data.num_samples=8", "7 pictures"]),
    "another crop": ("make_latents.py", ["data.crop=center"], ["crop is 'random'", "'center'"]),
    "another filter": ("make_latents.py", ["data.min_size=25"], ["min_size is 24", "25"]),
    "nothing there": ("make_latents.py", ["data.images=/nowhere"], ["no pictures at /nowhere"]),
    "no autoencoder": ("make_latents.py", ["data.vae=/nowhere"], ["no autoencoder", "'/nowhere'"]),
    "no solve to make": (
        "make_trajectories.py",
        [],
        ["data.guidance has no value", "data=images is for distill latents"],
    ),
    "no number to make": ("make_trajectories.py", ["data.guidance=2"], ["data.num_samples has no value"]),
    "no solve to read": ("train.py", ["method=lcm"], ["no teacher solves", "method=lcm_noised", "no two of [0]"]),
    "another guidance": (
        "train.py",
        ["method=lcm_noised", "data.guidance=2"],
        ["guidance is 1.0 in the store and 2.0"],
    ),
}


ONE_AFTER_ANOTHER = """
import contextlib, io, json, runpy, sys
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv, said = [script, *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path("scripts/" + script, run_name="__main__")
    except SystemExit as end:
        print(json.dumps([end.code, said.getvalue()]))
"""
"""Several commands in one process: imports take longer than what they do."""


def test_what_does_not_fit_is_one_line(settings: list[str], folder: Path, tmp_path: Path) -> None:
    settings = [*settings, f"data.store={folder}", f"output_dir={tmp_path}/run"]
    commands = [[script, *settings, *overrides] for script, overrides, _ in MISTAKES.values()]
    ended = subprocess.run(
        [python(), "-c", ONE_AFTER_ANOTHER, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True
    )
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    for (code, said), (name, (_, _, words)) in zip(found, MISTAKES.items(), strict=True):
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1, (name, said)
        assert all(word in lines[0] for word in words), (name, lines[0])
    assert not (tmp_path / "run").exists()


# What a sample is, without scripts.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher(save_tiny(tmp_path_factory.mktemp("teacher"), "sdxl"), parts=("text", "vae"))


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Listing:
    folder = tmp_path_factory.mktemp("listing")
    return list_pictures(str(shard_of_pictures(folder / "in")), str(folder / "store"), Accept(24))


def plan(crop: str) -> StorePlan:
    return StorePlan(**{**vars(PICTURES), "crop": crop, "resolution": 24, "seed": 5, "dtype": "float32"})


def test_a_sample_is_what_diffusers_trains_on(teacher: Teacher, listing: Listing) -> None:
    """The picture resized and cut by Pillow alone, its latent, its text and its sizes from the plain pipeline."""
    pipeline = tiny_pipeline("sdxl")
    i, (width, height) = 3, SIZES[3]
    made = LatentEncoder(teacher, plan("center"), listing, "cpu")([i], listing.captions[i : i + 1]).rest
    assert made is not None

    image = noise(width, height, seed=i).resize((24, 24 * height // width), Image.Resampling.LANCZOS)
    top = (image.height - 24) // 2
    pixels = torch.from_numpy(np.array(image)[top : top + 24]).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        states, _, pooled, _ = pipeline.encode_prompt(f"no {i}", device="cpu")
    drawn = torch.randn(teacher.latent_shape, generator=generator(5, "posterior", i))
    expected = (posterior.mean + posterior.std * drawn) * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(made.states[:, 0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.conditioning["encoder_hidden_states"], states)
    torch.testing.assert_close(made.conditioning["text_embeds"], pooled)
    ids = pipeline._get_add_time_ids(
        (height, width), (top, 0), (24, 24), torch.float32, text_encoder_projection_dim=pooled.shape[-1]
    )
    assert torch.equal(made.conditioning["time_ids"], ids)
    assert made.times == (0,) and made.guidance.tolist() == [1.0]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_sample_depends_on_its_own_number_alone(teacher: Teacher, listing: Listing, crop: str) -> None:
    encoder = LatentEncoder(teacher, plan(crop), listing, "cpu")
    whole = encoder(list(range(7)), listing.captions)
    assert set(whole.skipped) == set(TORN) and whole.rest is not None
    assert whole.skipped[4].startswith("00000.tar/4.png: ")
    for b, i in enumerate(i for i in range(7) if i not in TORN):
        alone = encoder([i], listing.captions[i : i + 1]).rest
        assert alone is not None and alone.seeds == whole.rest.seeds[b : b + 1]
        torch.testing.assert_close(alone.states[0], whole.rest.states[b], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.conditioning["time_ids"][0], whole.rest.conditioning["time_ids"][b])
    corners = whole.rest.conditioning["time_ids"][:, 2:4]
    assert corners[0].tolist() == [0, 0] and corners.any()


def test_a_batch_of_which_nothing_is_left(teacher: Teacher, listing: Listing) -> None:
    nothing = LatentEncoder(teacher, plan("center"), listing, "cpu")(list(TORN), ["a", "b"])
    assert nothing.rest is None and list(nothing.skipped) == list(TORN)


def test_a_photograph_survives_the_way_into_the_store(teacher: Teacher, tmp_path: Path) -> None:
    """A JPEG on its side, as cameras store them: what is encoded is upright, and told so."""
    exif = Image.Exif()
    exif[274] = 6
    upright = Image.new("RGB", (30, 40), "black")
    upright.paste("white", (0, 0, 30, 20))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encoded(upright.rotate(90, expand=True), "JPEG", exif=exif, quality=100))
    (tmp_path / "in" / "a.txt").write_text("half and half")
    found = list_pictures(str(tmp_path / "in"), str(tmp_path / "store"), Accept(24))
    (square,) = LatentEncoder(teacher, plan("center"), found, "cpu").parts([0], plan("center").image_sizes[0])
    assert square.original == (40, 30) and square.corner == (4, 0)  # type: ignore[union-attr]
    assert square.pixels[:, :10].min() > 0.9 and square.pixels[:, 14:].max() < -0.9  # type: ignore[union-attr]
    assert Image.open(io.BytesIO(found.read([0])[0])).size == (40, 30)  # on its side in the file
