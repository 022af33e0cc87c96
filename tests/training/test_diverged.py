"""Runs whose updates are skipped, and odd entries among checkpoints: what is kept, and from where a run continues."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.diffusion.trajectory import Batch
from distill.methods.base import Losses, Turn
from distill.training.checkpoint import CheckpointError, Checkpoints
from distill.training.engine import Engine, EngineSettings
from distill.training.health import Health
from distill.training.learning_rate import LearningRate
from distill.training.loop import Every, Observers, train
from distill.training.preemption import Preemption
from distill.training.skipped import NonFiniteError
from distill.training.tracking import Meter, Trackers, TrainingProgress
from distill.training.trained_network import TrainingRecipe
from distill.training.watchdog import Watchdog
from tests.training.test_checkpoint import Line, line

KEPT = 3


class Poisoned:
    """A method whose loss is NaN at the steps of `bad`, of a network of one layer."""

    def __init__(self, bad: Callable[[int], bool], stop_at: int | None = None) -> None:
        self.bad, self.stop_at = bad, stop_at

    def resets(self, step: int) -> bool:
        return False

    def turns(self, step: int) -> Iterator[Turn]:
        if step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        yield Turn("student", lambda networks, batch, context: self.loss(networks, batch, step))

    def loss(self, networks: Any, batch: Batch, step: int) -> Losses:
        distance = (networks["student"](batch.states, batch.times, {}).x0 - 1).square().mean()
        return Losses(distance * (float("nan") if self.bad(step) else 1.0), {})


def batches(start: int) -> Iterator[Batch]:
    for step in range(start, 1000):
        states = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        yield Batch(states, torch.zeros(2, 1), {}, {}, torch.ones(2), ("a", "b"), (2 * step, 2 * step + 1))


def looped(
    folder: Path,
    steps: int,
    bad: Callable[[int], bool] = lambda step: False,
    every: int = 1,
    total_limit: int | None = KEPT,
    stop_at: int | None = None,
    network: Line | None = None,
) -> tuple[Checkpoints, Engine, int]:
    """Runs the loop of real runs from the newest checkpoint on; returns also the steps taken, -1 if it diverged."""
    torch.manual_seed(0)
    engine = EngineSettings(max_nonfinite_steps=6).start()
    plan = TrainingRecipe(lambda p: torch.optim.AdamW(p, lr=0.01), LearningRate(), 0.9)
    engine.prepare({"student": network or line()}, {"student": plan})  # type: ignore[dict-item]
    checkpoints = Checkpoints(folder, total_limit)
    resumed = checkpoints.resume(engine, "latest")
    start = resumed.step if resumed else 0
    taken = -1
    with Preemption(folder) as preemption, suppress(NonFiniteError):
        taken = train(
            Poisoned(bad, stop_at),  # type: ignore[arg-type]
            engine,
            batches(start),
            start_step=start,
            max_train_steps=steps,
            every=Every(log=1, checkpoint=every, validate=1000),
            observers=Observers(
                Meter(steps, 2, start),
                TrainingProgress(steps, start, main=False),
                Trackers([]),
                Health(),
                lambda step: {},
            ),
            checkpoints=checkpoints,
            preemption=preemption,
            watchdog=Watchdog(None),
        )
    engine.release()
    return checkpoints, engine, taken


def steps_of(checkpoints: Checkpoints) -> list[int]:
    return [step for step, _ in checkpoints.found()]


def weights(folder: Path) -> bytes:
    return (folder / "student" / "weights.safetensors").read_bytes()


# ---- health -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total_limit", [1, 3])
def test_a_run_that_diverges_keeps_its_last_healthy_checkpoints_and_names_the_newest(
    total_limit: int, tmp_path: Path
) -> None:
    checkpoints, engine, taken = looped(tmp_path, 50, lambda step: step >= 5, total_limit=total_limit)
    assert taken == -1 and steps_of(checkpoints) == [5, 4, 3][:total_limit]
    engine = EngineSettings().start()
    said = checkpoints.after_divergence(engine.processes)
    assert "newest checkpoint with an update taken is that of step 5" in said
    assert f"resume_from_checkpoint={tmp_path}/step-00000005" in said and "learning_rate" in said
    engine.release()
    _, _, taken = looped(tmp_path, 8)  # the fault is gone: the same command takes the steps again
    assert taken == 8


def test_a_checkpoint_that_is_due_waits_for_the_next_update_that_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, _, taken = looped(tmp_path, 10, lambda step: step in (3, 4), every=4, total_limit=None)
    assert taken == 10 and steps_of(checkpoints) == [10, 8, 6]
    assert ["no checkpoint of step 4" in r.message for r in caplog.records].count(True) == 1


def test_before_the_first_checkpoint_the_line_says_that_there_is_none(tmp_path: Path) -> None:
    checkpoints, engine, taken = looped(tmp_path, 50, lambda step: step >= 1, every=2)
    engine = EngineSettings().start()
    assert taken == -1 and steps_of(checkpoints) == []
    assert checkpoints.after_divergence(engine.processes).startswith("no checkpoint was saved before that: ")
    engine.release()


def test_a_run_that_is_stopped_in_a_streak_loses_nothing_and_one_that_diverges_after_starts_before_it(
    tmp_path: Path,
) -> None:
    """The weights of steps since the last checkpoint are in what it saves, which pushes no healthy one out."""

    def bad(step: int) -> bool:
        return step >= 5

    checkpoints, _, taken = looped(tmp_path / "a", 50, bad, every=4, total_limit=1, stop_at=6)
    assert taken == 7 and steps_of(checkpoints) == [7, 4]
    assert not json.loads((tmp_path / "a/step-00000007/manifest.json").read_text())["healthy"]
    looped(tmp_path / "b", 5, every=5)
    assert weights(tmp_path / "a/step-00000007") == weights(tmp_path / "b/step-00000005")

    checkpoints, engine, taken = looped(tmp_path / "a", 50, bad, every=4, total_limit=1)
    assert taken == -1 and steps_of(checkpoints) == [7, 4]
    engine = EngineSettings().start()
    assert "is that of step 4: the same command" in checkpoints.after_divergence(engine.processes)
    engine.release()
    assert steps_of(checkpoints) == [4] and (tmp_path / "a/step-00000007.set-aside").is_dir()


def test_a_stop_in_a_streak_is_forgotten_once_updates_are_taken_again(tmp_path: Path) -> None:
    looped(tmp_path, 20, lambda step: step in (3, 4), every=2, total_limit=2, stop_at=4)
    checkpoints, _, taken = looped(tmp_path, 8, every=2, total_limit=2)
    assert taken == 8 and steps_of(checkpoints) == [8, 6]


def test_weights_that_are_not_finite_are_no_checkpoint_although_the_update_was_taken(tmp_path: Path) -> None:
    network = line()

    def spoil(gradient: torch.Tensor) -> None:
        network.module[1].weight.data[0] = torch.inf

    def bad(step: int) -> bool:
        if step == 3:  # the gradient is finite, the update is taken, and what it leaves is not finite
            network.module[1].weight.register_hook(spoil)
        return False

    checkpoints, _, taken = looped(tmp_path, 50, bad, network=network)
    assert taken == -1 and steps_of(checkpoints) == [3, 2, 1]


def test_a_network_that_is_always_skipped_ends_the_run_beside_one_that_learns() -> None:
    """A discriminator of NaN: the student's updates, which are taken, do not hide it."""
    engine = EngineSettings(max_nonfinite_steps=4).start()
    plan = TrainingRecipe(lambda p: torch.optim.AdamW(p, lr=0.01))
    engine.prepare({"student": line(), "discriminator": line()}, {"student": plan, "discriminator": plan})  # type: ignore[dict-item]

    def turn(name: str, factor: float) -> Turn:
        def loss(networks: Any, batch: Batch, context: Any) -> Losses:
            return Losses(networks[name](batch.states, batch.times, {}).x0.square().mean() * factor, {})

        return Turn(name, loss)

    taken = 0
    with pytest.raises(NonFiniteError, match="discriminator skipped.*that makes 4 in a row"):
        for step, batch in enumerate(batches(0)):
            engine.updated(turn("discriminator", float("nan")), [batch], step)
            taken += engine.updated(turn("student", 1.0), [batch], step)["student/skipped"] == 0
    assert taken == 3 and engine.is_skipping and not engine.is_healthy()
    counts = engine.state_dict()
    other = EngineSettings().start()
    other.load_state_dict(json.loads(json.dumps(counts)))
    assert other.state_dict() == counts
    engine.release()


