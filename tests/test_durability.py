"""The helper that simulates power cuts notices each way of writing a file that does not survive one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.data.storage import sync_folder
from tests.durability import Disk


def well(folder: Path) -> None:
    with open(folder / "new", "wb") as file:
        file.write(b"whole")
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "new", folder / "text")
    sync_folder(folder)


def without_fsync(folder: Path) -> None:
    (folder / "new").write_bytes(b"whole")
    os.replace(folder / "new", folder / "text")
    sync_folder(folder)


def written_on_after_fsync(folder: Path) -> None:
    with open(folder / "new", "wb") as file:
        file.write(b"wh")
        file.flush()
        os.fsync(file.fileno())
        file.write(b"ole")
    os.replace(folder / "new", folder / "text")
    sync_folder(folder)


def flushed_after_the_rename(folder: Path) -> None:
    (folder / "new").write_bytes(b"whole")
    os.replace(folder / "new", folder / "text")
    with open(folder / "text", "rb") as file:
        os.fsync(file.fileno())
    sync_folder(folder)


def without_its_folder(folder: Path) -> None:
    with open(folder / "new", "wb") as file:
        file.write(b"whole")
        file.flush()
        os.fsync(file.fileno())
    (folder / "new").rename(folder / "text")


def in_a_new_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    well(folder / "sub")


@pytest.mark.parametrize(
    ("write", "torn", "lost"),
    [
        (well, False, False),
        (without_fsync, True, False),
        (written_on_after_fsync, True, False),
        (flushed_after_the_rename, True, False),
        (without_its_folder, False, True),
        (in_a_new_folder, False, True),
    ],
)
def test_what_a_power_cut_leaves(write: Callable[[Path], None], torn: bool, lost: bool, tmp_path: Path) -> None:
    """The text is the old one or the new one after every cut, and the new one at the end."""
    folder = tmp_path / "watched"
    folder.mkdir()
    with Disk(folder) as disk:
        write(folder)
    found = []
    for number, cut in enumerate(disk.cuts()):
        laid_out = cut.lay_out(tmp_path / str(number))
        found += [path.read_bytes() for path in laid_out.rglob("text")]
    assert any(text != b"whole" for text in found) == torn
    end = list(disk.at_the_end().lay_out(tmp_path / "end").rglob("text"))
    assert (not end) == lost


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "text").write_bytes(b"before")
    with Disk(folder) as disk:
        well(folder)
    texts = [(cut.lay_out(tmp_path / str(n)) / "text").read_bytes() for n, cut in enumerate(disk.cuts())]
    assert texts[0] == b"before" and texts[-1] == b"whole" and set(texts) == {b"before", b"whole"}
