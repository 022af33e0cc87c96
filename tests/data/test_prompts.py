"""Prompts from every kind of file, and what is said when there are none."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import fsspec
import pytest

from distill.data import tar
from distill.data.prompts import read_prompts

PROMPTS = ["a red square", "ein grüner Kreis, mit Komma", 'with "quotes"']


def save(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_text(tmp_path: Path) -> None:
    assert read_prompts(save(tmp_path / "p.txt", "\ufeff" + "\r\n".join(PROMPTS) + "\r\n\r\n  \n")) == PROMPTS


def test_jsonl_of_strings_and_of_objects(tmp_path: Path) -> None:
    lines = [json.dumps(PROMPTS[0]), json.dumps({"prompt": PROMPTS[1], "x": 1}), "", json.dumps({"text": PROMPTS[2]})]
    assert read_prompts(save(tmp_path / "p.jsonl", "\n".join(lines))) == PROMPTS


@pytest.mark.parametrize(("ending", "comma"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("column", [None, "caption", "other"])
def test_tables(tmp_path: Path, ending: str, comma: str, column: str | None) -> None:
    quoted = ['"' + p.replace('"', '""') + '"' for p in PROMPTS]
    rows = [comma.join(["id", "caption", "other"]), *(comma.join([str(i), p, p]) for i, p in enumerate(quoted))]
    assert read_prompts(save(tmp_path / f"p.{ending}", "\n".join(rows)), column) == PROMPTS


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3, 4], "caption": [*PROMPTS, None]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet")) == PROMPTS
    with pytest.raises(ValueError, match="no column title; there are: id, caption"):
        read_prompts(str(tmp_path / "p.parquet"), "title")
    with pytest.raises(ValueError, match="not Parquet"):
        read_prompts(save(tmp_path / "q.parquet", "no table"))


def shard(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """As WebDataset's own writer makes them: with extended headers for the fractional times."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1700000000.25
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def captions(prompts: list[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for i, prompt in enumerate(prompts):
        found |= {f"{i:09d}.jpg": b"\xff\xd8" * 700, f"{i:09d}.txt": prompt.encode()}
        found |= {f"{i:09d}.json": json.dumps({"caption": prompt, "title": prompt.upper()}).encode()}
    return found


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_captions_of_shards(tmp_path: Path, format: int) -> None:
    save(tmp_path / "00001.tar", shard(captions(PROMPTS[2:]), format))
    save(tmp_path / "00000.tar", shard(captions(PROMPTS[:2]), format))
    assert read_prompts(str(tmp_path / "*.tar")) == PROMPTS
    assert read_prompts(str(tmp_path / "*.tar"), "title") == [p.upper() for p in PROMPTS]


def test_long_names_in_shards_are_read_whole(tmp_path: Path) -> None:
    members = {"d" * 90 + "/" + "k" * 90 + "ü.txt": b"a red square", "b.txt": b"second"}
    assert read_prompts(save(tmp_path / "a.tar", shard(members))) == ["a red square", "second"]


def test_captions_written_by_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i, prompt in enumerate(PROMPTS):
            sink.write({"__key__": f"{i:05d}", "txt": prompt, "json": {"caption": prompt}})
    assert read_prompts(str(tmp_path / "a.tar")) == read_prompts(str(tmp_path / "a.tar"), "caption") == PROMPTS


def test_remote_files() -> None:
    with fsspec.open("memory://prompts/p.txt", "wb") as file:
        file.write("\n".join(PROMPTS).encode())
    assert read_prompts("memory://prompts/p.txt") == PROMPTS


def links() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE), ("c.txt", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
    return buffer.getvalue()


def damaged(at: int, data: bytes) -> bytes:
    whole = bytearray(shard(captions(PROMPTS), tarfile.USTAR_FORMAT))
    whole[at : at + len(data)] = data
    return bytes(whole)


WHOLE = shard(captions(PROMPTS), tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("name", "data", "column", "message"),
    [
        ("p.txt", "\n \n", None, "no prompts in"),
        ("p.csv", "", None, "no column prompt or caption or text; there are: none"),
        ("p.csv", "a,b\n1,2\n", None, "no column prompt or caption or text; there are: a, b"),
        ("p.csv", "a,b\n1,2\n", "c", "no column c; there are: a, b"),
        ("p.jsonl", '"fine"\n{"a": 1}\n', None, "line 2: no column .* there are: a"),
        ("p.jsonl", "not json\n", None, "line 1: not JSON"),
        ("p.jsonl", "[1]\n", None, "line 1: a string or an object is needed, got list"),
        ("p.txt", b"\xff\xfe\x00", None, "not UTF-8"),
        ("p.docx", "x", None, "must end in one of .txt"),
        ("p.tar", links(), None, "no prompts in"),
        ("p.tar", b"no tar at all", None, "no tar header at byte 0"),
        ("p.tar", damaged(0, b"garbage"), None, "no tar header at byte 0"),
        ("p.tar", damaged(2048, b"garbage"), None, "no tar header at byte 2048"),
        ("p.tar", WHOLE[:1000], None, "'000000000.jpg' is cut short"),
        ("p.tar", WHOLE[:3072], None, "no tar header at byte 3072"),  # at a member's edge, where tar readers see an end
        ("p.tar", tar.header("a.txt", 8 * 1024**3 - 1) + bytes(1024), None, "'a.txt' is cut short"),
        ("p.tar", tar.member("a.txt", b"x" * (1 << 20) + b"y") + tar.END, None, "at most 1 MiB"),
        ("p.tar", tar.member("a.json", b"{") + tar.END, "caption", "a.json: not JSON"),
        ("p.tar", tar.member("a.json", b'{"b": 1}') + tar.END, "caption", "no column caption; there are: b"),
    ],
)
def test_bad_sources(tmp_path: Path, name: str, data: str | bytes, column: str | None, message: str) -> None:
    path = save(tmp_path / name, data)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path, column)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nothing.txt", "nothing-*.tar"])
def test_missing_sources(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(str(tmp_path / name))
