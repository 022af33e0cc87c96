"""Completion in a shell: what may follow, in the line as it is typed and as bash has it."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import completion
from distill.commands import COMMANDS
from distill.completion import answer, completed
from distill.config.composition import CONFIG_DIRS
from distill.config.loading import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "line, found",
    [
        ("distill tr", ["train", "trajectories"]),
        ("distill train max_tr", ["max_train_steps="]),
        ("distill train model.res", ["model.resolution="]),
        ("distill train engine=zero", ["engine=zero1", "engine=zero2", "engine=zero3"]),
        ("distill launch --num_processes 8 tr", ["train", "trajectories"]),
        ("distill launch --num_processes 8 train engine=si", ["engine=single"]),
        ("distill train -m method=lcm,mlcm_p", ["method=lcm,mlcm_paper"]),
        ("distill train validation_reward=to", ["validation_reward=toy"]),
        ("distill train reward@validation_reward=to", ["reward@validation_reward=toy"]),
        ("distill train lr_scheduler=con", ["lr_scheduler=constant", "lr_scheduler=constant_with_warmup"]),
        ("distill train gradient_checkpointing=", ["gradient_checkpointing=false", "gradient_checkpointing=true"]),
        ("distill train --mul", ["--multirun"]),
        ("distill train --info search", ["searchpath"]),
        ("distill train --cfg j", ["job"]),
        ("distill train --cfg --package data.dt", ["data.dtype="]),
        ("distill study toy_", ["toy_teacher"]),
        ("distill study toy_teacher reward_", ["reward_steps="]),
        ("distill benchmark de", ["deterministic", "deterministic="]),
        ("distill configs copy experiment/mlcm_t", ["experiment/mlcm_toy"]),
        ("distill configs sh", ["show"]),
        ("distill verify no", []),
        ("distill nothing ", []),
        ("distill train data.store=/", []),
        ("distill train reward=nothing/x y=", []),
    ],
)
def test_what_a_word_may_become(line: str, found: list[str]) -> None:
    expected = [one.removesuffix("=") for one in found] if "--package" in line else found
    assert completed(line) == expected


def test_a_line_without_a_word_offers_all() -> None:
    assert set(COMMANDS) < set(completed("distill "))
    assert {"experiment=", "seed=", "optimizer.betas="} < set(completed("distill train seed=1 "))


def test_files_of_ones_own_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_DIRS, "")
    for folder in ("configs/experiment", "other/experiment"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"my_{folder[0]}.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert completed("distill train experiment=my") == ["experiment=my_c"]
    assert completed("distill train --config-dir other experiment=my") == ["experiment=my_c", "experiment=my_o"]


def test_a_mistake_about_a_shell_is_a_line() -> None:
    with pytest.raises(
        ConfigError, match=r"-sc install=csh: allowed are install=, uninstall= and query=bash\|zsh\|fish"
    ):
        answer("install=csh")
    assert all(answer(f"install={shell}") and answer(f"uninstall={shell}") for shell in completion.SHELLS)


@pytest.fixture
def with_distill(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that finds the command as it is installed; one that imports torch fails."""
    program = tmp_path / "distill"
    check = "import sys; from distill.__main__ import main\ntry: main()\nfinally: assert 'torch' not in sys.modules\n"
    program.write_text(f"#!{sys.executable}\n{check}")
    program.chmod(0o755)
    return {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(with_distill: dict[str, str]) -> None:
    """A real bash, whose words end at `=`."""
    script = """
        eval "$(distill -sc install=bash)"
        COMP_LINE='distill train engine=zer' COMP_POINT=24 COMP_WORDS=(distill train engine = zer) COMP_CWORD=4
        _distill; echo "${COMPREPLY[@]}"; complete -p distill
    """
    command = ["bash", "--norc", "-c", script]
    done = subprocess.run(command, env=with_distill, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["zero1 zero2 zero3", "complete -o default -F _distill distill"], done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes(with_distill: dict[str, str]) -> None:
    script = """
        distill -sc install=fish | source
        complete -C 'cd /; distill train engine=zer'
    """
    done = subprocess.run(["fish", "--no-config", "-c", script], env=with_distill, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["engine=zero1", "engine=zero2", "engine=zero3"], done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
@pytest.mark.parametrize(
    "typed, becomes",
    [
        ("cd / && distill train method=lcm_", "cd / && distill train method=lcm_noised "),
        ("distill train max_tr", "distill train max_train_steps="),
    ],
)
def test_zsh_completes(with_distill: dict[str, str], typed: str, becomes: str) -> None:
    """A real zsh on a terminal: its completion works nowhere else."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], with_distill | {"TERM": "dumb", "COLUMNS": "200"})
    try:
        ready = 'autoload -Uz compinit; compinit -u -D; eval "$(distill -sc install=zsh)"; echo REA""DY\n'
        os.write(terminal, ready.encode())
        assert "READY" in shown_until(terminal, "READY")
        os.write(terminal, f"{typed}\t".encode())
        assert becomes in shown_until(terminal, becomes)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def shown_until(terminal: int, text: str, seconds: float = 60) -> str:
    """What a terminal shows until it is `text`, or some seconds are over."""
    shown, end = "", time.monotonic() + seconds
    while time.monotonic() < end and text not in shown:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown
