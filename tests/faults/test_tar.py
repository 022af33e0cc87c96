"""Archives of others: members that point elsewhere, are no files, or claim gigabytes. None is unpacked or believed."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.data import tar
from distill.data.images import Accept, list_pictures
from distill.data.prompts import read_prompts
from distill.data.reader import open_store
from distill.data.record import BadSample, StoreError
from distill.data.verify import verify_shard
from tests.data.test_images import picture
from tests.data.test_reader import edit, sample_5
from tests.faults.conftest import Outcome
from tests.faults.mutate import campaign

Fault = Callable[[int, str], Outcome]
HOSTILE = "tar members that point elsewhere or claim gigabytes"
GIB10 = 10 << 30
TYPES = {
    "symbolic link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
    "folder": tarfile.DIRTYPE,
    "sparse file": tarfile.GNUTYPE_SPARSE,
    "unknown kind": b"Q",
}
NAMES = ["../../evil", "/tmp/evil", "a/../../evil", "..\\evil"]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a checksum that fits, whatever it says; sizes above 8 GiB as GNU tar writes them."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "../../evil"
    return info.tobuf(tarfile.GNU_FORMAT)[-512:]


def archive(folder: Path, *members: bytes) -> str:
    """A good picture with its caption, then these."""
    good = [tar.member("good.png", picture()), tar.member("good.txt", b"a good picture")]
    (folder / "a.tar").write_bytes(b"".join([*good, *members]) + tar.END)
    return str(folder / "a.tar")


def read_both(source: str, folder: Path) -> None:
    """The two readers of other people's archives, from a folder in which nothing may appear."""
    for read in (read_prompts, lambda url: list_pictures(url, str(folder / "store"), Accept(8)).captions):
        try:
            found = read(source)
        except ValueError as error:
            assert "a.tar" in str(error) and "\n" not in str(error) and len(str(error)) < 500
        else:  # prompts are all the captions, that of a picture too large to be read as well
            assert found == ["a good picture"] or (read is read_prompts and found == ["a good picture", "x"])


def bounded(action: Callable[[], object], folder: Path) -> float:
    """Runs it with 256 MiB of memory, in two seconds of processor time."""
    return campaign(lambda rng: action(), 1, folder / "report")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("ending", ["png", "txt"])
def test_only_files_are_read(tmp_path: Path, kind: str, ending: str, fault: Fault) -> None:
    (tmp_path / "evil").write_bytes(b"an evil caption")
    inside = tmp_path / "a/b"
    inside.mkdir(parents=True)
    other = tar.member(
        "evil.txt" if ending == "png" else "evil.png", b"an evil caption" if ending == "png" else picture()
    )
    source = archive(inside, header(f"evil.{ending}", 0, TYPES[kind]), other)
    captions = list_pictures(source, str(tmp_path / "store"), Accept(8)).captions
    assert captions == ["a good picture"]
    if ending == "txt":
        assert read_prompts(source) == ["a good picture"]
    fault(16, HOSTILE).tried()


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_outside(tmp_path: Path, name: str, fault: Fault) -> None:
    inside = tmp_path / "a/b"
    inside.mkdir(parents=True)
    source = archive(inside, tar.member(f"{name}.png", picture(seed=1)), tar.member(f"{name}.txt", b"an evil caption"))
    before = tree(tmp_path)
    assert list_pictures(source, str(tmp_path / "made"), Accept(8)).captions == ["a good picture"]
    assert read_prompts(source) == ["a good picture", "an evil caption"]  # a text is a text, whatever its name
    assert {path for path in tree(tmp_path) - before if "made" not in path} == set()
    assert not Path("/tmp/evil.png").exists()
    fault(16, HOSTILE).tried()


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("name", ["evil.png", "evil.txt", "evil.json", "@LongLink", "evil.bin"])
def test_ten_gigabytes_take_no_memory(tmp_path: Path, name: str, there: bool, fault: Fault) -> None:
    """A member that claims them, and one that has them: a file with a hole."""
    kind = tarfile.GNUTYPE_LONGNAME if name == "@LongLink" else tarfile.REGTYPE
    pair = (
        tar.member("evil.json", b'{"caption": "x"}') if name == "evil.png" else tar.member("evil.png", picture(seed=1))
    )
    source = archive(tmp_path, pair, header(name, GIB10, kind))
    if there:
        with open(source, "r+b") as file:
            file.seek(-len(tar.END), 2)
            file.seek(GIB10, 1)
            file.write(tar.END)
    assert Path(source).stat().st_size > (GIB10 if there else 0)
    seconds = bounded(lambda: read_both(source, tmp_path / "made"), tmp_path)
    fault(16, HOSTILE).tried(seconds=seconds)


