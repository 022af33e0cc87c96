"""The small files of a run: durable, made good where they are lost, written again where their folder goes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings
from distill.training.checkpoint import MANIFEST, _write_manifest
from distill.training.preemption import Preemption
from distill.training.run import (
    checkpoints_of,
    environment,
    finished,
    identity,
    kept_files,
    mark_finished,
    open_run,
    prepare_folder,
    read_run,
    write_atomically,
)
from tests.durability import Disk
from tests.faults.ranks import ROOT, can_mount

OVERRIDES = ("experiment=lcm_lora_sd15", "data.store=s", "model.pretrained_model_name_or_path=t", "max_train_steps=8")
LOST: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
}


def settings(folder: Path, *more: str) -> TrainSettings:
    return load("train", TrainSettings, [*OVERRIDES, f"output_dir={folder}", *more])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has saved a checkpoint, as far as its small files are concerned."""
    folder = open_run(settings(tmp_path / "run"))
    checkpoint = checkpoints_of(folder) / "step-00000004"
    checkpoint.mkdir(parents=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    _write_manifest(checkpoint, {"format": 1, "run": identity(folder), "step": 4, "config": config, "files": {}})
    return folder


def test_every_small_file_of_a_run_survives_a_power_loss(tmp_path: Path) -> None:
    """At each moment it is as it was or as it becomes, and once it is written it stays."""
    folder = tmp_path / "disk"
    (folder / "run").mkdir(parents=True)
    with Disk(folder) as disk:
        open_run(settings(folder / "run"))
        Preemption(folder / "run").mark(3)
        mark_finished(folder / "run", 8)
    end = disk.at_the_end().lay_out(tmp_path / "end") / "run"
    names = {"config.yaml", "overrides.txt", "environment.json", "run_id", "PREEMPTED", "DONE"}
    assert {p.name for p in end.iterdir()} == names
    for name in names:
        assert (end / name).read_bytes() == (folder / "run" / name).read_bytes() != b""
    for i, cut in enumerate(disk.cuts()):
        found = cut.lay_out(tmp_path / str(i)) / "run"
        for path in found.iterdir():
            if path.name in names:
                assert path.read_bytes() == (end / path.name).read_bytes(), cut.where
        shutil.rmtree(tmp_path / str(i))


def test_a_file_that_is_replaced_is_old_or_new_after_a_power_loss(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write_atomically(tmp_path / "disk" / "DONE", "4\n")
    with Disk(tmp_path / "disk") as disk:
        write_atomically(tmp_path / "disk" / "DONE", "8\n")
    found = [(cut.lay_out(tmp_path / str(i)) / "DONE").read_text() for i, cut in enumerate(disk.cuts())]
    assert set(found) == {"4\n", "8\n"}
    assert (disk.at_the_end().lay_out(tmp_path / "end") / "DONE").read_text() == "8\n"


@pytest.mark.parametrize("lost", LOST)
def test_settings_that_are_lost_are_those_of_the_newest_checkpoint(
    lost: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = yaml.safe_load((run / "config.yaml").read_text())
    LOST[lost](run / "config.yaml")
    assert read_run(run).model_dump(mode="json") == before
    assert "has lost its config.yaml: taken from its newest checkpoint" in caplog.text
    with pytest.raises(ConfigError, match="holds a run with seed="):
        open_run(settings(run, "seed=7"))
    open_run(settings(run))
    assert yaml.safe_load((run / "config.yaml").read_text()) == before


@pytest.mark.parametrize("lost", LOST)
def test_a_run_whose_id_is_lost_is_still_the_one_of_its_checkpoints(
    lost: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = identity(run)
    LOST[lost](run / "run_id")
    open_run(settings(run))
    assert identity(run) == before
    assert "has lost its run_id: taken from its newest checkpoint" in caplog.text


def test_a_manifest_that_is_not_whole_makes_nothing_good(run: Path) -> None:
    """What it says may be anything; the checkpoint itself would be refused for it."""
    manifest = checkpoints_of(run) / "step-00000004" / MANIFEST
    changed = json.loads(manifest.read_text()) | {"run": "another"}
    manifest.write_text(json.dumps(changed))
    (run / "run_id").write_text("")
    (run / "config.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no run there \(config.yaml is empty, and no checkpoint says"):
        read_run(run)
    open_run(settings(run))
    assert len(identity(run)) == 16 and identity(run) != "another"


@pytest.mark.parametrize("text", ["- a\n", "text", "7"])
def test_settings_that_are_something_else_are_one_line(text: str, run: Path) -> None:
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="config.yaml holds no settings: put back what was there, or remove it"):
        open_run(settings(run))


@pytest.mark.parametrize(("text", "done"), [("8\n", True), ("4\n", False), ("", False), ("\0\0", False), ("x", False)])
def test_a_run_is_finished_if_its_mark_says_so(text: str, done: bool, tmp_path: Path) -> None:
    (tmp_path / "DONE").write_text(text)
    assert finished(tmp_path, 8) == done


def test_a_folder_that_goes_while_its_run_goes_on_is_made_anew(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    files: dict[str, Any] = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    restore = kept_files(run)
    restore()
    assert not caplog.text
    shutil.rmtree(run)
    restore()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == files
    assert "had lost config.yaml, run_id" in caplog.text


def test_of_the_environment_only_what_is_listed_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name tells nothing about what people put into a variable, so that those that are not known stay out."""
    hidden = {
        "HF_TOKEN": "secret",
        "HF_HUB_DOWNLOAD_HEADERS": '{"Authorization": "Bearer secret"}',
        "HF_ENDPOINT": "https://user:secret@host",
        "WANDB_API_KEY": "secret",
        "WANDB_BASE_URL": "https://host?api=secret",
        "WANDB_NOTES": "secret",
        "SLURM_JOB_COMMENT": "secret",
        "SLURM_JOB_NAME": "secret",
        "NCCL_X": "secret",
        "TORCH_PROXY": "http://user:secret@host",
        "OMP_SECRET": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HF_HOME": "s3://key:secret@bucket",
        "MASTER_ADDR": "user:secret@host",
    }
    told = {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "17", "NCCL_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": "0,1"}
    for name, value in {**hidden, **told}.items():
        monkeypatch.setenv(name, value)
    found = environment()
    assert "secret" not in json.dumps(found) and told.items() <= found["variables"].items()
    assert not found["variables"].keys() & hidden.keys()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("file", "/file is a file, and no folder can be made there"),
        ("file/a/b", "/file is a file, and no folder can be made there"),
        ("x" * 300, "cannot be written to: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^output_dir=.*{says}$"):
        prepare_folder(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    if not can_mount(tmp_path / "probe"):
        pytest.skip("a small file system cannot be mounted here")
    code = "import sys; from pathlib import Path; from tests.faults.ranks import mount_small\n"
    code += "from distill.training.run import prepare_folder; mount_small(sys.argv[1], 8)\n"
    code += "prepare_folder(Path(sys.argv[1]) / 'run')"
    command = [sys.executable, "-c", code, str(tmp_path / "disk")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("the disk is full, not even a run's settings fit on it")


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    prepare_folder(tmp_path / "there")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
