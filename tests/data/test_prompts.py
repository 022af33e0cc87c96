"""Prompts from every kind of file, and what is said when there are none."""

from __future__ import annotations

import importlib.util
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


@pytest.mark.parametrize("column", [None, "caption", "other"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_tables(tmp_path: Path, column: str | None, line_end: str) -> None:
    quoted = ['"' + p.replace('"', '""') + '"' for p in PROMPTS]
    rows = ["id, caption ,other", *(f"{i},{p},{p}" for i, p in enumerate(quoted)), "", ",,"]
    assert read_prompts(save(tmp_path / "p.csv", line_end.join(rows)), column) == PROMPTS
    rows = ["id\tcaption\tother", *(f"{i}\t{p}\t{p}" for i, p in enumerate(PROMPTS)), ""]
    assert read_prompts(save(tmp_path / "p.tsv", line_end.join(rows)), column) == PROMPTS


def test_a_tsv_knows_no_quotation_marks(tmp_path: Path) -> None:
    prompts = ['"a cat on a mat', 'a 5" screen', '"all of it"', 'two ""']
    rows = ["prompt\tid", *(f"{p}\t1" for p in prompts)]
    assert read_prompts(save(tmp_path / "p.tsv", "\n".join(rows))) == prompts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_a_byte_order_mark_says_is_believed(tmp_path: Path, encoding: str) -> None:
    assert read_prompts(save(tmp_path / "p.txt", "\n".join(PROMPTS).encode(encoding))) == PROMPTS
    lines = "\n".join(json.dumps(p, ensure_ascii=False) for p in PROMPTS)
    assert read_prompts(save(tmp_path / "p.jsonl", lines.encode(encoding))) == PROMPTS


def test_json_is_a_list_an_object_of_objects_or_cocos_captions(tmp_path: Path) -> None:
    several = [PROMPTS[0], {"prompt": PROMPTS[1]}, {"text": [PROMPTS[2]]}]
    by_name = {f"{i}": {"category": "x", "prompt": p} for i, p in enumerate(PROMPTS)}
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]
    annotations = [{"image_id": i, "caption": c} for i, p in enumerate(PROMPTS) for c in (p + "\n", "second")]
    for content in (several, by_name, {"images": images, "annotations": annotations}):
        assert read_prompts(save(tmp_path / "p.json", json.dumps(content))) == PROMPTS


@pytest.mark.parametrize(
    ("entry", "column", "expected"),
    [
        ({"caption": ["a cat"]}, None, ["a cat"]),
        ({"caption": ["a cat", "a kitten"]}, "caption.0", ["a cat"]),
        ({"caption": ["", None, "a kitten"]}, None, ["a kitten"]),
        ({"caption": {"en": "a cat", "ja": "neko"}}, "caption.ja", ["neko"]),
        ({"caption": {"en": ["a cat", "a kitten"]}}, "caption.en.1", ["a kitten"]),
        ({"caption.en": "a cat", "caption": {"en": "another"}}, "caption.en", ["a cat"]),
        ({"prompt": "", "text": "a cat"}, None, ["a cat"]),
        ({"text": "half a pair \ud800"}, None, ["half a pair ?"]),
        ("\ud83d\ude00", None, ["😀"]),
    ],
)
def test_of_several_captions_the_named_one_is_taken(
    tmp_path: Path, entry: object, column: str | None, expected: list[str]
) -> None:
    assert read_prompts(save(tmp_path / "p.jsonl", json.dumps(entry)), column) == expected


WRONG = {
    "a list of 2 texts": ["a cat", "a kitten"],
    "a number": 7,
    "true or false": True,
    "an object": {"en": "a cat"},
    "a list of numbers": [1],
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "tar"])
def test_what_is_no_text_is_never_made_one(tmp_path: Path, kind: str, ending: str) -> None:
    entry, path = {"caption": WRONG[kind]}, tmp_path / f"p.{ending}"
    if ending == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"caption": [WRONG[kind]]}), path)
    elif ending == "tar":
        save(path, shard({"1.json": json.dumps(entry).encode()}))
    else:
        save(path, json.dumps([entry] if ending == "json" else entry))
    with pytest.raises(ValueError, match=f"p.{ending}, .*caption is {kind}") as error:
        read_prompts(str(path))
    remedies = {"an object": "data.prompt_column=caption.en", "a list of 2 texts": "data.prompt_column=caption.0"}
    assert remedies.get(kind, "") in str(error.value)


