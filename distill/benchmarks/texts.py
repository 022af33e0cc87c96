"""distill benchmark texts: a store whose samples of a prompt share its text beside one where each holds its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from distill.benchmarks.common import SCHEDULE, machine, timed
from distill.data.index import StorePlan
from distill.data.loader import make_loader
from distill.data.reader import Store, open_store
from distill.data.writer import write_store
from distill.diffusion.random import generator
from distill.diffusion.solver import trailing_times
from distill.diffusion.trajectory import Trajectory
from distill.methods.lcm import LCM

SAMPLES_A_PROMPT, BATCH, ROUNDS = 4, 8, 7


@dataclass(frozen=True)
class Sizes:
    """What a sample has: latents [C, h, w] at 9 times, and text [tokens, width] in bfloat16."""

    latent: tuple[int, int, int]
    tokens: int
    width: int
    samples: int


SIZES = {
    "toy_flow": Sizes((4, 8, 8), 28, 64, 1024),
    "sd3": Sizes((16, 128, 128), 333, 4096, 64),
    "flux": Sizes((64, 64, 64), 512, 4096, 64),
}


def run() -> None:
    print(f"{SAMPLES_A_PROMPT} samples of a prompt with 9 states; LCM reads two and the text; {machine('cpu')}")
    for name, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            compare(name, sizes, Path(folder))


def compare(name: str, sizes: Sizes, folder: Path) -> None:
    """Prints what a sample takes in both stores, and how fast they are read, in turn."""
    stores = {"own": store_of(folder / "own", sizes, ()), "shared": store_of(folder / "shared", sizes, ("text",))}
    stored = {kind: sum(shard.bytes for shard in store.index.shards) for kind, store in stores.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in stores}
    for repeat in range(ROUNDS + 1):
        for kind, store in stores.items():
            took, _ = timed(partial(take_all, store, repeat, sizes.samples // BATCH))
            seconds[kind] += [took] if repeat else []  # the first one warms the page cache
    rates = {kind: sizes.samples / median(found) for kind, found in seconds.items()}
    before, after = (stored[kind] / sizes.samples / 2**20 for kind in ("own", "shared"))
    print(
        f"{name:>8}: {before:.3f} MiB stored per sample with texts of their own, {after:.3f} shared: "
        f"{after / before:.2f} x;  read {rates['own']:.0f} and {rates['shared']:.0f} samples/s: "
        f"{rates['shared'] / rates['own']:.2f} x"
    )


def take_all(store: Store, seed: int, count: int) -> None:
    """Reads so many batches, each dropped when the next one is there."""
    reads = LCM(SCHEDULE, skip=125).reads
    loader = make_loader(store, reads, seed=seed, global_batch_size=BATCH, micro_batch_size=BATCH, num_workers=1)
    for _ in islice(loader, count):
        pass


def store_of(folder: Path, sizes: Sizes, shared: tuple[str, ...]) -> Store:
    """A store of noise; of each prompt as many samples, an epoch of prompts apart."""
    plan = StorePlan(
        teacher_id="noise",
        teacher_hash="0" * 16,
        schedule_fingerprint=SCHEDULE.fingerprint,
        solver="ddim",
        solver_steps=8,
        spacing="trailing",
        guidance=7.5,
        times=tuple(trailing_times(SCHEDULE.T, 8)),
        resolution=sizes.latent[1] * 8,
        prompt_source="benchmark",
        seed=0,
        samples=sizes.samples,
        samples_per_shard=64,
        batch_size=BATCH,
        text_dtype="bfloat16",
    )
    prompts = [f"prompt {n}" for n in range(sizes.samples // SAMPLES_A_PROMPT)]

    def solve(indices: Sequence[int], texts: Sequence[str]) -> Trajectory:
        states = torch.randn(len(indices), 9, *sizes.latent, generator=generator("states", indices[0]))
        text = torch.randn(len(indices), sizes.tokens, sizes.width, generator=generator("text", indices[0]))
        weights = torch.full((len(indices),), 7.5)
        return Trajectory(states, plan.times, {"text": text.bfloat16()}, weights, tuple(indices))

    write_store(str(folder), replace(plan, shared=shared), prompts, {}, solve)
    return open_store(str(folder))
