"""Pictures of strangers: what is taken and what is left out, in which order, and what an autoencoder sees of them."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from distill.data import tar
from distill.data.errors import ReadError, StoreError
from distill.data.images import Accept, Listing, list_pictures, shown
from distill.data.index import StoreMismatch
from distill.data.pictures import MAX_PIXELS, BadPicture, cut_square, size_of
from distill.data.prompts import read_prompts
from distill.diffusion.random import generator
from distill.evaluation.reference import decoded
from tests.data.stores import files, in_processes
from tests.data.test_prompts import shard
from tests.data.test_reader import CountingFileSystem

ACCEPT = Accept(min_size=16)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture(width: int = 20, height: int = 18, kind: str = "PNG", seed: int = 0) -> bytes:
    return encoded(noise(width, height, seed), kind)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = {
    "b/00.jpg": picture(kind="JPEG"),
    "b/00.txt": "ein grüner Kreis\n".encode(),
    "a1.PNG": picture(seed=1),
    "a1.json": b'{"key": "a1", "caption": "from JSON", "title": "TITLE"}',
    "a1.txt": b" ",
    "a0.webp": picture(seed=2, kind="WEBP"),
    "a0.json": b'{"title": "zero", "caption": 0}',
    "a0.txt": b"\xef\xbb\xbffrom text",
}


def save(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard(members))
    return path


def unpack(folder: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def listed(source: object, store: Path, accept: Accept = ACCEPT) -> Listing:
    return list_pictures(str(source), str(store), accept)


def left_out(store: Path) -> dict[str, str]:
    """Names of pictures that were left out, and why."""
    lines = [json.loads(line) for part in sorted(store.glob("pictures-*")) for line in part.read_text().splitlines()]
    return {line["name"]: line["dropped"] for line in lines if "dropped" in line}


# Listing.


def test_shards_are_listed_in_the_order_of_names_then_keys(tmp_path: Path) -> None:
    second, first = dict(list(GOOD.items())[:2]), dict(list(GOOD.items())[2:])
    save(
        tmp_path / "10.tar", first | {f"c{i}.{e}": picture() for i, e in enumerate(("jpeg", "png"))} | {"c0.txt": b"c"}
    )
    save(tmp_path / "11.tar", second)
    found = listed(tmp_path / "1*.tar", tmp_path / "store")
    assert [(p.name, p.caption) for p in found.pictures] == [
        ("10.tar/a0.webp", "from text"),
        ("10.tar/a1.PNG", "from JSON"),
        ("10.tar/c0.jpeg", "c"),
        ("11.tar/b/00.jpg", "ein grüner Kreis"),
    ]
    assert found.captions == [p.caption for p in found.pictures]
    assert found.read([3, 0, 2]) == [GOOD["b/00.jpg"], GOOD["a0.webp"], picture()]
    assert left_out(tmp_path / "store") == {"c1.png": "no caption"}


@pytest.mark.parametrize("url", ["", "memory://pictures"])
def test_a_folder_is_listed_like_a_shard(tmp_path: Path, url: str) -> None:
    folder = url + str(tmp_path / "pictures")
    fs = fsspec.core.url_to_fs(folder)[0]
    for name, data in GOOD.items():
        fs.pipe_file(f"{fs._strip_protocol(folder)}/{name}", data) if url else unpack(
            tmp_path / "pictures", {name: data}
        )
    found = listed(folder, tmp_path / "store")
    of_a_shard = listed(save(tmp_path / "a.tar", GOOD), tmp_path / "of a shard")
    expected = ["from text", "from JSON", "ein grüner Kreis"]
    assert found.captions == of_a_shard.captions == expected
    assert [p.name for p in found.pictures] == ["a0.webp", "a1.PNG", "b/00.jpg"]
    assert found.read([2]) == [GOOD["b/00.jpg"]]
    named = listed(folder, tmp_path / "named", Accept(16, column="title"))
    assert [p.caption for p in named.pictures] == ["zero", "TITLE"]


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    """As datasets' imagefolder has it: one JSONL, names relative to it."""
    rows = [
        {"file_name": "z.png", "text": "the last"},
        {"file_name": "in/y.jpg", "text": "inside", "short": "in"},
        {"file_name": "lost.png", "text": "lost"},
        {"file_name": "w.gif", "text": "moves"},
        {"file_name": "x.png", "text": None},
    ]
    lines = "\n".join(map(json.dumps, rows)).encode() + b"\n\n"
    members = {"train/metadata.jsonl": lines, "train/z.png": picture(), "train/in/y.jpg": picture(kind="JPEG")}
    members |= {"train/w.gif": picture(kind="GIF"), "train/x.png": picture(), "train/x.txt": b"beside it"}
    members |= {"train/u.png": picture(), "train/u.txt": b"only beside it"}
    folder = unpack(tmp_path / "pictures", members)

    found = listed(folder, tmp_path / "store")
    assert [(p.name.removeprefix("train/"), p.caption) for p in found.pictures] == [
        ("in/y.jpg", "inside"),
        ("u.png", "only beside it"),
        ("z.png", "the last"),
    ]
    reasons = {"train/lost.png": "no such file", "train/x.png": "no caption"}
    assert left_out(tmp_path / "store") == reasons | {"train/w.gif": "not .jpg, .jpeg, .png, .webp"}
    named = listed(folder, tmp_path / "other", Accept(16, column="short"))
    assert [p.caption for p in named.pictures] == ["in"]


