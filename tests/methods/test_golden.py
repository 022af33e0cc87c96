"""Variance-preserving noise is what it has always been: fingerprints, told times, steps, losses and gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.methods.golden_vp import FILE, facts


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and word, with where it stands."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, f"{path}/{key}")
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            yield from leaves(entry, f"{path}[{i}]")
    else:
        yield path, value


def test_every_number_of_variance_preserving_noise_is_as_it_was() -> None:
    """Words exactly, numbers to 1e-12 of their size or of 1: bits are promised on one machine only."""
    then, now = dict(leaves(json.loads(FILE.read_text()))), dict(leaves(facts()))
    assert then.keys() == now.keys() and len(then) > 500
    off = {
        path: (value, now[path])
        for path, value in then.items()
        if value != (now[path] if isinstance(value, str) else pytest.approx(now[path], rel=1e-12, abs=1e-12))
    }
    assert not off
