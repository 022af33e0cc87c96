"""`distill submit` without a cluster: what it refuses, and what it writes. With one: tests/slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml

from distill.cluster.job import Job
from distill.commands import submit_chain, submit_sweep, trajectories
from distill.commands.submit import main
from distill.config.composition import CONFIG_DIRS
from distill.config.loading import ConfigError, given, load
from distill.config.settings import RunChainSettings, SubmitChainSettings, SubmitSettings, TrainSettings

TOY = ["experiment=lcm_toy", "slurm.script=trajectories"]


def submit(*settings: str) -> None:
    main(load("submit", SubmitSettings, settings))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["slurm.nodes=0"], "slurm.nodes=0: must be greater than or equal to 1"),
        (["slurm.time=1h"], "slurm.time: '1h' is not a time such as 12:00:00 or 2-00:00:00"),
        (["slurm.time=60"], "slurm.time: '60' is not a time such as 12:00:00 or 2-00:00:00"),
        (["slurm.mem=lots"], "slurm.mem: 'lots' is not an amount of memory such as 200G"),
        (["slurm.account='a\n#SBATCH --x'"], "slurm.account: 'a\\n#SBATCH --x' is not a name"),
        (["slurm.options=['--qos=high low']"], "slurm.options.0: '--qos=high low' is not an option of sbatch such as"),
        (["slurm.partitoin=a"], "unknown key 'slurm.partitoin' (did you mean 'slurm.partition'?)"),
        (["slurm.script=train", "slurm.array=4"], "slurm.array is for slurm.script=trajectories: a run is one job"),
        (["slurm.script=train", "slurm.nodes=2"], "engine=single is one process, and the job has 2: set engine=zero2"),
        (
            ["slurm.script=train", "engine=zero2", "slurm.nodes=3", "slurm.gpus_per_node=7"],
            "global_batch_size=64 must be a multiple of 21: 21 processes x gradient_accumulation_steps=1",
        ),
        (["slurm.parallel=2"], "slurm.parallel is for arrays and sweeps: set slurm.array too"),
        (["slurm.script=evaluate"], "slurm.script='evaluate': must be 'train' or 'trajectories'"),
        (["slurm.setup=['a\nb']"], "slurm.setup.0: 'a\\nb' is not a line of bash"),
        (["slurm.launch_flags=[x]"], "slurm.launch_flags.0: 'x' is not a flag of distill launch such as --use_fsdp"),
        (["data.prompts=null"], "data.prompts has no value: set data.prompts=FILE"),
    ],
)
def test_what_the_job_would_end_with_is_said_before_it_is_submitted(
    settings: list[str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        submit(*TOY, f"output_dir={tmp_path}/run", *settings)
    assert str(error.value).startswith(line)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_what_a_job_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a run"
    shape = [
        "slurm.array=3",
        "slurm.parallel=2",
        "slurm.nodes=2",
        "slurm.gpus_per_node=4",
        "slurm.max_failures=7",
        "slurm.time=1:00:00",
        "slurm.mem=8G",
        "slurm.grace_seconds=300",
    ]
    submit(
        *TOY,
        f"output_dir={folder}",
        *shape,
        "slurm.options=['--qos=high']",
        "slurm.setup=['module load x']",
        "dry_run=true",
    )
    written = folder / "slurm" / "trajectories.yaml"
    assert given([f"settings={written}"], "train", TrainSettings) == load(
        "train", TrainSettings, [TOY[0], f"output_dir={folder}"]
    )
    script = (folder / "slurm" / "trajectories.sbatch").read_text()
    assert capsys.readouterr().out == f"{script}\n{written.read_text()}\n"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    said = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {
        "--array=0-2%2",
        "--gpus-per-node=4",
        "--nodes=2",
        "--time=1:00:00",
        "--mem=8G",
        "--qos=high",
        "--requeue",
    } <= set(said)
    assert f'--output="{folder}/slurm/%x-%A-%a.log"' in said
    assert "--signal=B:USR1@300" in said and not any("cpus" in line or "None" in line for line in said)
    assert lines[-3:] == [
        "module load x",
        "trap '' USR1 # until the supervisor listens",
        f"exec {sys.executable} -m distill.cluster.supervise '{folder}/slurm/trajectories.json'",
    ]
    job = Job.read(folder / "slurm" / "trajectories.json")
    assert job.command[-3:] == ("distill", "trajectories", f"settings={written}") and job.command[0] == "srun"
    assert (job.grace_seconds, job.max_failures) == (300, 7) and job.progress[0] == "store"
    with pytest.raises(ConfigError, match="is all of the settings: nothing may be given beside it"):
        given([f"settings={written}", "seed=1"], "train", TrainSettings)


def test_the_settings_of_a_job_are_not_composed_again(tmp_path: Path) -> None:
    """What a job runs is what was submitted, whatever has become of configs/ since."""
    submit(*TOY, f"output_dir={tmp_path}/run", "dry_run=true")
    written = tmp_path / "run" / "slurm" / "trajectories.yaml"
    changed = yaml.safe_load(written.read_text()) | {"lr_warmup_steps": 77}  # as no config says it
    written.write_text(yaml.safe_dump(changed))
    assert given([f"settings={written}"], "train", TrainSettings).lr_warmup_steps == 77


def test_without_sbatch_the_script_is_written_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not installed here; .* is written"):
        submit(*TOY, f"output_dir={tmp_path}/run")
    assert (tmp_path / "run" / "slurm" / "trajectories.sbatch").is_file()


def test_a_site_writes_down_once_what_its_jobs_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm").mkdir()
    own = "defaults: [default]\npartition: gpu\nsetup: [module load x]\n"
    (tmp_path / "slurm" / "mysite.yaml").write_text(own)
    monkeypatch.setenv(CONFIG_DIRS, str(tmp_path))
    slurm = load("submit", SubmitSettings, ["experiment=quickstart", "slurm=mysite", "slurm.nodes=2"]).slurm
    assert (slurm.partition, slurm.setup, slurm.nodes, slurm.max_failures) == ("gpu", ["module load x"], 2, 3)


CHAIN = ["chain=lcm_toy", "slurm.nodes=2", "overrides=['engine=zero2']"]


def chain(*settings: str) -> None:
    submit_chain.main(load("submit_chain", SubmitChainSettings, settings))


def test_every_link_of_a_chain_has_the_shape_that_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All nodes for a training, an array for a store, one node for what only looks."""
    more = ["slurm.array=4", "slurm.launch_flags=['--debug']", "slurm.container='apptainer exec a.sif'", "dry_run=true"]
    chain(*CHAIN, *more, f"output_dir={tmp_path}/run")
    folder = tmp_path / "run" / "slurm"
    scripts = {path.stem: path.read_text() for path in folder.glob("*.sbatch")}
    assert capsys.readouterr().out.count("#!/usr/bin/env bash") == len(scripts) == 4
    assert ["--array" in scripts[name] for name in ("store", "verify", "run", "report")] == [True, False, False, False]
    assert ["--nodes=2" in scripts[name] for name in ("store", "verify", "run", "report")] == [True, False, True, False]
    jobs = {name: Job.read(folder / f"{name}.json") for name in scripts}
    assert [jobs[name].progress[0] for name in ("store", "verify", "run", "report")] == [
        "store",
        "files",
        "run",
        "files",
    ]
    for name, job in jobs.items():
        settings = given([job.command[-1]], "run_chain", RunChainSettings)
        assert settings.link == name and job.command[1:4] == ("-m", "distill", "chain")
        launch = " apptainer exec a.sif python -m distill.cluster.node launch_flag=--debug --"
        assert settings.launch is None if name in ("verify", "report") else str(settings.launch).endswith(launch)
        subprocess.run(["bash", "-n"], input=scripts[name], text=True, check=True)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["overrides=['engine=single']"], "link run: engine=single is one process, and the job has 2"),
        (["slurm.nodes=3"], "link run: global_batch_size=64 must be a multiple of 3"),
        (["overrides=['data.prompts=nothing.txt']"], "link store: .*nothing.txt"),
        (["overrides=['learning_rate=x']"], "link store: learning_rate='x': must be a number"),
        (["slurm.parallel=3"], "slurm.parallel is for arrays: set slurm.array too"),
        (["slurm.script=train"], "unknown key 'slurm.script'"),
    ],
)
def test_a_chain_is_checked_whole_before_any_of_it_is_submitted(settings: list[str], line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=line):
        chain(*CHAIN, *settings, f"output_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_a_chain_that_is_done_is_not_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no sbatch here that could be asked; the same chain with more samples needs one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    own = ["data.num_samples=4", "data.samples_per_shard=4", "data.batch_size=4", "data.solver_steps=10"]
    trajectories.main(load("train", TrainSettings, ["experiment=lcm_toy", f"data.store={tmp_path}/run/store", *own]))
    links = "chain.links=[{name:store,script:make_trajectories}]"
    chain("chain=lcm_toy", links, f"output_dir={tmp_path}/run", f"overrides=[{','.join(own)}]")
    assert not list((tmp_path / "run" / "slurm").glob("*.sbatch"))
    more = ",".join(["data.num_samples=8", *own[1:]])
    with pytest.raises(ConfigError, match="sbatch is not installed here; .*store.sbatch is written"):
        chain("chain=lcm_toy", links, f"output_dir={tmp_path}/run", f"overrides=[{more}]")


def test_the_earlier_script_for_chains_types_the_new_command(tmp_path: Path) -> None:
    command = ["bash", "slurm/chain.sh", "chain=lcm_toy", "a=['b','c d']", "--", "--nodes=4", "--gpus-per-node=8"]
    given = {"PYTHON": "echo", "ARRAY": "16", "LAUNCH_FLAGS": "--multi_gpu --debug"}
    options = ["--time=1:00:00", "--qos=high", "--exclude=n7"]
    done = subprocess.run([*command, *options], env=os.environ | given, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "-m distill submit chain=lcm_toy a=['b','c d'] slurm.nodes=4 slurm.gpus_per_node=8 slurm.time=1:00:00 "
        "slurm.options=['--qos=high','--exclude=n7'] slurm.array=16 slurm.launch_flags=[--multi_gpu,--debug]\n"
    )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a sweep of four runs of the toy, one of which is finished; their store is there."""
    folder = tmp_path_factory.mktemp("sweep")
    toy = ["experiment=quickstart", "engine=single", f"data.store={folder}/store", "data.num_samples=8"]
    toy += ["data.samples_per_shard=8", "data.solver_steps=10", "global_batch_size=4", "max_train_steps=2"]
    toy += ["lr_warmup_steps=0", "validation_prompts=null"]
    trajectories.main(load("train", TrainSettings, toy))
    done = folder / "out" / "learning_rate=0.001,seed=0"
    done.mkdir(parents=True)
    (done / "DONE").write_text("2\n")
    return [*toy, f"output_dir={folder}/out", "learning_rate=1e-4,1e-3", "seed=0,1"]


@pytest.fixture(scope="module")
def shown(sweep: list[str]) -> str:
    """What a dry run of it prints."""
    with redirect_stdout(StringIO()) as printed:
        assert submit_sweep.sweep("submit", [*sweep, "slurm.parallel=2", "slurm.time=1:00:00", "dry_run=true"]) == 0
    return printed.getvalue()


def test_a_sweep_is_one_array_with_a_task_for_each_unfinished_run_and_a_page(sweep: list[str], shown: str) -> None:
    out = Path(sweep[-3].removeprefix("output_dir="))
    array, page = shown.split("#!/usr/bin/env bash")[1:]
    assert "#SBATCH --array=0,1,3%2\n" in array and "--array" not in page
    assert "#SBATCH --time=1:00:00\n" in array and "#SBATCH --time=1:00:00\n" in page
    assert array.rstrip().endswith(f'supervise {out}/slurm/tasks/"$SLURM_ARRAY_TASK_ID".json')
    for number, name in enumerate(
        f"learning_rate={rate},seed={seed}" for rate in ("0.0001", "0.001") for seed in (0, 1)
    ):
        job = Job.read(out / "slurm" / "tasks" / f"{number}.json")
        settings = given([job.command[-1]], "train", TrainSettings)
        assert Path(settings.output_dir) == out / name and job.progress == ("run", str(out / name))
        assert (f"learning_rate={settings.learning_rate}", f"seed={settings.seed}") == tuple(name.split(","))


def test_the_page_of_a_sweep_says_which_runs_are_not_finished(
    sweep: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(sweep[-3].removeprefix("output_dir="))
    (out / "learning_rate=0.001,seed=0" / "metrics.jsonl").write_text('{"step": 2, "loss": 0.5}\n')
    capsys.readouterr()
    assert submit_sweep.write_page(out / "slurm" / "sweep.json") == 1
    said = capsys.readouterr().out
    assert said.count("not finished: ") == 3 and "learning_rate=0.0001,seed=1, at step 0 of 2" in said
    assert "learning_rate=0.001,seed=0" in (out / "index.html").read_text()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["slurm.nodes=1,2"], "the tasks of an array have one shape: settings of slurm and dry_run have one value"),
        (["slurm.script=trajectories", "seed=0,1"], "-m submits runs that train"),
        (["global_batch_size=4,3", "slurm.nodes=2", "engine=zero2"], "global_batch_size=3.*: global_batch_size=3 must"),
        (["learning_rate=1e-4,x"], "learning_rate='x': must be a number"),
        (["seed=0"], "nothing has several values"),
    ],
)
def test_a_sweep_is_checked_whole_before_any_of_it_is_submitted(
    settings: list[str], line: str, sweep: list[str]
) -> None:
    keys = {one.partition("=")[0] for one in (*settings, "learning_rate=", "seed=")}
    rest = [one for one in sweep if one.partition("=")[0] not in keys]
    with pytest.raises(ConfigError, match=line):
        submit_sweep.sweep("submit", [*rest, *settings])
    assert not list(Path(sweep[-3].removeprefix("output_dir=")).glob("global*"))
