"""Checksums of what is read of a sample, so that what was written is what is trained on, to the bit.

Beside each shard lies `shard-000000.crc32`: a row of numbers for each of its samples, in their order. A number is the
CRC-32 of one part that is read as a whole: the head (all of the safetensors payload but the states), each state, and
the JSON member. The last one is of the row itself. Each begins from the store and the key, so that a part of another
sample, or of another store, fits no better than a damaged one. What is read of a sample is checked by one more read of
a few hundred bytes and a pass over the bytes that are there anyway.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence

from distill.data.record import STATES, BadSample, Layout

ENDING = ".crc32"
Cut = Callable[[int, int], memoryview]
"""Bytes begin ... end of a payload, or of whatever it is that is checked."""


def checksums_name(shard: str) -> str:
    """The file with the checksums of the shard of that name."""
    return shard.removesuffix(".tar") + ENDING


def row_bytes(states: int) -> int:
    """Bytes of the checksums of one sample with so many states."""
    return 4 * (states + 3)


def start_of(store: str, key: str) -> int:
    """Where the checksums of a sample begin: `store` is `Plan.identity`."""
    return zlib.crc32(f"{store}/{key}".encode())


def make_row(layout: Layout, payload: bytes, facts: bytes, start: int) -> bytes:
    """The checksums of a sample.

    Args:
        payload: its safetensors.
        facts: its JSON as a member of the archive, with header and padding.
        start: see `start_of`.
    """
    whole = memoryview(payload)
    numbers = [_head(layout, lambda begin, end: whole[begin:end], start)]
    first = layout.start(STATES)
    for k in range(layout.tensors[STATES].shape[0]):
        begin = first + k * layout.state_bytes
        numbers.append(zlib.crc32(whole[begin : begin + layout.state_bytes], start))
    numbers.append(zlib.crc32(facts, start))
    row = struct.pack(f"<{len(numbers)}I", *numbers)
    return row + struct.pack("<I", zlib.crc32(row, start))


def check_row(layout: Layout, row: bytes, start: int, cut: Cut, states: Sequence[int], facts: bytes | None) -> None:
    """Compares what was read of a sample with its row of checksums.

    Args:
        cut: gives bytes of the payload that were read: all but the states, and those of `states`.
        states: places of the states that were read.
        facts: the JSON member, if it was.

    Raises:
        BadSample: something differs; says which part.
    """
    K = layout.tensors[STATES].shape[0]
    if len(row) != row_bytes(K) or zlib.crc32(row[:-4], start) != struct.unpack("<I", row[-4:])[0]:
        raise BadSample("its checksums are damaged or another sample's; distill verify add_checksums=true renews them")
    numbers = struct.unpack(f"<{K + 3}I", row)
    first = layout.start(STATES)
    found = {"text, times or guidance": (_head(layout, cut, start), numbers[0])}
    for k in states:
        begin = first + k * layout.state_bytes
        found |= {f"state {k}": (zlib.crc32(cut(begin, begin + layout.state_bytes), start), numbers[1 + k])}
    if facts is not None:
        found |= {"JSON": (zlib.crc32(facts, start), numbers[1 + K])}
    if wrong := [name for name, (is_so, was) in found.items() if is_so != was]:
        raise BadSample(f"its {wrong[0]} is not what was written (checksum): damaged, or of another store")


def _head(layout: Layout, cut: Cut, start: int) -> int:
    """Of the payload before and after the states."""
    first = layout.start(STATES)
    after = first + layout.tensors[STATES].shape[0] * layout.state_bytes
    so_far = zlib.crc32(cut(0, first), start)
    return zlib.crc32(cut(after, layout.payload_bytes), so_far) if after < layout.payload_bytes else so_far
