"""The comparison of methods: equal budgets, its table after a kill, and what it calls best."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config.loading import ConfigError, build, load
from distill.config.settings import CompareSettings, TrainSettings
from distill.diffusion.schedule import NoiseSchedule
from distill.methods.sampling import Sampling
from distill.studies import compare
from distill.studies.compare import settled
from distill.studies.compare_report import BudgetResults, ComparedFacts, goals, verdict_lines
from distill.studies.compare_rows import best, samplings, verdict
from distill.studies.compare_runs import Contestant, Runs, check_methods, known_methods
from tests.forked import python

SCHEDULE = NoiseSchedule.scaled_linear()
ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    "overrides=[data.num_samples=8,data.heldout_samples=0,data.solver_steps=20,global_batch_size=4,lr_warmup_steps=1]"
)
SMALL = ["methods=[lcm,lightning_mse]", "seeds=[0]", "budgets=[processing]", "processing_steps=4", "n=100"]
SMALL += ["tuning_n=100", "steps=[4]", "samplers=[ddim]", "guidances=[2.0]", "teacher_steps=4", SHORT]


def settings(*overrides: str) -> CompareSettings:
    return settled(load("compare", CompareSettings, overrides))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    given = [
        "methods=[lcm,lightning_mse,kd]",
        "starts={kd: lightning_mse}",
        "processing_steps=300",
        "samples_steps=100",
    ]
    return Runs(settings(f"output_dir={folder}", *given, "start_share=0.4", SHORT))


def test_equal_processing_is_equal_counted_arithmetic_starts_included(runs: Runs) -> None:
    found = {one.method: one for one in runs.contestants("processing")}
    wanted = 300 * runs.flops("lcm")
    for one in found.values():
        assert one.flops == pytest.approx(wanted, rel=0.01)
    assert found["lcm"].steps == 300 and found["lightning_mse"].steps > 330  # which calls the student once, not twice
    start = found["kd"].start
    assert start is not None and start.method == "lightning_mse"
    assert start.flops == pytest.approx(0.4 * wanted, rel=0.02)


def test_equal_samples_are_equal_steps_starts_included(runs: Runs) -> None:
    found = {one.method: one for one in runs.contestants("samples")}
    assert {found[name].steps for name in ("lcm", "lightning_mse")} == {100}
    start = found["kd"].start
    assert start is not None and (start.steps, found["kd"].steps) == (40, 60)


def test_a_run_is_what_its_file_says_at_any_length(runs: Runs) -> None:
    cfg = runs.settings(Contestant("mlcm", "samples", 100, 1.0), 3)
    assert [stage["iterations"] for stage in cfg.method["stages"]] == [77, 23]  # in the ratio of 1000 to 300
    assert cfg.seed == 3 and cfg.max_train_steps == 100 and cfg.data.store == runs.store


@pytest.mark.parametrize("name", known_methods())
def test_all_methods_share_the_teacher_store_lora_and_batch(name: str) -> None:
    """What is tuned for each is its rates, its method's own settings and its average; no more."""
    cfg, shared = (load("train", TrainSettings, [f"experiment=compare/{one}"]) for one in (name, "shared"))
    tuned = {"method", "learning_rate", "lr_warmup_steps", "ema_decay", "networks", "reward", "log_every"}
    found, usual = cfg.model_dump(), shared.model_dump()
    found["optimizer"]["lr"] = usual["optimizer"]["lr"]  # which is the learning rate
    own = {key for key, value in found.items() if value != usual[key]}
    assert own <= tuned, own - tuned


@pytest.mark.parametrize("name", known_methods())
def test_every_method_can_be_trained_for_any_number_of_steps(name: str) -> None:
    """The lengths of runs follow from counted costs: what a file derives from them has to fit each."""
    for steps in (97, 225):
        cfg = load(
            "train", TrainSettings, [f"experiment=compare/{name}", f"max_train_steps={steps}", "data.store=STORE"]
        )
        method = build(cfg.method, schedule=SCHEDULE)
        assert method.steps in (None, steps)


