"""Counts as people say them."""

from __future__ import annotations


def counted(n: int | str, one: str, many: str | None = None) -> str:
    """`1 picture`, `2 pictures`, `1 to 8 pictures`; `many` is given where it is not `one` with an s."""
    return f"{n} {one if n in (1, '1') else many or one + 's'}"
