"""The supervisor around real processes, without SLURM: signals, exit codes, what it keeps, and what it costs."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill.cluster.by_hand import job_by_hand
from distill.cluster.job import Job, Launcher
from distill.cluster.node import launch_command
from distill.cluster.progress import progress
from distill.cluster.scheduler import job_of

ROOT = Path(__file__).resolve().parents[2]
FURTHER = "mkdir -p run && echo {} >run/DONE"


def started(folder: Path, work: str, progress: tuple[str, str] | None = None, **limits: int) -> psutil.Popen:
    """The supervisor of a piece of bash, which is at the step that `run/DONE` says."""
    at = progress or ("run", str(folder / "run"))
    Job("work", ("bash", "-c", work), at, str(folder / "notes"), **limits).write(folder / "job.json")
    command = [sys.executable, "-m", "distill.cluster.supervise", str(folder / "job.json")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return psutil.Popen(command, cwd=folder, env=environment, text=True, **streams)


def until(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(supervisor: psutil.Popen) -> tuple[int, str]:
    said = supervisor.communicate(timeout=60)[0]
    return supervisor.returncode, said


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [
        ("true", 0, ""),
        (FURTHER.format(1) + "; exit 75", 75, "work ended with exit code 75 and is at step 1: run it again\n"),
        (
            FURTHER.format(1) + "; exit 3",
            3,
            "error: work: an alarm has ended the run, which is saved at step 1\n",
        ),
        ("exit 5", 5, "error: work: ended with exit code 5 and got no further than no checkpoint\n"),
        ("kill -KILL $$", 75, "work ended with exit code 137 and is at no checkpoint: run it again\n"),
        ("echo 2 >$JOB_NOTES/exit-1; exit 137", 2, "error: work: the settings or the data are wrong, see above\n"),
        (
            FURTHER.format(4) + "; echo 75 | tee $JOB_NOTES/exit-0 >$JOB_NOTES/exit-1; exit 137",
            75,
            "work ended with exit code 75 and is at step 4: run it again\n",
        ),
    ],
)
def test_the_exit_code_of_the_work_is_never_lost(work: str, code: int, words: str, tmp_path: Path) -> None:
    assert ended(started(tmp_path, work)) == (code, words)


def test_machines_that_the_work_finds_wrong_are_named_and_those_of_an_earlier_start_count(tmp_path: Path) -> None:
    said: list[str] = []
    for machines in ("n1 n2", "n2 n3", "", "n4 n5", "n4"):
        work = f"printf '%s\\n' {machines} >$JOB_NOTES/wrong-machines; exit 76"
        code, words = ended(started(tmp_path, work, max_failures=9))
        assert code == 75
        said.append(words.removeprefix("work ended with exit code 76 and is at no checkpoint: run it again\n"))
    assert said[:3] == ["work: on another machine than n1, n2\n", "work: on another machine than n3\n", ""]
    assert said[3].startswith("work: n4, n5 stay: no more than 4 machines are left out")
    assert said[4] == "work: on another machine than n4\n"


def test_failures_in_a_row_without_progress_end_the_job(tmp_path: Path) -> None:
    def once(work: str) -> int:
        return ended(started(tmp_path, work, max_failures=1))[0]

    further = "mkdir -p run && date +%s%N >run/DONE; exit 5"
    assert [once(work) for work in ("kill -KILL $$", further, "kill -KILL $$")] == [75, 75, 75]
    assert once("kill -KILL $$") == 137
    assert (tmp_path / "notes" / "alone" / "failures").read_text() == "2\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_work_that_is_asked_to_end_is_waited_for(number: signal.Signals, tmp_path: Path) -> None:
    """A second signal, and one that comes while the work saves, change nothing."""
    name = number.name.removeprefix("SIG")
    save = f"sleep .3; {FURTHER.format(8)}; exit 75"
    supervisor = started(tmp_path, f"trap '{save}' {name}; touch ready; while :; do sleep .02; done")
    until(tmp_path / "ready")
    supervisor.send_signal(number)
    time.sleep(0.1)
    supervisor.send_signal(number)
    assert ended(supervisor) == (75, "work ended with exit code 75 and is at step 8: run it again\n")


def test_work_that_does_not_listen_to_usr1_is_sent_term_before_its_time_is_up(tmp_path: Path) -> None:
    work = f"trap '' USR1; trap '{FURTHER.format(2)}; exit 1' TERM; touch ready; while :; do sleep .02; done"
    supervisor = started(tmp_path, work, grace_seconds=61)
    until(tmp_path / "ready")
    asked = time.monotonic()
    supervisor.send_signal(signal.SIGUSR1)
    code, said = ended(supervisor)
    assert (code, said) == (75, "work ended with exit code 1 and is at step 2: run it again\n")
    assert 0.9 < time.monotonic() - asked < 20
    assert not (tmp_path / "notes" / "alone" / "failures").exists()  # it was asked to


def test_what_the_batch_script_ignores_until_the_supervisor_listens_reaches_the_work(tmp_path: Path) -> None:
    """What a shell ignores, all that it starts would ignore too."""
    work = f"trap '{FURTHER.format(3)}; exit 75' USR1; touch ready; while :; do sleep .02; done"
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        supervisor = started(tmp_path, work)
    finally:
        signal.signal(signal.SIGUSR1, before)
    until(tmp_path / "ready")
    supervisor.send_signal(signal.SIGUSR1)
    assert ended(supervisor)[0] == 75


def test_it_starts_at_once_and_holds_little_memory(tmp_path: Path) -> None:
    """It stands beside a job for days, and must not load torch. CPU seconds, which other work does not lengthen."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    supervisor = started(tmp_path, "touch ready; while [ ! -e go ]; do sleep .02; done")
    until(tmp_path / "ready")
    mebibytes = supervisor.memory_info().rss / 2**20
    (tmp_path / "go").touch()
    assert ended(supervisor)[0] == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5 and mebibytes < 40


