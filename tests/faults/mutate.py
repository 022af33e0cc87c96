"""Damaged inputs by the thousand, the same ones for the same seed; and a place to try them that cannot hurt.

Three kinds of damage: to bytes (flips, cuts, splices), to the words of a text (huge numbers, NaN, nesting, what other
types look like), and to the tree that a JSON or YAML text stands for (values that change places, types, or vanish).
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MEMORY = 256 << 20
"""Bytes that all the inputs of a campaign may need beyond what the process has when it begins."""
SECONDS = 2.0
"""Processor time that one input may take."""

NUMBERS = ["0", "-1", "1.5", "1e999", "-1e999", "NaN", "Infinity", "9" * 19, "9" * 400, "9" * 5000, "true", "null"]
TEXTS = [
    "",
    " ",
    "\0",
    "\n",
    "é\u2028",
    "\ud800",
    "٣",
    "../../etc/passwd",
    "${oc.env:HOME}",
    "${seed}",
    "x" * 70_000,
    "%s",
]
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, -(10**30), 0.5, 1e308, -0.0]
VALUES += [
    float("nan"),
    float("inf"),
    float("-inf"),
    *TEXTS,
    "1",
    "512",
    "nan",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {}},
]
VALUES += [[0, 2**40], [2**70, 0], [1] * 1000, {"_target_": "os.getcwd"}, {"_args_": [1]}]


def damaged_bytes(rng: random.Random, data: bytes, others: Iterable[bytes] = ()) -> bytes:
    """`data` with one to three kinds of damage; `others` are what a piece may come from."""
    kinds = [_flip, _flip, _cut, _remove, _repeat, _blank, _noise, _number]
    pool = [data, *others]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.15:
            data = _splice(rng, data, rng.choice(pool))
        else:
            data = rng.choice(kinds)(rng, data)
    return data


def damaged_text(rng: random.Random, text: str) -> str:
    """A text one of whose words is another, or is repeated, or is deep within brackets."""
    words = list(re.finditer(r'"[^"]*"|[\w.+-]+', text)) or [re.match("", text)]
    word = rng.choice(words)
    assert word is not None
    depth = rng.choice((3, 50, 2000, 200_000))
    new = rng.choice(
        [
            rng.choice(NUMBERS),
            json.dumps(rng.choice(TEXTS)),
            rng.choice(TEXTS),
            rng.choice(words)[0] if words[0] else "",  # type: ignore[index]
            word[0] * 2,
            "[" * depth + word[0] + "]" * rng.choice((0, depth)),
            '{"a":' * depth + word[0] + "}" * rng.choice((0, depth)),
        ]
    )
    return text[: word.start()] + new + text[word.end() :]


def damaged_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of a tree of dicts and lists with one to three of its nodes changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        nodes = list(_nodes(tree))
        if not nodes:
            return rng.choice(VALUES)
        holder, key = rng.choice(nodes)
        match rng.randrange(7):
            case 0:
                del holder[key]
            case 1:
                other, name = rng.choice(nodes)
                holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(holder[key])
            case 2 if isinstance(holder, dict):
                holder[rng.choice([*TEXTS, "_target_", "_args_", key.upper(), key + "s"])] = holder.pop(key)
            case 3:
                holder[key] = [holder[key]] * rng.choice((1, 2, 50))
            case 4:
                holder[key] = str(holder[key])
            case 5:
                holder[key] = _nested(rng.choice((5, 60, 300)), holder[key])
            case _:
                holder[key] = rng.choice(VALUES)
    return tree


def _nodes(tree: Any) -> Iterable[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict) or (isinstance(value, list) and len(value) != 1):  # not into what is nested deeply
            yield from _nodes(value)


def _nested(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _place(rng: random.Random, data: bytes, most: int = 1) -> int:
    return rng.randrange(max(1, len(data) - most + 1))


def _flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((0, 1, len(data) - 1, _place(rng, data), _place(rng, data) // 512 * 512))]


def _remove(rng: random.Random, data: bytes) -> bytes:
    at, size = _place(rng, data), rng.choice((1, 4, 100, 512, 4096))
    return data[:at] + data[at + size :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    at, size = _place(rng, data), rng.choice((1, 4, 100, 512, 4096))
    return data[: at + size] + data[at : at + size] * rng.choice((1, 3)) + data[at + size :]


def _blank(rng: random.Random, data: bytes) -> bytes:
    size, fill = rng.choice((1, 8, 512, 1024)), rng.choice((b"\0", b"\xff", b" ", b"7"))
    at = rng.choice((_place(rng, data, size), _place(rng, data, size) // 512 * 512))
    return data[:at] + (fill * size)[: max(len(data) - at, 0)] + data[at + size :]


def _noise(rng: random.Random, data: bytes) -> bytes:
    at, size = _place(rng, data), rng.choice((1, 8, 64, 512))
    return data[:at] + rng.randbytes(size) + data[at + rng.choice((0, size)) :]


def _number(rng: random.Random, data: bytes) -> bytes:
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return data
    number = rng.choice(found)
    return data[: number.start()] + rng.choice(NUMBERS).encode() + data[number.end() :]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, size = _place(rng, other), rng.choice((8, 512, 4096))
    return data[: (at := _place(rng, data))] + other[start : start + size] + data[at + rng.choice((0, size)) :]


def campaign(
    try_one: Callable[[random.Random], None], inputs: int, report: Path, seconds: float = SECONDS, seed: int = 0
) -> float:
    """Calls `try_one` with so many generators, in a process of its own whose memory and time are bounded.

    Returns:
        The longest processor time of one input, in seconds.

    Raises:
        AssertionError: an input raised, took too long or too much memory; says which seed, and the traceback.
    """
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _bounded(try_one, inputs, report, seconds, seed)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = report.read_text() if report.exists() else ""
    assert status == 0, f"exit code {status}: {said}"
    return float(said)


class TookTooLong(BaseException):
    """Not an Exception, so that nothing that is tried catches it."""


def _bounded(try_one: Callable[[random.Random], None], inputs: int, report: Path, seconds: float, seed: int) -> None:
    """Ends the process."""

    def too_long(*_: object) -> None:
        raise TookTooLong(f"more than {seconds} s")

    signal.signal(signal.SIGVTALRM, too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    longest, number = 0.0, 0
    try:
        for number in range(inputs):
            start = time.process_time()
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            try_one(random.Random(f"{seed}:{number}"))
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            longest = max(longest, time.process_time() - start)
        report.write_text(str(longest))
        os._exit(0)
    except BaseException:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        report.write_text(f"input {number} of seed {seed}\n{traceback.format_exc()[-4000:]}")
        os._exit(1)