def test_every_method_of_the_list_has_a_family_and_a_file() -> None:
    cfg = settings()
    in_a_family = [name for names in cfg.families.values() for name in names]
    assert set(cfg.methods) <= set(known_methods()) and set(cfg.methods) <= set(in_a_family)
    assert len(in_a_family) == len(set(in_a_family))
    check_methods(cfg)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("methods=[lcm,rectifyed]", "no experiment compare/rectifyed .did you mean 'rectified'"),
        ("methods=[mlcm]", "baseline=lcm is not among methods"),
        ("starts={lightning: nothing}", "no experiment compare/nothing"),
        ("starts={lightning: lightning_mse, lightning_mse: lcm}", "lightning begins from lightning_mse, which begins"),
    ],
)
def test_names_that_cannot_be_are_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        check_methods(settings(override))


def test_quick_leaves_what_is_typed() -> None:
    quick, full = settings("quick=true"), settings()
    assert (quick.seeds, quick.n, quick.processing_steps, quick.budgets) == ([0], 300, 1300, ["processing"])
    assert (full.seeds, full.n, full.budgets) == ([0, 1, 2], 1000, ["processing", "samples"])
    assert settings("quick=true", "n=500").n == 500


# ---- samplers --------------------------------------------------------------------------------------------------------


def test_a_student_is_sampled_by_all_that_suits_it() -> None:
    open_ended = samplings(Sampling("ddim", "trailing"), ["lcm/lcm", "ddim/trailing", "ddim/leading"])
    assert open_ended == [Sampling("ddim", "trailing"), Sampling("lcm", "lcm"), Sampling("ddim", "leading")]
    fixed = samplings(Sampling("ddim", "trailing", 4), ["lcm/lcm", "ddim/leading", "euler"])
    assert fixed == [Sampling(name, "trailing", 4) for name in ("ddim", "lcm", "euler")]


# ---- verdicts --------------------------------------------------------------------------------------------------------


class FakeEntry:
    """A measured contestant as far as verdicts and goals look at it."""

    def __init__(self, method: str, values: Mapping[int, float], **more: float) -> None:
        self.method, self.chosen, self._values, self._more = method, dict.fromkeys(values), values, more
        self.contestant = Contestant(method, "processing", 10, 1.0)

    def row(self, steps: int) -> dict[str, Any]:
        return {"steps": steps, "frechet": self._values[steps], "frechet_se": 0.1, **self._more}


class FakeBench:
    """Differences of what entries say, with an error of .1."""

    cfg = settings()

    def apart(self, a: FakeEntry, b: FakeEntry, steps: int) -> dict[str, float]:
        return {"frechet": a.row(steps)["frechet"] - b.row(steps)["frechet"], "frechet_se": 0.1}


def judged(*entries: FakeEntry, steps: int = 4) -> Any:
    return verdict(FakeBench(), entries, steps)  # type: ignore[arg-type]


def test_a_winner_is_named_at_three_errors_and_not_before() -> None:
    near, far = (judged(FakeEntry("a", {4: 1.0}), FakeEntry("b", {4: value})) for value in (1.25, 1.31))
    assert near.best == far.best == "a" and near.winner is None and far.winner == "a"
    assert near.alike == far.alike == ["a"]
    three = judged(FakeEntry("c", {4: 9.0}), FakeEntry("b", {4: 1.15}), FakeEntry("a", {4: 1.0}))
    assert three.winner is None and three.alike == ["a", "b"]
    assert judged(FakeEntry("a", {4: 1.0}), FakeEntry("b", {2: 1.0})) is None
    assert best([1, 3, 2], "recall", float) == 3 and best([1, 3, 2], "frechet", float) == 1


def results(*entries: FakeEntry) -> BudgetResults:
    minutes = {entry.method: 0.9 for entry in entries}
    found = [judged(*entries, steps=steps) for steps in (1, 4)]
    verdicts = [one for one in found if one is not None]
    return BudgetResults("processing", entries, [], minutes, {}, verdicts, {}, {})  # type: ignore[arg-type]


