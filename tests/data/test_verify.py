"""The check of a whole store names what is wrong with it."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.data import tar
from distill.data.index import INDEX
from tests.data.stores import write
from tests.data.test_reader import CHANGED, RESIZED, edit, sample_5, states_5

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "verify_shards.py"


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the script: its exit status and what it says."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify_shards.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        said = capsys.readouterr()
        return int(str(exit.value.code)), said.out + said.err

    return run


def test_a_good_store(store_url: str, verify: Callable[..., tuple[int, str]]) -> None:
    status, said = verify(store_url)
    assert status == 0 and "3 shards, 11 good samples, 0 bad shards" in said
    assert verify(write("memory://verify/store"))[0] == 0


def test_skipped_pictures_are_not_missed(
    pictures_url: str, tmp_path: Path, verify: Callable[..., tuple[int, str]]
) -> None:
    status, said = verify(pictures_url)
    assert status == 0 and "3 shards, 5 good samples, 0 bad shards" in said
    shutil.copytree(pictures_url, tmp_path, dirs_exist_ok=True)
    facts = json.loads((tmp_path / INDEX).read_bytes())
    facts["shards"][0]["skipped"] = "2"  # another one than that which is missing
    (tmp_path / INDEX).write_text(json.dumps(facts))
    status, said = verify(tmp_path)
    assert status == 1 and "where the file 000000-000001.safetensors should begin" in said


DAMAGE = {
    "flipped bits that leave numbers": lambda f: edit(f, states_5(f), b"\x01\x02"),
    "flipped bit in the prompt": lambda f: edit(f, sample_5(f) - 512 + 30, b"~"),
    "no end mark": lambda f: edit(f, -1024, b"x"),
    "padding": lambda f: edit(f, -1024 - 1, b"x"),
    "missing": lambda f: (f / "shard-000001.tar").unlink(),
}


SAID = {
    "cut at a member boundary": ["bytes, index.json says", "where 000001-000001.safetensors should begin"],
    "cut in a payload": ["bytes, index.json says", "the shard ends within 000001-000001.safetensors"],
    "longer": ["bytes, index.json says", "no end mark"],
    "zeroed header": ["no tar header at byte", "where 000001-000001.safetensors should begin"],
    "path out of the folder": ["a member '../../evil.safetensors'"],
    "ten gigabytes": ["claims 8589934591 bytes"],
    "not a number": ["states has values that are not finite"],
    "other times": ["its times", "are not the store's"],
    "flipped bits that leave numbers": ["sha256 is"],
    "flipped bit in the prompt": ["sha256 is"],
    "no end mark": ["no end mark", "sha256 is"],
    "missing": ["the shard is missing"],
}


@pytest.mark.parametrize("kind", [*CHANGED, *RESIZED, *DAMAGE])
def test_damage_is_named(copy: Path, kind: str, verify: Callable[..., tuple[int, str]]) -> None:
    (CHANGED | RESIZED | DAMAGE)[kind](copy)
    status, said = verify(copy)
    assert status == 1
    assert "shard-000001.tar: " in said and "3 shards" in said and "1 bad shard" in said
    assert "shard-000000.tar: " not in said and "shard-000002.tar: " not in said
    assert all(words in said for words in SAID.get(kind, []))
    if kind in CHANGED:
        assert "000001-000001" in said
    assert verify(copy, "shard-000002.tar")[0] == 0


def facts_of_5(folder: Path) -> tuple[int, dict[str, object]]:
    """Where KEY.json of sample 5 starts, and what it says."""
    data = (folder / "shard-000001.tar").read_bytes()
    start = data.index(tar.header("000001-000001.json", 0)[:18]) + 512
    return start, json.loads(data[start : data.index(b"\0", start)])


@pytest.mark.parametrize(
    ("name", "value"), [("key", "000001-000002"), ("index", 6), ("teacher_hash", "beef5678"), ("guidance", 1.0)]
)
def test_facts_that_are_not_the_samples(
    copy: Path, name: str, value: object, verify: Callable[..., tuple[int, str]]
) -> None:
    start, facts = facts_of_5(copy)
    changed = json.dumps(facts | {name: value}, sort_keys=True, ensure_ascii=False).encode()
    edit(copy, start - 512, tar.member("000001-000001.json", changed))
    status, said = verify(copy)
    assert status == 1 and "sample 000001-000001: " in said and name in said


def test_what_cannot_be_opened(tmp_path: Path, copy: Path, verify: Callable[..., tuple[int, str]]) -> None:
    assert verify(tmp_path / "nothing") == (
        2,
        f"error: no trajectory store at {tmp_path}/nothing: {INDEX} is missing\n",
    )
    assert verify(copy, "shard-000009.tar")[0] == 2
    (copy / INDEX).write_text("{")
    assert verify(copy)[0] == 2


def test_an_unfinished_store_is_checked_as_far_as_it_goes(
    tmp_path: Path, verify: Callable[..., tuple[int, str]]
) -> None:
    status, said = verify(write(tmp_path / "store", rank=0, world_size=2))
    assert status == 0 and "unfinished: 2 of 3 shards" in said
