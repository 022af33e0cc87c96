"""Permissions of the files that are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as theirs

from distill.models.files import save_file, share


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_tensors_are_readable_by_whom_the_umask_says(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3)}, path, {"made": "here"})
    assert mode(path) == 0o666 & ~umask
    assert torch.equal(load_file(path)["x"], torch.arange(3)) and list(tmp_path.iterdir()) == [path]


def test_a_folder_of_another_librarys_files_is_shared_and_its_links_are_left(umask: int, tmp_path: Path) -> None:
    outside, folder = tmp_path / "private", tmp_path / "export"
    outside.touch(0o600)
    (folder / "unet").mkdir(parents=True)
    theirs({"x": torch.zeros(1)}, folder / "unet" / "model.safetensors")
    (folder / "unet" / "model.safetensors").chmod(0o600)
    (folder / "link").symlink_to(outside)
    share(folder)
    assert mode(folder / "unet" / "model.safetensors") == 0o666 & ~umask
    assert mode(outside) == 0o600 & ~umask
