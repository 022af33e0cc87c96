"""Sweeps: every run in a folder of its own, left where it is finished, and compared with the others on one page."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distill.commands import COMMANDS
from distill.commands.launch import launch
from distill.commands.multirun import multirun
from distill.commands.sweep_runs import SweepRunner
from distill.config.loading import ConfigError, Settings
from distill.config.settings import SampleSettings, TrainSettings
from distill.config.sweeps import SweptRun, distinct, label, runs_of, swept_of
from distill.evaluation.runs import runs_page, summary
from tests.test_front_door import ROOT

GIVEN = ["experiment=quickstart", "data.store=s", "output_dir=o"]
TINY = ["experiment=quickstart", "engine=single", "data.num_samples=8", "data.samples_per_shard=8"]
TINY += ["data.solver_steps=10", "method.skip=200", "global_batch_size=4", "max_train_steps=2", "lr_warmup_steps=0"]
TINY += ["log_every=1", "dataloader_num_workers=0", "validation_prompts=null"]
OPTUNA = ["hydra/sweeper=optuna", "learning_rate=tag(log,interval(1e-6,1e-2))"]


def chosen_by(*arguments: str) -> list[dict[str, str]]:
    return [dict(run.chosen) for run in runs_of("train", TrainSettings, [*GIVEN, *arguments])]


class PlainSettings(Settings):
    """Those of a command that writes no folder."""

    seed: int


# ---- what is swept over ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, values",
    [
        ("seed=1,2", ["1", "2"]),
        ("seed=range(1,4)", ["1", "2", "3"]),
        ("data.guidance=range(0.1,0.5,0.1)", ["0.1", "0.2", "0.3", "0.4"]),
        ("seed=choice(5,3)", ["5", "3"]),
        ("seed=choice(5)", ["5"]),
        ("seed=sort(5,3)", ["3", "5"]),
        ("preemption_signals=[SIGTERM],[SIGINT]", ["[SIGTERM]", "[SIGINT]"]),
        ("method=lcm,lcm_noised", ["lcm", "lcm_noised"]),
        ("method=glob(lcm*)", ["lcm", "lcm_noised"]),
        ("method=glob([lcm*,mlcm],exclude=*noised)", ["lcm", "mlcm"]),
        ("validation_prompts='a, b','c'", ["'a, b'", "'c'"]),
    ],
)
def test_what_an_argument_sweeps_over(argument: str, values: list[str]) -> None:
    key = argument.partition("=")[0]
    assert chosen_by(argument) == [{key: value} for value in values]


@pytest.mark.parametrize(
    "argument", ["preemption_signals=[SIGTERM,SIGINT]", "validation_prompts='1,2'", "data.prompts=x(1)"]
)
def test_what_has_one_value_is_not_swept_over(argument: str) -> None:
    assert chosen_by("seed=1,2", argument) == [{"seed": "1"}, {"seed": "2"}]


def test_runs_differ_in_what_is_swept_and_nothing_else() -> None:
    found = runs_of("train", TrainSettings, [*GIVEN, "seed=1,2", "lora_rank=range(1,4)", "~method.skip"])
    assert len(found) == len({run.name for run in found}) == 6
    for run in found:
        assert run.overrides[:3] == ("experiment=quickstart", "data.store=s", "~method.skip")
        assert run.overrides[-1] == f"output_dir={run.folder}" and run.folder.parent == Path("o")
        assert run.overrides[3:-1] == tuple(f"{key}={value}" for key, value in run.chosen.items())
    assert label({"a.b": "x/y z"}) == "a.b=x-y-z"
    assert distinct(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-2", "a-2-2", "a-3"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "nothing has several values"),
        (["seed=range(0,1000)", "lora_rank=range(1,1000)"], "999000 combinations: at most 1000"),
        (["output_dir=a,b", "seed=1,2"], "output_dir is the folder of the whole sweep"),
        (["seed=1,x"], "seed='x': must be an integer"),
        (["seed=range(3,1)"], "seed=range.* is empty"),
        (["seed=interval(1,3)"], "add hydra/sweeper=optuna"),
        (["method=glob(x*)"], "matches none of dmd2, .*lcm, "),
        (["seed=glob(*)"], "patterns are for groups, model, data"),
        (["seed=1,2", "hydra.sweep.dir=x"], "write output_dir=FOLDER"),
        (["seed=1,2", "hydra.sweep.subdir=x"], "each run has a folder in output_dir"),
        (["seed=1,2", "hydra/launcher=submitit_slurm"], "distill submit -m"),
        (["seed=1,2", "hydra/sweeper=ax"], "allowed are basic and optuna"),
        (["seed=1,2", "hydra.sweeper.n_trials=3"], "without effect: add hydra/sweeper=optuna"),
        (["seed=1,2", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=0"], "n_trials.*greater than or equal to 1"),
        (["seed=1,2", "hydra/sweeper=optuna", "hydra.sweeper.direction=up"], "must be 'minimize' or 'maximize'"),
        (["seed=1,2", "hydra.job.num=1"], "no setting here; allowed with -m: hydra/sweeper"),
        (["hydra/sweeper=optuna", "learning_rate=tag(log,interval(0,1))"], "above 0"),
        (["hydra/sweeper=optuna", "learning_rate=interval(1,0)"], "the first number is the smaller one"),
    ],
)
def test_a_mistake_is_said_before_the_first_run(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        multirun(["train"], "train", TrainSettings, [*GIVEN, *arguments], start=lambda run: pytest.fail(run.name))
    assert "\n" not in str(error.value)


def test_runs_whose_experiments_have_folders_of_their_own_need_one_for_the_sweep() -> None:
    with pytest.raises(ConfigError, match="set output_dir=FOLDER for the whole sweep"):
        runs_of("train", TrainSettings, ["experiment=quickstart,lcm_toy"])


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[[SweptRun], int]:
    """Trains a run in this process, as its own would."""

    def start(run: SweptRun) -> int:
        monkeypatch.setattr(sys, "argv", ["distill train", *run.overrides])
        try:
            return COMMANDS["train"].run(["train"])
        except SystemExit as ended:
            return int(ended.code or 0)

    return start


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import distill

    folder = tmp_path_factory.mktemp("sweep") / "store"
    distill.trajectories(*TINY, f"data.store={folder}")
    return folder


def test_runs_of_the_toy_are_compared_and_not_repeated(
    store: Path, tmp_path: Path, train: Callable[[SweptRun], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them fails, and the others are trained all the same."""
    sweep = [*TINY, f"data.store={tmp_path}/none,{store}", "learning_rate=1e-4,1e-3", f"output_dir={tmp_path}/sweep"]
    assert multirun(["train"], "train", TrainSettings, sweep, start=train) == 2
    said = capsys.readouterr()
    assert said.out.count("run ") == 4 and said.err.count("ended with exit code 2, see above") == 2
    folders = sorted(path.parent for path in (tmp_path / "sweep").glob("*/DONE"))
    assert [folder.name.rpartition(",")[2] for folder in folders] == ["learning_rate=0.0001", "learning_rate=0.001"]
    page = (tmp_path / "sweep/index.html").read_text()
    assert all(folder.name in page for folder in folders) and "<svg" in page and "<td>2</td>" in page
    assert page.count(">finished</td>") == 2 and page.count(">failed, exit code 2</td>") == 2
    before = [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders]
    assert multirun(["train"], "train", TrainSettings, sweep, start=train) == 2
    assert [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders] == before


