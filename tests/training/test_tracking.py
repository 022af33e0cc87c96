"""Tracking: what a run leaves behind, also when it was killed, and that no service can hold it up."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.config.loading import ConfigError, load, validated
from distill.config.settings import TrainSettings
from distill.training.tracking import (
    LINE,
    Background,
    JsonlTracker,
    Meter,
    TrainingProgress,
    cpu_seconds_of,
    describe,
    open_trackers,
    run_id,
    setup_logging,
    time_left,
    to_pictures,
    wants_bar,
)
from tests.forked import python

NODES: dict[str, Any] = {
    "wandb": {"_target_": "distill.training.tracking.WandbTracker"},
    "tensorboard": {"_target_": "distill.training.tracking.TensorboardTracker"},
}


class FileTracker:
    """A tracker as somebody else may write one."""

    def __init__(self, folder: Path, resume_step: int, name: str) -> None:
        self.file = open(folder / name, "w")
        self.file.write(f"from {resume_step}\n")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.file.write(f"{step} {scalars}\n")

    def images(self, name: str, images: Sequence[Image.Image], step: int, captions: Sequence[str] = ()) -> None: ...

    def close(self) -> None:
        self.file.write("closed\n")
        self.file.close()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder: Path, first: int, last: int, resume_step: int) -> None:
    tracker = JsonlTracker(folder, resume_step)
    for step in range(first, last + 1):
        tracker.log({"loss": 1 / step, "lr": 1e-4}, step)
    tracker.close()


class TestJsonl:
    def test_an_interrupted_and_resumed_file_equals_an_undisturbed_one(self, tmp_path: Path) -> None:
        run(tmp_path / "whole", 1, 10, 0)
        run(tmp_path / "broken", 1, 7, 0)  # killed at step 7, its last checkpoint is of step 4
        run(tmp_path / "broken", 5, 10, 4)
        whole, broken = (tmp_path / name / "metrics.jsonl" for name in ("whole", "broken"))
        assert broken.read_bytes() == whole.read_bytes()
        assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(1, 11))

    @pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 0.3}', "\x00\x00\x00\n", '{"loss": 1}\n'])
    def test_a_torn_end_is_cut(self, tmp_path: Path, torn: str) -> None:
        run(tmp_path, 1, 2, 0)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(torn)
        run(tmp_path, 3, 4, 2)
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]

    def test_every_line_is_on_its_way_before_the_next_step(self, tmp_path: Path) -> None:
        tracker = JsonlTracker(tmp_path)
        tracker.log({"loss": 0.5}, 1)
        assert rows(tmp_path) == [{"step": 1, "loss": 0.5}]  # while the tracker is still open
        tracker.close()

    def test_what_json_cannot_say_stays_json_and_a_number(self, tmp_path: Path) -> None:
        tracker = JsonlTracker(tmp_path)
        tracker.log({"a": math.nan, "b": math.inf, "c": -math.inf}, 1)
        tracker.close()
        row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda word: pytest.fail(word))
        assert math.isnan(float(row["a"])) and float(row["b"]) == math.inf and float(row["c"]) == -math.inf

    def test_pictures_are_png_files(self, tmp_path: Path) -> None:
        tracker = JsonlTracker(tmp_path)
        tracker.images("validation", to_pictures(torch.zeros(2, 3, 4, 6)), 100)
        tracker.close()
        files = sorted((tmp_path / "samples" / "step-000100").iterdir())
        assert [file.name for file in files] == ["validation-00.png", "validation-01.png"]
        assert Image.open(files[0]).size == (6, 4)


def test_pictures_span_black_to_white_and_clip() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(1, 3, 1, 5)
    (picture,) = to_pictures(image)
    assert np.asarray(picture)[0, :, 1].tolist() == [0, 0, 128, 255, 255]


class TestOpening:
    def test_settings_of_before_are_read_as_trackers(self) -> None:
        recorded = load("train", TrainSettings, ["data.store=s"]).model_dump(mode="json")
        del recorded["tracking"]
        own = {"project": "p", "entity": None, "group": None, "tags": ["t"], "mode": None}
        for said, names in (("jsonl", []), (["jsonl", "wandb"], ["wandb"]), (["wandb", "tensorboard"], None)):
            found = validated(recorded | {"report_to": said, "wandb": own}, TrainSettings).tracking
            assert list(found) == (["wandb", "tensorboard"] if names is None else names)
            assert "wandb" not in found or found["wandb"] == {"_target_": NODES["wandb"]["_target_"]} | own
        with pytest.raises(ConfigError, match="report_to: 'mlflow' is not known; allowed: jsonl, wandb, tensorboard"):
            validated(recorded | {"report_to": ["mlflow"]}, TrainSettings)

    def test_keys_of_before_are_one_line_that_says_what_to_type(self) -> None:
        for given in ("report_to=[wandb]", "wandb.project=x"):
            with pytest.raises(ConfigError, match="is set elsewhere now: set tracking=wandb"):
                load("train", TrainSettings, ["data.store=s", given])
        with pytest.raises(ConfigError, match="wandb is set, and nothing is sent there: set tracking=wandb as well"):
            load("train", TrainSettings, ["data.store=s", "tracking.wandb.project=x"])

    def test_the_files_of_the_group_are_checked_against_the_trackers(self) -> None:
        for name, wanted in (("none", []), ("wandb", ["wandb"]), ("wandb_tensorboard", ["wandb", "tensorboard"])):
            assert list(load("train", TrainSettings, ["data.store=s", f"tracking={name}"]).tracking) == wanted
        given = ["data.store=s", "tracking=wandb", "tracking.wandb.tags=[a,b]", "tracking.wandb.resume=must"]
        assert load("train", TrainSettings, given).tracking["wandb"]["tags"] == ["a", "b"]
        with pytest.raises(ConfigError, match="mode"):
            load("train", TrainSettings, [*given, "tracking.wandb.mode=of"])

    def test_a_tracker_of_another_module_gets_what_it_takes(self, tmp_path: Path) -> None:
        """Any `_target_`, with its own arguments and those of the facts that its constructor names."""
        node = {"_target_": f"{__name__}.FileTracker", "name": "mine.txt"}
        tracker = open_trackers({"mine": node}, tmp_path, {"seed": 1}, resume_step=3)
        tracker.log({"loss": 0.5}, 4)
        tracker.close()
        assert (tmp_path / "mine.txt").read_text() == "from 3\n4 {'loss': 0.5}\nclosed\n"

    def test_the_local_file_is_written_unasked(self, tmp_path: Path) -> None:
        tracker = open_trackers({}, tmp_path, {})
        tracker.log({"loss": torch.tensor(0.25)}, 3)
        tracker.close()
        assert rows(tmp_path) == [{"step": 3, "loss": 0.25}]

    def test_other_ranks_track_nothing(self, tmp_path: Path) -> None:
        tracker = open_trackers(NODES, tmp_path, {}, main=False)
        tracker.log({"loss": 1.0}, 1)
        tracker.images("validation", to_pictures(torch.zeros(1, 3, 2, 2)), 1)
        tracker.close()
        assert list(tmp_path.iterdir()) == []

    def test_wandb_offline_and_tensorboard_hold_what_was_logged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_PROJECT", "of-the-variable")
        nodes = NODES | {"wandb": NODES["wandb"] | {"group": "one-group", "tags": ["one-tag"]}}
        tracker = open_trackers(nodes, tmp_path / "run", {"learning_rate": 1e-4})
        for background in tracker.trackers[1:]:
            background.patience = 300.0  # on a busy machine wandb has not started after a minute, and would be given up
        tracker.log({"loss_here": 0.123456789}, 7)
        tracker.images("validation", to_pictures(torch.zeros(1, 3, 4, 4)), 7, ["red rings"])
        tracker.close()

        (record,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id(tmp_path / 'run')}.wandb")
        content = record.read_bytes()
        assert b"loss_here" in content and b"0.123456789" in content and b"red rings" in content
        assert b"of-the-variable" in content and b"one-group" in content and b"one-tag" in content
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
        (scalar,) = events.Scalars("loss_here")
        assert (scalar.step, scalar.value) == (7, pytest.approx(0.123456789))
        assert [image.step for image in events.Images("validation/00")] == [7]

    def test_wandb_without_a_key_does_not_stop_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        tracker = open_trackers({"wandb": NODES["wandb"] | {"mode": "online"}}, tmp_path / "run", {})
        for step in range(1, 4):
            tracker.log({"loss": 1.0}, step)
        tracker.close()
        assert len(rows(tmp_path / "run")) == 3
        assert [r.message for r in caplog.records if r.levelno >= logging.WARNING and "wandb failed" in r.message]

    def test_a_run_folder_has_one_wandb_id(self, tmp_path: Path) -> None:
        folder = tmp_path / "lcm lora/α=1"
        assert run_id(folder) == run_id(folder.parent / "." / folder.name)
        assert run_id(folder) != run_id(tmp_path / "elsewhere" / folder.name)
        assert not set(run_id(folder)) & set("/\\#?%: ")


HANGING_SERVICE = """
import signal, sys, time, psutil
from pathlib import Path
from distill.training.tracking import open_trackers

