"""`scripts/launch.py`: the command has the last word, and every process of it hears of signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.ranks import ROOT

pytestmark = pytest.mark.distributed
RANK = """
import os, signal, sys, time
from pathlib import Path
from distill.training.preemption import Preemption

rank, folder = int(os.environ.get("RANK", 0)), Path(sys.argv[1])
if sys.argv[2] == "mistake":
    if rank == 0:
        print("error: a mistake", file=sys.stderr, flush=True)
        sys.exit(2)
    time.sleep(60)
if sys.argv[2] == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
with Preemption(folder, writes=rank == 0) as preemption:
    (folder / f"ready-{rank}").touch()
    while not preemption.requested or sys.argv[2] == "stuck":
        time.sleep(0.02)
    time.sleep(1)  # a save
(folder / f"saved-{rank}").touch()
sys.exit(75)
"""


def launch(folder: Path, what: str, processes: int, starter: tuple[str, ...] = (), **how: object) -> psutil.Popen:
    """`distill launch`, or another `starter` of processes, with `RANK`."""
    (folder / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    several = ["--num_processes", str(processes)] if processes > 1 else []
    start = starter or (sys.executable, str(ROOT / "scripts/launch.py"), *several)
    command = [*start, str(folder / "rank.py"), str(folder), what]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a child inherits it, and these tests may ignore it
    try:
        return psutil.Popen(command, env=environment, **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **how})
    finally:
        signal.signal(signal.SIGINT, before)


def ready(folder: Path, processes: int, launched: psutil.Popen) -> None:
    end = time.monotonic() + 120
    while len(list(folder.glob("ready-*"))) < processes:
        assert launched.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_is_one_line_and_exit_code_2(processes: int, tmp_path: Path) -> None:
    launched = launch(tmp_path, "mistake", processes)
    said = launched.communicate(timeout=120)[0].decode()
    assert (launched.returncode, said) == (2, "error: a mistake\n")


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    launched = launch(tmp_path, "killed", 2)
    said = launched.communicate(timeout=120)[0].decode()
    assert launched.returncode == 128 + signal.SIGKILL
    assert said.splitlines()[-1].startswith("error: rank 1 was ended by SIGKILL")


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_reaches_every_process_and_is_waited_for(
    number: signal.Signals, processes: int, tmp_path: Path
) -> None:
    launched = launch(tmp_path, "saves", processes)
    ready(tmp_path, processes, launched)
    launched.send_signal(number)
    said = launched.communicate(timeout=120)[0].decode()
    assert launched.returncode == 75 and len(list(tmp_path.glob("saved-*"))) == processes
    lines = ["interrupted: finishing this step and saving it; Ctrl-C again ends at once"] * (number == signal.SIGINT)
    assert said.splitlines() == lines


def test_ctrl_c_in_a_terminal_saves_and_a_second_one_ends_all(tmp_path: Path) -> None:
    """The terminal sends it to the launcher, and, with one process, to that as well: that is still one Ctrl-C."""
    for processes, what, presses, code in ((1, "saves", 1, 75), (2, "stuck", 2, 130)):
        folder = tmp_path / what
        folder.mkdir()
        terminal, inside = pty.openpty()
        how = {"stdin": inside, "stdout": inside, "stderr": inside, "start_new_session": True}
        launched = launch(folder, what, processes, preexec_fn=_takes(inside), **how)
        ready(folder, processes, launched)
        ranks = launched.children()
        for _ in range(presses):
            os.write(terminal, b"\x03")
            time.sleep(1.0)
        assert launched.wait(60) == code
        gone, left = psutil.wait_procs(ranks, timeout=10)
        assert not left and (folder / "saved-0").exists() == (what == "saves")
        os.close(terminal)
        os.close(inside)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
ACCELERATE += ("--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


@pytest.mark.slow
@pytest.mark.parametrize("starter", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_ctrl_c_under_other_launchers_saves_once(starter: tuple[str, ...], tmp_path: Path) -> None:
    """They start ranks in sessions of their own, which the terminal's Ctrl-C does not reach, and hand it on, once."""
    terminal, inside = pty.openpty()
    how = {"stdin": inside, "stdout": inside, "stderr": inside, "start_new_session": True}
    launched = launch(tmp_path, "saves", 2, starter, preexec_fn=_takes(inside), **how)
    ready(tmp_path, 2, launched)
    os.write(terminal, b"\x03")
    assert launched.wait(60) == 1 and len(list(tmp_path.glob("saved-*"))) == 2
    os.close(inside)
    os.set_blocking(terminal, False)
    said = os.read(terminal, 1 << 16).decode()
    assert said.count("interrupted: finishing this step") == 1 and "ended at once" not in said
    os.close(terminal)


def _takes(terminal: int) -> Callable[[], None]:
    """Makes a terminal the one of the session that a child has begun."""

    def take() -> None:
        import fcntl
        import termios

        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    return take
