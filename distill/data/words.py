"""Counts as people say them."""

from __future__ import annotations


def counted(n: int, one: str, many: str | None = None) -> str:
    """`1 picture`, `2 pictures`, `0 pictures`; `many` is given where it is not `one` with an s."""
    return f"{n} {one if n == 1 else many or one + 's'}"
