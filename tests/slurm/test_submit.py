"""Jobs from `distill submit` to their ends: trajectories, training on two nodes, and what befalls them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.config.loading import load
from distill.config.settings import TrainSettings
from tests.forked import python
from tests.slurm.cluster import Cluster, until

STEPS = 30
REAL = f"slurm.python={sys.executable}"  # forks are not below the processes that SLURM has started, and signals


def submit(slurm: Cluster, output_dir: Path, settings: list[str], *more: str, **environment: str) -> str:
    """The id of a job of `distill submit`."""
    given = [*settings, f"output_dir={output_dir}", *more]
    said = slurm.call(python(), "-m", "distill", "submit", *given, both=True, **environment)
    return said.partition("INFO job ")[2].split()[0]


def train(slurm: Cluster, output_dir: Path, tiny: list[str], store: Path, *more: str, **environment: str) -> str:
    """Two nodes, a process each."""
    sizes = [f"data.store={store}", f"max_train_steps={STEPS}", "slurm.nodes=2", "slurm.gpus_per_node=1"]
    return submit(slurm, output_dir, tiny, *sizes, "slurm.options=[--exclusive]", *more, **environment)


def log_of(output_dir: Path) -> str:
    return "".join(path.read_text() for path in (output_dir / "slurm").glob("*.log"))


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "checkpoints" / f"step-{STEPS:08d}" / "student" / "weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def undisturbed(slurm: Cluster, tiny: list[str], store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two nodes that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    job = train(slurm, folder, tiny, store, WANDB_API_KEY="secret-of-tests", HF_TOKEN="secret-of-tests")
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["NumNodes"], facts["Restarts"]) == ("COMPLETED", "2", "0"), log_of(folder)
    return folder


def test_a_submitted_run_is_what_was_composed_and_holds_no_secrets(
    undisturbed: Path, tiny: list[str], store: Path
) -> None:
    composed = [*tiny, f"data.store={store}", f"max_train_steps={STEPS}", f"output_dir={undisturbed}"]
    expected = load("train", TrainSettings, composed)
    for written in (undisturbed / "slurm" / "train.yaml", undisturbed / "config.yaml"):
        assert TrainSettings.model_validate(yaml.safe_load(written.read_text())) == expected
    script = (undisturbed / "slurm" / "train.sbatch").read_text()
    for option in ("job-name=undisturbed", "nodes=2", "gpus-per-node=1", "exclusive"):
        assert f"#SBATCH --{option}\n" in script
    assert (undisturbed / "DONE").read_text() == f"{STEPS}\n"
    for path in undisturbed.rglob("*"):
        assert path.is_dir() or b"secret-of-tests" not in path.read_bytes(), path


def begun(output_dir: Path, steps: int) -> bool:
    metrics = output_dir / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text().splitlines()) >= steps


def test_usr1_saves_and_the_job_goes_on_to_the_same_weights(
    slurm: Cluster, undisturbed: Path, tiny: list[str], store: Path, tmp_path: Path
) -> None:
    """The job is one that `sbatch` alone was given, and comes to the weights of one that was submitted."""
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    shape = ["--nodes=2", "--gpus-per-node=1", "--exclusive", f"--output={tmp_path}/run/slurm/%j.log"]
    settings = [*tiny, f"data.store={store}", f"max_train_steps={STEPS}", f"output_dir={tmp_path}/run"]
    job = slurm.call("sbatch", "--parsable", *shape, "slurm/train.sbatch", *settings, PYTHON=sys.executable)
    until(lambda: begun(tmp_path / "run", 3), why=lambda: log_of(tmp_path / "run"))
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    facts, log = slurm.ended(job), log_of(tmp_path / "run")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert "error: train:" not in log and log.count("back to the queue") == 1
    assert same(weights(tmp_path / "run"), weights(undisturbed))


@pytest.mark.faults
def test_a_killed_rank_ends_the_job_which_goes_on_to_the_same_weights(
    slurm: Cluster, undisturbed: Path, tiny: list[str], store: Path, tmp_path: Path
) -> None:
    job = train(slurm, tmp_path / "run", tiny, store, "checkpointing_steps=4", REAL)
    until(lambda: begun(tmp_path / "run", 6), why=lambda: log_of(tmp_path / "run"))
    (rank,) = started(tmp_path, RANK="1")
    rank.kill()
    facts, log = slurm.ended(job), log_of(tmp_path / "run")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert not (tmp_path / "run" / "slurm" / job / "failures").exists()  # it had got further
    assert same(weights(tmp_path / "run"), weights(undisturbed))


def started(folder: Path, **environment: str) -> list[psutil.Process]:
    """Processes that were started by a launcher with settings below `folder`, and have this in their environment."""
    return [process for process in psutil.process_iter() if _is(process, folder, environment)]


def writers(folder: Path, task: str) -> list[psutil.Process]:
    """Of what was started for a task of an array, the processes that write, and not those that have started them."""
    command = ["-m", "distill", "trajectories"]
    return [one for one in started(folder, SLURM_ARRAY_TASK_ID=task) if one.cmdline()[1:4] == command]


def _is(process: psutil.Process, folder: Path, wanted: dict[str, str]) -> bool:
    try:
        ours = any(str(folder) in word for word in process.cmdline())
        return ours and wanted.items() <= process.environ().items()
    except psutil.Error:
        return False


def test_a_sweep_is_an_array_whose_tasks_are_run_again_by_themselves_and_ends_with_a_page(
    slurm: Cluster, tiny: list[str], store: Path, tmp_path: Path
) -> None:
    """One of its two runs is stopped before its time is up; the other one is not."""
    settings = [f"data.store={store}", f"max_train_steps={STEPS}", "engine=single", f"output_dir={tmp_path}/out"]
    command = [*tiny, *settings, "learning_rate=1e-4,1e-3", "slurm.parallel=2", REAL]
    said = slurm.call(python(), "-m", "distill", "submit", "-m", *command, both=True)
    array, page = re.findall(r"INFO job (\d+):", said)
    stopped = tmp_path / "out" / "learning_rate=0.001"
    until(lambda: begun(stopped, 3), why=lambda: log_of(tmp_path / "out"))
    slurm.call("scancel", "--signal=USR1", "--batch", f"{array}_1")
    tasks, log = [slurm.ended(f"{array}_{i}") for i in range(2)], log_of(tmp_path / "out")
    assert [(facts["JobState"], facts["Restarts"]) for facts in tasks] == [("COMPLETED", "0"), ("COMPLETED", "1")], log
    assert slurm.ended(page)["JobState"] == "COMPLETED", log_of(tmp_path / "out")
    shown = (tmp_path / "out" / "index.html").read_text()
    for name in ("learning_rate=0.0001", "learning_rate=0.001"):
        assert (tmp_path / "out" / name / "DONE").read_text() == f"{STEPS}\n" and name in shown


def test_a_killed_task_of_an_array_is_run_again_and_the_store_is_the_same(
    slurm: Cluster, tiny: list[str], store: Path, tmp_path: Path
) -> None:
    settings = [*tiny, f"data.store={tmp_path}/store"]
    command = ["slurm.script=trajectories", "slurm.array=2", REAL]
    array = submit(slurm, tmp_path / "run", settings, *command)
    until(lambda: writers(tmp_path, "1") != [], why=lambda: log_of(tmp_path / "run"))
    (rank,) = writers(tmp_path, "1")
    until((tmp_path / "store" / "shard-000001.json").exists, every=0.001)
    rank.kill()
    tasks, log = [slurm.ended(f"{array}_{i}") for i in range(2)], log_of(tmp_path / "run")
    assert [(facts["JobState"], facts["Restarts"]) for facts in tasks] == [("COMPLETED", "0"), ("COMPLETED", "1")], log
    found, expected = files(tmp_path / "store"), files(store)
    assert found.keys() == expected.keys() and [name for name in found if found[name] != expected[name]] == []


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
