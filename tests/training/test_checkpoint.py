"""Checkpoints in one process: what they hold, what becomes of damaged ones, and death at every moment of a save."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.config.loading import load
from distill.config.settings import TrainSettings
from distill.diffusion.prediction import Denoised
from distill.diffusion.trajectory import Batch
from distill.methods.base import Losses, Turn
from distill.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    Checkpoints,
    _digest,
    _write_manifest,
    best_of,
    mark_best,
    read_weights,
)
from distill.training.engine import Engine, EngineSettings
from distill.training.learning_rate import LearningRate
from distill.training.sharding import read_whole
from distill.training.trained_network import TrainingRecipe
from tests.durability import Disk
from tests.training.engine_worker import run as run_case


@dataclass(frozen=True)
class Line:
    """The smallest network that can be trained: half of it is frozen."""

    module: nn.Module

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> Denoised:
        return Denoised(self.module(x), x)


def line(width: int = 4) -> Line:
    frozen, trained = nn.Linear(4, 1000), nn.Linear(1000, width)
    return Line(nn.Sequential(frozen.requires_grad_(False), trained))


def distance(networks: Any, batch: Batch, context: Any) -> Losses:
    return Losses((networks["student"](batch.states, batch.times, {}).x0 - 1).square().mean(), {})


TURN = Turn("student", distance)
Make = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[Make]:
    engines: list[Engine] = []

    def build(name: str = "student", width: int = 4, ema_decay: float | None = 0.9, **settings: Any) -> Engine:
        torch.manual_seed(0)
        plan = TrainingRecipe(lambda p: torch.optim.AdamW(p, lr=0.01), LearningRate("cosine", 1, 20), ema_decay)
        engines.append(EngineSettings(**settings).start())
        engines[-1].prepare({name: line(width)}, {name: plan})  # type: ignore[dict-item]
        return engines[-1]

    yield build
    for engine in engines:
        engine.release()


def advance(engine: Engine, start: int, stop: int) -> list[dict[str, float]]:
    rows = []
    for step in range(start, stop):
        states = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        batch = Batch(states, torch.zeros(2, 1), {}, {}, torch.ones(2), ("a", "b"), (2 * step, 2 * step + 1))
        rows.append(engine.updated(TURN, [batch], step))
    return rows


def saved(engine: Engine, folder: Path, stop: int, **settings: Any) -> Checkpoints:
    """A checkpoint after each of the steps 1 ... stop."""
    checkpoints = Checkpoints(folder, **settings)
    for step in range(stop):
        advance(engine, step, step + 1)
        checkpoints.save(engine, step + 1, {"samples": 2 * (step + 1)})
    return checkpoints


def weights(engine: Engine) -> torch.Tensor:
    both = (engine.export_weights("student", ema=e) for e in (False, True))
    return torch.cat([w.flatten() for part in both for w in part.values()])


# ---- going on ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    """A LoRA on a UNet, with accumulation, clipping, an average, a schedule and a skipped step before the save."""
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    case = {"engine": settings, "method": "distance", "poison": {1: [3]}, "steps": 4, "save_at": [2, 4]}
    whole_engine, whole = run_case({**case, "run": tmp_path / "whole"})
    first_engine, _ = run_case({**case, "run": tmp_path / "parted", "steps": 2})
    first_engine.release()
    engine, rest = run_case({**case, "run": tmp_path / "parted", "resume": "latest"})
    assert (rest["start"], rest["state"]) == (2, {"note": "after 2"})
    assert rest["scalars"] == whole["scalars"][2:]
    assert engine.state_dict() == whole_engine.state_dict() == {"skipped_steps": 1, "skipped_in_a_row": 0}
    manifests = [
        json.loads((tmp_path / p / "checkpoints/step-00000004/manifest.json").read_text()) for p in ("whole", "parted")
    ]
    assert manifests[0]["files"] == manifests[1]["files"]  # weights, average and optimizer: sizes and hashes
    engine.release()


def test_a_checkpoint_says_what_it_is_and_holds_no_frozen_weight(make: Make, tmp_path: Path) -> None:
    engine = make()
    saved(engine, tmp_path, 2, config={"seed": 3, "betas": (0.9, 0.99)})
    folder = tmp_path / "step-00000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert (manifest["step"], manifest["state"], manifest["config"]["seed"]) == (2, {"samples": 4}, 3)
    assert torch.__version__.startswith(manifest["versions"]["torch"])
    assert manifest["engine"]["networks"]["student"]["parameters"] == 4004
    on_disk = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert {p: f["size"] for p, f in manifest["files"].items()} == {
        p: size for p, size in on_disk.items() if p != "manifest.json"
    }
    # weights, average and two moments of 4004 float32, where the frozen layer alone has 5000
    assert sum(on_disk.values()) < 4 * 4004 * 4 + 10_000
    step, names = read_weights(tmp_path, "student")
    assert (step, set(names)) == (2, {"1.weight", "1.bias"})


def test_an_optimizer_that_is_dealt_out_anew_counts_its_steps_on(make: Make, tmp_path: Path) -> None:
    """Adam's corrections of its first steps would otherwise be made a second time."""
    whole, moved = make(), make()
    saved(whole, tmp_path, 3)
    advance(whole, 3, 6)
    folder, trained = tmp_path / "step-00000003" / "student", moved._trained["student"]
    state = read_whole(folder, trained.shapes())
    assert state.shared["step"] == 3 and state.keys == ("exp_avg", "exp_avg_sq")
    trained.load_moved(folder, state)
    advance(moved, 3, 6)
    assert torch.equal(weights(moved), weights(whole))


