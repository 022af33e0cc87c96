"""Copies of a training state in host memory, from which it is written while the training continues.

memory = HostMemory()
with memory.snapshot() as copies:           # the memory of the snapshot before is used again
    state = copies.of(optimizer.state_dict())
    weight = copies.dense(parameter)
...                                         # the copies stay until the next snapshot begins
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class HostMemory:
    """Host memory that one snapshot after another is copied into; it is allocated for the first one.

    On a machine with GPUs it is page-locked, which a copy from a GPU is several times as fast into.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the next snapshot."""
        return sum(nbytes * len(memory) for (nbytes, _), memory in self._kept.items())

    @contextmanager
    def snapshot(self) -> Iterator[Copies]:
        """Surrounds the copying of one snapshot; at the end all copies are there. The one before is given up.

        Raises:
            RuntimeError: there is not so much memory.
        """
        free, self._kept = self._kept, {}
        copies = Copies(free)
        try:
            yield copies
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._kept = copies.used


class Copies:
    """The copies of one snapshot.

    Args:
        free: memory that may be used, as tensors of bytes, by their number and whether they are page-locked.
    """

    def __init__(self, free: dict[tuple[int, bool], list[Tensor]]) -> None:
        self.used: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)
        self._free = free
        self._storages: dict[
            tuple[str, int], tuple[Tensor, Tensor]
        ] = {}  # those copied, with what they were copied from

    def dense(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of the elements of a tensor, in the host's memory."""
        memory = self._memory(tensor.numel() * tensor.element_size(), tensor)
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

    def of(self, value: Any) -> Any:
        """A copy of anything that can be pickled. Tensors in it share memory, and lie in it, as they did."""
        return with_tensors(value, self._laid_out)

    def later(self, value: Any) -> Callable[[], Any]:
        """Gives `of(value)` as it is now, however often it is called."""
        copied = self.of(value)
        return lambda: copied

    def of_storage(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor within a copy of all of its storage, which is made once for all tensors that share it."""
        storage = tensor.untyped_storage()
        key = str(tensor.device), storage.data_ptr()
        if key not in self._storages or storage.nbytes() == 0:
            there = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._storages[key] = self._memory(there.numel(), tensor).copy_(there, non_blocking=True), there
        copied = self._storages[key][0].untyped_storage()
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        return torch.empty(0, dtype=tensor.dtype).set_(copied, *place)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        copy = self.of_storage(tensor)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(copy, tensor.requires_grad)
        return copy.requires_grad_(tensor.requires_grad)

    def _memory(self, nbytes: int, source: Tensor) -> Tensor:
        pinned = source.device.type == "cuda" and nbytes > 0
        same = self._free.get((nbytes, pinned))
        memory = same.pop() if same else torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.used[nbytes, pinned].append(memory)
        return memory


class InPlace(Copies):
    """No copies: what a snapshot is given, moved to the host's memory where it lies elsewhere.

    For a state that is written at once, while nothing changes it.
    """

    def __init__(self) -> None:
        super().__init__({})

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def later(self, value: Any) -> Callable[[], Any]:
        return lambda: InPlace().of(value)  # one file after another, so that no more than one is moved at a time

    def of_storage(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if tensor.device.type == "cpu" else super().of_storage(tensor)


def with_tensors(value: Any, replaced: Any) -> Any:
    """A copy of anything that can be pickled, with what `replaced` gives for each of its tensors."""
    found: dict[int, Tensor] = {}

    class Out(pickle.Pickler):
        def persistent_id(self, thing: Any) -> int | None:
            if not isinstance(thing, Tensor):
                return None
            found[id(thing)] = thing  # held, so that no other one can have its number
            return id(thing)

    class In(pickle.Unpickler):
        def persistent_load(self, number: int) -> Any:
            return copies[number]

    stream = io.BytesIO()
    Out(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    copies = {number: replaced(tensor) for number, tensor in found.items()}
    stream.seek(0)
    return In(stream).load()
