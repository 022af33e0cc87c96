"""How long training stands still for a checkpoint that is written beside it, against one that it waits for.

Two processes train all weights of a UNet under ZeRO-2 (gloo on CPUs), with an average and AdamW, in float32. They save
in turns one way and the other; beside a save that is written in the background they take steps.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from distill.benchmarks.common import SCHEDULE, machine, toy_unet
from distill.diffusion.prediction import Prediction
from distill.diffusion.trajectory import Batch
from distill.methods.base import Losses, Turn
from distill.models.denoiser import NetworkDenoiser
from distill.models.full_size import build_unet, unet_config
from distill.training.checkpoint import Checkpoints
from distill.training.engine import Engine, EngineSettings
from distill.training.trained_network import TrainingRecipe

RANKS = 2
NARROW = {"block_out_channels": (128, 256, 512, 512)}  # 0.4 of SD1.5's width: the states of both ranks fit in 8 GiB
SECONDS = ("waited", "stood", "written", "step", "beside")


def bench_saving(size: str, rounds: int) -> int:
    """Starts the ranks, of which the first prints; in a rank, measures. Returns an exit code."""
    if "RANK" in os.environ:
        measure(size, rounds)
        return 0
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        command = [sys.executable, "-m", "distill", "benchmark", "checkpoint", f"size={size}", f"rounds={rounds}"]
        own = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"TMPDIR": folder, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        ranks = [
            subprocess.Popen(command, env={**own, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(RANKS)
        ]
        return max(abs(rank.wait()) for rank in ranks)


def measure(size: str, rounds: int) -> None:
    """Trains and saves; rank 0 prints medians."""
    unet = toy_unet() if size == "toy" else build_unet({**unet_config("sd15"), **NARROW})
    unet.requires_grad_(True)
    stage = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}}
    engine = EngineSettings(kind="deepspeed", deepspeed=stage).start()
    recipe = TrainingRecipe(partial(torch.optim.AdamW, lr=1e-5), ema_decay=0.99)
    engine.prepare({"student": NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON)}, {"student": recipe})
    batch = noise(unet.config)
    folder = Path(engine.processes.from_main(tempfile.mkdtemp()))
    ways = {way: Checkpoints(folder / str(way), total_limit=1, background=way) for way in (False, True)}
    found: dict[str, list[float]] = {name: [] for name in SECONDS}
    step = taken(engine, batch, 0, found["step"], 2)
    for i in range(rounds + 1):
        waited = timed(engine, partial(ways[False].save, engine, step))
        step = taken(engine, batch, step, found["step"], 2)
        began = time.monotonic()
        stood = timed(engine, partial(ways[True].begin, engine, step))
        while engine.processes.any(ways[True].is_writing):
            step = taken(engine, batch, step, found["beside"] if i else [], 1)
        ways[True].finish()
        if i:  # the first ones allocate
            found["waited"].append(waited)
            found["stood"].append(stood)
            found["written"].append(time.monotonic() - began)
        elif engine.processes.is_main:
            print(f"the first save, which allocates the memory of the copy: training stood still for {stood:.2f} s")
    if engine.processes.is_main:
        report(size, rounds, engine, folder, found)
        print(f"  the copy on rank 0  {ways[True].copied_bytes / 2**30:9.2f} GiB of host memory")
    ways[True].close()
    engine.close()


def noise(config: Any) -> Batch:
    """A sample of noise for a loss that needs no teacher."""
    states = torch.randn(1, config["in_channels"], 8, 8)
    conditioning = {"encoder_hidden_states": torch.randn(1, 4, config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        conditioning |= {"text_embeds": torch.randn(1, pooled), "time_ids": torch.full((1, 6), 32.0)}
    return Batch(states, torch.full((1, 1), 500), conditioning, {}, torch.ones(1), ("noise",), (0,))


def distance(networks: Any, batch: Batch, context: Any) -> Losses:
    return Losses(networks["student"](batch.states, batch.times[:, 0], batch.conditioning).eps.square().mean(), {})


def taken(engine: Engine, batch: Batch, step: int, seconds: list[float], count: int) -> int:
    """Takes so many steps, and notes the seconds of each; the number of the next one."""
    for _ in range(count):
        began = time.monotonic()
        engine.updated(Turn("student", distance), [batch], step)
        seconds.append(time.monotonic() - began)
        step += 1
    return step


def timed(engine: Engine, call: partial[Any]) -> float:
    """Seconds from when all ranks begin until all have done it."""
    engine.processes.barrier()
    began = time.monotonic()
    call()
    engine.processes.barrier()
    return time.monotonic() - began


def report(size: str, rounds: int, engine: Engine, folder: Path, found: dict[str, list[float]]) -> None:
    """Prints medians and their ratio."""

    def of(values: Sequence[float]) -> float:
        return median(values) if values else float("nan")

    (count,) = engine.trained_parameters().values()
    written = sum(p.stat().st_size for p in (folder / "True").rglob("*") if p.is_file()) / 2**30
    print(f"{size}, {count / 1e6:.0f} M weights, ZeRO-2 on {RANKS} processes, {rounds} saves each way, medians,")
    print(f"  a checkpoint of {written:.2f} GiB; {machine(engine.processes.device)} a process")
    print(f"  training waits      {of(found['waited']):9.2f} s   until the checkpoint is complete")
    print(f"  in the background   {of(found['stood']):9.2f} s   that training stands still, and")
    print(f"                      {of(found['written']):9.2f} s   until it is complete")
    print(f"  ratio               {of(found['stood']) / of(found['waited']):9.3f}     target <= 0.1")
    print(f"  a step, and beside  {of(found['step']):9.2f} s, {of(found['beside']):.2f} s")