def test_the_newest_so_many_are_kept(make: Make, tmp_path: Path) -> None:
    saved(make(), tmp_path, 4, total_limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    with pytest.raises(ValueError, match="checkpoints_total_limit"):
        Checkpoints(tmp_path, total_limit=0)


def test_the_best_is_kept_beside_the_newest(make: Make, tmp_path: Path) -> None:
    engine, checkpoints = make(), Checkpoints(tmp_path, total_limit=1)
    for step in (1, 2, 3):
        checkpoints.save(engine, step)
        if step == 1:
            mark_best(tmp_path, 1)
    assert best_of(tmp_path) == 1 and [step for step, _ in checkpoints.found()] == [3, 1]


def test_a_step_is_written_once(make: Make, tmp_path: Path) -> None:
    engine = make()
    checkpoints = saved(engine, tmp_path, 1)
    written = (tmp_path / "step-00000001/manifest.json").stat().st_mtime_ns
    checkpoints.save(engine, 1)
    resumed = Checkpoints(tmp_path)
    resumed.resume(engine, "latest")
    resumed.save(engine, 1)
    assert (tmp_path / "step-00000001/manifest.json").stat().st_mtime_ns == written


# ---- where to go on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["latest", None])
def test_an_empty_folder_is_a_new_run(make: Make, tmp_path: Path, where: str | None) -> None:
    assert Checkpoints(tmp_path / "none").resume(make(), where) is None


@pytest.mark.parametrize("where", [2, "2", "path"])
def test_a_checkpoint_that_is_named_is_taken_and_later_ones_are_put_aside(
    make: Make, tmp_path: Path, where: str | int
) -> None:
    engine = make()
    checkpoints = saved(engine, tmp_path, 2)
    expected = weights(engine)
    advance(engine, 2, 3)
    checkpoints.save(engine, 3)
    (tmp_path / "step-00000003.set-aside").mkdir()
    resumed = Checkpoints(tmp_path).resume(make(), str(tmp_path / "step-00000002") if where == "path" else where)
    assert resumed is not None and (resumed.step, resumed.state) == (2, {"samples": 4})
    other = make()
    Checkpoints(tmp_path).resume(other, "latest")
    assert torch.equal(weights(other), expected)
    assert {p.name for p in tmp_path.iterdir()} >= {"step-00000003.set-aside", "step-00000003.set-aside-2"}
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


def test_another_runs_checkpoint_starts_a_run_but_not_a_second_time(make: Make, tmp_path: Path) -> None:
    engine = make()
    saved(engine, tmp_path / "a", 2)
    path = str(tmp_path / "a" / "step-00000002")
    own, other = Checkpoints(tmp_path / "b"), make()
    resumed = own.resume(other, path)
    assert resumed is not None and resumed.step == 2 and torch.equal(weights(other), weights(engine))
    own.save(other, 2)
    with pytest.raises(CheckpointError, match="its own checkpoints: use latest"):
        Checkpoints(tmp_path / "b").resume(make(), path)


@pytest.mark.parametrize(
    "where, says",
    [
        (None, "has a checkpoint of step 2.*another output_dir"),
        (7, "no checkpoint of step 7; there are: 2, 1"),
        ("newest", "neither latest, nor a step, nor a folder"),
    ],
)
def test_what_cannot_be_resumed_is_said_and_nothing_starts_over(
    make: Make, tmp_path: Path, where: Any, says: str
) -> None:
    saved(make(), tmp_path, 2)
    with pytest.raises(CheckpointError, match=says):
        Checkpoints(tmp_path).resume(make(), where)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"width": 5}, "the student had 4,004 trained weights when it was saved, and has 5,005 here$"),
        ({"ema_decay": None}, r"an average of the student was kept when it was saved \(ema_decay\)"),
        ({"mixed_precision": "bf16"}, "mixed_precision=no, this run has mixed_precision=bf16"),
        ({"name": "discriminator"}, "the discriminator was not trained when it was saved"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(make: Make, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    saved(make(), tmp_path, 2)
    with pytest.raises(CheckpointError, match=says):
        Checkpoints(tmp_path).resume(make(**changes), "latest")


def test_the_setting_behind_another_shape_is_named(make: Make, tmp_path: Path) -> None:
    """And not the shapes, or their hashes, or what follows from it."""

    def config(*overrides: str) -> dict[str, Any]:
        given = ["data.store=s", "model.pretrained_model_name_or_path=t", *overrides]
        return load("train", TrainSettings, given).model_dump(mode="json")

    saved(make(), tmp_path, 1, config=config())
    with pytest.raises(CheckpointError, match=r"does not fit this run: lora_rank was 64, is 8 \(the student had 4,004"):
        Checkpoints(tmp_path, config=config("lora_rank=8", "seed=3")).resume(make(width=5), "latest")


def test_settings_that_must_match_must_match(make: Make, tmp_path: Path) -> None:
    saved(make(), tmp_path, 1, must_match={"skip": 20, "sizes": (1, 2)})
    assert Checkpoints(tmp_path, must_match={"skip": 20, "sizes": (1, 2)}).resume(make(), "latest")
    with pytest.raises(CheckpointError, match="skip was 20, is 10"):
        Checkpoints(tmp_path, must_match={"skip": 10, "sizes": (1, 2)}).resume(make(), "latest")


@pytest.mark.parametrize("saved_by", [{"engine": "ddp", "world_size": 4}, {"engine": "zero2", "world_size": 4}])
def test_any_engine_reads_a_checkpoint_of_its_precision(make: Make, saved_by: dict[str, Any]) -> None:
    engine = make()
    assert engine.misfit({**engine.describe(), **saved_by}) is None
    problem = engine.misfit({**engine.describe(), **saved_by, "mixed_precision": "bf16"})
    assert problem == "it was saved with mixed_precision=bf16, this run has mixed_precision=no"


def test_a_run_takes_its_own_checkpoints_and_those_of_others_that_are_named(make: Make, tmp_path: Path) -> None:
    Checkpoints(tmp_path / "a", run="one").save(make(), 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for where in ("latest", 2):
        assert Checkpoints(tmp_path / "a", run="one").resume(make(), where)
        with pytest.raises(CheckpointError, match="step-00000002 was saved by another run: resume_from_checkpoint="):
            Checkpoints(tmp_path / "b", run="two").resume(make(), where)
    assert Checkpoints(tmp_path / "c", run="two").resume(make(), str(tmp_path / "b" / "step-00000002"))


# ---- power loss -------------------------------------------------------------------------------------------------


def test_power_lost_at_any_moment_of_a_save_leaves_the_checkpoint_before_or_the_new_one(
    make: Make, tmp_path: Path
) -> None:
    """Of what was written, only what was flushed is there; a save that has returned is there whole."""
    engine, folder = make(), tmp_path / "disk" / "checkpoints"
    checkpoints = saved(engine, folder, 1, total_limit=1)
    advance(engine, 1, 2)
    with Disk(tmp_path / "disk") as disk:
        checkpoints.save(engine, 2)
    found = []
    for i, cut in enumerate(disk.cuts()):
        left = cut.lay_out(tmp_path / str(i)) / "checkpoints"
        found.append(read_weights(left, "student")[0])  # which verifies size and hash
        shutil.rmtree(left.parent)
    assert set(found) == {1, 2}
    end = disk.at_the_end().lay_out(tmp_path / "end") / "checkpoints"
    resumed = Checkpoints(end).resume(make(), "latest")
    assert resumed is not None and resumed.step == 2
    assert (end / "latest").read_text() == "step-00000002\n"


# ---- damage -----------------------------------------------------------------------------------------------------

FILES = ("manifest.json", "student/weights.safetensors", "student/ema.safetensors", "student/optimizer.pt")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_first(file: Path) -> None:
    flip(file, 0)


def flip_middle(file: Path) -> None:
    flip(file, file.stat().st_size // 2)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip_first, flip_middle, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_said_so(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None]
) -> None:
    engine = make()
    checkpoints = saved(engine, tmp_path, 1)
    expected = weights(engine)
    advance(engine, 1, 2)
    checkpoints.save(engine, 2)
    damage(tmp_path / "step-00000002" / file)
    caplog.clear()

    with pytest.raises(CheckpointError, match="step-00000002 is damaged"):
        Checkpoints(tmp_path).resume(make(), 2)
    engine, again = make(), Checkpoints(tmp_path)
    resumed = again.resume(engine, "latest")
    assert resumed is not None and resumed.step == 1 and torch.equal(weights(engine), expected)
    told = [r.message for r in caplog.records if "is damaged" in r.message]
    assert len(told) == 1 and file.rpartition("/")[2] in told[0]

    advance(engine, 1, 2)
    again.save(engine, 2)  # the step is taken again, and so is its checkpoint
    resumed = Checkpoints(tmp_path).resume(make(), "latest")
    assert resumed is not None and resumed.step == 2


def test_every_byte_of_the_manifest_counts(make: Make, tmp_path: Path) -> None:
    saved(make(), tmp_path, 1)
    file = tmp_path / "step-00000001" / "manifest.json"
    whole = file.read_bytes()
    parsed = json.loads(whole)
    for place in range(len(whole)):
        flip(file, place)
        try:
            changed = json.loads(file.read_bytes()) != parsed
        except ValueError:
            changed = True
        if changed:  # a blank between two entries may become a tab
            with pytest.raises(CheckpointError):
                read_weights(tmp_path, "student", 1)
        file.write_bytes(whole)
    assert read_weights(tmp_path, "student", 1)[0] == 1


def test_no_whole_checkpoint_is_an_error_and_not_a_new_run(make: Make, tmp_path: Path) -> None:
    saved(make(), tmp_path, 2)
    for step in (1, 2):
        truncate(tmp_path / f"step-0000000{step}" / "student/optimizer.pt")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        Checkpoints(tmp_path).resume(make(), "latest")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sealed_pickle_that_would_call_something_is_not_opened(
    make: Make, tmp_path: Path, wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As if somebody had made a whole checkpoint around it: one of torch's own files, or a pickle."""
    marker, checkpoints = tmp_path / "executed", Checkpoints(tmp_path / "run")
    for step in (2, 4):
        checkpoints.save(make(), step)
    newest = tmp_path / "run" / "step-00000004"
    file = newest / "student" / "optimizer.pt"
    torch.save(Bomb(marker), file) if wrapped else file.write_bytes(pickle.dumps(Bomb(marker)))
    manifest = json.loads((newest / MANIFEST).read_text())
    del manifest["seal"]
    manifest["files"]["student/optimizer.pt"] = _digest(file)
    _write_manifest(newest, manifest)
    resumed = Checkpoints(tmp_path / "run").resume(make(), "latest")
    assert resumed is not None and resumed.step == 2 and not marker.exists()
    says = "optimizer.pt would call posix.mkdir, which no" if wrapped else "optimizer.pt is not a file of torch's"
    assert says in caplog.text


def test_a_poisoned_pickle_is_not_opened(make: Make, tmp_path: Path) -> None:
    saved(make(), tmp_path / "run", 2)
    marker = tmp_path / "executed"
    file = tmp_path / "run/step-00000002/student/optimizer.pt"
    file.write_bytes(pickle.dumps(Bomb(marker)))
    resumed = Checkpoints(tmp_path / "run").resume(make(), "latest")
    assert resumed is not None and resumed.step == 1 and not marker.exists()
    pickle.loads((tmp_path / "run/step-00000002.set-aside/student/optimizer.pt").read_bytes())
    assert marker.exists()  # the bomb was live


# ---- death ------------------------------------------------------------------------------------------------------

TOUCHES_FILES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir"}


def dies_before_touch(number: int, action: Callable[[], object]) -> bool:
    """Runs `action` in a child that is gone at its so-manieth touch of a file; False if it lived to the end."""
    child = os.fork()
    if child == 0:
        touched = 0

        def count(event: str, _: Any) -> None:
            nonlocal touched
            touched += event in TOUCHES_FILES
            if touched == number:
                os._exit(9)

        sys.addaudithook(count)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("replaces_another", [False, True])
def test_death_at_any_moment_of_a_save_costs_that_checkpoint_at_most(
    make: Make, tmp_path: Path, replaces_another: bool
) -> None:
    engine = make()
    saved(engine, tmp_path / "before", 2, total_limit=2)
    states = {2: weights(engine)}
    advance(engine, 2, 3)
    states[3] = weights(engine)
    if replaces_another:  # of the same step: a copy of the one before it will do
        shutil.copytree(tmp_path / "before/step-00000002", tmp_path / "before/step-00000003")

    reader = make()
    found = []
    for touch in range(1, 1000):
        folder = tmp_path / f"after-{touch}"
        shutil.copytree(tmp_path / "before", folder)
        died = dies_before_touch(touch, lambda: Checkpoints(folder, total_limit=2).save(engine, 3))  # noqa: B023
        for _, other in Checkpoints(folder).found():  # what looks like a checkpoint is one
            assert all(read_weights(folder, "student", str(other), ema)[1] for ema in (False, True))
            assert (other / "student/optimizer.pt").is_file()
        resumed = Checkpoints(folder).resume(reader, "latest")
        assert resumed is not None and torch.equal(weights(reader), states[resumed.step])
        assert not list(folder.glob("*.tmp"))
        found.append(resumed.step)
        if not died:
            break
    assert found == sorted(found) and set(found) == {2, 3}
    assert len(found) > 20 and found.count(3) > 3  # it really died in many places, also after the new one was there


# ---- weights for others -----------------------------------------------------------------------------------------


def test_weights_are_read_without_an_engine(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = make()
    saved(engine, tmp_path, 2)
    for ema in (False, True):
        step, found = read_weights(tmp_path, "student", ema=ema)
        wanted = engine.export_weights("student", ema=ema)
        assert step == 2 and all(torch.equal(found[n], w) for n, w in wanted.items())
    assert read_weights(tmp_path, "student", 1)[0] == 1
    with pytest.raises(CheckpointError, match="no trained network 'critic'"):
        read_weights(tmp_path, "critic")
    flip_middle(tmp_path / "step-00000002/student/ema.safetensors")
    with caplog.at_level(logging.WARNING):
        assert read_weights(tmp_path, "student")[0] == 1
    assert "step-00000002 is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="damaged: student/ema.safetensors"):
        read_weights(tmp_path, "student", 2)


def test_without_an_average_the_weights_themselves_are_read(make: Make, tmp_path: Path) -> None:
    engine = make(ema_decay=None)
    saved(engine, tmp_path, 1)
    _, found = read_weights(tmp_path, "student", ema=True)
    assert all(torch.equal(found[n], w) for n, w in engine.export_weights("student").items())
