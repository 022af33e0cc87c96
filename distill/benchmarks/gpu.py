"""`distill benchmark gpu`: what only a GPU can show, in one run of minutes; `size=tiny` runs the same code on a CPU.

Sections stand in the order of their worth. Each is cut off when the budget is gone, and one that fails is a line of the
result. What is found is in `gpu.json`, and as tables in `gpu.md`, after every measurement, whatever ends the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from distill.benchmarks.common import SCHEDULE, free_memory, machine, peak_memory, timed
from distill.benchmarks.gpu_tables import tables
from distill.benchmarks.lcm_recipe import Recipe
from distill.benchmarks.networks import MODELS, Model
from distill.config.packages import is_installed
from distill.diffusion.prediction import Prediction
from distill.diffusion.random import generator
from distill.diffusion.trajectory import Batch
from distill.methods.lcm import LCM
from distill.methods.lightning import LightningAdversarial
from distill.models.denoiser import NetworkDenoiser
from distill.models.devices import described, driver_version, gpu_count, own_device
from distill.models.discriminator import CriticNetwork, Discriminator
from distill.models.lora import ADAPTER, adapters, add_lora
from distill.training.engine import Engine, EngineSettings
from distill.training.trained_network import TrainingRecipe

PACKAGES = ("distill", "torch", "diffusers", "transformers", "peft", "accelerate", "deepspeed")
LEAST_SECONDS = 20.0  # with less left nothing new is begun
STATES = (900, 800)  # times of two stored states

Batches = Mapping[bool, Sequence[int]]
"""Numbers of samples, without (False) and with (True) gradient checkpointing."""


@dataclass
class GPUBenchmark:
    """A run of this benchmark: where it computes, how much time is left, and what has been found.

    Args:
        tiny: networks of toy size, few repeats.
        budget: seconds in all.
        folder: of the results, and of what commands write.
    """

    tiny: bool
    budget: float
    folder: Path
    device: torch.device = field(default_factory=own_device)
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    peak: float | None = None  # TFLOP/s of matrix products in the dtype of the networks

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def model(self, size: str) -> Model:
        return MODELS[f"tiny_{size}" if self.tiny else size]

    def note(self, section: str, **facts: Any) -> None:
        """Adds a row to the results, on the screen and in the files."""
        row = {"section": section, "at_seconds": round(time.monotonic() - self.began, 1), **facts}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.rows, indent=1) + "\n")
        (self.folder / "gpu.md").write_text(tables(self.rows))

    def median(self, work: Callable[[int], Any], repeats: int, warm: int = 2) -> float:
        """Median seconds of `work`, whose repeats are cut short when time is."""
        seconds: list[float] = []
        for i in range(warm + repeats):
            took, _ = timed(partial(work, i))
            if i >= warm:
                seconds.append(took)
            if self.left < LEAST_SECONDS and seconds:
                break
        return median(seconds)

    def short_of(self, seconds: float, section: str, what: str) -> bool:
        """Whether less time than that is left; if so, notes what is left out. A tiny size needs little."""
        short = self.left < (LEAST_SECONDS if self.tiny else seconds)
        if short:
            self.note(section, skipped=f"{what}: out of time")
        return short


def run(size: str, sections: Sequence[str], budget: float, output_dir: Path) -> int:
    """Measures, prints the tables, and returns the exit code: 1 if a section has failed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    bench = GPUBenchmark(size == "tiny", budget, output_dir.resolve())
    for name in sections:
        if bench.left < LEAST_SECONDS:
            bench.note(name, skipped="out of time")
            continue
        try:
            SECTIONS[name](bench)
        except Exception as error:  # one that fails must not stop the others
            where = traceback.format_exc().splitlines()[-12:]
            bench.note(name, failed=f"{type(error).__name__}: {error}"[:500], trace=where)
        free_memory()
    bench.note("end", seconds=round(time.monotonic() - bench.began, 1))
    print(f"\n{tables(bench.rows)}\n{bench.folder}/gpu.json, gpu.md")
    return int(any("failed" in row for row in bench.rows))