def test_a_job_of_settings_alone_is_composed_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = ["experiment=quickstart", f"output_dir={tmp_path}/a run", f"data.store={tmp_path}/store"]
    own = ["slurm.processes_per_node=2", "slurm.container=apptainer exec a.sif", "slurm.grace_seconds=300"]
    job = job_by_hand("make_trajectories", [*settings, *own])
    assert job.command[-6:] == ("-m", "distill", "trajectories", *settings)
    assert "apptainer exec a.sif python -m distill.cluster.node processes_per_node=2 -- " in " ".join(job.command)
    assert job.progress == ("store", f"{tmp_path}/store") and job.notes == f"{tmp_path}/a run/slurm"
    assert (job.grace_seconds, job.max_failures) == (300, 3)
    with pytest.raises(ValueError, match="these settings cannot be run, see above"):
        job_by_hand("train", ["no_such_key=1"])
    monkeypatch.setenv("MAX_FAILURES", "1")
    with pytest.raises(ValueError, match="the environment variable MAX_FAILURES is a setting now: slurm.max_failures="):
        job_by_hand("train", settings)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing.json"], "error: nothing.json is no job that distill submit has written: "),
        (["trane", "seed=1"], "error: 'trane' is no job's file and no command; allowed: train, trajectories"),
        (["train", "slurm.nodes=2"], "error: slurm.nodes: here it is an option of sbatch, or none at all; allowed: "),
        (["train", "slurm.max_failures=x"], "error: slurm.max_failures='x' is no whole number"),
    ],
)
def test_what_is_no_job_is_one_line(arguments: list[str], line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill.cluster.supervise", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    said = done.stderr.decode()
    assert done.returncode == 2 and said.startswith(line) and said.count("\n") == 1


def test_a_job_is_the_same_after_it_was_written(tmp_path: Path) -> None:
    job = Job("a", ("b", "c d"), ("store", "s3://x"), "notes", 300, 0)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job and [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_how_far_work_is_shows_on_disk(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert progress("run", str(run)) == "no checkpoint" and progress("files", str(run)) == "0 files"
    for step, whole in ((100, True), (200, True), (300, False)):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        if whole:
            (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").touch()
    assert progress("run", str(run)) == "step 200" and progress("files", str(run)) == "2 files"
    (run / "DONE").write_text("400\n")
    assert progress("run", str(run)) == "step 400"
    (tmp_path / "store").mkdir()
    for name in ("shard-000000.json", "shard-000000.tar", "shard-000001.json", "index.json"):
        (tmp_path / "store" / name).write_text(json.dumps({}))
    assert progress("store", str(tmp_path / "store")) == "2 shards"
    assert progress("store", "nosuch://a").startswith("unknown: ")


NODE = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "4", "SLURM_NODEID": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "9"}


def test_a_node_starts_its_share_of_the_processes() -> None:
    command = launch_command(["--", "-m", "distill", "train", "seed=1"], NODE | {"SLURM_GPUS_ON_NODE": "8"})
    said = " ".join(command)
    assert "--num_processes 32 --num_machines 4 --machine_rank 2" in said
    assert "--main_process_ip n1 --main_process_port 9" in said and said.endswith("-m distill train seed=1")
    own = ["processes_per_node=3", "launch_flag=--use_fsdp", "launch_flag=--debug", "train", "processes_per_node=9"]
    said = " ".join(launch_command(own, NODE))
    assert "launch --use_fsdp --debug --num_processes 12 " in said and said.endswith("train processes_per_node=9")
    for wrong, line in (
        ([], "no command is given"),
        (["processes_per_node=0", "x"], "'0' is no number"),
    ):
        with pytest.raises(ValueError, match=line):
            launch_command(wrong, NODE)
    with pytest.raises(ValueError, match="SLURM_NODEID is not set: this is for srun"):
        launch_command(["train"], {name: value for name, value in NODE.items() if name != "SLURM_NODEID"})
    with pytest.raises(ValueError, match="variable LAUNCH_FLAGS is a setting now: slurm.launch_flags=…; unset it"):
        launch_command(["train"], NODE | {"LAUNCH_FLAGS": "--multi_gpu"})


def test_a_launcher_says_what_srun_starts_on_each_node() -> None:
    plain = Launcher("py", 2, ("--use_fsdp",)).command()
    assert plain[0] == "srun" and plain[-6:] == (
        "py",
        "-m",
        "distill.cluster.node",
        "processes_per_node=2",
        "launch_flag=--use_fsdp",
        "--",
    )
    within = Launcher("py", container=("apptainer", "exec", "--nv", "a.sif")).command()
    assert within[-8:] == ("apptainer", "exec", "--nv", "a.sif", "python", "-m", "distill.cluster.node", "--")


def test_a_task_of_an_array_is_named_by_its_array() -> None:
    task = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_of(task) == "70_3" and job_of({"SLURM_JOB_ID": "70"}) == "70"
