"""Solves that no run learns from: a small store within a store, beside its shards, of other noise.

It is written after the store itself, which it leaves as it is. Its prompts are the last ones of the prompts' file, from
the end on: other ones than the store's where there are more prompts than samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from distill.data.index import INDEX, PLAN, StorePlan
from distill.data.storage import Folder, below
from distill.diffusion.random import seed_of

FOLDER = "heldout"
SHARE, MOST = 50, 64
"""One held-out solve for so many of the store, and how many at most, unless the settings say how many."""


def within(url: str) -> str:
    """Where the held-out solves of a store lie."""
    return below(url, FOLDER)


def is_there(url: str) -> bool:
    """Whether a store has held-out solves, or some of them."""
    return bool(Folder(within(url)).sizes((PLAN, INDEX)))


def heldout_samples(wanted: int | Literal["auto"], samples: int) -> int:
    """How many solves are held out beside so many samples: as many as wanted, or a fiftieth, 64 at most."""
    return min(samples // SHARE, MOST) if wanted == "auto" else wanted


def heldout_plan(plan: StorePlan, samples: int) -> StorePlan:
    """The plan of the held-out solves of a store: its own, with other noise, in shards that processes share."""
    seed = seed_of(plan.seed, "held out")
    return replace(plan, samples=samples, seed=seed, samples_per_shard=min(plan.samples_per_shard, plan.batch_size))


def heldout_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts in the order in which held-out solves take them."""
    return list(reversed(prompts))