node = {"_target_": "distill.training.tracking.WandbTracker", "mode": "offline"}
tracker = open_trackers({"wandb": node}, Path(sys.argv[1]), {})
tracker.trackers[1].patience = 1.0
tracker.log({"loss": 1.0}, 1)
deadline = time.monotonic() + 60
while not (started := [p for p in psutil.Process().children() if p.name().startswith("wandb-core")]):
    assert time.monotonic() < deadline
    time.sleep(0.05)
time.sleep(0.5)
started[0].send_signal(signal.SIGSTOP)
for step in range(2, 51):
    tracker.log({"loss": 1.0}, step)
tracker.close()
"""


def test_a_wandb_service_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGING_SERVICE, str(tmp_path / "run")]
    # without WANDB_SERVICE, by which it would use the service of another test
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env = clean | {"HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert "wandb did not finish within 1 s and is given up" in done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 51))


LOCKED = """
import logging, os, signal
from tqdm import tqdm
from distill.training.tracking import setup_logging

tqdm.get_lock()  # as the first bar or line does
setup_logging()
if (child := os.fork()) == 0:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
logging.getLogger("distill").info("on it goes")
"""


def test_a_log_line_waits_for_no_process_that_was_killed_as_it_wrote_one() -> None:
    """Loader workers are forks of their rank, and one may be killed at any moment."""
    done = subprocess.run([python(), "-c", LOCKED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.endswith("on it goes\n"), done.stderr


class Service:
    """A tracker that keeps what it gets, once `gate` is open; fails at the steps in `fails`."""

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self.fails, self.closed = fails, False
        self.steps: list[int] = []
        self.gate = threading.Event()

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        assert self.gate.wait(20)
        if step in self.fails:
            raise ConnectionError("service gone\nwith a long story")
        self.steps.append(step)

    def images(self, name: str, images: Sequence[Image.Image], step: int, captions: Sequence[str] = ()) -> None:
        self.log({}, step)

    def close(self) -> None:
        self.closed = True


class TestBackground:
    def test_failures_are_told_once_and_the_rest_arrives_in_order(self, caplog: pytest.LogCaptureFixture) -> None:
        service = Service(fails=(2, 3))
        service.gate.set()
        tracker = Background("service", lambda: service)
        for step in range(1, 6):
            tracker.log({}, step)
        tracker.close()
        assert service.steps == [1, 4, 5] and service.closed
        (warning,) = caplog.records
        assert warning.message.startswith("service failed") and warning.message.endswith(
            "ConnectionError: service gone"
        )

    def test_a_full_queue_drops_and_counts_and_never_waits(self, caplog: pytest.LogCaptureFixture) -> None:
        service = Service()
        tracker = Background("service", lambda: service, capacity=4)
        start = time.monotonic()
        for step in range(100):
            tracker.log({}, step)
        assert time.monotonic() - start < 5
        service.gate.set()
        tracker.close()
        assert len(service.steps) + tracker.dropped == 100 and tracker.dropped >= 95
        assert [r.message for r in caplog.records][-1].startswith("service is too slow: 64 calls dropped")

    def test_one_that_cannot_start_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        def start() -> Service:
            raise OSError("no route")

        tracker = Background("service", start)
        tracker.log({}, 1)
        tracker.close()
        assert [r.message for r in caplog.records] and not tracker._thread.is_alive()

    def test_it_starts_no_process_before_its_first_call(self) -> None:
        """That is: before the loader's workers are forked, one of which could keep that start waiting for ever."""
        started: list[bool] = []
        tracker = Background("service", lambda: started.append(True) or Service())  # type: ignore[func-returns-value]
        tracker.close()
        assert not started and tracker._thread.ident is None

    def test_one_that_hangs_is_given_up(self, caplog: pytest.LogCaptureFixture) -> None:
        service = Service()
        given_up: list[bool] = []
        tracker = Background("service", lambda: service, patience=0.2, abandon=lambda: given_up.append(True))
        tracker.log({}, 1)
        start = time.monotonic()
        tracker.close()
        assert time.monotonic() - start < 5 and given_up == [True]
        service.gate.set()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_meter_measures_speed_waiting_and_what_is_left() -> None:
    clock = Clock()
    meter = Meter(total=100, samples=8, done=40, clock=clock)
    for _ in range(10):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        meter.step()
    numbers = meter.read()
    assert numbers["samples_per_second"] == pytest.approx(4)
    assert numbers["data_wait"] == pytest.approx(0.25)
    assert numbers["step_seconds"] == pytest.approx(2)
    assert numbers["eta_seconds"] == pytest.approx(2 * 50)
    assert 0.01 < numbers["peak_memory_gib"] < 1000

    clock.now += 1.0  # a window of its own
    meter.step()
    assert meter.read()["samples_per_second"] == pytest.approx(8)


