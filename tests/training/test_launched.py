"""What a launcher has started is what it was asked for, or a line says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = "from distill.training.run import only_one_process; print(only_one_process())"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--num_processes", "2"], {}, "asked for 2 processes and has started one, .*add --multi_gpu"),
        (["--num_processes=2"], {"WORLD_SIZE": "2", "RANK": "1"}, "None"),
    ],
)
def test_one_process_where_more_were_asked_for(arguments: list[str], variables: dict[str, str], words: str) -> None:
    """The parent has the arguments of `accelerate launch`, and hands on the variables that it does."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", PARENT, CHILD, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert re.search(words, ended.stdout), ended.stdout
