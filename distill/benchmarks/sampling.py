"""`distill benchmark sample`: what a picture of a teacher and of its student costs, here and in diffusers.

For each number of steps: seconds from a prompt to one picture, and pictures per second of a batch, text encoders and
autoencoder included. The teacher takes 25 guided steps, as in the announcement of LCM-LoRA, whose 7 and 10 times faster
pictures these are (4 steps without guidance). A LoRA is measured as it is loaded, and merged into the weights. Networks
are of the real sizes; what they have learnt makes no difference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from distill.benchmarks.common import free_memory, machine, peak_memory, timed
from distill.benchmarks.gpu_tables import markdown, number
from distill.benchmarks.networks import MODELS, build_pipeline, teacher_of
from distill.diffusion.guidance import guided
from distill.diffusion.prediction import Denoiser
from distill.diffusion.random import starting_noise
from distill.diffusion.solver import make_times
from distill.evaluation.pipelines import arguments_of, generate_images, load_pipeline, use_sampler
from distill.methods.sampling import sample
from distill.models.devices import described, own_device
from distill.models.execution import base_dtype
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.lora import add_lora, merge_lora
from distill.toy.teacher import teacher_folder

TEACHER_STEPS, GUIDANCE, STUDENT_STEPS = 25, 7.5, (1, 2, 4, 8)
PROMPT = "red stripes"
CPU_SIDE = 16  # of the latents of large models on a CPU, where a picture would take minutes


@dataclass(frozen=True)
class SampledModel:
    """One model twice: as diffusers' pipeline and as a teacher here; they share their networks."""

    pipeline: Any
    teacher: Teacher
    rank: int

    @property
    def pixels(self) -> int:
        return self.teacher.resolution


Generate = Callable[[int, int], Tensor]
"""Pictures [B, 3, H, W], from B and a number of steps."""


def run(size: str, repeats: int, batch_size: int, output_dir: Path) -> None:
    """Measures, and writes `sample.json` and `sample.md`."""
    device = own_device()
    models = load(size, device)
    facts = {
        "size": size,
        "pixels": models.pixels,
        "device": machine(device),
        "described": described(device),
        "dtype": str(models.teacher.network.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
        "batch_size": batch_size,
        "repeats": repeats,
    }
    rows = measured(models, repeats, batch_size)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "sample.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    text = table(facts, rows)
    (output_dir / "sample.md").write_text(text)
    print(f"{text}\n{output_dir}/sample.json, sample.md")


def load(size: str, device: torch.device) -> SampledModel:
    """The bundled teacher, or a model of real size with random weights; in float16 on a GPU, as pipelines are used."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if size == "toy":
        pipeline = load_pipeline(str(teacher_folder())).to(device, dtype)
        teacher = load_teacher(teacher_folder(), parts=("network", "text", "vae"))
        parts = {"network": pipeline.unet, "vae": pipeline.vae, "text": teacher.text}
        teacher.parts.update(parts)
        return SampledModel(pipeline, teacher.to(device), 64)
    model = MODELS[size]
    pipeline = build_pipeline(model, device, dtype)
    teacher = teacher_of(pipeline, model)
    return SampledModel(pipeline, teacher.at_resolution(None if device.type == "cuda" else 8 * CPU_SIDE), model.rank)


@torch.no_grad()
def measured(models: SampledModel, repeats: int, batch_size: int) -> list[dict[str, Any]]:
    """A row for each program, network and number of steps."""
    pipeline, teacher = models.pipeline, models.teacher
    rows: list[dict[str, Any]] = []

    def row(program: str, network: str, steps: int, generate: Generate) -> None:
        generate(1, 1)  # allocates
        with peak_memory() as memory:
            one = median(timed(partial(generate, 1, steps))[0] for _ in range(repeats))
            many = one
            if batch_size > 1:
                many = median(timed(partial(generate, batch_size, steps))[0] for _ in range(repeats))
        found = {"seconds": round(one, 5), "pictures_per_second": round(batch_size / many, 4), **memory}
        rows.append({"program": program, "network": network, "steps": steps, **found})
        print(json.dumps(rows[-1]), flush=True)

    use_sampler(pipeline, "ddim", "trailing")
    row("diffusers", "teacher", TEACHER_STEPS, partial(theirs, models, "trailing", GUIDANCE))
    own = guided(teacher.denoiser(), teacher.unconditional(), GUIDANCE)
    row("distill", "teacher", TEACHER_STEPS, partial(ours, teacher, own, "ddim", "trailing"))
    use_sampler(pipeline, "lcm", "lcm")
    add_lora(teacher.network, models.rank, models.rank)
    nn.Module.to(teacher.network.requires_grad_(False), base_dtype(teacher.network))  # as it is loaded for use
    student: Denoiser = teacher.denoiser_of(teacher.network)
    for network in ("LoRA", "LoRA, merged"):
        if network != "LoRA":
            merge_lora(teacher.network)
            student = teacher.denoiser()
            free_memory()
        for steps in STUDENT_STEPS:
            row("diffusers", network, steps, partial(theirs, models, "lcm", 1.0))
            row("distill", network, steps, partial(ours, teacher, student, "lcm", "lcm"))
    return rows


def theirs(models: SampledModel, spacing: str, guidance: float, B: int, steps: int) -> Tensor:
    """Pictures by diffusers' own pipeline."""
    arguments = arguments_of(models.pipeline, spacing, steps)
    return generate_images(models.pipeline, [PROMPT] * B, range(B), steps, guidance, models.pixels, arguments=arguments)


def ours(teacher: Teacher, denoiser: Denoiser, sampler: str, spacing: str, B: int, steps: int) -> Tensor:
    """Pictures by the sampler here, as `distill evaluate` generates."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(B)]
    x = starting_noise(generators, teacher.latent_shape).to(teacher.network.device)
    times = make_times(spacing, teacher.schedule.T, steps)
    conditioning = teacher.encode([PROMPT] * B)
    return teacher.decode(sample(denoiser, teacher.schedule, x, times, conditioning, sampler, generators))


def table(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, beside diffusers' teacher."""
    base = next(row for row in rows if row["network"] == "teacher" and row["program"] == "diffusers")
    lines = [
        [
            f"{row['network']}, {row['steps']} step{'s' * (row['steps'] > 1)}",
            row["program"],
            number(row["seconds"]),
            f"{base['seconds'] / row['seconds']:.1f}",
            number(row["pictures_per_second"]),
            f"{row['pictures_per_second'] / base['pictures_per_second']:.1f}",
            number(row.get("peak_gib")),
        ]
        for row in rows
    ]
    heads = ["network", "program", "s a picture", "times faster", f"pictures/s of {facts['batch_size']}"]
    heads += ["times as many", "GPU memory, GiB"]
    about = "{described}; {date}; {size}, {pixels} x {pixels} pixels, {dtype}, medians of {repeats}."
    against = f"Beside diffusers' teacher at {TEACHER_STEPS} steps with guidance; students have none."
    return f"{about.format(**facts)} {against}\n\n{markdown(heads, lines)}\n"