def test_processor_time_goes_on_from_what_earlier_starts_took() -> None:
    clock = Clock()
    meter = Meter(total=100, samples=8, done=40, cpu_seconds=30.0, cpu_clock=clock)
    clock.now += 2.5
    assert meter.read()["cpu_seconds"] == pytest.approx(32.5)
    clock.now += 1.0  # so far, not since the last reading
    assert meter.read()["cpu_seconds"] == pytest.approx(33.5)
    assert cpu_seconds_of([{"step": 1, "cpu_seconds": 3.0}, {"step": 2}, {"step": 3, "cpu_seconds": math.nan}]) == 3.0
    assert cpu_seconds_of([{"step": 1}]) == 0


def test_scalars_for_people() -> None:
    scalars = {"loss": 0.12345, "samples_per_second": 812.3, "data_wait": 0.031, "step_seconds": 1, "eta_seconds": 751}
    assert describe(scalars) == "loss 0.1235  812.3 samples/s  data 3 %  eta 12:31"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "slurm", "bar"), [(Terminal, 0, True), (Terminal, 1, False), (io.StringIO, 0, False)]
)
def test_a_bar_is_for_terminals_and_never_for_slurm(
    stream: type[io.StringIO], slurm: int, bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if slurm:
        monkeypatch.setitem(os.environ, "SLURM_JOB_ID", "17")
    out = stream()
    assert wants_bar(out) == bar
    progress = TrainingProgress(10, stream=out)
    progress.step()
    progress.close()
    assert ("1/10" in out.getvalue()) == bar


def test_how_long_a_run_takes_is_said_before_it_and_after_its_first_steps(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    rows = [{"step": 10.0, "step_seconds": 9.0}, {"step": 20.0, "step_seconds": 0.5}, {"step": 20.0, "loss": 1.0}]
    assert time_left(rows, 20, 140) == "about 01:00 at 0.5 s per step, as before"
    assert (
        time_left([{"step": 1.0, "loss": 1.0}], 1, 9)
        == time_left([], 0, 9)
        == "whose time is known after the first few"
    )
    caplog.set_level(logging.INFO, "distill")
    for main, stream, lines in ((True, io.StringIO(), 1), (False, io.StringIO(), 0), (True, Terminal(), 0)):
        caplog.clear()
        progress = TrainingProgress(1000, 20, stream=stream, main=main)
        for _ in range(20):
            time.sleep(0.002)
            progress.step()
        progress.close()
        assert len(caplog.messages) == lines
        assert all(line.startswith("step 25/1000: about 00:0") and " left at 0.0" in line for line in caplog.messages)


@pytest.fixture
def plain_logging() -> Any:
    root, ours = logging.getLogger(), logging.getLogger("distill")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.mark.parametrize("rank", [0, 3])
def test_ranks_other_than_the_first_say_only_what_is_wrong(rank: int, plain_logging: None) -> None:
    out = io.StringIO()
    setup_logging(rank, out)
    TrainingProgress(200, stream=out, main=rank == 0).show(50, {"loss": 0.5})
    logging.getLogger("distill.data").warning("shard cut")
    logging.getLogger("somebody.else").info("chatter")
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[1] for line in lines] == ["INFO step 50/200 (25 %)  loss 0.5"] * (rank == 0) + [
        "WARNING shard cut"
    ]
    assert all(f"[{rank}]" in line for line in lines)


def test_a_line_of_adversarial_training_is_short_and_says_the_most_important() -> None:
    networks = ("student", "discriminator", "fake_score")
    parts = {f"{name}/{part}": 0.123456 for name in networks for part in ("loss", "grad_norm", "lr")}
    more = {f"student/segment_{i}": 0.5 for i in range(1, 9)} | {"student/stage": 2.0, "student/reward": 17.0}
    game = {"discriminator/real_accuracy": 0.7, "discriminator/fake_accuracy": 0.6, "discriminator/balance": 0.5}
    meters = {"samples_per_second": 812.3, "data_wait": 0.03, "step_seconds": 0.1, "eta_seconds": 751.0}
    quiet = {"alarm/chance": 0.0, "alarm/winning": 0.0, "student/skipped": 0.0}
    line = describe({**parts, **more, **game, **meters, **quiet})
    assert len(line) <= LINE and "segment" not in line and "alarm/" not in line
    for shown in ("student/loss 0.1235", "discriminator/loss", "fake_score/loss", "accuracy 0.7", "eta 12:31"):
        assert shown in line
    loud = describe({**parts, **more, **game, **meters, "alarm/chance": 1.0, "student/skipped": 1.0})
    assert "alarm/chance 1" in loud


def test_a_validation_is_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distill")
    found = {"validation/diversity": 0.51234, "validation/teacher_consistency": 0.01}
    for main in (True, False):
        TrainingProgress(200, stream=io.StringIO(), main=main).show_validation(50, found)
    (record,) = caplog.records
    assert record.getMessage() == "step 50/200 validation  diversity 0.5123  teacher_consistency 0.01"


def test_metrics_that_somebody_removes_are_written_on(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "run")
    tracker.log({"loss": 1.0}, 1)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    tracker.log({"loss": 2.0}, 2)
    tracker.close()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 2, "loss": 2.0}
