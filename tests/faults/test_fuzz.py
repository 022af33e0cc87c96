"""Damaged indexes, shards and settings, by the thousand: a clear error or a sound answer, in bounded time and memory.

300 of each kind are in the default run; with `-m faults` there are 10,000. The same number is the same input.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from distill.config.loading import ConfigError, load, read_settings
from distill.config.settings import TrainSettings
from distill.data import tar
from distill.data.index import INDEX
from distill.data.reader import Store, open_store
from distill.data.record import BadSample, Sample, StoreError
from distill.data.verify import verify_shard
from tests.faults.conftest import Outcome
from tests.faults.mutate import campaign, damaged_bytes, damaged_text, damaged_tree

MOST = 500  # characters of an error's one line
DEFAULT, ALL = 300, pytest.param(10_000, marks=pytest.mark.faults)
OVERRIDES = [
    "experiment=lcm_lora_sdxl",
    "method=mlcm",
    "method._target_=distill.methods.lcm.LCM",
    "data.store=store",
    "data.guidance=[2,8]",
    "data.keep=[1000,500,0]",
    "max_train_steps=30",
    "learning_rate=3e-5",
    "+optimizer.eps=1e-8",
    "tracking=wandb",
    "engine=zero2",
    "resume_from_checkpoint=latest",
    "teacher=null",
]


def clear(error: object) -> None:
    said = str(error)
    assert said and "\n" not in said and len(said) < MOST, f"{len(said)} characters: {said[:200]}"


def tried(fault: Callable[[int, str], Outcome], name: str, inputs: int, try_one: Callable, report: Path) -> None:
    """Tries so many inputs and adds them to the table; the seconds are of the slowest."""
    slowest = campaign(try_one, inputs, report)
    row = fault(21, f"mutated {name}")
    for _ in range(inputs):
        row.tried(seconds=slowest)


@pytest.mark.parametrize("inputs", [DEFAULT, ALL])
def test_a_mutated_index(
    inputs: int,
    store_url: str,
    pictures_url: str,
    tmp_path: Path,
    fault: Callable[[int, str], Outcome],
) -> None:
    """Refused, or else all that is read and verified by it is."""
    folders = [copied(Path(url), tmp_path / str(n)) for n, url in enumerate((store_url, pictures_url))]
    whole = [(folder / INDEX).read_bytes() for folder in folders]

    def try_one(rng: random.Random) -> None:
        which = rng.randrange(2)
        (folders[which] / INDEX).write_bytes(damaged_index(rng, whole[which], whole))
        try:
            store = open_store(str(folders[which]), allow_partial=True, max_bad_fraction=0.5)
            for found in store.read_many([(i, (0,)) for i in sample_of(len(store))], prompts=True):
                check(found, store)
            for shard in store.index.shards:
                for problem in verify_shard(store.folder, store.index, shard).problems:
                    clear(problem)
        except StoreError as error:
            clear(error)

    tried(fault, "index", inputs, try_one, tmp_path / "report")


@pytest.mark.parametrize("inputs", [DEFAULT, ALL])
def test_a_mutated_shard(
    inputs: int,
    store_url: str,
    pictures_url: str,
    tmp_path: Path,
    fault: Callable[[int, str], Outcome],
) -> None:
    """Other shards read as ever; of this one, samples are sound or bad ones; and the hash passes none of it."""
    folders = [copied(Path(url), tmp_path / str(n)) for n, url in enumerate((store_url, pictures_url))]
    shards = [(folder, path.name, path.read_bytes()) for folder in folders for path in sorted(folder.glob("*.tar"))]
    shards = [shard for shard in shards if len(shard[2]) > len(tar.END)]
    whole = {folder: everything(open_store(str(folder))) for folder in folders}

    def try_one(rng: random.Random) -> None:
        folder, name, data = rng.choice(shards)
        damaged = damaged_bytes(rng, data, [other for _, _, other in shards])
        (folder / name).write_bytes(damaged)
        for verify in (False, True):
            store = open_store(str(folder), max_bad_fraction=0.9, verify_sha256=verify)
            for i, (found, right) in enumerate(zip(everything(store), whole[folder], strict=True)):
                check(found, store)
                if store.locate(i)[0].name != name or damaged == data:
                    assert same(found, right)
                else:
                    assert not verify or isinstance(found, BadSample)
        (shard,) = [shard for shard in store.index.shards if shard.name == name]
        problems = verify_shard(store.folder, store.index, shard).problems
        assert bool(problems) == (damaged != data)
        for problem in problems:
            clear(problem)
        try:
            assert all(member.size <= len(damaged) for member in tar.walk(io.BytesIO(damaged)))
        except ValueError as error:
            clear(error)
        (folder / name).write_bytes(data)

    tried(fault, "shard", inputs, try_one, tmp_path / "report")


@pytest.mark.parametrize("inputs", [DEFAULT, ALL])
def test_mutated_settings(inputs: int, tmp_path: Path, fault: Callable[[int, str], Outcome]) -> None:
    """A file of settings is refused, or holds settings that are written down and read again."""
    settings = load("train", TrainSettings, ["data.store=a", "output_dir=b", "method=mlcm", "reward=toy"])
    tree = settings.model_dump(mode="json")
    text, file = yaml.safe_dump(tree, sort_keys=False), tmp_path / "config.yaml"
    file.write_text(text)
    assert read_settings(file, TrainSettings) == settings

    def try_one(rng: random.Random) -> None:
        kind = rng.randrange(3)
        if kind < 2:
            data = damaged_bytes(rng, text.encode()) if kind else damaged_text(rng, text).encode(errors="surrogatepass")
        else:
            data = yaml.safe_dump(damaged_tree(rng, tree)).encode(errors="surrogatepass")
        file.write_bytes(data)
        try:
            found = read_settings(file, TrainSettings)
            file.write_text(yaml.safe_dump(found.model_dump(mode="json")))
            assert read_settings(file, TrainSettings) == found
        except ConfigError as error:
            clear(error)

    tried(fault, "settings", inputs, try_one, tmp_path / "report")


@pytest.mark.parametrize("inputs", [20, pytest.param(1000, marks=pytest.mark.faults)])
def test_mutated_overrides(inputs: int, tmp_path: Path, fault: Callable[[int, str], Outcome]) -> None:
    """On the command line; Hydra takes a tenth of a second for each, and so there are fewer."""

    def try_one(rng: random.Random) -> None:
        overrides = rng.sample(OVERRIDES, 4)
        for k in rng.sample(range(4), rng.choice((1, 1, 2))):
            text = rng.random() < 0.6
            damaged = damaged_bytes(rng, overrides[k].encode(), [b"data.keep=[1,0]"]).decode(errors="replace")
            overrides[k] = damaged_text(rng, overrides[k]) if text else damaged
        try:
            load("train", TrainSettings, overrides)
        except ConfigError as error:
            clear(error)

    tried(fault, "overrides", inputs, try_one, tmp_path / "report")


def test_a_campaign_notices_what_it_is_for(tmp_path: Path) -> None:
    def too_much(rng: random.Random) -> None:
        bytearray(1 << 30)

    def too_long(rng: random.Random) -> None:
        while True:
            time.process_time()

    def odd(rng: random.Random) -> None:
        {}["key"]

    for try_one, said in ((too_much, "MemoryError"), (too_long, "TookTooLong"), (odd, "KeyError")):
        with pytest.raises(AssertionError, match=said):
            campaign(try_one, 3, tmp_path / "report", seconds=0.2)


def damaged_index(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Of bytes, of words, or of the tree, or of the tree that its safetensors header is."""
    kind = rng.randrange(4)
    if kind == 0:
        return damaged_bytes(rng, data, others)
    if kind == 1:
        return damaged_text(rng, data.decode()).encode(errors="surrogatepass")
    facts = json.loads(data)
    if kind == 2:
        facts = damaged_tree(rng, facts)
    else:
        facts["header"] = json.dumps(damaged_tree(rng, json.loads(facts["header"])))
    return json.dumps(facts).encode()


def copied(source: Path, target: Path) -> Path:
    """A folder like `source`, whose files may be replaced."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def sample_of(samples: int) -> list[int]:
    return sorted({0, samples // 2, samples - 1}) if samples else []


def everything(store: Store) -> list[Sample | BadSample]:
    return store.read_many([(i, tuple(range(len(store.index.times)))) for i in range(len(store))], prompts=True)


def check(found: Sample | BadSample, store: Store) -> None:
    """A bad sample that says so, or one of the store's shape with numbers in it."""
    if isinstance(found, BadSample):
        clear(found)
        assert "shard-" in str(found)
    else:
        assert found.states.shape[1:] == store.index.shapes["states"][1:] and torch.isfinite(found.states).all()
        assert all(torch.isfinite(x.float()).all() for x in found.conditioning.values())
        assert all(int(t) in store.index.times for t in found.times)


def same(a: Sample | BadSample, b: Sample | BadSample) -> bool:
    assert isinstance(a, Sample) and isinstance(b, Sample)
    return torch.equal(a.states, b.states) and (a.key, a.prompt, a.guidance) == (b.key, b.prompt, b.guidance)