# ---- networks and batches ----------------------------------------------------------------------------------------


def batch_of(bench: GPUBenchmark, model: Model, B: int, times: Sequence[int]) -> Batch:
    """What the loader gives of a store: float16 states [B, len(times), 4, h, w] and texts, pinned beside a GPU."""
    g, side, family = generator("gpu", B), model.side, model.family
    shapes = family.text.shapes(model.unet, model.tokens)
    text = {name: torch.randn(B, *shape, generator=g).half() for name, shape in shapes.items()}
    text |= family.sizes([(8 * side, 8 * side)] * B, [(0, 0)] * B, (8 * side, 8 * side))
    states = torch.randn(B, len(times), 4, side, side, generator=g).half()
    if bench.device.type == "cuda":
        states, text = states.pin_memory(), {name: value.pin_memory() for name, value in text.items()}
    at = torch.tensor([list(times)] * B)
    return Batch(states, at, text, dict(text), torch.full((B,), 7.5), ("",) * B, tuple(range(B)))


@contextmanager
def engine_for(
    bench: GPUBenchmark,
    networks: Mapping[str, Any],
    trained: Sequence[str] = ("student",),
    betas: tuple[float, float] = (0.9, 0.999),
) -> Iterator[Engine]:
    """An engine that trains these networks, with checkpointing; released at the end."""
    precision: Any = "bf16" if bench.device.type == "cuda" else "no"
    settings = EngineSettings(kind="single", mixed_precision=precision, gradient_checkpointing=True)
    optimizer = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, betas=betas, fused=True)
    engine = settings.start()
    try:
        engine.prepare(networks, {name: TrainingRecipe(optimizer) for name in trained})
        yield engine
    finally:
        engine.release()


def lora_views(unet: UNet2DConditionModel, rank: int) -> dict[str, NetworkDenoiser]:
    """A LoRA student, and its own network as its teacher."""
    add_lora(unet, rank, rank)
    views = {"student": ADAPTER, "teacher": None}
    return {
        name: NetworkDenoiser(unet, SCHEDULE, Prediction.EPSILON, adapter=adapter) for name, adapter in views.items()
    }


def set_checkpointing(module: Any, on: bool) -> None:
    if on:
        module.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    else:
        module.disable_gradient_checkpointing()


def drop_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def bare_passes(student: NetworkDenoiser, batch: Batch) -> None:
    """The network passes of an LCM-LoRA step on stored states, and nothing else."""
    drop_gradients(student.module)
    step = batch.transition()
    with torch.no_grad():
        student(step.x_s, step.s, batch.conditioning)
    student(step.x_t, step.t, batch.conditioning).x0.mean().backward()


# ---- sections ----------------------------------------------------------------------------------------------------


def machine_section(bench: GPUBenchmark) -> None:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    bench.note(
        "machine",
        device=machine(bench.device),
        described=described(bench.device),
        cuda=torch.version.cuda,
        driver=driver_version(),
        date=time.strftime("%Y-%m-%d"),
        command=" ".join(["distill benchmark", *sys.argv[1:]]),
        packages=found,
    )


def peak_section(bench: GPUBenchmark) -> None:
    """The TFLOP/s that matrix products reach: the reference for everything else."""
    n = 8192 if bench.device.type == "cuda" else 512
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
        seconds = bench.median(lambda i, a=a, b=b: a @ b, 20, warm=5)  # type: ignore[misc]
        tflops = 2 * n**3 / seconds / 1e12
        bench.peak = tflops if dtype == bench.dtype else bench.peak
        bench.note("peak", dtype=str(dtype).removeprefix("torch."), n=n, tflops=float(f"{tflops:.4g}"))


