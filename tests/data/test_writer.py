"""Writing: the same bytes from any number of processes, killed or not; and what must be refused."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distill.data import writer
from distill.data.errors import NotWritten
from distill.data.index import INDEX, LATER, OF_PICTURES, OF_SIZES, PLAN_FIELDS, SETTINGS, StoreMismatch, kept_times
from distill.data.reader import open_store
from distill.data.record import StoreError
from distill.data.storage import Folder
from distill.data.writer import SKIPPED, Notes, Partly, work_split
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import ddim_step, solve
from distill.diffusion.trajectory import Trajectory
from tests.analytic import three_peaks
from tests.data.stores import (
    BAD,
    PICTURES,
    PLAN,
    PROMPTS,
    embedding_of,
    files,
    in_processes,
    skipping,
    states_of,
    teacher,
    whole_shards,
    write,
)

SHARDS = [f"shard-00000{n}.tar" for n in range(3)]


def test_any_webdataset_reader_sees_the_samples(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    webdataset = pytest.importorskip("webdataset")
    urls = [str(Path(store_url) / name) for name in SHARDS]
    seen = []
    for i, found in enumerate(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)):
        tensors, facts = safetensors.torch.load(found["safetensors"]), json.loads(found["json"])
        seen.append(found["__key__"])
        assert torch.equal(tensors["states"], states_of(PLAN, i).half())
        assert tensors["times"].dtype == torch.int32 and tuple(tensors["times"].tolist()) == PLAN.times
        assert torch.equal(tensors["conditioning.encoder_hidden_states"], embedding_of(facts["prompt"]))
        assert (facts["key"], facts["index"], facts["prompt"]) == (found["__key__"], i, PROMPTS[i % len(PROMPTS)])
        assert facts["guidance"] == pytest.approx(PLAN.guidance_of(i)) == pytest.approx(tensors["guidance"].item())
    assert seen == [f"{i // 4:06d}-{i % 4:06d}" for i in range(11)]


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
def test_any_number_of_writers_gives_the_same_bytes(store_url: str, tmp_path: Path, writers: int) -> None:
    """Five are more than there are shards."""
    jobs = [partial(write, tmp_path / "store", rank=r, world_size=writers) for r in range(writers)]
    assert in_processes(*jobs) == [0] * writers
    assert files(tmp_path / "store") == files(store_url)


def test_a_shard_that_another_job_finished_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    """With a teacher whose arithmetic differs between the two, a mixture of their files would not fit together."""

    def noisy(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        if not (tmp_path / SHARDS[0]).exists():
            assert in_processes(partial(write, tmp_path)) == [0]
        found = teacher(PLAN)(indices, prompts)
        return replace(found, states=found.states + 0.01)

    write(tmp_path, solve=noisy)
    assert whole_shards(tmp_path) == SHARDS
    assert torch.equal(open_store(str(tmp_path)).read(1).states, states_of(PLAN, 1).half())


def test_publishers_that_race_lose_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between this process's look around and its writing of the index, another one finishes and publishes a shard."""
    folder = Folder(str(tmp_path))
    write(tmp_path, replace(PLAN, samples=11), rank=0, world_size=3)
    plan = replace(
        PLAN,
        **{
            name: json.loads((tmp_path / "plan.json").read_bytes())[name]
            for name in PLAN_FIELDS
            if name not in (*OF_PICTURES, *OF_SIZES, *LATER)
        },
    )
    publish, others = Folder.publish, [1, 2]

    def overtaken(self: Folder, name: str, data: bytes) -> None:
        if name == INDEX and others:
            rank = others.pop()
            assert in_processes(lambda: _publish_alone(str(tmp_path), rank, publish)) == [0]
            assert len(whole_shards(tmp_path)) > 1
        publish(self, name, data)

    monkeypatch.setattr(Folder, "publish", overtaken)
    Notes(folder, plan).publish_index()
    assert others == []
    assert whole_shards(tmp_path) == SHARDS


def _publish_alone(url: str, rank: int, publish: Callable[[Folder, str, bytes], None]) -> None:
    setattr(Folder, "publish", publish)  # noqa: B010, in a process of its own
    write(url, rank=rank, world_size=3)


