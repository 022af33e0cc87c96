"""What the environment says of launchers is believed, put aside or refused; and a rank without its launcher ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill.commands.running import RANK_0_SECONDS
from distill.training.launched import LaunchError, require_one_task, settle
from tests.faults.ranks import ROOT
from tests.forked import unlaunched

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def test_what_a_launcher_says_is_believed() -> None:
    environment = LAUNCHED | {"TORCHELASTIC_RUN_ID": "none", "PATH": "/bin"}
    settle(environment)
    assert environment == LAUNCHED | {"TORCHELASTIC_RUN_ID": "none", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
        ({"RANK": "0"}, "RANK=0"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "WORLD_SIZE=4 LOCAL_RANK=3"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALNRANKS": "4"}, "PMI_SIZE=4"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1"}, "MV2_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
    ],
)
def test_what_earlier_launches_have_left_is_put_aside(
    left: dict[str, str], says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """No process of them runs: whoever believed it would wait for them."""
    environment = {"PATH": "/bin", "SLURM_JOB_ID": "7"} | left
    settle(environment)
    assert environment == {"PATH": "/bin", "SLURM_JOB_ID": "7"}
    said = [record.message for record in caplog.records]
    assert said == [] if says is None else (len(said) == 1 and says in said[0] and "put aside" in said[0])


def test_mpis_variables_are_put_aside_for_a_launched_rank_too(caplog: pytest.LogCaptureFixture) -> None:
    environment = LAUNCHED | {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "7"}
    settle(environment)
    assert environment == LAUNCHED and not caplog.records


@pytest.mark.parametrize(
    "wrong", [{"WORLD_SIZE": "x"}, {"RANK": ""}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}]
)
def test_numbers_that_are_none_are_one_line(wrong: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="the environment says .*unset") as error:
        settle(dict(wrong))
    assert "\n" not in str(error.value)


def test_processes_that_know_nothing_of_each_other_are_refused(tmp_path: Path) -> None:
    """Several tasks of srun; several processes of mpirun, which this test plays by its name."""
    require_one_task({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    require_one_task({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "RANK": "0", "WORLD_SIZE": "4"})
    with pytest.raises(LaunchError, match="srun has started 4 of these processes.*python -m distill.cluster.node"):
        require_one_task({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"})
    (tmp_path / "mpirun").symlink_to("/bin/bash")
    check = "from distill.training.launched import settle; settle()"
    environment = {**unlaunched(), "PYTHONPATH": str(ROOT), "OMPI_COMM_WORLD_SIZE": "4"}
    command = [str(tmp_path / "mpirun"), "-c", f"{sys.executable} -c '{check}'; exit $?"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "LaunchError: mpirun has started 4 of these processes" in done.stderr
    assert "distill launch --num_processes 4" in done.stderr


RANK = """
import sys, time
from distill.training.launched import follow_launcher, launcher_gone, save_without_launcher
follow_launcher()
if sys.argv[1] == "saves":
    save_without_launcher()
print("ready", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end and not launcher_gone():
    time.sleep(0.05)
print("saved", flush=True)
"""


def orphaned(tmp_path: Path, how: str, environment: dict[str, str], shell: bool = False) -> tuple[bool, str]:
    """A child of a process that is killed: whether it ended in 10 s, and what it said."""
    (tmp_path / "rank.py").write_text(RANK)
    log = tmp_path / "log"
    own = unlaunched()
    start = f"{sys.executable} {tmp_path}/rank.py {how} >{log} 2>&1"
    parent = ["bash", "-c", f"{start}; true"]
    if not shell:
        call = f"import subprocess; subprocess.run([{sys.executable!r}, {str(tmp_path / 'rank.py')!r}, {how!r}],"
        parent = [sys.executable, "-c", f"{call} stdout=open({str(log)!r}, 'w'))"]
    launcher = psutil.Popen(parent, env={**own, "PYTHONPATH": str(ROOT), **environment}, start_new_session=True)
    while not (log.exists() and "ready" in log.read_text()):
        assert launcher.poll() is None
        time.sleep(0.02)
    (rank,) = launcher.children()
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    gone, _ = psutil.wait_procs([rank], timeout=10 if environment and not shell else 3)
    if not gone:
        rank.kill()
    return bool(gone), log.read_text()


def test_a_rank_whose_launcher_is_killed_saves(tmp_path: Path) -> None:
    assert orphaned(tmp_path, "saves", LAUNCHED) == (True, "ready\nsaved\n")


def test_a_rank_whose_launcher_is_killed_before_it_can_save_ends(tmp_path: Path) -> None:
    """It sleeps here; it may as well wait for other ranks, half an hour."""
    (tmp_path / "sleeps").mkdir()
    ended, said = orphaned(tmp_path, "sleeps", LAUNCHED)
    assert ended and said.startswith("ready\n")


@pytest.mark.parametrize("environment", [{}, LAUNCHED], ids=["plain", "exported"])
def test_what_a_shell_has_started_outlives_it(environment: dict[str, str], tmp_path: Path) -> None:
    """nohup, setsid and disown are usual; also with the variables of ranks that somebody has exported."""
    assert orphaned(tmp_path, "saves", environment, shell=True) == (False, "ready\n")


def test_of_ranks_that_make_one_mistake_the_first_says_it() -> None:
    assert RANK_0_SECONDS < 30  # a launcher has ended the others by then; one that alone makes it still says it
    command = [sys.executable, str(ROOT / "scripts/train.py"), "no_such_key=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = ranks[0].communicate(timeout=120)[1]
    assert ranks[0].returncode == 2 and said.startswith("error: ") and said.count("\n") == 1
    ranks[1].terminate()
    assert ranks[1].communicate(timeout=20)[1] == ""


CHILD = "from distill.training.launched import only_one_process; print(only_one_process())"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--num_processes", "2"], {}, "is to start 2 processes and has started one, .*add --multi_gpu"),
        (["--num_processes=2"], {"WORLD_SIZE": "2", "RANK": "1"}, "None"),
    ],
)
def test_one_process_where_more_were_asked_for(arguments: list[str], variables: dict[str, str], words: str) -> None:
    """The parent has the arguments of `accelerate launch`, and hands on the variables that it does."""
    environment = unlaunched()
    environment |= {"ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", PARENT, CHILD, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert re.search(words, ended.stdout), ended.stdout
