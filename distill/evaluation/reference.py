"""What Fréchet distances are measured against: the statistics of real pictures, made once or read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.data import tar
from distill.data.images import ENDINGS, files_in
from distill.data.pictures import BadPicture, upright
from distill.data.progress import Progress
from distill.data.prompts import find_files
from distill.data.remote import file_system
from distill.models.files import save_file

BATCH = 32
_PARTS = ("mean", "covariance", "n")

Prepare = Callable[[Tensor], Tensor]
"""A picture [1, 3, H, W] in [0, 1] to what the network is shown, [1, 3, side, side]; ValueError: it cannot be used."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of the features of n pictures: mean [F] and covariance [F, F], float64."""

    mean: Tensor
    covariance: Tensor
    n: int


@dataclass(frozen=True)
class Pictures:
    """Real pictures: their names in order, and the bytes of each. `identity` changes with their names or sizes."""

    names: Sequence[str]
    identity: str
    _read: Callable[[], Iterator[bytes]]

    def __iter__(self) -> Iterator[bytes]:
        return self._read()


def find_pictures(source: str, only: Sequence[str] | None = None) -> Pictures:
    """The pictures of a folder, at any depth, or of tars (`*` and `?` match several), by name.

    Args:
        only: names of files, those to take.

    Raises:
        FileNotFoundError: nothing there, or one of `only` is not.
        ValueError: no pictures, or a damaged tar.
    """
    sizes, opened = _in_tars(source) if source.lower().endswith(".tar") else _in_folder(source)
    wanted = set(only) if only is not None else None
    places = [name for name in sorted(sizes) if wanted is None or Path(name).name in wanted]
    if wanted is not None and (missing := sorted(wanted - {Path(name).name for name in places})):
        raise FileNotFoundError(
            f"reference={source}: {len(missing)} of the prompts' pictures are missing: {missing[0]}"
        )
    if not places:
        raise ValueError(f"reference={source}: no pictures there ({', '.join(ENDINGS)})")
    digest = hashlib.sha256("".join(f"{name} {sizes[name]}\n" for name in places).encode()).hexdigest()[:16]
    return Pictures(places, digest, lambda: (opened(name) for name in places))


def _in_folder(source: str) -> tuple[dict[str, int], Callable[[str], bytes]]:
    fs, root = file_system(source)
    if not fs.isdir(root):
        raise FileNotFoundError(f"reference={source}: no such folder")
    found = {name: file for name, file in files_in(fs, root).items() if name.lower().endswith(ENDINGS)}
    if wrong := [f"{name} ({file.problem})" for name, file in found.items() if file.problem]:
        raise ValueError(f"reference={source}: {len(wrong)} of its pictures cannot be read; the first: {wrong[0]}")
    return {name: file.size for name, file in found.items()}, lambda name: fs.cat_file(f"{root}/{name}")


def _in_tars(source: str) -> tuple[dict[str, int], Callable[[str], bytes]]:
    where: dict[str, tuple[int, int, int]] = {}
    files = find_files(source, "reference pictures")
    for number, file in enumerate(files):
        with file as stream:
            for member in tar.walk(stream):
                if member.regular and member.name.lower().endswith(ENDINGS):
                    where[f"{number:06d}/{member.name}"] = (number, member.start, member.size)

    def read(name: str) -> bytes:
        number, start, size = where[name]
        with files[number] as stream:
            stream.seek(start)
            return stream.read(size)

    return {name: size for name, (_, _, size) in where.items()}, read


def decoded(data: bytes) -> Tensor:
    """A picture file as [1, 3, H, W] in [0, 1], as `distill.data.pictures.upright` sees it.

    Raises:
        BadPicture: it cannot be decoded.
    """
    return torch.from_numpy(np.array(upright(data))).permute(2, 0, 1)[None].float() / 255


@torch.no_grad()
def statistics_of(
    pictures: Pictures, prepare: Prepare, network: Callable[[Tensor], Tensor], what: str = "reference"
) -> Statistics:
    """Statistics of the network's features of real pictures, in float64.

    Pictures that `prepare` refuses are left out: n says how many there were in the end.

    Raises:
        ValueError: a file that is no picture (names it), or fewer than two are left.
    """
    n, total, products = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for batch in _batches(pictures, prepare, Progress(what, len(pictures.names), "pictures")):
        features = network(batch).double().cpu()  # [B, F]
        n, total, products = n + len(features), total + features.sum(0), products + features.T @ features
    if n < 2:
        raise ValueError(f"{what}: {n} of {len(pictures.names)} pictures can be used, at least 2 are needed")
    mean = total / n
    return Statistics(mean, (products - n * torch.outer(mean, mean)) / (n - 1), n)


@torch.no_grad()
def features_of(pictures: Pictures, network: Callable[[Tensor], Tensor], what: str = "reference") -> Tensor:
    """The network's features of each of the real pictures, float32 [m, F]; each is shown as its middle square.

    Raises:
        ValueError: a file that is no picture (names it).
    """
    progress = Progress(what, len(pictures.names), "pictures")
    found = []
    for name, data in zip(pictures.names, pictures, strict=True):
        try:
            found.append(network(decoded(data)).float().cpu())
        except BadPicture as error:
            raise ValueError(f"reference picture {name}: not decoded ({error})") from None
        progress.update(1)
    return torch.cat(found)


def _batches(pictures: Pictures, prepare: Prepare, progress: Progress) -> Iterator[Tensor]:
    """The pictures as the network is shown them, [B, 3, side, side]."""
    batch: list[Tensor] = []
    for name, data in zip(pictures.names, pictures, strict=True):
        try:
            image = decoded(data)
        except BadPicture as error:
            raise ValueError(f"reference picture {name}: not decoded ({error})") from None
        with suppress(ValueError):  # smaller than the patch that is wanted
            batch.append(prepare(image))
        if len(batch) == BATCH:
            yield torch.cat(batch)
            batch = []
        progress.update(1)
    if batch:
        yield torch.cat(batch)


def write_statistics(path: Path, statistics: Mapping[str, Statistics], protocol: str) -> None:
    """A safetensors file with `NAME.mean`, `NAME.covariance` and `NAME.n` of each, and its protocol in the header."""
    tensors: dict[str, Tensor] = {}
    for name, own in statistics.items():
        values = (own.mean, own.covariance, torch.tensor(own.n))
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in zip(_PARTS, values, strict=True)}
    save_file(tensors, path, metadata={"protocol": protocol})


def read_statistics(path: str | Path, protocol: str) -> dict[str, Statistics]:
    """What `write_statistics` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is of another protocol, or not such a file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"reference={path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            of = (file.metadata() or {}).get("protocol")
            if of != protocol:
                raise ValueError(f"it is of the protocol {of!r}, this one is {protocol!r}")
            names = sorted({key.rpartition(".")[0] for key in file.keys()})
            found = {name: [file.get_tensor(f"{name}.{part}") for part in _PARTS] for name in names}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"reference={path}: {error}") from None
    return {name: Statistics(mean.double(), cov.double(), int(n)) for name, (mean, cov, n) in found.items()}