def test_one_broken_caption_of_a_shard_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = captions(PROMPTS) | {"x.json": b'{"caption": 7}', "y.json": b"{"}
    assert read_prompts(save(tmp_path / "p.tar", shard(members)), "caption") == PROMPTS
    assert "2 of 5 captions left out; the first: x.json: caption is a number (7)" in caplog.text


@pytest.mark.parametrize("text", ["a cat", "cat", "a cat, sitting on (a) mat: 50%", "x" * 300, "1.5 cats", "what?"])
def test_a_text_that_is_no_path_is_one_prompt(text: str) -> None:
    assert read_prompts(text) == [text]
    assert read_prompts([text, " ", "another"]) == [text, "", "another"]


@pytest.mark.parametrize("text", ["prompts.docx", "a/b", "~/prompts", "./my prompts", "s3x://b/c"])
def test_a_text_that_looks_like_a_path_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"must end in one of .txt.* a prompt itself is written \[") as error:
        read_prompts(text)
    assert text in str(error.value)


def test_of_a_url_that_nothing_here_opens_the_package_is_named() -> None:
    for url, package in (
        ("s3://bucket/p.txt", "s3fs"),
        ("gs://b/p.txt", "gcsfs"),
        ("http://127.0.0.1:9/p.txt", "aiohttp"),
    ):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ValueError, match=f"{url}: .* is not installed: pip install {package}$"):
                read_prompts(url)
    with pytest.raises(ValueError, match="nothing://b/p.txt: Protocol not known: nothing$"):
        read_prompts("nothing://b/p.txt")


def test_a_long_text_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    for name, content in (
        ("p.txt", "x" * 1_500_000),
        ("p.csv", "prompt\n" + "x" * 200_000),
        ("p.tsv", "prompt\n" + "x" * 200_000),
    ):
        with pytest.raises(ValueError, match=f"{name}, line [12]: the caption has .* characters; allowed: 10,000$"):
            read_prompts(save(tmp_path / name, content))
    with pytest.raises(ValueError, match="the list, number 2: the caption has"):
        read_prompts(["a cat", "x" * 1_500_000])


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
        ("p.txt", b"fine\n\xff\xfa", None, r"not UTF-8 in line 2 \(byte 0xff\): save it as UTF-8"),
        ("p.txt", b"\xff\xfe\x00", None, "not UTF-16 in line 1"),
        ("p.txt", "fine\nnot".encode("utf-16-le"), None, "a zero byte in line 1"),
        ("p.jsonl", "[" * 100_000, None, "line 1: not JSON that can be read .nested too deeply"),
        ("p.csv", 'id,prompt\n1,"a cat\n' + "2,a dog\n" * 9000, None, "line 2: a quotation mark opens a text and none"),
        ("p.csv", 'id,prompt\n1,a\n2,"a cat\n3,"a dog"\n', None, "line 3: something follows a closing quotation mark"),
        ("p.csv", 'prompt\n"a' + "b\n" * 600_000, None, "line 2: a text of more than 1,048,576 characters"),
        ("p.csv", "id,prompt\n1,a cat, sitting\n", None, "line 2: 3 cells, the header has 2; .* quotation marks"),
        ("p.csv", "id,prompt\n1,a cat\n2\n", None, "line 3: 1 cell, the header has 2"),
        ("p.tsv", "id\tprompt\n1\ta\tcat\n", None, "line 2: 3 cells, the header has 2; a text cannot have tabs"),
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


def test_a_folder_and_names_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "f.txt").mkdir()
    with pytest.raises(FileNotFoundError, match="f.txt: a folder; name its files"):
        read_prompts(str(tmp_path / "f.txt"))
    assert read_prompts(save(tmp_path / "p[1].txt", "a cat")) == ["a cat"]
