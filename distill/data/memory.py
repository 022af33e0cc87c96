"""Memory for batches that is used again once nobody holds a tensor in it.

The system clears every page of new memory, and a process stops at each for it: for a batch of latents that takes as
long as reading them does.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict, deque
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST_BYTES = 1 << 17
"""Smaller batches are `torch.empty`'s, whose memory is used again as it is."""
MOST_FREE = 32
"""Of one size; what comes back beyond that is given back to the system."""
HUGE_PAGE = 1 << 21


class Recycled:
    """Gives memory, and takes it back when the last view of it is gone; for several threads."""

    def __init__(self) -> None:
        self._free: defaultdict[int, deque[NDArray[np.uint8]]] = defaultdict(partial(deque, maxlen=MOST_FREE))

    def __call__(self, size: int) -> Tensor:
        """So many bytes with anything in them, [bytes] of uint8."""
        if size < LEAST_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        free = self._free[rounded(size)]
        try:
            whole = free.pop()
        except IndexError:
            whole = _new(rounded(size))
        lent = whole[:size]  # an array of its own, which the tensor holds, and all views of the tensor with it
        weakref.finalize(lent, free.append, whole).atexit = False
        return torch.from_numpy(lent)


def rounded(size: int) -> int:
    """Bytes, rounded up by a quarter at most, so that nearly equal sizes of images share their memory."""
    step = 1 << max(size.bit_length() - 3, 12)
    return -(-size // step) * step


def _new(size: int) -> NDArray[np.uint8]:
    """Memory of the system, in huge pages where it is large and there are any; they are faster to write to."""
    if size < HUGE_PAGE:
        return np.frombuffer(_pages(size), np.uint8)
    area = _pages(size + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + size]


def _pages(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
