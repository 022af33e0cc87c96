"""Measures speed and memory, as ratios within one run (single timings mean little on shared machines):

distill benchmark step size=toy        # a training step against the bare network passes that it needs
distill benchmark step size=sd15
distill benchmark deterministic        # a training step with and without the arithmetic that repeats itself
distill benchmark lcm size=sd15        # LCM-LoRA's step here against that of the usual scripts
distill benchmark memory               # what the experiments hold, counted without weights
distill benchmark reader               # planned reads against a sequential read of the same bytes
distill benchmark checksums            # what comparing all that is read with its checksums costs
distill benchmark texts                # a store whose samples of a prompt share its text, beside one where none do
distill benchmark checkpoint size=sd15 # how long training stands still for a checkpoint written beside it
distill benchmark start                # from an index to the first batch, for 10^3, 10^5, 10^7 samples
distill benchmark sample size=toy      # seconds per picture of teacher and student, here and in diffusers' own pipeline
distill benchmark gpu                  # what only a GPU can show, within 8 minutes; size=tiny tries it on a CPU
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
from torch import nn

from distill.benchmarks.common import SCHEDULE, machine, peak_memory, random_store, timed, toy_unet
from distill.benchmarks.saving import bench_saving
from distill.config.loading import checking
from distill.config.packages import is_installed
from distill.config.settings import BenchmarkSettings
from distill.data.index import ShardInfo, StoreIndex
from distill.data.loader import make_loader
from distill.data.reader import Store, open_store
from distill.diffusion.prediction import Prediction
from distill.diffusion.random import generator
from distill.diffusion.trajectory import Batch
from distill.methods.lcm import LCM
from distill.models.denoiser import NetworkDenoiser
from distill.models.devices import own_device
from distill.models.full_size import build_unet, unet_config
from distill.models.lora import add_lora
from distill.training import arithmetic
from distill.training.engine import EngineSettings
from distill.training.trained_network import TrainingRecipe

SHAPES = {"toy": ((8, 8), 12), "sd15": ((32, 32), 77)}  # latents (h, w), text tokens


def main(cfg: BenchmarkSettings) -> int | None:
    """Measures what the settings name, and prints it; returns an exit code where something could not be measured."""
    size, samples = cfg.size or "", cfg.samples or []
    measurements: dict[str, Callable[[], int | None]] = {
        "step": lambda: bench_step(size, cfg.repeats or 0, cfg.batch_size or 0),
        "deterministic": lambda: bench_deterministic(size, cfg.rounds or 0),
        "lcm": lambda: bench_lcm(size, cfg.rounds or 0, cfg.repeats or 0),
        "memory": bench_memory,
        "reader": lambda: bench_reader(samples[0], cfg.workers or 0),
        "checksums": bench_checksums,
        "texts": bench_texts,
        "checkpoint": lambda: bench_saving(size, cfg.rounds or 0),
        "start": lambda: bench_start(samples),
        "gpu": lambda: bench_gpu(size, cfg.sections or [], cfg.budget or 0, cfg.output_dir or ""),
        "sample": lambda: bench_sample(size, cfg.repeats or 0, cfg.batch_size or 0, cfg.output_dir or ""),
    }
    with checking():
        own_device()  # or why there is none
    return measurements[cfg.measure]()


def bench_gpu(size: str, sections: Sequence[str], budget: float, output_dir: str) -> int:
    from distill.benchmarks import gpu

    return gpu.run(size, sections, budget, Path(output_dir))


def bench_sample(size: str, repeats: int, batch_size: int, output_dir: str) -> None:
    from distill.benchmarks import sampling

    sampling.run(size, repeats, batch_size, Path(output_dir))


def bench_lcm(size: str, rounds: int, repeats: int) -> None:
    from distill.benchmarks import lcm_recipe

    lcm_recipe.compare(size, rounds, repeats)


def bench_texts() -> None:
    from distill.benchmarks import texts

    texts.run()


def bench_memory() -> None:
    from distill.benchmarks import memory

    memory.table()
    print()
    memory.adversarial()


def bench_deterministic(size: str, rounds: int) -> None:
    """The fastest median step of each kind: what disturbs a machine makes steps slower, never faster."""
    own = {name: value for name, value in os.environ.items() if name not in arithmetic.VARIABLES}
    seconds: dict[str, list[float]] = {"auto": [], "false": []}
    for _ in range(rounds):
        for chosen, found in seconds.items():
            command = [sys.executable, "-m", "distill", "benchmark", "step", f"size={size}", f"deterministic={chosen}"]
            done = subprocess.run(command, env=own, stdout=subprocess.PIPE, text=True, check=True)
            found.append(float(done.stdout.partition("training step")[2].split()[0]))
    auto, false = min(seconds["auto"]), min(seconds["false"])
    print(f"{size}, {rounds} processes of each kind, the fastest medians, {machine(own_device())}")
    print(f"  deterministic=auto  {auto:9.4f} s")
    print(f"  deterministic=false {false:9.4f} s")
    print(f"  ratio               {auto / false:9.3f}")


def bench_step(size: str, repeats: int, batch_size: int) -> None:
    """Steps, bare passes and a bare update in turn; the ratios are of medians."""
    unet = toy_unet() if size == "toy" else build_unet(unet_config("sd15"))
    add_lora(unet, rank=64, alpha=64)
    (h, w), tokens = SHAPES[size]
    student = NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON)
    method = LCM(SCHEDULE)
    engine = EngineSettings(kind="single").start()
    engine.prepare({"student": student}, {"student": TrainingRecipe(partial(torch.optim.AdamW, lr=1e-4, fused=True))})
    (turn,) = method.turns(0)

    with tempfile.TemporaryDirectory() as folder:
        store = random_store(folder, unet.config, (h, w), tokens, samples=max(64, batch_size))
        loader = make_loader(
            store, method.reads, seed=0, global_batch_size=batch_size, micro_batch_size=batch_size, num_workers=1
        )
        batches = iter(loader)
        fixed = next(batches).to(engine.processes.device)
        seconds: dict[str, list[float]] = {"step": [], "passes": [], "update": [], "data": []}
        trained = [p for p in unet.parameters() if p.requires_grad]
        beside = torch.optim.AdamW(trained, lr=0.0, fused=True)  # moves nothing
        with peak_memory() as memory:
            for i in range(repeats + 2):
                waited, batch = timed(partial(next, batches))
                took, _ = timed(partial(engine.update, turn, [batch], i))
                bare, _ = timed(partial(bare_passes, student, fixed))
                own, _ = timed(partial(bare_update, trained, beside))
                if i >= 2:  # the first ones allocate
                    for name, value in (("step", waited + took), ("passes", bare), ("update", own), ("data", waited)):
                        seconds[name].append(value)
    unet.zero_grad(set_to_none=True)
    step, passes, update, data = (median(found) for found in seconds.values())
    millions = sum(p.numel() for p in trained) / 1e6
    target = {"toy": 1.10, "sd15": 1.03}[size]
    print(
        f"{size}, batch {batch_size}, latents {h} x {w}, {repeats} steps, medians, {machine(engine.processes.device)}"
    )
    print(f"  training step       {step:9.4f} s   {batch_size / step:8.2f} samples/s")
    print(f"  bare passes         {passes:9.4f} s   student forward and backward, target forward")
    print(f"  bare update         {update:9.4f} s   torch's clipping and fused AdamW of {millions:.1f} M weights")
    print(f"  ratio to both       {step / (passes + update):9.3f}     target <= {target}")
    print(f"  ratio to passes     {step / passes:9.3f}")
    print(f"  of it waiting data  {100 * data / step:9.2f} %")
    if memory:
        print(f"  GPU memory          {memory['peak_gib']:9.2f} GiB   at most")


def bare_passes(student: NetworkDenoiser, batch: Batch) -> None:
    """The network passes of an LCM-LoRA step on stored states, and nothing else."""
    for p in student.module.parameters():
        p.grad = None
    step = batch.transition()
    with torch.no_grad():
        student(step.x_s, step.s, batch.conditioning)
    student(step.x_t, step.t, batch.conditioning).x0.mean().backward()


def bare_update(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """What torch does with gradients that are there: it takes as long for one sample as for a thousand."""
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def bench_reader(samples: int, workers: int) -> None:
    """LCM's two states of 41 at SDXL's sizes: what is read, how fast, and how fast as many bytes come in a row.

    A batch is dropped when the next one is taken, as in training. The bytes in a row are read from the page cache too,
    of other places each time: into memory as large as that of the loader's batches, and into one small buffer, which
    stays in the processor's cache.
    """
    method = LCM(SCHEDULE, skip=25)
    config = {**unet_config("sd15"), "cross_attention_dim": 2048}
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(folder, config, (128, 128), 77, samples=samples, solver_steps=40)
        shards = sorted(Path(folder).glob("shard-*.tar"))
        total = sum(shard.stat().st_size for shard in shards)
        per_sample, batches_timed = bytes_read_by(store, method), max(1, samples // 8)
        held = 8 * int(per_sample) * (2 * workers + 2)  # batches that are read ahead, and those around
        in_a_row = {"memory": chunks_in_a_row(shards, held), "buffer": chunks_in_a_row(shards, 1 << 20)}
        spent: dict[str, list[tuple[float, float]]] = {"planned": [], "memory": [], "buffer": []}
        for repeat in range(READER_REPEATS):
            loader = make_loader(
                store, method.reads, seed=repeat, global_batch_size=8, micro_batch_size=8, num_workers=workers
            )
            batches = iter(loader)
            take(batches, 4 * workers + 4)  # the first ones open files, and allocate
            spent["planned"].append(wall_and_cpu(partial(take, batches, batches_timed)))
            batches.close()
            for name, chunks in in_a_row.items():
                spent[name].append(wall_and_cpu(partial(read_bytes, chunks, per_sample * 8 * batches_timed)))
        if is_installed("aiohttp"):
            bench_remote(Path(folder), samples, workers)
    wall = {name: median(one for one, _ in found) / batches_timed / 8 for name, found in spent.items()}
    cpu = {name: median(one for _, one in found) / batches_timed / 8 for name, found in spent.items()}
    print(f"{samples} samples of 41 states [4, 128, 128] fp16 and text [77, 2048]; {machine('cpu')}")
    print(f"  stored per sample          {total / samples / 2**20:8.2f} MiB")
    print(f"  read per sample, planned   {per_sample / 2**20:8.2f} MiB")
    print(
        f"  planned reads              {1 / wall['planned']:8.1f} samples/s, {1 / wall['planned'] / 8:.1f} batches/s, "
        f"{workers} worker(s), batches assembled"
    )
    print("  per sample, and against the same bytes read in a row into as much memory, into a buffer of 1 MiB")
    for name, one in (("time", wall), ("CPU time of all threads", cpu)):
        print(
            f"    {name:<24} {1e3 * one['planned']:8.3f} ms {one['planned'] / one['memory']:6.2f} x "
            f"{one['planned'] / one['buffer']:6.2f} x"
        )


def bench_remote(folder: Path, samples: int, workers: int) -> None:
    """The same batches from a web server that answers each request 50 ms late, against the local store, in one run.

    Flat out, which is against memory, for the local files are in the page cache; and beside a step of 100 ms for 8
    samples, which is less than SDXL takes.
    """
    method, count = LCM(SCHEDULE, skip=25), max(1, samples // 8)
    command = [sys.executable, "-m", "distill.benchmarks.range_server", str(folder), "0.05"]
    with tempfile.TemporaryDirectory() as cache, subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        stores = {"local": (str(folder), None), "remote": (url, None), "cached": (url, cache)}
        rates: dict[str, dict[float, float]] = {}
        for name, (place, kept) in stores.items():
            store = open_store(place, cache=kept)
            for pause in (0.0, 0.1):
                for _ in range(2 if kept is not None and not pause else 1):  # the first one fills the cache
                    loader = make_loader(
                        store, method.reads, seed=0, global_batch_size=8, micro_batch_size=8, num_workers=workers
                    )
                    batches = iter(loader)
                    take(batches, 1)
                    seconds, _ = timed(partial(take_with_steps, batches, count, pause))
                    batches.close()
                    rates.setdefault(name, {})[pause] = count * 8 / seconds
        server.terminate()
    print("  a web server with 50 ms of latency, samples/s and against the local store")
    for name, found in rates.items():
        flat, paced = found[0.0], found[0.1]
        print(
            f"    {name:<8} flat out {flat:8.1f} {flat / rates['local'][0.0]:6.2f} x   "
            f"a step of 100 ms {paced:8.1f} {paced / rates['local'][0.1]:6.2f} x"
        )


def take_with_steps(batches: Iterator[Batch], count: int, seconds: float) -> None:
    """Takes batches, with a step of so many seconds for each."""
    for _ in islice(batches, count):
        time.sleep(seconds)


READER_REPEATS = 5


def take(batches: Iterator[Batch], count: int) -> None:
    """Takes batches, of which the last one alone is held."""
    deque(islice(batches, count), maxlen=1)


def wall_and_cpu(work: Callable[[], object]) -> tuple[float, float]:
    """The seconds that `work` takes, and those of processors in all threads of this process."""
    before = time.process_time()
    seconds, _ = timed(work)
    return seconds, time.process_time() - before


def bench_checksums() -> None:
    """LCM's two states of 51 of a sample, read with and without its checksums, in turn: what the difference is."""
    method = LCM(SCHEDULE)
    toy = {"cross_attention_dim": 64, "in_channels": 4}
    for size, config, latent, tokens in (
        ("toy", toy, (8, 8), 12),
        ("sd15", unet_config("sd15"), (64, 64), 77),
        ("sdxl", {**unet_config("sd15"), "cross_attention_dim": 2048}, (128, 128), 77),
    ):
        with tempfile.TemporaryDirectory() as folder:
            store = random_store(folder, config, latent, tokens, samples=64)
            bare = Store(store.folder, without_checksums(store.index), store.unconditional)
            picks = [method.reads().pick(store.index.times, generator("benchmark", i)) for i in range(64)]
            seconds: dict[str, list[float]] = {"with": [], "without": []}
            for _ in range(30):
                for name, one in (("with", store), ("without", bare)):
                    took, _ = timed(partial(one.read_many, list(enumerate(picks))))
                    seconds[name].append(took / 64)
            checked, unchecked = (1e3 * median(seconds[name]) for name in ("with", "without"))
            print(
                f"{size:>5}: {checked:.3f} ms per sample, {unchecked:.3f} unchecked: {checked - unchecked:.3f} ms more"
            )