def test_many_publishers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PUBLISH_SECONDS", 0.0)
    plan = replace(PLAN, samples=40, samples_per_shard=1)
    assert in_processes(*[partial(write, tmp_path / "a", plan, rank=r, world_size=8) for r in range(8)]) == [0] * 8
    assert len(open_store(str(tmp_path / "a"))) == 40
    assert files(tmp_path / "a") == files(write(tmp_path / "b", plan))


def test_a_live_writers_temporary_file_is_left_alone_and_a_dead_ones_removed(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.make()
    in_processes(lambda: write(tmp_path), fault="write shard-000000.tar.tmp:3")
    (dead,) = tmp_path.glob("*.tmp")
    foreign = tmp_path / "notes.tmp"  # not ours, whatever it is
    foreign.write_text("mine")
    with folder.staged("shard-000000.tar") as (path, file):
        file.write(b"working on it")
        Folder(str(tmp_path)).make()
        assert path.exists() and not dead.exists() and foreign.exists()
        folder.commit_staged(path, file, "shard-000000.tar")
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"working on it"


def test_a_lost_shard_is_written_again(store_url: str, copy: Path) -> None:
    (copy / SHARDS[1]).unlink()
    (copy / SHARDS[2]).write_bytes((copy / SHARDS[2]).read_bytes()[:-512])
    write(copy)
    assert files(copy) == files(store_url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 12}, "seed is 11 in the store and 12 in the run"),
        ({"teacher_hash": "ffff"}, "teacher_hash is '0123abcd' in the store and 'ffff' in the run"),
        ({"guidance": 7.5}, "guidance is [2.0, 8.0] in the store and 7.5 in the run"),
        ({"times": (1000, 500, 0)}, "times is [1000, 750, 500, 250, 0] in the store and [1000, 500, 0] in the run"),
        ({"samples": 7}, "samples is 11 in"),
        ({"dtype": "float32"}, "dtype is 'float16' in the store and 'float32' in the run"),
    ],
)
def test_another_plan_is_refused_with_both_values(copy: Path, change: dict[str, Any], message: str) -> None:
    before = files(copy)
    with pytest.raises(StoreMismatch, match="begun with another plan|may grow, not shrink") as error:
        write(copy, replace(PLAN, **change))
    (name,) = change
    said = str(error.value)
    assert "\n" not in said and message in said and f"Set {SETTINGS[name]}" in said
    assert files(copy) == before


def test_other_prompts_are_another_plan(copy: Path) -> None:
    with pytest.raises(StoreMismatch, match="prompts_sha256"):
        write(copy, prompts=[*PROMPTS, "one more"])


def spoiled(part: str, value: float) -> Callable[[Sequence[int], Sequence[str]], Trajectory]:
    def solve(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        found = teacher(PLAN)(indices, prompts)
        if 5 in indices:
            tensor = found.states if part == "states" else found.conditioning[part]
            tensor[indices.index(5)].view(-1)[3] = value
        return found

    return solve


@pytest.mark.parametrize(("part", "value"), [("states", float("nan")), ("states", 1e5), ("time_ids", float("inf"))])
def test_what_is_not_finite_is_never_written(tmp_path: Path, part: str, value: float) -> None:
    """1e5 is finite, but not in float16."""
    with pytest.raises(StoreError, match=f"000001-000001.*{part} has values that are not finite"):
        write(tmp_path, solve=spoiled(part, value))
    assert whole_shards(tmp_path) == SHARDS[:1]
    assert list(tmp_path.glob("*.tmp")) == []


def wrong(change: Callable[[Trajectory], Trajectory]) -> Callable[[Sequence[int], Sequence[str]], Trajectory]:
    return lambda indices, prompts: change(teacher(PLAN)(indices, prompts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replace(t, times=t.times[:-1], states=t.states[:, :-1]), "at 4 times"),
        (lambda t: replace(t, states=t.states[:-1]), "states"),
        (lambda t: replace(t, guidance=t.guidance + 9), "guidance"),
        (lambda t: replace(t, seeds=t.seeds[:-1]), "gave 2 of seeds for 3 samples"),
        (lambda t: replace(t, conditioning={"e": t.conditioning["time_ids"][:1]}), "gave 1 of e for 3 samples"),
    ],
)
def test_a_teacher_that_breaks_the_plan_is_refused(
    tmp_path: Path, change: Callable[[Trajectory], Trajectory], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        write(tmp_path, solve=wrong(change))
    assert whole_shards(tmp_path) == []


def test_a_disk_that_is_full_is_one_line_and_what_is_finished_stays(tmp_path: Path, store_url: str) -> None:
    def writes() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = (Path(store_url) / SHARDS[0]).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))  # a shard, and not one that is longer
        with pytest.raises(NotWritten, match=r"store cannot be written \(\[Errno 27\] .*; the shards that"):
            write(tmp_path / "store", prompts=[*PROMPTS[:4], "x" * 10_000])

    assert in_processes(writes) == [0]
    assert (tmp_path / "store" / SHARDS[0]).exists() and not list((tmp_path / "store").glob("*.tmp"))
    write(tmp_path / "store", prompts=[*PROMPTS[:4], "x" * 10_000])
    assert whole_shards(tmp_path / "store") == SHARDS