def test_a_streak_that_an_earlier_version_saved_is_known() -> None:
    engine = EngineSettings().start()
    engine._trained = {"student": None}  # type: ignore[dict-item]
    engine.load_state_dict({"skipped_steps": 12, "skipped_in_a_row": 9})
    assert engine.is_skipping and engine.state_dict()["skipped_in_a_row"] == 9
    engine._trained = {}


# ---- odd entries ------------------------------------------------------------------------------------------------


def moved(checkpoints: Path, scratch: Path) -> None:
    """As people do when a disk is full: the step folders lie elsewhere, with links in their places."""
    scratch.mkdir()
    for folder in sorted(checkpoints.glob("step-*")):
        folder.rename(scratch / folder.name)
        folder.symlink_to(scratch / folder.name)


def test_linked_checkpoints_are_resumed_from_and_dropped_as_links(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looped(tmp_path / "run", 3, total_limit=2)
    moved(tmp_path / "run", tmp_path / "scratch")
    checkpoints, _, taken = looped(tmp_path / "run", 6, total_limit=2)
    assert taken == 6 and steps_of(checkpoints) == [6, 5]
    assert not any(p.is_symlink() for p in (tmp_path / "run").iterdir())
    assert sorted(p.name for p in (tmp_path / "scratch").iterdir()) == ["step-00000002", "step-00000003"]
    assert [r.levelno for r in caplog.records if r.levelno >= logging.WARNING] == []


ODD: dict[str, Callable[[Path], object]] = {
    "a file called like a torn checkpoint": lambda run: (run / "step-00000010.tmp").write_text("x"),
    "a link called like one": lambda run: (run / "step-00000010.tmp").symlink_to(run.parent),
    "a link to nothing called like one": lambda run: (run / "step-00000010.tmp").symlink_to("nowhere"),
    "a file where a step is to be saved": lambda run: (run / "step-00000004").write_text("x"),
    "a link to nothing where a step is to be saved": lambda run: (run / "step-00000004").symlink_to("nowhere"),
    "a folder where a step is to be saved": lambda run: (run / "step-00000004").mkdir(),
    "a torn folder where a step is to be saved": lambda run: (run / "step-00000004.tmp").mkdir(),
    "a file where a dropped step is renamed to": lambda run: (run / "step-00000002.tmp").write_text("x"),
    "a foreign folder of an early step": lambda run: (run / "step-00000001").mkdir(),
    "a folder called latest": lambda run: ((run / "latest").unlink(), (run / "latest").mkdir()),
    "a link called latest": lambda run: ((run / "latest").unlink(), (run / "latest").symlink_to("step-00000003")),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_entries_hinder_neither_a_start_nor_a_save(odd: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    looped(run, 3, total_limit=2)
    ODD[odd](run)
    checkpoints, _, taken = looped(run, 5, total_limit=2)
    assert taken == 5 and steps_of(checkpoints)[:2] == [5, 4]
    assert not list(run.glob("*.tmp")) and not list(run.glob("*.part"))
    assert tmp_path.is_dir() and checkpoints._was_unhealthy(run / "step-00000005") is False


def test_a_foreign_folder_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    looped(tmp_path, 2)
    (tmp_path / "step-00000001.mine").mkdir()
    (tmp_path / "step-99999999").mkdir()
    (tmp_path / "step-99999999" / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints._was_unhealthy(tmp_path / "step-99999999") is None
    (tmp_path / "step-99999999").rename(tmp_path / "step-00000000")
    checkpoints, _, _ = looped(tmp_path, 6, total_limit=2)
    assert steps_of(checkpoints) == [6, 5, 0] and (tmp_path / "step-00000000" / "notes.txt").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove anything")
def test_what_cannot_be_removed_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    looped(tmp_path, 3, total_limit=2)
    locked = tmp_path / "step-00000002" / "student"
    locked.chmod(0o500)
    checkpoints, _, taken = looped(tmp_path, 5, total_limit=2)
    assert taken == 5 and any("could not be dropped" in r.message for r in caplog.records)
    (tmp_path / "step-00000002.tmp" / "student").chmod(0o700)


def test_a_place_that_is_a_file_or_leads_nowhere_is_one_line(tmp_path: Path) -> None:
    engine = EngineSettings().start()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match=f"{name} is a file, or a link to nothing"):
            Checkpoints(tmp_path / name).resume(engine, "latest")
    engine.release()
