"""The files of a training state: written from a snapshot, hashed on the way, and on the disk when they are closed.

Two kinds: what torch pickles, by the rank that has it; and unsharded weights as safetensors, which rank 0 writes a part
at a time while the ranks send it their shares, so that nobody holds all of them for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from distill.training.processes import Channel
from distill.training.rank_writes import Writes

CHUNK = 1 << 24
"""Elements of weights that are put together at once, unless a single one has more."""
Digests = dict[str, dict[str, Any]]
"""Size and sha256 by file, relative to the folder of a checkpoint."""


class HashedFile:
    """A new file that is hashed while it is written. Closed by `finish`, it is on the disk."""

    def __init__(self, path: Path) -> None:
        self._digest, self._size = hashlib.sha256(), 0
        self._file = open(path, "wb", buffering=0)
        self._problem: OSError | None = None

    def write(self, data: Any) -> int:
        """Appends bytes, all of them."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self._problem = error
            raise
        self._size += done
        return done

    def pickle(self, content: Any) -> None:
        """Writes what `torch.save` makes of it. Raises the OSError that stopped it, which torch's own does not name."""
        try:
            torch.save(content, cast(IO[bytes], self))
        except RuntimeError:
            if self._problem is not None:
                raise self._problem from None
            raise

    def flush(self) -> None:
        """Nothing waits in memory."""

    def finish(self) -> dict[str, Any]:
        """Flushes it to the disk and closes it; its size and sha256."""
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Closes it as it is."""
        self._file.close()


@dataclass(frozen=True)
class Pickled:
    """A file of torch's, of this rank alone. `content` gives what is in it, in the host's memory."""

    path: str
    content: Callable[[], Any]

    def write(self, folder: Path, channel: Channel, writes: Writes) -> Digests:
        """Writes it; what fails is kept in `writes`. Returns its size and hash."""
        digests: Digests = {}

        def save() -> None:
            with closing(HashedFile(folder / self.path)) as file:
                file.pickle(self.content())
                digests[self.path] = file.finish()

        writes(save)
        return digests


@dataclass(frozen=True)
class Weights:
    """A safetensors file of float32 weights, unsharded: the bytes that the safetensors library writes.

    Attributes:
        shapes: of all weights by name, the same on all ranks.
        pieces: (name, flat values) that this rank has. Those of a name follow one another in the order of ranks.
        shared: whether ranks other than the first have any.
    """

    path: str
    shapes: Mapping[str, Sequence[int]]
    pieces: Sequence[tuple[str, Tensor]]
    shared: bool

    def write(self, folder: Path, channel: Channel, writes: Writes) -> Digests:
        """Writes it on rank 0, to which the others send; what fails is kept in `writes`. Returns its size and hash."""
        mine: dict[str, list[Tensor]] = {}
        for name, piece in self.pieces:
            mine.setdefault(name, []).append(piece)
        sizes = {name: sum(map(Tensor.numel, pieces)) for name, pieces in mine.items()}
        of_ranks = channel.gathered(sizes) if self.shared else [sizes]
        if channel.rank != 0:
            for names in self._chunks() if self.shared else ():
                if any(sizes.get(name) for name in names):
                    pieces = [piece for name in names for piece in mine.get(name, ())]
                    channel.send(torch.cat([piece.reshape(-1) for piece in pieces]), 0)
            return {}
        digests: Digests = {}
        files: list[HashedFile] = []
        writes(lambda: files.append(HashedFile(folder / self.path)))
        writes(lambda: files[0].write(header(self.shapes)))
        for names in self._chunks():
            chunk = self._whole(names, mine, of_ranks, channel)
            writes(lambda chunk=chunk: files[0].write(chunk.numpy()))
        writes(lambda: digests.update({self.path: files[0].finish()}))
        for file in files:
            file.close()
        return digests

    def _chunks(self) -> Iterator[list[str]]:
        """The names in the order of the file, in groups that are put together at once."""
        names: list[str] = []
        for name in sorted(self.shapes):
            if names and sum(math.prod(self.shapes[n]) for n in (*names, name)) > CHUNK:
                yield names
                names = []
            names.append(name)
        if names:
            yield names

    def _whole(
        self,
        names: list[str],
        mine: Mapping[str, list[Tensor]],
        of_ranks: Sequence[Mapping[str, int]],
        channel: Channel,
    ) -> Tensor:
        """The values of these weights one after another, from what all ranks have of them."""
        counts = [math.prod(self.shapes[name]) for name in names]
        whole = torch.empty(sum(counts), dtype=torch.float32)
        rest = dict(zip(names, whole.split(counts), strict=True))  # of each weight, what is not there yet
        for rank, sizes in enumerate(of_ranks):
            if rank == 0:
                pieces = [(name, piece.reshape(-1)) for name in names for piece in mine.get(name, ())]
            else:
                there = [name for name in names if sizes.get(name)]
                received = channel.receive(sum(sizes[name] for name in there), rank) if there else torch.empty(0)
                pieces = list(zip(there, received.split([sizes[name] for name in there]), strict=True)) if there else []
            for name, piece in pieces:
                rest[name][: piece.numel()].copy_(piece)
                rest[name] = rest[name][piece.numel() :]
        return whole


StateFile = Pickled | Weights


def write_files(files: Sequence[StateFile], folder: Path, channel: Channel) -> Digests:
    """Writes the files of this rank below `folder`, and those that it has a share of, on all ranks alike.

    Returns:
        sizes and hashes of those that this rank wrote.

    Raises:
        WriteError: this rank could not write. The others know nothing of it, and do not wait.
    """
    writes, digests = Writes(), {}
    for file in files:
        digests.update(file.write(folder, channel, writes))
    writes.finish()
    return digests


def header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """The beginning of a safetensors file of float32 tensors, which lie in it in the order of their names."""
    entries, begin = {}, 0
    for name in sorted(shapes):
        end = begin + 4 * math.prod(shapes[name])
        entries[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