@dataclass(frozen=True)
class Measured:
    """LCM-LoRA on one network: what its rows are measured with."""

    bench: GPUBenchmark
    size: str
    model: Model
    engine: Engine
    student: NetworkDenoiser
    flops: float | None  # of a sample's passes, without recomputation

    def row(self, B: int, repeats: int, source: str = "trajectory", **facts: Any) -> bool:
        """Measures steps of B samples; False if they do not fit."""
        turn = next(iter(LCM(SCHEDULE, source).turns(0)))
        batch = batch_of(self.bench, self.model, B, STATES if source == "trajectory" else (0,))
        named = {"size": self.size, "source": source, "samples": B, **facts}
        try:
            with peak_memory() as memory:
                step = self.bench.median(lambda i: self.engine.updated(turn, [batch], i), repeats)
            passes = self._passes(batch) if source == "trajectory" else {}
        except torch.OutOfMemoryError:
            drop_gradients(self.student.module)
            free_memory()
            self.bench.note("lcm", **named, out_of_memory=True)
            return False
        speed = {"step_seconds": round(step, 4), "samples_per_second": round(B / step, 3)}
        if passes:
            speed["outside_networks"] = round(1 - passes["seconds"] / step, 4)
        if self.flops is not None and source == "trajectory":
            speed["tflops"] = float(f"{self.flops * B / step / 1e12:.4g}")
            if self.bench.peak:
                speed["share_of_peak"] = round(speed["tflops"] / self.bench.peak, 3)
        self.bench.note("lcm", **named, **speed, **memory)
        return True

    def _passes(self, batch: Batch) -> dict[str, float]:
        there = batch.to(self.bench.device)
        seconds = self.bench.median(lambda i: bare_passes(self.student, there), 3, warm=1)
        drop_gradients(self.student.module)
        return {"seconds": seconds}


def lcm_section(bench: GPUBenchmark, size: str, batches: Batches, compiled: Batches, repeats: int) -> None:
    """LCM-LoRA's step on stored states: as it is, checkpointed and compiled; and the usual recipe on the same card."""
    shared = 2 if bench.tiny else 4  # samples of what is compared with the recipe
    own_rows(bench, size, batches, compiled, shared, repeats)
    free_memory()  # the recipe has all of the card, too
    recipe(bench, size, bench.model(size), shared, repeats)


def own_rows(bench: GPUBenchmark, size: str, batches: Batches, compiled: Batches, shared: int, repeats: int) -> None:
    model = bench.model(size)
    unet = model.build_unet(bench.device, bench.dtype)
    networks = lora_views(unet, model.rank)
    with engine_for(bench, networks) as engine:
        set_checkpointing(unet, False)
        with FlopCounterMode(display=False) as counter:
            bare_passes(networks["student"], batch_of(bench, model, 1, STATES).to(bench.device))
        of = Measured(bench, size, model, engine, networks["student"], float(counter.get_total_flops()))
        for checkpointed, counts in batches.items():
            set_checkpointing(unet, checkpointed)
            for B in counts:
                if bench.short_of(60, "lcm", f"{size}, {B} samples") or not of.row(
                    B, repeats, checkpointed=checkpointed
                ):
                    break
        set_checkpointing(unet, True)
        if not bench.short_of(60, "lcm", f"{size}, noised"):
            of.row(shared, repeats, "noised", checkpointed=True)
        if any(compiled.values()) and not bench.short_of(200, "lcm", f"{size}, compiled"):
            compiled_rows(of, unet, compiled, repeats)


def compiled_rows(of: Measured, unet: Any, batches: Batches, repeats: int) -> None:
    """The same with the network's repeated blocks compiled; the first call takes a minute or more."""
    try:
        unet.compile_repeated_blocks()
        for checkpointed, counts in batches.items():
            set_checkpointing(unet, checkpointed)
            for B in counts:
                of.row(B, repeats, checkpointed=checkpointed, compiled=True)
    except Exception as error:  # of a compiler; what follows does without
        of.bench.note("lcm", size=of.size, compiled=True, failed=f"{type(error).__name__}: {error}"[:500])


