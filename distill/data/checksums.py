"""Checksums of what is read of a sample, so that what was written is what is trained on, to the bit.

Beside each shard lies `shard-000000.crc32`: a row of numbers for each of its samples, in their order. A number is the
CRC-32 of one part that is read at once: the head (all of the safetensors payload but the states), each state, and
the JSON member. The last one is of the row itself. Each begins from the store and the key, so that a part of another
sample, or of another store, fits no better than a damaged one; and, of a sample whose text another one holds, from the
key of that, so that the text of a third one fits no better. What is read of a sample is checked by one more read of
a few hundred bytes and a pass over the bytes that are there anyway.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from distill.data.record import STATES, Layout

try:
    from isal.isal_zlib import crc32  # the same numbers, at several times the speed
except ImportError:
    from zlib import crc32

ENDING = ".crc32"


def checksums_name(shard: str) -> str:
    """The file with the checksums of the shard of that name."""
    return shard.removesuffix(".tar") + ENDING


def row_bytes(states: int) -> int:
    """Bytes of the checksums of one sample with so many states."""
    return 4 * (states + 3)


def start_of(store: str, key: str, text_of: str = "") -> int:
    """Where the checksums of a sample begin.

    Args:
        store: `StorePlan.identity`.
        text_of: the key of the sample that holds its text, if it is another one.
    """
    return crc32(f"{store}/{key}{text_of and '/' + text_of}".encode())


def make_row(layout: Layout, payload: bytes, facts: bytes, start: int) -> bytes:
    """The checksums of a sample.

    Args:
        payload: its safetensors.
        facts: its JSON as a member of the archive, with header and padding.
        start: see `start_of`.
    """
    whole, first, size = memoryview(payload), layout.start(STATES), layout.state_bytes
    after = first + layout.tensors[STATES].shape[0] * size
    numbers = [chained([whole[:first], whole[after:]], start)]
    numbers += [crc32(whole[begin : begin + size], start) for begin in range(first, after, size)]
    numbers.append(crc32(facts, start))
    row = struct.pack(f"<{len(numbers)}I", *numbers)
    return row + struct.pack("<I", crc32(row, start))


HEAD_NUMBER, FACTS_NUMBER = 0, -2
"""The places in a row of the numbers of the head and of the JSON; the last one is of the row itself."""


def state_number(state: int) -> int:
    """The place in a row of a state's number."""
    return 1 + state


def row_problem(row: bytes, states: int, start: int, found: Mapping[int, int]) -> str:
    """What differs between a sample's row of checksums and those of what was read of it, in words; "" if nothing does.

    Args:
        states: how many a sample has.
        found: checksums by their places in the row.
    """
    if len(row) != row_bytes(states) or crc32(row[:-4], start) != int.from_bytes(row[-4:], "little"):
        return "its checksums are damaged or another sample's; distill verify add_checksums=true renews them"
    numbers = struct.unpack(f"<{states + 3}I", row)
    for place, number in found.items():
        if number != numbers[place]:
            name = {HEAD_NUMBER: "text, times or guidance", FACTS_NUMBER: "JSON"}.get(place, f"state {place - 1}")
            return f"its {name} is not what was written (checksum): damaged, or of another store"
    return ""


def chained(pieces: Iterable[memoryview], start: int) -> int:
    """The CRC-32 of pieces as if they were one."""
    for piece in pieces:
        start = crc32(piece, start)
    return start
