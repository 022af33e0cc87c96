"""The supervisor in jobs, around work that takes no time: when one goes back to the queue, and when it ends."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from distill.cluster import batch
from distill.cluster.job import Job, Launcher
from tests.slurm.cluster import Cluster, until

FURTHER = "mkdir -p at && date +%s%N >at/DONE"  # the step that the run has reached
ONCE = f"[ -e at ] || {{ {FURTHER}; exit 75; }}"  # asks to be run again the first time


def submitted(slurm: Cluster, folder: Path, work: str, *options: str, **limits: int) -> str:
    command = ("bash", "-euc", f'echo "$SLURM_JOB_ID" >>runs; {work}')
    Job("work", command, ("run", str(folder / "at")), str(folder / "notes"), **limits).write(folder / "job.json")
    given = {"job-name": "work", "chdir": folder, "output": folder / "log"}
    body = batch.supervised(sys.executable, folder / "job.json")
    (folder / "job.sh").write_text(batch.script(batch.options_of(given, options), (), body))
    return slurm.call("sbatch", "--parsable", str(folder / "job.sh"))


OUTCOMES = [
    ("true", "0:0", 0, ""),
    (ONCE, "0:0", 1, "is at step [0-9]+: back to the queue"),
    (f"{FURTHER}; exit 3", "3:0", 0, "error: work: an alarm has ended the run, which is saved at step"),
    (f"{FURTHER}; exit 2", "2:0", 0, "error: work: the settings or the data are wrong"),
    ("exit 5", "5:0", 0, "error: work: ended with exit code 5 and got no further than no checkpoint"),
    ("exit 75", "75:0", 1, "error: work: ended with exit code 75 and has failed 2 times in a row"),
    ("exit 4", "4:0", 1, "error: work: ended with exit code 4 and has failed 2 times in a row"),
    (f"{FURTHER}; echo 3 >$JOB_NOTES/exit-1; exit 137", "3:0", 0, "an alarm has ended the run"),
]


@pytest.fixture(scope="module")
def jobs(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """A job of each piece of work, and its folder: they wait for the queue side by side."""
    folders = {work: tmp_path_factory.mktemp("job") for work, *_ in OUTCOMES}
    return {work: (submitted(slurm, folder, work, max_failures=1), folder) for work, folder in folders.items()}


@pytest.mark.parametrize(("work", "exit_code", "restarts", "words"), OUTCOMES)
def test_a_job_is_run_again_only_if_it_may_help(
    work: str, exit_code: str, restarts: int, words: str, slurm: Cluster, jobs: dict[str, tuple[str, Path]]
) -> None:
    job, folder = jobs[work]
    facts, log = slurm.ended(job), (folder / "log").read_text()
    assert (facts["ExitCode"], facts["Restarts"]) == (exit_code, str(restarts)), log
    assert re.search(words, log) and log.count("error: work:") == (exit_code != "0:0")


WRONG = 'echo "$SLURMD_NODENAME" >>nodes; [ -e seen ] || { touch seen; cp nodes $JOB_NOTES/wrong-machines; exit 76; }'


def test_a_job_is_kept_off_the_machine_that_its_work_found_wrong(slurm: Cluster, tmp_path: Path) -> None:
    facts = slurm.ended(submitted(slurm, tmp_path, WRONG))
    first, second = (tmp_path / "nodes").read_text().split()
    log = (tmp_path / "log").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert first != second and facts["ExcNodeList"] == first and f"work: it is kept off {first} from now on" in log


def test_no_machine_is_left_out_where_too_few_would_be_left(slurm: Cluster, tmp_path: Path) -> None:
    facts = slurm.ended(submitted(slurm, tmp_path, WRONG, "--nodes=2"))
    log = (tmp_path / "log").read_text()
    assert (facts["JobState"], facts["Restarts"], facts["ExcNodeList"]) == ("COMPLETED", "1", "(null)"), log
    assert "cannot be left out: of 2 nodes of all too few would be left" in log


def listening(then: str) -> str:
    """Work in a step that waits for USR1, if it is the first time."""
    inner = f"trap '{then}; exit 75' USR1; touch ready; sleep 60 & wait"
    return f'[ -e at ] || srun bash -c "{inner}"'


@pytest.mark.parametrize(
    ("then", "state", "restarts", "words"),
    [
        (FURTHER, "COMPLETED", "1", "is at step [0-9]+: back to the queue"),
        ("true", "FAILED", "0", "error: work: stopped before it got any further .no checkpoint.: it needs more time"),
    ],
)
def test_a_signal_before_the_time_is_up_reaches_the_steps(
    then: str, state: str, restarts: str, words: str, slurm: Cluster, tmp_path: Path
) -> None:
    job = submitted(slurm, tmp_path, listening(then))
    until((tmp_path / "ready").exists)
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == (state, restarts)
    assert re.search(words, (tmp_path / "log").read_text())


def test_a_task_of_an_array_goes_back_to_the_queue_alone(slurm: Cluster, tmp_path: Path) -> None:
    """The last task has the id of the whole array: to signal or to requeue that id is to do so to all of them."""
    work = f"[ $SLURM_JOB_ID != $SLURM_ARRAY_JOB_ID ] || {ONCE}; sleep 2"
    array = submitted(slurm, tmp_path, work, "--array=0-2")
    tasks = [slurm.ended(f"{array}_{i}") for i in range(3)]
    runs = (tmp_path / "runs").read_text().split()
    assert sorted(facts["Restarts"] for facts in tasks) == ["0", "0", "1"]
    assert len(runs) == 4 and runs.count(array) == 2 and len(set(runs)) == 3


def test_a_cancelled_job_stays_cancelled_and_takes_what_waits_for_it_along(slurm: Cluster, tmp_path: Path) -> None:
    job = submitted(slurm, tmp_path, listening(FURTHER))
    (tmp_path / "after").mkdir()
    after = submitted(slurm, tmp_path / "after", "true", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    until((tmp_path / "ready").exists)
    slurm.call("scancel", job)
    assert {slurm.ended(one)["JobState"] for one in (job, after)} == {"CANCELLED"}
    assert slurm.facts(job)["Restarts"] == "0" and not (tmp_path / "after" / "runs").exists()


def test_the_exit_code_of_one_node_is_the_jobs(slurm: Cluster, tmp_path: Path) -> None:
    """Through `accelerate launch`, whose own is always 1, and srun, which kills the other node for it."""
    script = "import os, sys, time\nif os.environ['RANK'] == '0':\n    time.sleep(60)\nsys.exit(3)\n"
    (tmp_path / "rank.py").write_text(script)
    options = ["--nodes=2", "--gpus-per-node=1", "--exclusive"]
    job = submitted(slurm, tmp_path, f"{FURTHER}; {shlex.join(Launcher().command())} rank.py", *options)
    facts, log = slurm.ended(job), (tmp_path / "log").read_text()
    assert (facts["ExitCode"], facts["NumNodes"], facts["Restarts"]) == ("3:0", "2", "0"), log
    assert (tmp_path / "notes" / job / "exit-1").read_text() == "3\n"
