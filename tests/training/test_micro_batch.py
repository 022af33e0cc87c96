"""How many samples are taken at once: as a setting, found by halving, and the line of runs without room for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import distill
from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings
from distill.planning.fitting import fitting_split
from distill.training.assembly import train_run
from distill.training.micro_batch import Split, halved, is_out_of_memory, split_batch, within_memory
from tests.training import short_of_memory

SHORT = ("method._target_=tests.training.short_of_memory.Short",)
SHORT += tuple(f"~method.{key}" for key in ("skip", "source", "target", "loss", "huber_c"))


def settings(*overrides: str) -> TrainSettings:
    return load("train", TrainSettings, ("experiment=quickstart", "data.store=STORE", "engine=single", *overrides))


@pytest.mark.parametrize(
    ("most", "processes", "expected"),
    [("null", 1, (96, 1)), (12, 1, (12, 8)), (40, 1, (32, 3)), (12, 8, (12, 1)), (7, 8, (6, 2)), (200, 8, (12, 1))],
)
def test_the_batch_stays_the_same_in_the_largest_micro_batches_that_are_allowed(
    most: int | str, processes: int, expected: tuple[int, int]
) -> None:
    assert split_batch(settings("global_batch_size=96", f"micro_batch_size={most}"), processes) == Split(*expected)


def test_stages_of_other_sizes_come_in_as_many_micro_batches() -> None:
    split = split_batch(settings("global_batch_size=16", "micro_batch_size=6"), 1, [8, 4])
    assert split == Split(4, 4, (8, 4)) and split.largest == 4
    assert split_batch(settings("global_batch_size=16", "micro_batch_size=1"), 1, [8, 4]).accumulated == 4
    larger = split_batch(settings("global_batch_size=8", "micro_batch_size=4"), 2, [32])
    assert larger == Split(1, 4, (16,)) and larger.largest == 4


@pytest.mark.parametrize("most", ["8", "auto"])
def test_two_settings_of_one_thing_are_refused(most: str) -> None:
    with pytest.raises(ConfigError, match=f"micro_batch_size={most} and gradient_accumulation_steps=2 both say how"):
        split_batch(settings(f"micro_batch_size={most}", "gradient_accumulation_steps=2"), 1)


def test_accumulation_that_is_typed_takes_the_place_of_an_experiments_size() -> None:
    experiment = ["experiment=lcm_lora_sd15", "data.store=S", "global_batch_size=16"]
    assert load("train", TrainSettings, experiment).micro_batch_size == "auto"
    cfg = load("train", TrainSettings, [*experiment, "gradient_accumulation_steps=4"])
    assert cfg.micro_batch_size is None and split_batch(cfg, 2) == Split(2, 4)


@pytest.mark.parametrize("size", ["0", "2.5", "all"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size"):
        settings(f"micro_batch_size={size}")


# ---- found by halving -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    written = ["experiment=quickstart", "engine=single", "data.num_samples=24", "data.solver_steps=5"]
    distill.trajectories(*written, f"data.store={folder}", "data.samples_per_shard=24")
    return folder


def trained(store: Path, folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """What a run of two steps of 6 samples, with room for four at once, leaves behind."""
    short_of_memory.seen.clear()
    cfg = settings(
        *(f"data.store={store}", "data.solver_steps=5", f"output_dir={folder / name}", "reward@validation_reward=null"),
        *("validation_prompts=null", "max_train_steps=2", "lr_warmup_steps=1", "global_batch_size=6", "log_every=1"),
        *("dataloader_num_workers=0", *SHORT, "+method.room=4", *overrides),
    )
    assert train_run(cfg, fitting_split) == 0
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    network = next((folder / name / "checkpoints").glob("*2")) / "student"
    return {
        "losses": [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row],
        "files": [path.read_bytes() for path in sorted(network.rglob("*")) if path.is_file()],
        "seen": [*short_of_memory.seen],
        "used": json.loads((folder / name / "environment.json").read_text())["batch"],
    }


@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_a_size_that_is_found_gives_the_run_of_that_size_to_the_bit(
    engine: str, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = trained(store, tmp_path, "auto", f"engine={engine}", "micro_batch_size=auto")
    given = trained(store, tmp_path, "given", f"engine={engine}", "micro_batch_size=3")
    assert found["seen"] == [3] + given["seen"] == [3] + 2 * 2 * [3]  # 6 had no room, 3 was rehearsed once
    assert len(found["losses"]) == 2 and found["losses"] == given["losses"]
    assert found["files"] == given["files"] and len(found["files"]) > 2
    assert found["used"] == given["used"] == {"micro_batch_size": 3, "accumulated": 2, "processes": 1}
    assert "6 samples at once, no limit is known here" in caplog.text
    assert "no memory for 6 samples at once, trying 3" in caplog.text
    again = trained(store, tmp_path, "auto", f"engine={engine}", "micro_batch_size=2", "max_train_steps=2")
    assert again["seen"] == []  # another size is no other run


def test_no_room_for_one_is_one_line(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out of memory for 1 sample at once, the fewest .*checkpointing=true"):
        trained(store, tmp_path, "none", "micro_batch_size=auto", "method.room=0")


def test_memory_that_runs_out_later_is_one_line(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out of memory: set a smaller micro_batch_size") as raised:
        trained(store, tmp_path, "later", "micro_batch_size=6", "+method.first=1")
    assert "distill plan" in str(raised.value) and "\n" not in str(raised.value)


def test_what_runs_out_of_memory_is_known_whoever_says_it() -> None:
    """A CPU's allocator says so by a plain RuntimeError, and so do CUDA's libraries."""
    with pytest.raises(ConfigError, match="out of memory: take less"), within_memory("take less"):
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"), within_memory("take less"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_the_counting_cuts_the_batch_by_the_memory_there_is() -> None:
    cfg = settings("micro_batch_size=auto", "global_batch_size=64")
    all_at_once, needed = fitting_split(cfg, Split(64, 1), 1, float("inf"), None) or (None, 0.0)
    assert all_at_once == Split(64, 1) and 0 < needed < 2**32
    less, taken = fitting_split(cfg, Split(64, 1), 1, 0.6 * needed, None) or (None, 0.0)
    assert less is not None and less.samples == 64 and 1 < less.micro_batch_size < 64 and taken <= 0.6 * needed
    assert fitting_split(cfg, Split(64, 1), 1, 1.0, None) == (Split(1, 64), pytest.approx(taken, rel=1))


def test_halving_ends_at_one_sample() -> None:
    class Here:
        is_main = False

    assert halved(Split(6, 2), Here()) == Split(3, 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="for 1 sample at once"):
        halved(Split(1, 12), Here())  # type: ignore[arg-type]
