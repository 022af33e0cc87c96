"""A small store to write, break and read: its teacher draws sample i from (seed, i), its states are worth reading."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.index import INDEX, StoreIndex, StorePlan
from distill.data.writer import Partly, Solve, write_store
from distill.diffusion.random import generator, seed_of
from distill.diffusion.trajectory import Trajectory
from tests.data.dying import Touches

PROMPTS = ["a red square", "ein grüner Kreis", '"quotes", commas\tand tabs', "", "a long prompt " * 60]
UNCONDITIONAL = {"encoder_hidden_states": torch.full((1, 7, 6), -1.0, dtype=torch.float16)}

PLAN = StorePlan(
    teacher_id="tests/teacher",
    teacher_hash="0123abcd",
    schedule_fingerprint="fedc9876",
    solver="ddim",
    solver_steps=4,
    spacing="trailing",
    guidance=(2.0, 8.0),
    times=(1000, 750, 500, 250, 0),
    resolution=64,
    prompt_source="PROMPTS",
    seed=11,
    samples=11,
    samples_per_shard=4,
    batch_size=3,
)

PICTURES = replace(
    PLAN,
    kind="pictures",
    solver="none",
    solver_steps=0,
    spacing="none",
    guidance=1.0,
    times=(0,),
    pictures_sha256="aaaa",
    crop="center",
    vae_hash="bbbb",
)


BAD = (1, 4, 5, 6, 7, 10)
"""Of the pictures: one of the first shard, all of the second, the last one of the third."""


def states_of(plan: StorePlan, i: int, shape: tuple[int, ...] = (4, 8, 8)) -> Tensor:
    """The states of sample i before they are rounded for storage, [K, C, h, w]."""
    return torch.randn(len(plan.times), *shape, generator=generator(plan.seed, "states", i))


def embedding_of(prompt: str) -> Tensor:
    return torch.randn(7, 6, generator=generator("embedding", prompt)).half()


def teacher(plan: StorePlan, shape: tuple[int, ...] = (4, 8, 8), solved: list[int] | None = None) -> Solve:
    """A solve function; it notes the samples it was asked for in `solved`."""

    def solve(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        if solved is not None:
            solved.extend(indices)
        return Trajectory(
            states=torch.stack([states_of(plan, i, shape) for i in indices]),
            times=plan.times,
            conditioning={
                "encoder_hidden_states": torch.stack([embedding_of(p) for p in prompts]),
                "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, float(i)] for i in indices]),
            },
            guidance=torch.tensor([plan.guidance_of(i) for i in indices]),
            seeds=tuple(seed_of(plan.seed, i) for i in indices),
        )

    return solve


def skipping(plan: StorePlan, bad: Collection[int]) -> Solve:
    """The teacher above, of a store of pictures some of which cannot be read."""

    def solve(indices: Sequence[int], prompts: Sequence[str]) -> Partly:
        good = {i: prompt for i, prompt in zip(indices, prompts, strict=True) if i not in bad}
        rest = teacher(plan)(list(good), list(good.values())) if good else None
        return Partly(rest, {i: f"{i}.jpg: torn" for i in indices if i in bad})

    return solve


def write(url: str | Path, plan: StorePlan = PLAN, **arguments: Any) -> str:
    """Writes a store with the teacher above and gives back its URL."""
    solve = arguments.pop("solve", None) or teacher(plan)
    prompts = arguments.pop("prompts", PROMPTS)
    write_store(str(url), plan, prompts, UNCONDITIONAL, solve, **arguments)
    return str(url)


def in_processes(*jobs: Callable[[], object], fault: str = "") -> list[int | None]:
    """Runs each job in a process of its own, all at once; their exit codes (-9 for one that died of its `fault`)."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run, args=(job, fault)) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def _run(job: Callable[[], object], fault: str) -> None:
    if fault:
        Touches(fault)
    job()


def files(folder: str | Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def whole_shards(folder: Path) -> list[str]:
    """The shards that the index of a store lists, after checking that each is there and whole."""
    if not (folder / INDEX).exists():
        return []
    index = StoreIndex.from_json((folder / INDEX).read_bytes())
    for shard in index.shards:
        data = (folder / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    assert index.complete == (len(index.shards) == index.planned_shards)
    return [shard.name for shard in index.shards]