def test_samples_of_one_store_have_one_shape(tmp_path: Path) -> None:
    def grows(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        return teacher(PLAN, (4, 8, 8) if indices[0] < 3 else (4, 8, 16))(indices, prompts)

    with pytest.raises(StoreError, match="000000-000003"):
        write(tmp_path, solve=grows)


def test_stored_neighbours_are_the_teachers_own_steps(tmp_path: Path) -> None:
    """What a method gets from the store is the solver step it would have made, to the rounding of storage."""
    schedule = NoiseSchedule.scaled_linear()
    world, grid = three_peaks(schedule), [1000, 800, 600, 400, 200, 0]
    plan = replace(PLAN, times=kept_times(grid, [1000, 600, 400, 0]), dtype="float32", guidance=1.0)

    def solve_them(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        x: Tensor = torch.stack([states_of(plan, i, (1, 1, 1))[0] for i in indices])
        kept = {t: x_t for t, x_t in solve(world, schedule, x, grid, {}) if t in plan.times}
        return Trajectory(
            torch.stack([kept[t] for t in plan.times], 1), plan.times, {}, torch.ones(len(x)), (0,) * len(x)
        )

    store = open_store(write(tmp_path, plan, solve=solve_them))
    x_t, x_s = store.read(7, (1, 2)).states[:, None]
    assert torch.equal(ddim_step(schedule, world(x_t, torch.tensor([600]), {}), 400).float(), x_s)


def test_remote_stores_are_written_alike(store_url: str) -> None:
    url = "memory://writer/store"
    write(url, rank=1, world_size=2)
    with pytest.raises(StoreError, match="unfinished: 1 of 3"):
        open_store(url)
    write(url, rank=0, world_size=2)
    fs = Folder(url).fs
    assert {path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in fs.ls(url, detail=False)} == files(store_url)
    assert list(Folder(url).staging.glob("*.tmp")) == []


def test_there_must_be_prompts(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no prompts"):
        write(tmp_path, prompts=[])


# Pictures: some cannot be read, and their places stay empty.

write_pictures = partial(write, plan=PICTURES, solve=skipping(PICTURES, BAD))


def test_the_places_of_skipped_samples_stay_empty(pictures_url: str) -> None:
    store = open_store(pictures_url)
    assert [shard.samples for shard in store.index.shards] == [3, 0, 2] and store.index.complete
    good = [i for i in range(11) if i not in BAD]
    assert [store.key(row) for row in range(len(store))] == [f"{i // 4:06d}-{i % 4:06d}" for i in good]
    for row, i in enumerate(good):
        sample = store.read(row)
        assert sample.key == store.key(row)
        assert torch.equal(sample.states, states_of(PICTURES, i).half())
        assert torch.equal(sample.conditioning["encoder_hidden_states"], embedding_of(PROMPTS[i % len(PROMPTS)]))
    assert json.loads((Path(pictures_url) / INDEX).read_bytes())["kind"] == "pictures"
    assert (Path(pictures_url) / SKIPPED).read_text().splitlines() == [
        f"{i // 4:06d}-{i % 4:06d} {i}.jpg: torn" for i in BAD
    ]


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_any_number_of_writers_skips_alike(
    pictures_url: str, tmp_path: Path, writers: int, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in range(writers):
        assert "were skipped" not in caplog.text
        write_pictures(tmp_path, rank=rank, world_size=writers)
    assert f"6 of 11 pictures were skipped, see {SKIPPED}" in caplog.text
    assert files(tmp_path) == files(pictures_url)


def test_a_store_without_any_sample_is_one_error(tmp_path: Path) -> None:
    nothing = partial(write, tmp_path, PICTURES, solve=skipping(PICTURES, range(11)))
    nothing(rank=0, world_size=2)  # cannot know yet
    with pytest.raises(StoreError, match="11 of 11 pictures were skipped.*such as 000000-000000 0.jpg: torn"):
        nothing(rank=1, world_size=2)
    with pytest.raises(StoreError, match="no shard is finished that holds a sample"):
        open_store(str(tmp_path))


def test_trajectories_are_never_skipped(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"batch at 000000-000000: samples were skipped \(1.jpg: torn\)"):
        write(tmp_path, solve=skipping(PLAN, BAD))
    assert write(tmp_path, solve=lambda *of: Partly(teacher(PLAN)(*of), {}))  # whole, and said so


@pytest.mark.parametrize("answer", [Partly(None, {0: "torn"}), Partly(None, {0: "", 1: "", 2: "", 3: ""})])
def test_a_sample_is_made_or_skipped(tmp_path: Path, answer: Partly) -> None:
    """The batch is of samples 0, 1 and 2."""
    with pytest.raises(StoreError, match="batch at 000000-000000: samples neither made nor skipped, or skipped un"):
        write(tmp_path, PICTURES, solve=lambda *of: answer)


def test_stores_of_trajectories_hold_what_they_always_held(store_url: str) -> None:
    """So that those begun before there were pictures go on and open."""
    index = json.loads((Path(store_url) / INDEX).read_bytes())
    assert not set(index) & set(OF_PICTURES) and set(index["shards"][0]) == {
        "name",
        "samples",
        "bytes",
        "sha256",
        "offsets",
        "crc32",
    }
    assert set(SETTINGS) == set(PLAN_FIELDS)
    assert open_store(store_url).index.kind == "trajectories"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures_sha256": "cccc"}, "pictures_sha256 is 'aaaa' in the store and 'cccc' in the run"),
        ({"crop": "random"}, "crop is 'center' in the store and 'random' in the run"),
        ({"vae_hash": "cccc"}, "vae_hash is 'bbbb' in the store and 'cccc' in the run"),
    ],
)
def test_other_pictures_are_another_plan(pictures_url: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreMismatch, match=message):
        write_pictures(pictures_url, plan=replace(PICTURES, **change))
    with pytest.raises(StoreMismatch, match="kind is 'pictures' in the store and 'trajectories' in the run"):
        write(pictures_url)


@pytest.mark.parametrize("change", [{"times": (1000, 0)}, {"solver": "ddim"}, {"solver_steps": 4}])
def test_pictures_have_no_solve(change: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="no solve"):
        replace(PICTURES, **change)


@pytest.mark.parametrize(
    ("environ", "split"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "7"}, (2, 4)),
        (
            {"RANK": "1", "WORLD_SIZE": "2"}
            | {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "7"},
            (5, 8),
        ),
    ],
)
def test_work_split(environ: dict[str, str], split: tuple[int, int]) -> None:
    assert work_split(environ | {"SLURM_ARRAY_TASK_COUNT": "4"}) == split