def test_a_sweep_that_is_stopped_saves_its_run_and_is_resumed(
    store: Path, tmp_path: Path, train: Callable[[SweptRun], int]
) -> None:
    sweep = [*TINY, f"data.store={store}", "max_train_steps=8", "seed=1,2", f"output_dir={tmp_path}/sweep"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "distill", "train", "-m", *sweep], env=environment) as running:
        metrics, end = tmp_path / "sweep/seed=1/metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.stat().st_size) and running.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(ConfigError, match="is being run by another process"):
            multirun(["train"], "train", TrainSettings, sweep, start=train)
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 75
    saved = int((tmp_path / "sweep/seed=1/PREEMPTED").read_text())
    assert 0 < saved < 8 and not (tmp_path / "sweep/seed=2").exists()
    page = (tmp_path / "sweep/index.html").read_text()
    assert ">stopped, saved</td>" in page and ">not started</td>" in page
    assert multirun(["train"], "train", TrainSettings, sweep, train) == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    assert (tmp_path / "sweep/seed=2/DONE").is_file()


def test_a_run_is_the_command_with_its_own_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is typed before the settings is typed before those of each run."""
    run = SweptRun(tmp_path / "a", ("show", "experiment/quickstart"), {})
    with SweepRunner(["configs"], tmp_path) as sweep:
        assert sweep.run(run) == 0 and not sweep.stopped
    assert "max_train_steps: 350" in capfd.readouterr().out


def test_each_run_of_a_launched_sweep_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(SweepRunner, "run", lambda sweep, run: started.append((*sweep.command, *run.overrides)) or 0)
    settings = ["train", "-m", *GIVEN[:2], f"output_dir={tmp_path}/o", "seed=1,2"]
    monkeypatch.setattr(sys, "argv", ["distill", *settings])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        assert launch(["--num_processes", "2", *settings]) == 0
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
    assert [command[:4] for command in started] == [("launch", "--num_processes", "2", "train")] * 2
    assert [command[-2] for command in started] == ["seed=1", "seed=2"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use distill launch, or distill submit -m"):
        multirun(["train"], "train", TrainSettings, settings[2:])


def test_commands_without_a_folder_have_no_sweeps() -> None:
    with pytest.raises(ConfigError, match="this one has no output_dir"):
        swept_of("run_chain", PlainSettings, ["seed=1,2"])
    with pytest.raises(ConfigError, match="is for distill train"):
        optuna = ["hydra/sweeper=optuna", "prompts=[a]", "steps=1,2", "output_dir=o"]
        multirun(["sample"], "sample", SampleSettings, optuna)


def test_a_page_shows_runs_that_have_not_begun_and_torn_lines(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) for step in range(1, 21)]
    end = json.dumps({"step": 20, "validation/diversity": 0.5, "validation/seconds": 3.0})
    (tmp_path / "a/metrics.jsonl").write_text("\n".join([*lines, end, '{"step": 2']))
    runs_page(tmp_path / "index.html", "t", {n: tmp_path / n for n in "ab"}, {n: {"seed": n} for n in "ab"})
    page = (tmp_path / "index.html").read_text()
    assert "validation/diversity" in page and "seconds" not in page
    assert summary([]) == {"steps": 0}
    assert summary([json.loads(line) for line in lines])["loss"] == pytest.approx((1 / 19 + 1 / 20) / 2)


# ---- searches -------------------------------------------------------------------------------------------------------


class Valley:
    """A run whose validation is best at a learning rate of 1e-4; the `fails`th fails, and the `stops`th is stopped."""

    def __init__(self, fails: int = 0, stops: int = 0) -> None:
        self.started: list[str] = []
        self.fails, self.stops = fails, stops

    def __call__(self, run: SweptRun) -> int:
        self.started.append(run.name)
        if len(self.started) == self.fails:
            return 3
        if len(self.started) == self.stops:
            return 75
        value = (math.log10(float(run.chosen["learning_rate"])) + 4) ** 2
        run.folder.mkdir(parents=True, exist_ok=True)
        lines = [{"step": 1, "loss": 1.0}, {"step": 1, "validation/distance": value}]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0


def searched(folder: Path, start: Callable[[SweptRun], int], *more: str) -> int:
    settings = [*GIVEN[:-1], f"output_dir={folder}", *OPTUNA, "hydra.sweeper.metric=validation/distance", *more]
    return multirun(["train"], "train", TrainSettings, settings, start)


def test_a_search_finds_the_best_value_and_is_resumed_as_it_would_have_gone_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    whole, stopped, resumed = Valley(), Valley(stops=12), Valley()
    assert searched(tmp_path / "a", whole, "hydra.sweeper.n_trials=30") == 0
    found = yaml.safe_load((tmp_path / "a/optimization_results.yaml").read_text())
    assert found["name"] == "optuna" and found["best_value"] < 0.05, "TPE is better than 30 random tries, mostly"
    assert 5e-5 < float(found["best_params"]["learning_rate"]) < 2e-4
    assert "best of 30: learning_rate=" in capsys.readouterr().out
    page = (tmp_path / "a/index.html").read_text()
    assert page.count(">finished</td>") == 30 and "last validation/distance" in page
    assert searched(tmp_path / "b", stopped, "hydra.sweeper.n_trials=30") == 75
    assert searched(tmp_path / "b", resumed, "hydra.sweeper.n_trials=30") == 0
    assert stopped.started == whole.started[:12] and resumed.started == whole.started
    other = Valley()
    searched(tmp_path / "c", other, "hydra.sweeper.n_trials=3", "hydra.sweeper.seed=1")
    assert other.started != whole.started[:3]


def test_a_search_goes_on_after_a_failed_run_and_says_which_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    valley = Valley(fails=2)
    assert searched(tmp_path, valley, "hydra.sweeper.n_trials=4", "hydra.sweeper.direction=maximize") == 3
    assert len(valley.started) == 4 and f"{valley.started[1]} ended with exit code 3" in capsys.readouterr().err
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())["best_params"]["learning_rate"]
    rates = [float(name.partition("=")[2]) for i, name in enumerate(valley.started) if i != 1]
    assert float(best) == max(rates, key=lambda rate: abs(math.log10(rate) + 4))
    with pytest.raises(ConfigError, match="has measured none; it has loss, validation/distance"):
        searched(tmp_path / "b", Valley(), "hydra.sweeper.metric=accuracy")


def test_a_search_trains_the_toy(store: Path, tmp_path: Path, train: Callable[[SweptRun], int]) -> None:
    pytest.importorskip("optuna")
    settings = [*TINY, f"data.store={store}", *OPTUNA, "lora_rank=interval(1,4)", "method=lcm,lcm_noised"]
    settings += ["hydra.sweeper.n_trials=2", f"output_dir={tmp_path}"]
    assert multirun(["train"], "train", TrainSettings, settings, train) == 0
    found = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert found["best_params"]["lora_rank"] in "1234" and math.isfinite(found["best_value"])
    assert len(list(tmp_path.glob("*/DONE"))) == 2


def test_a_search_without_optuna_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # as Python marks what cannot be imported
    with pytest.raises(ConfigError, match=r"pip install 'distill\[sweeps\]'"):
        searched(tmp_path, lambda run: pytest.fail(run.name))


def test_the_ends_of_an_interval_are_checked_before_the_first_run(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    for wrong in ("learning_rate=interval(-1,1)", "lora_rank=interval(0,4)"):
        with pytest.raises(ConfigError, match="must be greater than"):
            searched(tmp_path, lambda run: pytest.fail(run.name), wrong)