def test_a_named_column_is_the_only_caption(tmp_path: Path) -> None:
    found = listed(save(tmp_path / "a.tar", GOOD), tmp_path / "store", Accept(16, column="title"))
    assert [(p.name, p.caption) for p in found.pictures] == [("a.tar/a0.webp", "zero"), ("a.tar/a1.PNG", "TITLE")]


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (32, 16), (31, 17)])
def test_what_is_just_large_enough_and_just_not_too_long_is_taken(tmp_path: Path, size: tuple[int, int]) -> None:
    assert listed(save(tmp_path / "a.tar", {"a.png": picture(*size), "a.txt": b"a"}), tmp_path / "store").pictures


DROPPED: dict[str, tuple[str, dict[str, bytes]]] = {
    "narrow": ("too small", {"x.png": picture(15, 20), "x.txt": b"x"}),
    "low": ("too small", {"x.jpg": picture(20, 15, "JPEG"), "x.txt": b"x"}),
    "long": ("aspect ratio", {"x.png": picture(33, 16), "x.txt": b"x"}),
    "tall": ("aspect ratio", {"x.png": picture(16, 33), "x.txt": b"x"}),
    "alone": ("no caption", {"x.png": picture()}),
    "of spaces": ("no caption", {"x.png": picture(), "x.txt": b" \n"}),
    "no such column": ("no caption", {"x.png": picture(), "x.json": b'{"title": "x"}'}),
    "null": ("no caption", {"x.png": picture(), "x.json": b'{"caption": null}'}),
    "not text": ("caption unreadable", {"x.png": picture(), "x.txt": b"\xff\xfa"}),
    "a number": ("caption unreadable", {"x.png": picture(), "x.json": b'{"caption": 3}'}),
    "several": ("caption unreadable", {"x.png": picture(), "x.json": b'{"caption": ["x", "y"]}'}),
    "an object": ("caption unreadable", {"x.png": picture(), "x.json": b'{"caption": {"en": "x"}}'}),
    "deep JSON": ("caption unreadable", {"x.png": picture(), "x.json": b"[" * 100_000}),
    "a long text": ("caption unreadable", {"x.png": picture(), "x.txt": b"x" * 20_000}),
    "not JSON": ("caption unreadable", {"x.png": picture(), "x.json": b"{"}),
    "long caption": ("caption unreadable", {"x.png": picture(), "x.txt": b"x" * ((1 << 20) + 1)}),
    "empty": ("header unreadable", {"x.png": b"", "x.txt": b"x"}),
    "another format": ("header unreadable", {"x.png": picture(kind="GIF"), "x.txt": b"x"}),
    "a bomb": ("header unreadable", {"x.png": bomb(60_000, 60_000), "x.txt": b"x"}),
    "just too many pixels": ("header unreadable", {"x.png": bomb(10_000, MAX_PIXELS // 10_000 + 1), "x.txt": b"x"}),
    "cut in its header": ("header unreadable", {"x.jpg": picture(kind="JPEG")[:100], "x.txt": b"x"}),
    "absolute": ("unsafe name", {"/etc/x.png": picture(), "/etc/x.txt": b"x"}),
    "out of the archive": ("unsafe name", {"a/../../x.png": picture(), "a/../../x.txt": b"x"}),
    "two of a key": ("a second picture of its key", {"a0.png": picture(), "a1.txt": b"x"}),
}


@pytest.mark.parametrize("kind", DROPPED)
@pytest.mark.filterwarnings("error")
def test_what_is_left_out_is_named_with_its_reason(tmp_path: Path, kind: str) -> None:
    reason, members = DROPPED[kind]
    found = listed(save(tmp_path / "a.tar", GOOD | members), tmp_path / "store")
    assert [p.name for p in found.pictures] == ["a.tar/a0.webp", "a.tar/a1.PNG", "a.tar/b/00.jpg"]
    assert left_out(tmp_path / "store") == {next(iter(members)): reason}


def test_links_in_a_shard_are_not_followed(tmp_path: Path) -> None:
    unpack(tmp_path, {"secret.png": picture()})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(info)
    with pytest.raises(StoreError, match=r"no pictures .* 3 left out \(not a regular file: 3\)"):
        listed(tmp_path / "a.tar", tmp_path / "store")


KINDS_OF_CAPTION: dict[str, tuple[dict[str, bytes], str | None, str]] = {
    "the only one of a list": ({"x.json": b'{"caption": ["", "only", null]}'}, None, "only"),
    "a language": ({"x.json": b'{"caption": {"en": "a cat", "ja": "neko"}}'}, "caption.en", "a cat"),
    "the second": ({"x.json": b'{"captions": ["one", "two"]}'}, "captions.1", "two"),
    "the column that is not empty": ({"x.json": b'{"prompt": null, "text": "here"}'}, None, "here"),
    "of sd-scripts": ({"x.caption": b"tagged"}, None, "tagged"),
    "text before tags": ({"x.txt": b"text", "x.caption": b"tagged"}, None, "text"),
    "an empty text": ({"x.txt": b" ", "x.caption": b"tagged"}, None, "tagged"),
    "of Windows": ({"x.txt": "grün".encode("utf-16")}, None, "grün"),
    "in capitals": ({"x.TXT": b"loud"}, None, "loud"),
}


@pytest.mark.parametrize("kind", KINDS_OF_CAPTION)
@pytest.mark.parametrize("where", ["a.tar", "a folder"])
def test_a_caption_is_read_alike_in_a_shard_and_in_a_folder(tmp_path: Path, kind: str, where: str) -> None:
    members, column, expected = KINDS_OF_CAPTION[kind]
    members = members | {"x.png": picture()}
    source = save(tmp_path / where, members) if where == "a.tar" else unpack(tmp_path / where, members)
    assert listed(source, tmp_path / "store", Accept(16, column=column)).captions == [expected]
    if where == "a.tar":
        assert read_prompts(str(source), column) == [expected]


def test_a_key_ends_at_the_first_dot_where_its_caption_does(tmp_path: Path) -> None:
    """As in WebDataset; a picture whose own whole stem has a caption keeps that."""
    members = {"v1.0/000.image.jpg": picture(kind="JPEG"), "v1.0/000.txt": b"one"}
    members |= {"001.png": picture(), "001.caption.txt": b"two", "001.mask.png": picture()}
    members |= {"a.b.png": picture(), "a.b.txt": b"b", "a.c.png": picture(), "a.c.txt": b"c"}
    found = listed(save(tmp_path / "a.tar", members), tmp_path / "store")
    assert {p.name.removeprefix("a.tar/"): p.caption for p in found.pictures} == {
        "001.png": "two",
        "a.b.png": "b",
        "a.c.png": "c",
        "v1.0/000.image.jpg": "one",
    }
    assert left_out(tmp_path / "store") == {"001.mask.png": "a second picture of its key"}


def test_of_a_missing_caption_it_says_what_was_looked_for(tmp_path: Path) -> None:
    listed(save(tmp_path / "a.tar", GOOD | {"d/x.image.png": picture()}), tmp_path / "store")
    lines = (tmp_path / "store" / "pictures-000000.jsonl").read_text().splitlines()
    (why,) = [line["why"] for line in map(json.loads, lines) if "dropped" in line]
    assert why == "looked for: x.image.txt, x.image.caption, x.image.json, x.txt, x.caption, x.json"


@pytest.mark.parametrize("where", ["a.tar", "a folder"])
def test_files_that_are_not_read_are_named(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    members = GOOD | {"m.gif": picture(kind="GIF"), "n.gif": picture(kind="GIF"), "LICENSE": b"free", "x.csv": b"a,b"}
    source = save(tmp_path / where, members) if where == "a.tar" else unpack(tmp_path / where, members)
    for _ in range(2):  # the second time from what was listed
        caplog.clear()
        listed(source, tmp_path / "store")
        (said,) = [record.message for record in caplog.records if "not read" in record.message]
        assert said.endswith(
            "that are not read: no ending: 1, such as LICENSE, .csv: 1, such as x.csv, .gif: 2, such as m.gif"
        )


def test_what_a_folder_links_to_is_followed_and_what_is_not_there_is_named(tmp_path: Path) -> None:
    folder = unpack(tmp_path / "in", {"a.png": picture(), "a.txt": b"a", "gone.txt": b"gone", "b.png": picture()})
    unpack(tmp_path / "elsewhere", {"c.png": picture(), "c.txt": b"c"})
    (folder / "gone.png").symlink_to("/nowhere/gone.png")
    (folder / "b.txt").symlink_to("/nowhere/b.txt")
    (folder / "self.png").symlink_to("self.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(folder)  # and round again
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    found = listed(folder, tmp_path / "store")
    assert [(p.name, p.caption) for p in found.pictures] == [("a.png", "a"), ("linked/c.png", "c")]
    reasons = {"gone.png": "cannot be read", "self.png": "cannot be read", "pipe.png": "cannot be read"}
    assert left_out(tmp_path / "store") == reasons | {"b.png": "caption unreadable"}
    why = (tmp_path / "store" / "pictures-000000.jsonl").read_text()
    assert all(words in why for words in ("No such file or directory", "symbolic links", "not a regular file"))


def test_long_names_of_gnu_tar_are_read_whole(tmp_path: Path) -> None:
    name = "d" * 90 + "/" + "k" * 90
    members = {f"{name}.png": picture(), f"{name}.txt": b"long"}
    (tmp_path / "a.tar").write_bytes(shard(members, tarfile.GNU_FORMAT))
    assert [p.name for p in listed(tmp_path / "a.tar", tmp_path / "store").pictures] == [f"a.tar/{name}.png"]


def test_names_and_captions_may_be_of_any_bytes(tmp_path: Path) -> None:
    """They end up in UTF-8 and in front of a tokenizer."""
    folder = unpack(
        tmp_path / "pictures", {"metadata.jsonl": b'{"file_name": "a.png", "text": "half a pair: \\ud83d"}'}
    )
    unpack(folder, {"a.png": picture(), os.fsdecode(b"b\xff.png"): picture(seed=1), os.fsdecode(b"b\xff.txt"): b"b"})
    found = listed(folder, tmp_path / "store")
    assert found.captions == ["half a pair: ?", "b"]
    assert [shown(p.name) for p in found.pictures] == ["a.png", "b?.png"]
    assert found.read([1]) == [picture(seed=1)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_of_large_pictures_only_the_header_is_read(tmp_path: Path, kind: str) -> None:
    url, data = "counting://header" + str(tmp_path), picture(400, 500, kind)
    fs = fsspec.core.url_to_fs(url)[0]
    for i in range(5):
        fs.pipe_file(f"{fs._strip_protocol(url)}/{i}.png", data)
        fs.pipe_file(f"{fs._strip_protocol(url)}/{i}.txt", b"caption")
    CountingFileSystem.read.clear()
    found = listed(url, tmp_path / "store")
    assert len(found.pictures) == 5 and len(data) > 100_000
    assert sum(CountingFileSystem.read) == 5 * (4096 + len(b"caption"))


def test_a_header_behind_a_large_profile_is_found(tmp_path: Path) -> None:
    data = encoded(noise(20, 30), "JPEG", icc_profile=bytes(150_000))
    members = {"a.jpg": data, "a.txt": b"a"}
    listed(save(tmp_path / "a.tar", members), tmp_path / "store")
    line = json.loads((tmp_path / "store" / "pictures-000000.jsonl").read_text().splitlines()[1])
    assert (line["width"], line["height"]) == (20, 30)


# Listing once, by any number of processes.


def three_shards(folder: Path) -> str:
    for n in range(3):
        save(
            folder / f"{n}.tar",
            {f"{n}{i}.{e}": d for i in range(4) for e, d in (("png", picture(seed=i)), ("txt", b"t"))},
        )
    return str(folder / "*.tar")


def test_any_number_of_processes_killed_or_not_give_the_same_listing(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    alone = listed(source, tmp_path / "alone")
    many = [partial(list_pictures, source, str(tmp_path / "two"), ACCEPT, rank=r, world_size=2) for r in range(2)]
    assert in_processes(*many) == [0, 0]
    for kill in range(1, 4):
        killed = partial(listed, source, tmp_path / f"killed-{kill}")
        assert in_processes(killed, fault=f"fsync killed-{kill}:{kill}") == [-signal.SIGKILL]
        assert len(list((tmp_path / f"killed-{kill}").glob("pictures-*"))) == kill
        assert killed().sha256 == alone.sha256
    assert all(files(other) == files(tmp_path / "alone") for other in tmp_path.glob("[tk]*"))


def test_what_is_listed_is_not_read_again(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    first = listed(source, tmp_path / "store")
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(bytes(path.stat().st_size))  # of the same size, and nothing in it
    assert listed(source, tmp_path / "store") == first


def test_data_may_be_moved(tmp_path: Path) -> None:
    first = listed(three_shards(tmp_path / "in"), tmp_path / "store")
    os.rename(tmp_path / "in", tmp_path / "moved")
    again = listed(tmp_path / "moved" / "*.tar", tmp_path / "store")
    assert again.sha256 == first.sha256 and again.read([5]) == [picture(seed=1)]


@pytest.mark.parametrize(
    ("change", "accept", "message"),
    [
        (
            lambda f: save(f / "1.tar", {"x.png": picture(), "x.txt": b"x"}),
            ACCEPT,
            "file_bytes is .* there and .* in the",
        ),
        (lambda f: os.rename(f / "0.tar", f / "00.tar"), ACCEPT, "file is '0.tar' there and '00.tar' in the run"),
        (lambda f: None, Accept(17), "min_size is 16 there and 17 in the run"),
        (lambda f: None, Accept(16, 1.5), "max_aspect_ratio is 2.0 there and 1.5 in the run"),
        (lambda f: None, Accept(16, column="title"), "column is None there and 'title' in the run"),
    ],
)
def test_other_pictures_or_filters_are_refused(
    tmp_path: Path, change: Callable[[Path], object], accept: Accept, message: str
) -> None:
    source = three_shards(tmp_path / "in")
    listed(source, tmp_path / "store")
    change(tmp_path / "in")
    with pytest.raises(StoreMismatch, match=f"begun over other pictures.*{message}") as error:
        listed(source, tmp_path / "store", accept)
    assert "\n" not in str(error.value)


def test_the_hash_is_of_pictures_and_captions(tmp_path: Path) -> None:
    base = {"a.png": picture(), "a.txt": b"a"}
    variants = [base, base | {"a.txt": b"b"}, base | {"b.png": picture(), "b.txt": b"b"}]
    for n, members in enumerate([*variants, base]):
        save(tmp_path / str(n) / "a.tar", members)
    *hashes, again = [listed(tmp_path / str(n) / "a.tar", tmp_path / f"store-{n}").sha256 for n in range(4)]
    assert len(set(hashes)) == 3 and again == hashes[0]


def test_pictures_that_vanish_or_change_are_named(tmp_path: Path) -> None:
    folder = unpack(tmp_path / "in", {"a.png": picture(), "a.txt": b"a", "b.png": picture(), "b.txt": b"b"})
    found = listed(folder, tmp_path / "store")
    (folder / "a.png").unlink()
    (folder / "b.png").write_bytes(b"short")
    assert [str(one) for one in found.read([0, 1])] == [
        "cannot be read any more (No such file or directory)",
        "has changed since it was listed",
    ]
    (folder / "b.png").unlink()
    for name in ("a.txt", "b.txt"):
        (folder / name).unlink()
    folder.rmdir()  # all is gone, such as a disk that is no longer mounted: not a store of nothing
    with pytest.raises(ReadError, match="picture a.png cannot be read"):
        found.read([0])


@pytest.mark.parametrize(
    ("source", "members", "error", "message"),
    [
        ("nothing", {}, FileNotFoundError, "no pictures at .*nothing: it must be a folder, or end in .tar"),
        ("no*.tar", {}, FileNotFoundError, "no pictures at .*no\\*.tar.*no such file"),
        ("a.tar", {"a.tar": b"no tar"}, ValueError, "pictures in .*a.tar: no tar header at byte 0"),
        (
            "a.tar",
            {"a.tar": shard(GOOD, tarfile.USTAR_FORMAT)[:1000]},
            ValueError,
            "pictures in .*a.tar: member .* is cut short",
        ),
        ("a.tar", {"a.tar": tar.header("a.png", 8 * 1024**3 - 1) + bytes(1024)}, ValueError, "'a.png' is cut short"),
        ("in", {"in/x": b""}, StoreError, "0 pictures in .*in, 0 left out"),
        ("in", {"in/x.png": b"", "in/y.png": b""}, StoreError, r"2 left out \(no caption: 2\)"),
        ("in", {"in/metadata.jsonl": b'{"text": 1}'}, ValueError, "metadata.jsonl, line 1: an object with file_name"),
        ("in", {"in/metadata.jsonl": b"\n[]"}, ValueError, "line 2: an object with file_name"),
        ("in", {"in/metadata.jsonl": b'{"file_name": "../x.png"}'}, ValueError, "'../x.png' is outside its folder"),
        ("in", {"in/metadata.jsonl": b'{"file_name": "/x.png"}'}, ValueError, "'/x.png' is outside its folder"),
    ],
)
def test_bad_sources(
    tmp_path: Path, source: str, members: dict[str, bytes], error: type[Exception], message: str
) -> None:
    unpack(tmp_path, members)
    with pytest.raises(error, match=message) as caught:
        listed(tmp_path / source, tmp_path / "store")
    assert "\n" not in str(caught.value)


def test_a_store_among_its_pictures_is_refused(tmp_path: Path) -> None:
    """What is written to it would be other pictures, the next time."""
    unpack(tmp_path / "in", {"a.png": picture(), "a.txt": b"a", "notes.doc": b"no picture"})
    for store in (tmp_path / "in", tmp_path / "in" / "store"):
        with pytest.raises(ValueError, match="lies among the pictures"):
            listed(tmp_path / "in", store)
    assert listed(tmp_path / "in", tmp_path / "in-store").captions == ["a"]
    (tmp_path / "in" / "notes.doc").unlink()
    assert listed(tmp_path / "in", tmp_path / "in-store").captions == ["a"]


@pytest.mark.parametrize("values", [(0,), (16, 0.9), (16, float("nan"))])
def test_filters_check_their_values(values: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="min_size and max_aspect_ratio must be at least 1"):
        Accept(*values)


# Decoding.


def levels(data: bytes, side: int = 16) -> np.ndarray[Any, Any]:
    """What the autoencoder sees, in levels of 255, [side, side, 3]."""
    return ((cut_square(data, side).pixels.permute(1, 2, 0) + 1) * 127.5).numpy()


STORED: dict[int, Callable[[Any], Any]] = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: lambda x: np.rot90(x, -1),
}
"""How a camera stores an upright picture under each EXIF orientation (TIFF 6.0, tag 274)."""


@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_turned_upright(orientation: int) -> None:
    upright = np.array(noise(16, 24))
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), exif=exif)
    square = cut_square(data, 16)
    assert (square.original, square.corner) == ((24, 16), (4, 0))
    assert np.abs(levels(data) - upright[4:20]).max() < 1e-4


def uniform(mode: str, value: Any, **options: Any) -> bytes:
    return encoded(Image.new(mode, (16, 16), value), options.pop("kind", "PNG"), **options)


def grey16(level: int, transparent: int) -> bytes:
    """16 bits of grey, of which one level is transparent, as the chunk tRNS before the pixels says."""
    data = uniform("I;16", level)
    chunk = b"tRNS" + transparent.to_bytes(2, "big")
    at = data.index(b"IDAT") - 4
    return data[:at] + (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[at:]


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return encoded(image, **({"transparency": 1} if transparent else {}))


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (uniform("RGB", (10, 200, 30)), (10, 200, 30)),
        (uniform("RGBA", (10, 200, 30, 255)), (10, 200, 30)),
        (uniform("RGBA", (10, 200, 30, 0)), (255, 255, 255)),
        (uniform("RGBA", (10, 200, 30, 51)), (206, 244, 210)),
        (uniform("RGBA", (10, 200, 30, 51), kind="WEBP", lossless=True), (206, 244, 210)),
        (uniform("LA", (0, 51)), (204, 204, 204)),
        (uniform("RGB", (10, 200, 30), transparency=(10, 200, 30)), (255, 255, 255)),
        (palette(transparent=False), (10, 200, 30)),
        (palette(transparent=True), (255, 255, 255)),
        (uniform("L", 77), (77, 77, 77)),
        (uniform("1", 1), (255, 255, 255)),
        (uniform("I;16", 257 * 77), (77, 77, 77)),
        (uniform("I;16", 65535), (255, 255, 255)),
        (grey16(257 * 77, transparent=257 * 77), (255, 255, 255)),
        (uniform("CMYK", (0, 0, 0, 155), kind="JPEG", quality=100), (100, 100, 100)),
    ],
)
def test_every_kind_of_colour_becomes_rgb_on_white(data: bytes, colour: Sequence[int]) -> None:
    """In training as in an evaluation."""
    assert np.abs(levels(data) - np.array(colour)).max() <= 1
    seen = decoded(data)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(seen - levels(data)).max() < 1e-3


def test_of_an_animation_the_first_frame_is_taken() -> None:
    for kind in ("PNG", "WEBP"):
        frames = [Image.new("RGB", (16, 16), colour) for colour in ((200, 10, 10), (10, 200, 10))]
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.abs(levels(data) - np.array((200, 10, 10))).max() <= 1


@pytest.mark.parametrize("size", [(16, 16), (40, 26), (26, 40), (90, 47), (11, 13)])
def test_resizing_and_cutting_the_middle_is_torchvisions(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = CenterCrop(16)(Resize(16, InterpolationMode.LANCZOS)(image))
    square = cut_square(encoded(image), 16)
    assert np.abs(levels(encoded(image)) - np.array(expected)).max() < 1e-4
    assert square.original == size[::-1]
    assert square.pixels.min() >= -1 and square.pixels.max() <= 1 and square.pixels.dtype == torch.float32


def test_random_crops_are_everywhere_and_of_their_generator_alone() -> None:
    image = noise(21, 16)
    found = [cut_square(encoded(image), 16, generator(3, "crop", i)) for i in range(60)]
    assert {square.corner for square in found} == {(0, left) for left in range(6)}
    for i, square in enumerate(found[:8]):
        left = square.corner[1]
        expected = torch.from_numpy(np.array(image)[:, left : left + 16]).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(square.pixels, expected)
        assert torch.equal(square.pixels, cut_square(encoded(image), 16, generator(3, "crop", i)).pixels)


@pytest.mark.parametrize(
    "data",
    [
        picture(kind="JPEG")[:-200],
        picture()[:-500],
        picture(kind="WEBP")[:-300],
        bomb(100, 100),
        bomb(60_000, 60_000),
        b"",
        b"GIF89a" + bytes(50),
        Path(__file__).read_bytes(),
    ],
)
def test_what_cannot_be_decoded_says_the_same_every_time(data: bytes) -> None:
    said = []
    for _ in range(2):
        with pytest.raises(BadPicture) as error:
            cut_square(data, 16)
        said.append(str(error.value))
    assert said[0] == said[1] != "" and " at 0x" not in said[0] and "\n" not in said[0]


def test_sizes_are_width_and_height() -> None:
    assert size_of(picture(31, 17)) == (31, 17)