def test_extended_headers_of_megabytes_are_refused(tmp_path: Path, fault: Fault) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        size = tar.MAX_EXTRA_BYTES + 1
        source = archive(tmp_path, header("x", size, kind) + bytes(size + tar.padding(size)))
        with pytest.raises(ValueError, match=f"extended header .* has {size} bytes"):
            read_prompts(source)
        fault(16, HOSTILE).tried()


def test_a_header_of_zeros_is_not_the_end(tmp_path: Path, fault: Fault) -> None:
    """Python's reader, and webdataset with it, stops there without a word."""
    second = tar.member("b.txt", b"lost")
    source = archive(
        tmp_path, tar.member("a.txt", b"kept"), bytes(512) + second[512:], tar.member("c.txt", b"lost too")
    )
    with tarfile.open(source) as other:
        assert [member.name for member in other] == ["good.png", "good.txt", "a.txt"]
    with pytest.raises(ValueError, match="zeros at byte .*: they are not the end"):
        read_prompts(source)
    whole = Path(archive(tmp_path)).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole + bytes(10_240))
    assert read_prompts(source) == ["a good picture"]
    (tmp_path / "a.tar").write_bytes(whole[:-512])
    with pytest.raises(ValueError, match="no end mark"):
        read_prompts(source)
    fault(16, HOSTILE).tried()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", [0, GIB10])
def test_a_store_has_none_of_them(copy: Path, tmp_path: Path, kind: str, size: int, fault: Fault) -> None:
    """In the place of a sample's file. Nothing is written, by the reader or by the check of the whole store."""
    edit(copy, sample_5(copy), header("000001-000001.safetensors", size, TYPES[kind]))
    before = tree(tmp_path)

    def read() -> None:
        store = open_store(str(copy))
        found = store.read_many([(i, (0,)) for i in range(11)], prompts=True)
        assert [i for i, sample in enumerate(found) if isinstance(sample, BadSample)] == [5]
        assert verify_shard(store.folder, store.index, store.index.shards[1]).problems

    seconds = bounded(read, tmp_path)
    assert tree(tmp_path) - before == {"report"}
    fault(16, HOSTILE).tried(seconds=seconds)


def test_a_json_of_gigabytes_takes_no_memory(copy: Path, tmp_path: Path, fault: Fault) -> None:
    """An index that leaves so much room between two samples, and a shard with a hole there."""
    text = (copy / "index.json").read_text()
    store = open_store(str(copy))
    shard = store.index.shards[1]
    first, *rest = map(int, shard.offsets.split())
    far = " ".join(map(str, [first, *(n + GIB10 for n in rest)]))
    text = text.replace(shard.offsets, far, 2).replace(f'"bytes": {shard.bytes}', f'"bytes": {shard.bytes + GIB10}')
    (copy / "index.json").write_text(text)
    for name in ("shard-000000.tar", "shard-000001.tar"):
        if (copy / name).stat().st_size == shard.bytes:
            with open(copy / name, "r+b") as file:
                file.truncate(shard.bytes + GIB10)

    def read() -> None:
        opened = open_store(str(copy), max_bad_fraction=0.9)
        with pytest.raises(StoreError, match="bytes for a sample's JSON"):
            opened.read(4, (0,), prompts=True)

    fault(16, HOSTILE).tried(seconds=bounded(read, tmp_path))
