"""Sweeps: every combination in a folder of its own, left where it is finished, and compared on one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.commands.multirun import combined, label, multirun, values_of
from distill.config.loading import ConfigError
from distill.config.settings import TrainSettings
from distill.evaluation.runs import runs_page, summary
from tests.test_front_door import ROOT, ran


@pytest.mark.parametrize(
    "argument, values",
    [
        ("a=1,2", ["1", "2"]),
        ("a=range(1,4)", ["1", "2", "3"]),
        ("a=choice(x,y)", ["x", "y"]),
        ("a=[1,2]", ["[1,2]"]),
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
        ("a='1,2'", ["'1,2'"]),
        ("a=runs/x(1)", ["runs/x(1)"]),
        ("method=lcm,mlcm", ["lcm", "mlcm"]),
    ],
)
def test_what_an_argument_sweeps_over(argument: str, values: list[str]) -> None:
    assert values_of(argument) == values


def test_combinations_differ_in_what_is_swept_and_nothing_else() -> None:
    found = combined(["a=1,2", "b=x", "c=range(0,3)", "~d"])
    assert len(found) == 6 and all(overrides[:2] == ["b=x", "~d"] for overrides, _ in found)
    assert len({label(chosen) for _, chosen in found}) == 6 and label({"a.b": "x/y z"}) == "a.b=x-y-z"
    with pytest.raises(ConfigError, match="1000000 combinations"):
        combined(["a=range(0,1000)", "b=range(0,1000)"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["data.store=s"], "nothing has several values"),
        (["data.store=s", "output_dir=a,b", "seed=1,2"], "output_dir is the folder of the whole sweep"),
        (["data.store=s", "output_dir=a", "seed=1,x"], "seed='x': must be an integer"),
    ],
)
def test_a_mistake_is_said_before_the_first_run(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        multirun("train", "train", TrainSettings, arguments)


def test_two_runs_of_the_toy_are_compared_and_not_repeated(tmp_path: Path) -> None:
    toy = [
        "experiment=quickstart",
        "engine=single",
        "data.store=store",
        "data.num_samples=8",
        "data.samples_per_shard=8",
    ]
    toy += ["data.solver_steps=10", "global_batch_size=4", "max_train_steps=2", "lr_warmup_steps=0", "log_every=1"]
    toy += ["dataloader_num_workers=0", "validation_prompts=null"]
    assert ran(tmp_path, ROOT, "trajectories", *toy).returncode == 0
    sweep = ["train", "-m", *toy, "learning_rate=1e-4,1e-3", "output_dir=sweep"]
    done = ran(tmp_path, ROOT, *sweep)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = sorted(path.parent for path in (tmp_path / "sweep").glob("*/DONE"))
    assert [folder.name for folder in folders] == ["learning_rate=0.0001", "learning_rate=0.001"]
    page = (tmp_path / "sweep/index.html").read_text()
    assert all(folder.name in page for folder in folders) and "<svg" in page and "<td>2</td>" in page
    before = [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders]
    assert ran(tmp_path, ROOT, *sweep).returncode == 0
    assert [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders] == before


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
