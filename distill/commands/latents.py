"""Writes a store of clean latents of pictures with captions, for `method=lcm_noised`:

distill launch latents experiment=lcm_lora_sdxl data=images data.images='laion/*.tar' \
    data.store=STORE

The pictures are listed first, into the store's folder. Every process, under a launcher or in a SLURM array, writes
shards of its own; killed at any moment and started again, each resumes. A picture that cannot be decoded is skipped
and named. Settings are `configs/data/images.yaml`; `--cfg` prints them.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("latents")

import logging
import os

from distill.config.loading import ConfigError, checking
from distill.config.settings import OF_PROMPTS, DataSettings, TrainSettings
from distill.data.images import Accept, Listing, list_pictures
from distill.data.index import NO_SOLVE, StorePlan
from distill.data.progress import counted
from distill.data.writer import work_split, write_store
from distill.models.devices import described, own_device
from distill.models.families.teacher import Teacher
from distill.training.latents import LatentEncoder
from distill.training.launched import launched_rank, launched_world_size, only_one_process
from distill.training.micro_batch import within_memory
from distill.training.sizes import chosen_sizes
from distill.training.teacher import inference_dtype, open_teacher
from distill.training.tracking import setup_logging
from distill.training.trajectories import stored
from distill.training.watchdog import watched

log = logging.getLogger("distill")


@watched
@within_memory("set a smaller data.batch_size; the same command then resumes with the shards that are left")
def main(cfg: TrainSettings) -> None:
    setup_logging(launched_rank())
    if line := only_one_process():
        log.warning(line)
    data, model = cfg.data, cfg.model
    if data.images is None:
        raise ConfigError(
            "data.images has no value: set data=images data.images='FOLDER/*.tar' or a folder of pictures"
        )
    with checking():
        device = own_device()
        rank, world_size = work_split()
        dtype = inference_dtype(data.teacher_dtype, device)
        teacher = open_teacher(model, ("text", "vae"), vae=data.vae, vae_dtype=dtype)
        sizes = sizes_of(data, teacher)
        least = data.min_size or (0 if sizes else teacher.resolution)
        accept = Accept(least, data.max_aspect_ratio, data.prompt_column, sizes)
        listing = list_pictures(data.images, data.store, accept, rank=rank, world_size=world_size)
        plan = plan_of(cfg, teacher, listing, sizes)
    encoder = LatentEncoder(teacher.to(device), plan, listing, device)
    log.info("%s", described(device, launched_world_size()))
    with checking():
        write_store(
            data.store,
            plan,
            listing.captions[: plan.samples],
            stored(teacher.unconditional(), plan),
            encoder,
            size_of=encoder.size_of,
            rank=rank,
            world_size=world_size,
        )


def sizes_of(data: DataSettings, teacher: Teacher) -> tuple[str, ...]:
    """What pictures are cut to where that is not the teacher's square alone.

    Raises:
        ConfigError, ValueError: settings of trajectories' sizes; sizes that the teacher cannot have.
    """
    if data.sizes == OF_PROMPTS or data.size_weights is not None:
        raise ConfigError(
            "the size of a picture follows from its aspect ratio: set data.sizes to a list such as "
            "[1024x1024,1152x896], and leave data.size_weights out"
        )
    return tuple(map(str, chosen_sizes(data, teacher)))


def plan_of(cfg: TrainSettings, teacher: Teacher, listing: Listing, sizes: tuple[str, ...]) -> StorePlan:
    data, pictures = cfg.data, len(listing.pictures)
    if data.images is None or (data.num_samples or 0) > pictures:
        are = "is" if pictures == 1 else "are"
        raise ConfigError(f"data.num_samples={data.num_samples}, but there {are} {counted(pictures, 'picture')}")
    return StorePlan(
        kind="pictures",
        teacher_id=teacher.teacher_id,
        teacher_hash=teacher.teacher_hash,
        schedule_fingerprint=teacher.schedule.fingerprint,
        solver=NO_SOLVE,
        solver_steps=0,
        spacing=NO_SOLVE,
        guidance=1.0,
        times=(0,),
        resolution=teacher.resolution,
        prompt_source=os.path.basename(data.images.rstrip("/")),
        seed=cfg.seed,
        samples=data.num_samples or pictures,
        samples_per_shard=data.samples_per_shard,
        batch_size=data.batch_size,
        dtype=data.dtype,
        text_dtype=teacher.family.text.stored or "",
        shift=teacher.schedule.shift or 0.0,
        pictures_sha256=listing.sha256,
        crop=data.crop,
        vae_hash=teacher.vae_hash,
        sizes=sizes,
    )
