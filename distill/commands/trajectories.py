"""Writes a store of teacher trajectories:

distill launch trajectories experiment=lcm_lora_sd15 data.prompts=prompts.txt data.store=STORE

Every process, under a launcher or in a SLURM array, writes shards of its own; killed at any moment and started again,
each resumes. Settings are the `data` group of `configs/train.yaml`; `--cfg` prints them. `teacher=EXPORT` solves with
an earlier student's network.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("trajectories")

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from distill.config.loading import ConfigError, checking
from distill.config.settings import OF_PROMPTS, DataSettings, TrainSettings
from distill.data.heldout import heldout_plan, heldout_prompts, heldout_samples, within
from distill.data.index import StorePlan, kept_times
from distill.data.prompts import read_prompts, read_sized_prompts
from distill.data.sizes import ImageSize, read_sizes
from distill.data.words import counted
from distill.data.writer import work_split, write_store
from distill.diffusion.solver import make_times
from distill.models.devices import described, own_device
from distill.models.execution import execute
from distill.models.exported import open_export
from distill.models.families.teacher import Teacher
from distill.models.student import as_teacher
from distill.training.launched import launched_rank, launched_world_size, only_one_process
from distill.training.micro_batch import within_memory
from distill.training.sizes import chosen_sizes, settled
from distill.training.teacher import inference_dtype, open_teacher
from distill.training.tracking import setup_logging
from distill.training.trajectories import TrajectorySolver, shared_texts, stored
from distill.training.watchdog import watched

log = logging.getLogger("distill")


@watched
@within_memory("set a smaller data.batch_size; the same command then resumes with the shards that are left")
def main(cfg: TrainSettings) -> None:
    setup_logging(launched_rank())
    if line := only_one_process():
        log.warning(line)
    prompts, own_sizes = prompts_of(cfg)
    with checking():
        device = own_device()
        dtype = inference_dtype(cfg.data.teacher_dtype, device)
        loaded = dtype if cfg.teacher is None else torch.float32  # a LoRA that teaches is merged before it is rounded
        teacher = open_teacher(cfg.model, ("network", "text"), dtype=loaded)
        own_hash = teacher.teacher_hash
        if cfg.teacher is not None:
            export = open_export(cfg.teacher)
            export.require_base(own_hash)
            teacher, own_hash = as_teacher(teacher, export), export.weights_hash
        check_guidance(cfg.data, teacher)
        nn.Module.to(teacher.network, dtype)  # diffusers' own `to` warns of nothing
        plan = replace(plan_of(cfg, teacher, own_hash), teacher_dtype=str(dtype).removeprefix("torch."))
        plan = sized(plan, cfg.data, teacher, own_sizes)
        rank, world_size = work_split()
    teacher = teacher.to(device)
    execute(teacher.network, cfg.compile, cfg.channels_last)
    log.info("%s, the teacher in %s", described(device, launched_world_size()), plan.teacher_dtype)
    stores = [(cfg.data.store, plan, prompts, own_sizes)]
    if heldout := heldout_samples(cfg.data.heldout_samples, plan.samples):
        of_last = own_sizes and own_sizes[::-1]
        own_plan = with_prompt_sizes(heldout_plan(plan, heldout), of_last)
        stores.append((within(cfg.data.store), own_plan, heldout_prompts(prompts), of_last))
    with checking():
        for url, own_plan, texts, sizes in stores:
            size_of = size_by_prompt(own_plan, sizes)
            solver = TrajectorySolver(teacher, own_plan, device, size_of)
            unconditional = stored(teacher.unconditional(), own_plan)
            write_store(url, own_plan, texts, unconditional, solver, size_of=size_of, rank=rank, world_size=world_size)


def check_guidance(data: DataSettings, teacher: Teacher) -> None:
    """Raises ValueError for a guidance of a teacher that knows none."""
    if data.guidance not in (1, (1, 1)) and not teacher.second_pass and not teacher.takes_guidance:
        raise ValueError(
            f"data.guidance={data.guidance}: this teacher was distilled and takes no guidance, set data.guidance=1"
        )


def prompts_of(cfg: TrainSettings) -> tuple[list[str], list[ImageSize] | None]:
    """The prompts, and their sizes where these are read with them, once the settings are checked, as far as they can be
    without the teacher.
    """
    data = cfg.data
    if data.guidance is None:
        raise ConfigError("data.guidance has no value: set data.guidance=W (data=images is for distill latents)")
    if data.num_samples is None:
        raise ConfigError("data.num_samples has no value: set data.num_samples=N")
    if data.prompts is None:
        raise ConfigError("data.prompts has no value: set data.prompts=FILE")
    with checking():
        if data.sizes == OF_PROMPTS:
            return read_sized_prompts(data.prompts, data.prompt_column)
        return read_prompts(data.prompts, data.prompt_column), None


def sized(plan: StorePlan, data: DataSettings, teacher: Teacher, own_sizes: list[ImageSize] | None) -> StorePlan:
    """The plan with the sizes that the settings list, or that the prompts have.

    Raises:
        ConfigError, ValueError: sizes that the teacher cannot have, or too many of them.
    """
    sizes = chosen_sizes(data, teacher)
    if own_sizes is not None:
        sizes = settled(read_sizes([*map(str, sorted(set(own_sizes)))]), teacher)
        return with_prompt_sizes(replace(plan, sizes=tuple(map(str, sizes))), own_sizes if sizes else None)
    weights = tuple(data.size_weights or ()) if sizes else ()
    return replace(plan, sizes=tuple(map(str, sizes)), size_weights=weights)


def with_prompt_sizes(plan: StorePlan, sizes: list[ImageSize] | None) -> StorePlan:
    """The plan of samples that have the sizes of their prompts, if these have any."""
    if not sizes or not plan.sizes:
        return plan
    return replace(plan, prompt_sizes_sha256=hashlib.sha256(" ".join(map(str, sizes)).encode()).hexdigest())


def size_by_prompt(plan: StorePlan, sizes: list[ImageSize] | None) -> Callable[[int], int] | None:
    """Which of the plan's sizes a sample has: its prompt's; None where prompts have none."""
    if not sizes or not plan.sizes:
        return None
    numbers = {size: number for number, size in enumerate(plan.image_sizes)}
    return lambda i: numbers[sizes[i % len(sizes)]]


def source_of(prompts: str | list[str]) -> str:
    """Where prompts come from: a file's name; or how many are written out, and a hash that tells them from others."""
    if isinstance(prompts, str):
        return os.path.basename(prompts)
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return f"{counted(len(prompts), 'prompt')} of the settings ({digest[:8]})"


def plan_of(cfg: TrainSettings, teacher: Teacher, teacher_hash: str) -> StorePlan:
    data = cfg.data
    assert data.guidance is not None and data.num_samples is not None and data.prompts is not None  # prompts_of
    return StorePlan(
        teacher_id=teacher.teacher_id,
        teacher_hash=teacher_hash,
        schedule_fingerprint=teacher.schedule.fingerprint,
        solver=data.solver,
        solver_steps=data.solver_steps,
        spacing="trailing",
        guidance=data.guidance,
        times=kept_times(make_times("trailing", teacher.schedule.T, data.solver_steps), data.keep, data.segments),
        resolution=teacher.resolution,
        prompt_source=source_of(data.prompts),
        seed=cfg.seed,
        samples=data.num_samples,
        samples_per_shard=data.samples_per_shard,
        batch_size=data.batch_size,
        dtype=data.dtype,
        text_dtype=teacher.family.text.stored or "",
        shift=teacher.schedule.shift or 0.0,
        empty_prompts=data.empty_prompts,
        shared=shared_texts(data.share_texts, teacher),
    )
