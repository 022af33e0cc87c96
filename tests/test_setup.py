"""What `scripts/setup.sh` installs beside NVIDIA's drivers, old and new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = 'eval "$(sed -e "/^cd /d" -e "/^install$/,\\$d" scripts/setup.sh)"; set -euo pipefail; '


def said(folder: Path, smi: str, code: str) -> tuple[str, str]:
    """Standard output and error of a line of bash beside an `nvidia-smi`."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{smi}\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", FUNCTIONS + code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("smi", "installed", "warned"),
    [
        ("echo 580.65.06; echo 580.65.06", "", ""),
        ("echo 535.183.01", "torch==2.10.0\ntorchvision==0.25.0\n", ""),
        ("echo 470.82.01", "", "driver 470 is too old"),
        ("echo NVIDIA-SMI has failed because; exit 9", "", ""),
    ],
)
def test_an_older_driver_gets_a_torch_that_runs_with_it(tmp_path: Path, smi: str, installed: str, warned: str) -> None:
    out, err = said(tmp_path, smi, 'fitting_torch "$(driver || true)"')
    assert out == installed and (warned in err if warned else not err)


def test_a_torch_that_is_there_is_kept_if_the_driver_is_new_enough(tmp_path: Path) -> None:
    module = tmp_path / "site"
    module.mkdir()
    for name in ("torch", "torchvision"):
        (module / f"{name}.py").write_text("__version__ = '2.11.0'\nclass version:\n    cuda = '13.0'\n")
        info = module / f"{name}-2.11.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.11.0\n")
    for driver, kept in (("", True), ("580", True), ("570", False)):
        code = f'PYTHONPATH={module} installed_torch {sys.executable} "{driver}"'
        assert ("torch==2.11.0" in said(tmp_path, "exit 1", code)[0]) is kept
