"""What the benchmarks share: networks and stores of noise, and what machine it is."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from distill.data.index import StorePlan
from distill.data.reader import Store, open_store
from distill.data.writer import write_store
from distill.diffusion.random import generator
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import trailing_times
from distill.diffusion.trajectory import Trajectory
from distill.models.devices import gpu_is_used
from distill.models.families.loading import load_teacher
from distill.toy.teacher import teacher_folder

SCHEDULE = NoiseSchedule.scaled_linear()
T = TypeVar("T")


def random_store(
    folder: str, config: dict, latent: tuple[int, int], tokens: int, samples: int, solver_steps: int = 50
) -> Store:
    """A store of noise, written and opened like any other."""
    times = tuple(trailing_times(SCHEDULE.T, solver_steps))
    width = config["cross_attention_dim"]
    added = config.get("addition_embed_type") == "text_time"
    plan = StorePlan(
        teacher_id="noise",
        teacher_hash="0" * 16,
        schedule_fingerprint=SCHEDULE.fingerprint,
        solver="ddim",
        solver_steps=solver_steps,
        spacing="trailing",
        guidance=7.5,
        times=times,
        resolution=latent[0] * 8,
        prompt_source="benchmark",
        seed=0,
        samples=samples,
        samples_per_shard=64,
        batch_size=8,
    )

    def solve(indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        g, B = generator("benchmark", indices[0]), len(indices)
        text = {"encoder_hidden_states": torch.randn(B, tokens, width, generator=g, dtype=torch.float32).half()}
        if added:
            text["text_embeds"] = torch.randn(
                B, config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"], generator=g
            )
            text["time_ids"] = torch.full((B, 6), 32.0)
        states = torch.randn(B, len(times), config["in_channels"], *latent, generator=g)
        return Trajectory(states, times, text, torch.full((B,), 7.5), tuple(indices))

    empty = {"encoder_hidden_states": torch.zeros(1, tokens, width)}
    write_store(folder, plan, ["noise"], empty, solve)
    return open_store(folder)


def toy_unet() -> Any:
    """The bundled teacher's network."""
    return load_teacher(teacher_folder()).network


def machine(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def synchronise() -> None:
    """Waits for what the GPU still computes: a clock that is read before measures how fast work is handed to it."""
    if gpu_is_used():
        torch.cuda.synchronize()


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """The seconds that `work` takes on the device of this process, and what it returns."""
    synchronise()
    start = time.perf_counter()
    result = work()
    synchronise()
    return time.perf_counter() - start, result


def free_memory() -> None:
    """Gives memory back that nothing uses any more."""
    gc.collect()
    if gpu_is_used():
        torch.cuda.empty_cache()


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """GiB of the GPU's memory that the work inside has held at most, once it has ended; nothing on a CPU."""
    found: dict[str, float] = {}
    if gpu_is_used():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if gpu_is_used():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
