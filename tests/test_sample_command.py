"""What `sample` leaves in a folder: its pictures, a grid of them, and nothing of an earlier call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.commands import sample
from distill.commands.owned_files import MANIFEST, Written
from distill.config.loading import ConfigError, load
from distill.config.settings import SampleSettings
from distill.evaluation.figures import CELL, GAP, HEADER, LABEL_WIDTH
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher"), "sd15")


def draw(teacher: Path, folder: Path, *settings: str) -> set[str]:
    """The files of the folder afterwards."""
    given = [f"model.pretrained_model_name_or_path={teacher}", f"output_dir={folder}", "batch_size=2", *settings]
    sample.main(load("sample", SampleSettings, given))
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}


def cell(grid: Image.Image, row: int, column: int) -> np.ndarray:  # type: ignore[type-arg]
    left, top = LABEL_WIDTH + column * (CELL + GAP), HEADER + row * (CELL + GAP)
    return np.asarray(grid.crop((left, top, left + CELL, top + CELL)))


def test_the_grid_has_a_row_for_each_number_of_steps_and_nothing_stale_is_left(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    found = draw(teacher, folder, "steps=[1,2]", "prompts=[red,green,blue]")
    of_steps = {
        f"steps-{n}/{name}" for n in (1, 2) for name in ("00000.png", "00001.png", "00002.png", "pictures.json")
    }
    assert found == of_steps | {"grid.png"}
    grid = Image.open(folder / "grid.png")
    for row, steps in enumerate((1, 2)):
        for column in range(3):
            picture = Image.open(folder / f"steps-{steps}" / f"{column:05d}.png")
            factor = CELL // max(picture.size)
            shown = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
            found_there = cell(grid, row, column)[: shown.height, : shown.width].astype(int)
            assert np.abs(found_there - np.asarray(shown).astype(int)).max() <= 1

    (folder / "steps-2" / "mine.txt").write_text("a note")
    (folder / "steps-2" / "00001.png").write_bytes(b"mine, painted over")
    assert draw(teacher, folder, "steps=1", "prompts=red") == {
        "00000.png",
        "pictures.json",
        "grid.png",
        "steps-2/mine.txt",
        "steps-2/00001.png",
    }
    assert not (folder / "steps-1").exists()
    assert [row["prompt"] for row in json.loads((folder / "pictures.json").read_text())] == ["red"]


def test_what_another_has_put_there_is_not_overwritten(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "00000.png").write_bytes(b"a holiday")
    with pytest.raises(ConfigError, match="00000.png is there and was not written by this command: choose another"):
        draw(teacher, tmp_path, "steps=1", "prompts=red")
    assert (tmp_path / "00000.png").read_bytes() == b"a holiday"


def test_pictures_of_a_call_that_left_no_list_are_its_own(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures.json").write_text(json.dumps([{"file": f"{i:05d}.png"} for i in range(3)]))
    for i in range(3):
        (tmp_path / f"{i:05d}.png").write_bytes(b"earlier")
    assert draw(teacher, tmp_path, "steps=1", "prompts=red") == {"00000.png", "pictures.json", "grid.png"}


def test_a_list_from_elsewhere_reaches_nothing_outside(tmp_path: Path) -> None:
    outside = tmp_path / "precious.png"
    outside.write_bytes(b"x")
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    names = ["../precious.png", str(outside), "link.png", "steps-1/../../precious.png"]
    lines = [json.dumps({"file": name, "sha256": None}) for name in names]
    (folder / MANIFEST).write_text("\n".join([*lines, "[1]", "{", '{"file": 3}']))
    Written(folder).clear()
    assert outside.exists() and (folder / "link.png").is_symlink()


def test_a_file_that_a_kill_left_half_written_is_written_again(tmp_path: Path) -> None:
    def killed(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Written(tmp_path).save("00000.png", killed)
    again = Written(tmp_path)
    again.save("00000.png", lambda path: path.write_bytes(b"whole") and None)
    assert (tmp_path / "00000.png").read_bytes() == b"whole"
    Written(tmp_path).clear()
    assert not list(tmp_path.iterdir())