def without_checksums(index: StoreIndex) -> StoreIndex:
    from dataclasses import replace

    return replace(index, shards=tuple(replace(shard, crc32="") for shard in index.shards))


def bytes_read_by(store: Store, method: LCM) -> float:
    """Mean bytes that the reader plans to read of a sample."""
    from distill.data.rows import plan_reads

    times = store.index.times
    picks = [method.reads().pick(times, generator("benchmark", i)) for i in range(64)]
    return sum(span.end - span.begin for pick in picks for span in plan_reads(store.index.layout, pick)) / len(picks)


def chunks_in_a_row(files: Sequence[Path], memory: int) -> Iterator[int]:
    """Reads files from start to end, over and over, into so many bytes of memory in turn: how many bytes, each time."""
    size = min(memory, 1 << 20)
    buffers = cycle([memoryview(bytearray(size)) for _ in range(memory // size)])
    for path in cycle(files):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(next(buffers)):
                yield count


def read_bytes(chunks: Iterator[int], wanted: float) -> None:
    while wanted > 0:
        wanted -= next(chunks)


def bench_start(counts: Sequence[int]) -> None:
    """Synthetic indexes over one real shard's layout; the first batch's order is computed, its bytes are not read."""
    from distill.data.order import BatchShare, Order

    with tempfile.TemporaryDirectory() as folder:
        store = random_store(folder, unet_config("sd15"), (8, 8), 12, samples=100)
        for count in counts:
            data = grown(store.index, count).to_json()
            path = Path(folder) / "grown.json"
            path.write_bytes(data)

            def first_batch(path: Path = path, count: int = count) -> list[int]:
                index = StoreIndex.from_json(path.read_bytes())
                order = Order(0, len(index))
                return [order.index(p) for p in next(BatchShare(64, 64).micro_batches())]

            seconds, _ = timed(first_batch)
            print(f"{count:>12,} samples: index {len(data) / 2**20:8.2f} MiB, {seconds:6.2f} s to the first batch")


def grown(index: StoreIndex, count: int) -> StoreIndex:
    """The same index, as if it had `count` samples in shards of 1,000."""
    from dataclasses import replace

    one = index.shards[0]
    offsets = [int(x) for x in one.offsets.split()]
    stride = offsets[1] - offsets[0]
    many = " ".join(str(offsets[0] + i * stride) for i in range(1000))
    size = offsets[0] + 1000 * stride + 10240
    shards = [
        ShardInfo(f"shard-{i:06d}.tar", min(1000, count - 1000 * i), size, one.sha256, many)
        for i in range(-(-count // 1000))
    ]
    return replace(index, samples=count, samples_per_shard=1000, shards=tuple(shards))
