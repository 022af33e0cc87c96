"""What is written for later is there after a power loss, whole, or is recognised as not there; and each flush counts.

Everything that the product writes to be found again is written onto a disk that loses its power at each moment, and
what is left is opened. Then the disk takes no notice of one kind of flush after another: each time something must be
found broken, or this test could not tell that the flush is missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.cluster import supervise
from distill.cluster.job import Job
from distill.evaluation.blocks import Cache
from distill.models import derived
from distill.training.checkpoint import Checkpoints, _difference, _read_manifest, best_of, mark_best
from distill.training.export import FACTS, published
from distill.training.preemption import Preemption
from distill.training.run import mark_finished, write_atomically
from distill.training.validation import kept_ends
from tests.data.stores import files, whole_shards, write
from tests.durability import Disk
from tests.training.test_checkpoint import Make, advance, make  # noqa: F401, a fixture

JOB = Job("train", ("train", "a=b"), ("run", "/run"), "/notes")
TENSOR = torch.arange(4.0)


@dataclass(frozen=True)
class Writing:
    """Something that is written, into a folder that is there; and what must be so of any such folder after a cut.

    `check` is given the folder, and whether the power was lost after everything: then all must be there.
    """

    write: Callable[[Path], object]
    check: Callable[[Path, bool], None]


def small(name: str, content: Callable[[Path], object], expected: str) -> Writing:
    """A small file: whole or not there."""

    def check(folder: Path, end: bool) -> None:
        assert (folder / name).exists() or not end
        assert not (folder / name).exists() or (folder / name).read_text() == expected

    return Writing(content, check)


def export(folder: Path) -> None:
    with published(folder / "exports" / "new") as aside:
        (aside / "student").mkdir()
        (aside / "student" / "weights").write_bytes(b"weights")
        (aside / "card.md").write_text("card")
        (aside / FACTS).write_text("{}")


def check_export(folder: Path, end: bool) -> None:
    found = folder / "exports" / "new"
    assert found.exists() or not end
    if found.exists():
        facts = json.loads((found / FACTS).read_text())["files"]
        assert facts == {"card.md": 4, "student/weights": 7}
        assert {path: (found / path).read_bytes() for path in facts} == {
            "card.md": b"card",
            "student/weights": b"weights",
        }


def derive(folder: Path) -> None:
    def copy(target: Path) -> None:
        (target / "unet").mkdir()
        (target / "unet" / "weights").write_bytes(b"weights")
        (target / "model_index.json").write_text("{}")

    before = os.environ.get(derived.CACHE)
    os.environ[derived.CACHE] = str(folder / "cache")
    try:
        derived.made_once("merged", {"of": "it"}, "merging", copy)
    finally:
        os.environ.pop(derived.CACHE) if before is None else os.environ.update({derived.CACHE: before})


def check_derived(folder: Path, end: bool) -> None:
    found = list((folder / "cache").rglob("merged"))
    complete = [path for path in found if ".partial" not in str(path)]
    for path in complete:  # one that is lost is made again
        assert (path / "model_index.json").read_text() == "{}" and (
            path / "unet" / "weights"
        ).read_bytes() == b"weights"


def check_store(folder: Path, end: bool) -> None:
    store = folder / "store"
    assert not end or files(store) == STORE
    if store.exists():
        whole_shards(store)
        for note in store.glob("shard-*.json"):
            assert json.loads(note.read_text())


STORE: dict[str, bytes] = {}


def check_tensors(folder: Path, end: bool) -> None:
    found = list((folder / "made" / "evaluation").glob("[!.]*.safetensors"))
    assert found or not end
    assert all(torch.equal(load_file(path)["tensor"], TENSOR) for path in found)


WRITINGS = {
    "settings": small("run.yaml", lambda folder: write_atomically(folder / "run.yaml", "a: 1\n"), "a: 1\n"),
    "DONE": small("DONE", lambda folder: mark_finished(folder, 8), "8\n"),
    "PREEMPTED": small("PREEMPTED", lambda folder: Preemption(folder).mark(3), "3\n"),
    "a job": small("job.json", lambda f: JOB.write(f / "job.json"), json.dumps(JOB.__dict__, indent=2) + "\n"),
    "a job's failures": small("failures", lambda folder: supervise.write(folder / "failures", 2), "2\n"),
    "export": Writing(export, check_export),
    "a folder that is derived": Writing(derive, check_derived),
    "cached tensors": Writing(
        lambda folder: Cache(folder / "made" / "evaluation").tensor({}, lambda: TENSOR), check_tensors
    ),
    "store": Writing(lambda folder: write(folder / "store"), check_store),
}


def check_checkpoints(folder: Path, end: bool) -> None:
    """Each is whole; the first was there before, or it is the only one that was written."""
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    found = dict(checkpoints.found())
    for path in found.values():
        manifest, problem = _read_manifest(path)
        assert problem is None and len(manifest["files"]) == 3
        assert all(_difference(path, name, facts) is None for name, facts in manifest["files"].items())
    if end:
        assert set(found) == {1, 2} and (checkpoints.folder / "latest").read_text() == "step-00000002\n"
        assert best_of(checkpoints.folder) == 1
    for name in ("latest", "best"):
        if (checkpoints.folder / name).exists():
            assert (checkpoints.folder / name).read_text() in ("step-00000001\n", "step-00000002\n")


def check_ends(folder: Path, end: bool) -> None:
    assert (folder / "v" / "ends.safetensors").exists() or not end
    if (folder / "v" / "ends.safetensors").exists():
        assert torch.equal(load_file(folder / "v" / "ends.safetensors")["ends"][0], TENSOR)


@pytest.fixture
def writings(make: Make) -> Iterator[dict[str, Writing]]:  # noqa: F811
    """All that there is, those with an engine too."""
    engine = make()
    advance(engine, 0, 1)

    def checkpoints(folder: Path) -> None:
        saving = Checkpoints(folder / "run" / "checkpoints", background=True)
        saving.save(engine, 1)
        mark_best(saving.folder, 1)
        saving.save(engine, 2)

    def ends(folder: Path) -> None:
        kept_ends(folder / "v" / "ends.safetensors", [0], 4, 7.5, engine.processes, lambda: [TENSOR])

    more = {
        "checkpoints": Writing(checkpoints, check_checkpoints),
        "pictures of the teacher": Writing(ends, check_ends),
    }
    yield {**WRITINGS, **more}


def broken(
    writing: Writing, folder: Path, ignoring: str | None = None, thorough: bool = False
) -> tuple[list[str], Disk]:
    """After which cuts something is neither whole nor not there; and the disk that it was written to."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "disk").mkdir(parents=True)
    with Disk(folder / "disk", ignoring) as disk:
        writing.write(folder / "disk")
    found, seen = [], set()
    for number, (cut, end) in enumerate([(disk.at_the_end(), True), *((cut, False) for cut in disk.cuts(thorough))]):
        left = cut.lay_out(folder / str(number))
        paths = sorted(left.rglob("*"))
        state = tuple((str(p.relative_to(left)), p.read_bytes() if p.is_file() else None) for p in paths)
        if (state, end) not in seen:
            seen.add((state, end))
            try:
                writing.check(left, end)
            except Exception as problem:  # whatever a reader makes of what it does not expect
                found.append(f"{cut.where}: {problem!r}"[:300])
                if ignoring is not None:  # one is enough
                    break
        shutil.rmtree(left)
    return found, disk


LONG = ("checkpoints", "store")
"""Those with many files, which tests of their own try at fewer moments."""
NAMES = [*WRITINGS, "checkpoints", "pictures of the teacher"]


@pytest.fixture(scope="module", autouse=True)
def expected_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("expected") / "store"
    write(folder)
    STORE.update(files(folder))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.faults if n in LONG else ()) for n in NAMES])
def test_power_lost_at_any_moment_breaks_nothing(name: str, writings: dict[str, Writing], tmp_path: Path) -> None:
    found, disk = broken(writings[name], tmp_path / "x", thorough=True)
    assert not found and len(disk.kinds) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_each_flush_that_is_made_is_missed_where_it_is_not(
    name: str, writings: dict[str, Writing], tmp_path: Path
) -> None:
    _, disk = broken(writings[name], tmp_path / "x")
    kinds = sorted(set(disk.kinds))
    unmissed = [kind for kind in kinds if not broken(writings[name], tmp_path / "x", kind, thorough=True)[0]]
    assert unmissed == []