def test_array_ids_with_holes_are_refused() -> None:
    ids = {"ID": "7", "MIN": "3", "MAX": "7", "COUNT": "2"}
    with pytest.raises(StoreError, match="follow one another"):
        work_split({f"SLURM_ARRAY_TASK_{name}": value for name, value in ids.items()})


@pytest.mark.parametrize(
    ("keep", "times"),
    [
        ("all", tuple(range(1000, -1, -125))),
        ("milestones", tuple(range(1000, -1, -125))),
        ([0, 500, 1000], (1000, 500, 0)),
    ],
)
def test_kept_times(keep: str | list[int], times: tuple[int, ...]) -> None:
    assert kept_times(list(range(1000, -1, -125)), keep) == times


@pytest.mark.parametrize(("keep", "message"), [("some", "all, milestones or a list"), ([3], r"times \[3\]")])
def test_times_off_the_grid_are_refused(keep: str | list[int], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        kept_times([1000, 500, 0], keep)


@pytest.mark.parametrize(
    "change",
    [
        {"times": (0, 1000)},
        {"times": ()},
        {"dtype": "float8"},
        {"samples": 0},
        {"guidance": (8, 2)},
        {"batch_size": 0},
        {"solver_steps": 0},
        {"kind": "films"},
    ],
)
def test_a_plan_checks_its_values(change: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=next(iter(change))):
        replace(PLAN, **change)
