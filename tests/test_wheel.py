"""The installed package alone: all files are in it, and commands work away from any checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distill.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
LISTED = """
import json, sys
from setuptools import Distribution

distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files(["pyproject.toml"])
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
command.build_lib = "wheel"
print(json.dumps(command.get_outputs(include_bytecode=0)))
"""


def sources() -> set[str]:
    """The files that the package consists of, as they lie in the wheel."""
    found = {f"distill/{path.relative_to(ROOT / 'distill')}" for path in (ROOT / "distill").rglob("*")}
    found |= {f"distill/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*")}
    folders = {str(Path(path).parent) for path in found}
    return {path for path in found - folders if "__pycache__" not in path and path != "distill/configs"}


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    command = [sys.executable, "-W", "ignore", "-c", LISTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    built = {path.removeprefix("wheel/") for path in json.loads(done.stdout.splitlines()[-1])}
    assert built == sources()
    kinds = {Path(path).suffix for path in built}
    assert {".py", ".yaml", ".html", ".safetensors", ".txt", ".json"} <= kinds and "distill/py.typed" in built


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a wheel is unpacked that was built from a copy of the sources, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("distill", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = folder.glob("distill-*.whl")
    target = folder / "site"
    unpack = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(unpack, check=True, timeout=300)
    shutil.rmtree(source)
    return target


def ran(site: Path, folder: Path, *arguments: str) -> str:
    """What a command of the unpacked wheel prints, run in a folder that is no checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "distill", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (arguments, done.stdout[-1000:], done.stderr[-3000:])
    return done.stdout


@pytest.mark.slow
def test_every_command_answers_help_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert "COMMAND" in ran(installed, tmp_path, "--help")
    for name in COMMANDS:
        assert ran(installed, tmp_path, name, "--help").strip(), name
    listed = ran(installed, tmp_path, "configs", "experiment")
    assert "quickstart" in listed and "lcm_lora_sdxl" in listed
    assert "ok    python" in ran(installed, tmp_path, "doctor")


@pytest.mark.slow
def test_an_experiment_of_ones_own_trains_exports_and_samples(installed: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine/experiment"
    own.mkdir(parents=True)
    copied = ran(installed, tmp_path, "configs", "show", "experiment/quickstart")
    (own / "small.yaml").write_text(copied.replace("override /engine: zero2", "override /engine: single"))
    given = ["experiment=small", "data.store=store", "data.num_samples=8", "data.samples_per_shard=8"]
    given += ["data.solver_steps=10", "global_batch_size=4", "max_train_steps=2", "lr_warmup_steps=0"]
    given += ["dataloader_num_workers=0", "validation_prompts=null", "--config-dir", "mine"]
    ran(installed, tmp_path, "trajectories", *given)
    ran(installed, tmp_path, "train", *given, "output_dir=run")
    ran(installed, tmp_path, "export", "run=run", "output_dir=lora", "card_prompts=[red stripes]")
    ran(
        installed,
        tmp_path,
        "sample",
        "model=toy",
        "lora=lora",
        "steps=2",
        "prompts=[blue rings]",
        "output_dir=pictures",
    )
    job = ran(installed, tmp_path, "submit", *given, "output_dir=job", "dry_run=true")
    assert "#SBATCH" in job and f"{ROOT}/distill" not in job and f"{ROOT}/configs" not in job
    assert (tmp_path / "pictures/grid.png").is_file() and (tmp_path / "lora/samples.png").is_file()


@pytest.mark.slow
def test_an_evaluation_writes_its_page(installed: Path, tmp_path: Path) -> None:
    ran(installed, tmp_path, "evaluate", "guidance=2", "n=100", "steps=[1]", "protocol.tuning_n=0", "output_dir=out")
    assert "<html" in (tmp_path / "out/report/index.html").read_text(encoding="utf-8")