def recipe(bench: GPUBenchmark, size: str, model: Model, B: int, repeats: int) -> None:
    """The step of the usual scripts: autoencoder and text encoders in it, a second UNet called twice; checkpointed."""
    if bench.short_of(60, "recipe", size):
        return
    where = (bench.device, bench.dtype)
    unet = model.build_unet(*where)
    set_checkpointing(unet, True)
    unet.train()
    networks = (model.build_unet(*where), model.build_vae(*where), model.build_encoders(*where))
    usual = Recipe(unet, *networks, batch_size=B, pixels=8 * model.side, tokens=model.tokens, rank=model.rank)
    with peak_memory() as memory:
        seconds = bench.median(usual.step, repeats)
    speed = {"step_seconds": round(seconds, 4), "samples_per_second": round(B / seconds, 3)}
    bench.note("recipe", size=size, samples=B, checkpointed=True, **speed, **memory)


def sdxl_section(bench: GPUBenchmark) -> None:
    if bench.tiny:
        return lcm_section(bench, "sdxl", {True: (1, 2), False: (2,)}, {}, 2)
    lcm_section(bench, "sdxl", {True: (1, 4, 8, 16), False: (1, 4, 8, 16)}, {True: (8,), False: (4,)}, 4)


def sd15_section(bench: GPUBenchmark) -> None:
    if bench.tiny:
        return lcm_section(bench, "sd15", {False: (1,), True: (2,)}, {}, 2)
    lcm_section(bench, "sd15", {False: (1, 8, 32), True: (4, 32)}, {False: (8,)}, 5)


def lightning_section(bench: GPUBenchmark) -> None:
    """Both turns of adversarial training: a LoRA student, its network as teacher, all of the discriminator trained."""
    model = bench.model("sdxl")
    for conditional in (False, True):
        if bench.short_of(70, "lightning", f"conditional={conditional}"):
            return
        unet = model.build_unet(bench.device, bench.dtype)
        critic = Discriminator(CriticNetwork(unet, (model.side, model.side), conditional))
        networks = {**lora_views(unet, model.rank), "discriminator": critic}
        method = LightningAdversarial(SCHEDULE, student_steps=8, teacher_steps=32, renoise_times=())
        with engine_for(bench, networks, method.trains, betas=(0.0, 0.99)) as engine:
            for B in (1,) if bench.tiny else (1, 4):
                if not lightning_row(bench, engine, method, batch_of(bench, model, B, (0,)), conditional):
                    break
        del networks, unet, critic
        free_memory()


def lightning_row(
    bench: GPUBenchmark, engine: Engine, method: LightningAdversarial, batch: Batch, conditional: bool
) -> bool:
    """Measures a step's turns; False if they do not fit."""
    named = {"conditional": conditional, "samples": len(batch), "checkpointed": True}
    try:
        with peak_memory() as memory:
            seconds = {
                turn.updates: bench.median(partial(updated, engine, turn, batch), 2 if bench.tiny else 3, warm=1)
                for turn in method.turns(0)
            }
    except torch.OutOfMemoryError:
        bench.note("lightning", **named, out_of_memory=True)
        return False
    turns = {f"{name}_seconds": round(value, 4) for name, value in seconds.items()}
    rate = round(len(batch) / sum(seconds.values()), 3)
    bench.note("lightning", **named, samples_per_second=rate, **turns, **memory)
    return True


def updated(engine: Engine, turn: Any, batch: Batch, step: int) -> None:
    engine.updated(turn, [batch], step)


def repeat_section(bench: GPUBenchmark) -> None:
    """Whether the same steps from the same weights give the same bits on this device, as it is set up and with
    deterministic kernels, and what a step costs in both."""
    as_set_up = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    try:
        for deterministic in dict.fromkeys((as_set_up[0], True)):
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.cudnn.deterministic = deterministic
            bench.note("repeat", deterministic=deterministic, **repeated(bench))
    except RuntimeError as error:  # an operation without a deterministic kernel
        bench.note("repeat", failed=f"with deterministic kernels: {str(error).partition(chr(10))[0]}")
    finally:
        torch.use_deterministic_algorithms(as_set_up[0])
        torch.backends.cudnn.deterministic = as_set_up[1]