def test_goals_are_said_to_be_missed_where_they_are() -> None:
    facts = ComparedFacts(
        FakeBench.cfg,
        {"frechet": 1.0, "frechet_se": 0.2, "steps": 50, "recall": 0.9, "diversity": 1, "precision": 0.9},
        {},
        {},
    )
    good = FakeEntry("good", {1: 3.0, 4: 1.1}, recall=0.9, diversity=0.99, precision=0.9)
    bad = FakeEntry("bad", {1: 3.0, 4: 3.2}, recall=0.4, diversity=0.5, precision=0.8)
    special = FakeEntry("special", {1: 2.5}, recall=0.9, diversity=3.0, precision=0.3)
    one, diverse, fast = goals(facts, results(good, bad))
    assert "reached by good." in one and "reached by good." in diverse and "reached by good." in fast
    one, diverse, fast = goals(facts, results(bad, special))
    assert "missed: bad (it does not fall with every doubling; behind the best at 1)" in one
    assert (
        "by numbers alone: of special the variance is that of wrong images (shares: recall 1.00, diversity 3.00"
        in diverse
    )
    (_, missed, _) = goals(facts, results(bad, FakeEntry("none", {4: 1.0})))
    assert "missed; the nearest is bad (shares: recall 0.44, diversity 0.50, precision 0.89)" in missed
    assert "missed; none is as good" in fast
    (said,) = verdict_lines(facts, results(good, bad))
    assert "1 step: best is good; within 2 standard errors of it: bad. No winner is named." in said
    assert "4 steps: best is good, the winner" in said


# ---- killed, and started again ---------------------------------------------------------------------------------------


def told(folder: Path) -> dict[str, Any]:
    """The report without clocks and the folder's own name."""
    report = json.loads((folder / "report.json").read_text())
    report["settings"]["output_dir"] = ""
    for row in report["parts"][0]["rows"]:
        row.pop("cpu_minutes")
    return report


def test_a_comparison_that_is_stopped_goes_on_and_a_method_more_adds_its_runs_alone(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.output / "costs", tmp_path / "costs")  # which take longer to count than such runs
    given = [f"output_dir={tmp_path}", *SMALL]
    compare.main(load("compare", CompareSettings, [*given, "methods=[lcm]"]))
    alone = told(tmp_path)["parts"][0]["rows"]
    before = {path: path.read_text() for path in (tmp_path / "runs").glob("lcm-*/metrics.jsonl")}
    next((tmp_path / "evaluation").glob("*.safetensors")).unlink()  # as a kill leaves it: not all images are there
    compare.main(load("compare", CompareSettings, given))
    rows = told(tmp_path)["parts"][0]["rows"]
    assert [row["method"] for row in rows] == ["lcm", "lightning_mse"] and rows[:1] == alone
    assert before and all(path.read_text() == text for path, text in before.items())  # not trained again
    report = (tmp_path / "report.md").read_text()
    assert "| lcm " in report and "| lightning_mse " in report and "### Less lcm, in pairs" in report
    assert (tmp_path / "methods.png").stat().st_size > 5000
    assert "experiment=compare/lcm" in (tmp_path / "runs.txt").read_text()
    changed = Runs(settings(*given, SHORT.replace("data.num", "learning_rate=9e-4,data.num")))
    with pytest.raises(ConfigError, match="was trained with learning_rate=0.002, and it is 0.0009 now: remove"):
        changed.train(changed.contestants("processing")[:1], [0])


@pytest.mark.slow
def test_a_comparison_that_is_killed_by_a_signal_goes_on(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(folder: str, log: Any) -> subprocess.Popen[bytes]:
        command = [python(), "-m", "distill", "study", "compare", f"output_dir={tmp_path / folder}", *SMALL]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    with open(tmp_path / "log", "wb") as log:
        assert start("whole", log).wait(1800) == 0
        for kill, reached in ((signal.SIGKILL, "runs/*/metrics.jsonl"), (signal.SIGKILL, "evaluation/*.safetensors")):
            process, deadline = start("killed", log), time.monotonic() + 900
            while not list((tmp_path / "killed").glob(reached)):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(kill)
            process.wait(60)
        assert start("killed", log).wait(1800) == 0
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