def repeated(bench: GPUBenchmark) -> dict[str, Any]:
    """Compares two runs of three steps: how many weights differ, of how many, and by how much; seconds of a step."""
    model, ends, seconds = bench.model("sd15"), [], []
    for _ in range(2):
        unet = model.build_unet(bench.device, bench.dtype)
        with engine_for(bench, {"student": lora_views(unet, 4)["student"]}) as engine:
            turn = next(iter(LCM(SCHEDULE).turns(0)))
            for step in range(3):
                began = time.perf_counter()
                engine.updated(turn, [batch_of(bench, model, 2, STATES)], step)  # it waits for the device
                seconds.append(time.perf_counter() - began)
            ends.append(torch.cat([p.detach().float().flatten().cpu() for p in adapters(unet).values()]))
        free_memory()
    differ, largest = int((ends[0] != ends[1]).sum()), float((ends[0] - ends[1]).abs().max())
    return {"weights": ends[0].numel(), "differ": differ, "largest": largest, "step_seconds": round(min(seconds), 4)}


# ---- commands ----------------------------------------------------------------------------------------------------


def command(bench: GPUBenchmark, name: str, *arguments: str, limit: float) -> bool:
    """Runs a command of distill's, within a limit of seconds; whether it has succeeded."""
    start, code, said = time.monotonic(), "timed out", ""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "distill", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(15.0, min(bench.left - 5, bench.left if bench.tiny else limit)),
        )
        code, said = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
    last = said.strip().splitlines()[-3 if code == "0" else -25 :]
    bench.note("command", name=name, exit=code, seconds=round(time.monotonic() - start, 1), last=last)
    return code == "0"


def commands_section(bench: GPUBenchmark) -> None:
    """The commands themselves on the toy: a store, ZeRO over the device's own collectives, an export."""
    with tempfile.TemporaryDirectory(prefix="toy-", dir=bench.folder) as out:
        few = ["experiment=quickstart", f"data.num_samples={32 if bench.tiny else 200}", f"data.store={out}/store"]
        few += ["data.solver_steps=10"] if bench.tiny else []
        if command(bench, "trajectories", "trajectories", *few, limit=90):
            train_commands(bench, out, few)


def train_commands(bench: GPUBenchmark, out: str, few: Sequence[str]) -> None:
    """Trainings on a store, and an export of the first one."""
    tiny = bench.tiny
    steps = 3 if tiny else 120
    common = [*few, f"max_train_steps={steps}", f"validation_steps={steps}", f"checkpointing_steps={steps}"]
    common += ["global_batch_size=16"] if tiny else []
    common += ["validation_teacher_steps=4", "lr_warmup_steps=2", "validation_reward=null"]
    kinds = [("zero2", "no")] if tiny else [("zero2", "no"), ("zero2", "bf16"), ("zero3", "bf16")]
    if not is_installed("deepspeed"):
        bench.note("command", name="train zero2", skipped="deepspeed is not installed")
        kinds = [("single", "no")]
    launch = [] if tiny else ["launch", "--num_processes", str(max(1, gpu_count()))]
    for engine, precision in kinds:
        settings = [f"engine={engine}", f"mixed_precision={precision}", f"output_dir={out}/{engine}-{precision}"]
        command(bench, f"train {engine} {precision}", *launch, "train", *common, *settings, limit=100)
    first = f"{out}/{kinds[0][0]}-no"
    command(bench, "export", "export", f"run={first}", f"output_dir={out}/lora", "card_prompts=[]", limit=60)


def quickstart_section(bench: GPUBenchmark) -> None:
    """The quickstart as it is typed, with its evaluation, if there is time."""
    if bench.tiny:
        return bench.note("command", name="quickstart", skipped="size=tiny")
    if not bench.short_of(60, "command", "quickstart"):
        with tempfile.TemporaryDirectory(prefix="quickstart-", dir=bench.folder) as out:
            command(bench, "quickstart", "quickstart", f"output_dir={out}/quickstart", "n=400", limit=240)


SECTIONS: dict[str, Callable[[GPUBenchmark], None]] = {
    "machine": machine_section,
    "peak": peak_section,
    "sdxl": sdxl_section,
    "commands": commands_section,
    "lightning": lightning_section,
    "sd15": sd15_section,
    "repeat": repeat_section,
    "quickstart": quickstart_section,
}
"""The sections in the order in which they are measured."""
