"""Distils: `accelerate launch scripts/train.py experiment=lcm_lora_sd15 data.store=STORE output_dir=runs/a`.

Settings are `configs/train.yaml` and its groups; `--cfg` prints them. Run again, it goes on from its newest checkpoint.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from distill.data.loader import Loader, make_loader
from distill.data.prompts import read_prompts
from distill.data.reader import Store, open_store
from distill.methods.base import Method
from distill.models.exported import Exported, open_export
from distill.models.families import Teacher, load_teacher
from distill.models.latent_reward import LatentReward
from distill.training.checkpoint import Checkpoints
from distill.training.config import ConfigError, TrainSettings, build, checking, run_script
from distill.training.engine import Engine, LearningRate, TrainedNetwork
from distill.training.health import Health
from distill.training.loop import Every, train
from distill.training.preemption import Preemption
from distill.training.run import checkpoints_of, finished, launched_rank, launched_world_size, mark_finished, open_run
from distill.training.tracking import Meter, Progress, Tracker, open_trackers, read_metrics, setup_logging
from distill.training.validation import Validation

log = logging.getLogger("distill")

PREEMPTED = 75  # EX_TEMPFAIL: saved, and to be run again
UNHEALTHY = 3  # an alarm has ended the run; it is not to be run again as it is


def main(cfg: TrainSettings) -> None:
    setup_logging(launched_rank())
    # Everything that the user may have to mend is built and checked before the first network is loaded.
    engine: Engine = build(cfg.engine)
    micro_batch_size = split_batch(cfg, launched_world_size())
    teacher = teacher_of(cfg, parts=())
    method: Method = build(cfg.method, schedule=teacher.schedule)
    check_method(cfg, method)
    exports = exports_of(cfg, teacher)
    cfg = settled(cfg, exports)
    student, others = build(cfg.student), others_of(cfg, method)
    health: Health = build(cfg.health, main=launched_rank() == 0)
    with checking():
        rate = LearningRate(cfg.lr_scheduler, cfg.lr_warmup_steps, cfg.max_train_steps)
        plans = {name: plan_of(cfg, method, rate, name) for name in method.trains}
        store = fitting_store(cfg, teacher, method, exports)

    folder = open_run(cfg)
    if finished(folder, cfg.max_train_steps):
        log.info("%s has taken its %d steps already", folder, cfg.max_train_steps)
        return
    with checking():
        engine.start()
        hashes = engine.from_main(hashes_of(exports) if engine.is_main else {})
        recorded = cfg.model_dump(mode="json")
        checkpoints = Checkpoints(checkpoints_of(folder), cfg.checkpoints_total_limit, recorded, hashes)
        teacher = teacher_of(cfg, parts=("unet",))
        networks = {name: other.network(teacher, cfg.seed) for name, other in others.items()}  # of it untouched
        starts, teaches = exports.get("start"), exports.get("teacher")
        networks |= student.networks(teacher, cfg.seed, "teacher" in method.asks, starts, teaches)
        engine.prepare(networks, plans, helpers_of(cfg, method))
        resumed = checkpoints.resume(engine, cfg.resume_from_checkpoint)
    start_step = resumed.step if resumed else 0

    health.recall(engine.from_main(read_metrics(folder, start_step)))
    report_to = [cfg.report_to] if isinstance(cfg.report_to, str) else cfg.report_to
    tracker = open_trackers(report_to, folder, cfg.model_dump(mode="json"), resume_step=start_step, main=engine.is_main)
    progress = Progress(cfg.max_train_steps, start_step, main=engine.is_main)
    with Preemption(folder, writes=engine.is_main) as preemption:
        step = train(
            method,
            engine,
            iter(loader_of(cfg, store, method, engine, micro_batch_size, start_step)),
            start_step=start_step,
            max_train_steps=cfg.max_train_steps,
            every=Every(cfg.log_every, cfg.checkpointing_steps, cfg.validation_steps),
            meter=Meter(cfg.max_train_steps, cfg.global_batch_size, start_step),
            progress=progress,
            tracker=tracker,
            checkpoints=checkpoints,
            preemption=preemption,
            health=health,
            validate=validation_of(cfg, method, engine, tracker),
        )
        if step < cfg.max_train_steps and not health.ends_run:
            preemption.mark(step)
    progress.close()
    tracker.close()
    if engine.is_main and step == cfg.max_train_steps and not health.ends_run:
        mark_finished(folder, step)
    engine.close()
    if health.ends_run:
        if launched_rank() == 0:
            log.error("ended at step %d, for %s; health.stop=false goes on", step, " and ".join(health.alarms))
        sys.exit(UNHEALTHY)
    if step < cfg.max_train_steps:
        sys.exit(PREEMPTED)


def split_batch(cfg: TrainSettings, world_size: int) -> int:
    """Samples of one micro-batch of one rank."""
    parts = world_size * cfg.gradient_accumulation_steps
    if cfg.global_batch_size % parts:
        raise ConfigError(
            f"global_batch_size={cfg.global_batch_size} must be a multiple of {parts}: "
            f"{world_size} processes x gradient_accumulation_steps={cfg.gradient_accumulation_steps}"
        )
    return cfg.global_batch_size // parts


def exports_of(cfg: TrainSettings, teacher: Teacher) -> dict[str, Exported]:
    """The earlier students that this one starts from ("start") and learns from ("teacher"), where given."""
    exports = {}
    for name, folder in (("start", cfg.start), ("teacher", cfg.teacher)):
        if folder is not None:
            with checking(f"{name}: "):
                exports[name] = open_export(folder)
                if launched_rank() == 0:  # the hash reads all weights once
                    exports[name].require_base(teacher.teacher_hash)
    return exports


def settled(cfg: TrainSettings, exports: Mapping[str, Exported]) -> TrainSettings:
    """With what the student's settings leave to its start: so recorded, the run can be exported without that."""
    if "start" not in exports:
        return cfg
    with checking("start: "):
        found = build(cfg.student).settle(exports["start"])
    return cfg.model_copy(update={"student": cfg.student | found})


def hashes_of(exports: Mapping[str, Exported]) -> dict[str, str]:
    """What a resumed run must find in the folders of its earlier students."""
    return {f"SHA-256 of the weights of {name}": export.weights_hash for name, export in exports.items()}


def others_of(cfg: TrainSettings, method: Method) -> dict[str, Any]:
    """What makes each of the networks that the method trains beside the student."""
    names = [name for name in method.trains if name != "student"]
    if missing := [name for name in names if name not in cfg.networks]:
        raise ConfigError(f"the method trains a {missing[0]}, which the settings do not describe: set networks=critics")
    return {name: build(cfg.networks[name]) for name in names}


def plan_of(cfg: TrainSettings, method: Method, rate: LearningRate, name: str) -> TrainedNetwork:
    """How a network is trained; of those beside the student an average is kept only if the method asks for it."""
    averaged = name == "student" or f"{name}_ema" in method.asks
    schedule = partial(scheduled, cfg, method, rate, name)
    return TrainedNetwork(build(cfg.optimizer), schedule, cfg.ema_decay if averaged else None)


def scheduled(cfg: TrainSettings, method: Method, rate: LearningRate, name: str, step: int) -> float:
    """The factor of `learning_rate` at a step: the schedule's, times that of the method's own rate, if it has one."""
    return rate(step) * (method.learning_rate(step, name) or cfg.learning_rate) / cfg.learning_rate


def check_method(cfg: TrainSettings, method: Method) -> None:
    """The run's settings have to be what the method counts on."""
    if method.steps not in (None, cfg.max_train_steps):
        raise ConfigError(f"the method's stages take {method.steps} steps, not max_train_steps={cfg.max_train_steps}")
    if cfg.ema_decay is None and any(f"{name}_ema" in method.asks for name in method.trains):
        raise ConfigError("the method's target is the moving average of the student, and none is kept: set ema_decay")
    if "reward" in method.asks and cfg.reward is None:
        raise ConfigError("the method scores its answers, and there is no reward: set reward=clip or another")
    if "perceptual" in method.asks and cfg.perceptual is None:
        raise ConfigError("the method's distance is perceptual, and there is none: set perceptual=latent_lpips")
    if cfg.global_batch_size < method.least_samples:
        raise ConfigError(
            f"the method compares samples of a step: global_batch_size={cfg.global_batch_size} must be at least "
            f"{method.least_samples}"
        )


def teacher_of(cfg: TrainSettings, parts: tuple[str, ...]) -> Teacher:
    model = cfg.model
    with checking("model."):
        return load_teacher(
            model.pretrained_model_name_or_path, parts=parts, revision=model.revision, variant=model.variant
        ).at_resolution(model.resolution)


def helpers_of(cfg: TrainSettings, method: Method) -> dict[str, torch.nn.Module]:
    """What the method's losses call beside networks, of what they ask for: a reward and a distance of latents."""
    helpers: dict[str, torch.nn.Module] = {}
    if "reward" in method.asks and cfg.reward is not None:
        teacher = teacher_of(cfg, parts=("vae",))
        helpers["reward"] = LatentReward(teacher, build(cfg.reward), cfg.reward_batch_size)
    if "perceptual" in method.asks and cfg.perceptual is not None:
        helpers["perceptual"] = build(cfg.perceptual)
    return helpers


def fitting_store(cfg: TrainSettings, teacher: Teacher, method: Method, exports: Mapping[str, Exported]) -> Store:
    """The store, once it is known to be this teacher's and to hold what the method reads.

    A method that asks no network to teach learns from the solves of the one that `teacher` names.
    """
    store = open_store(
        cfg.data.store, max_bad_fraction=cfg.data.max_bad_fraction, verify_sha256=cfg.data.verify_on_first_read
    )
    try:
        for step in method.starts:
            method.reads(step).check(store.index.times)
    except ValueError as error:
        if store.index.kind == "pictures":
            raise ConfigError(
                f"a store of pictures has no teacher solves, method=lcm_noised needs none: {error}"
            ) from None
        raise
    if launched_rank() == 0:  # the hash reads all weights once
        solved = exports.get("teacher") if "teacher" not in method.asks else None
        store.index.require(
            schedule_fingerprint=teacher.schedule.fingerprint,
            teacher_hash=solved.weights_hash if solved else teacher.teacher_hash,
            guidance=cfg.data.guidance,
            resolution=teacher.resolution,
        )
    return store


def loader_of(
    cfg: TrainSettings, store: Store, method: Method, engine: Engine, micro_batch_size: int, start_step: int
) -> Loader:
    return make_loader(
        store,
        method.reads,
        seed=cfg.seed,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
        start_step=start_step,
        num_workers=cfg.dataloader_num_workers,
        prompts=method.needs_prompts,
    )


def validation_of(
    cfg: TrainSettings, method: Method, engine: Engine, tracker: Tracker
) -> Callable[[int], dict[str, float]]:
    """Draws the validation prompts, if there are any. Text encoders are needed once, and dropped."""
    if cfg.validation_prompts is None:
        return lambda step: {}
    prompts = cfg.validation_prompts
    prompts = read_prompts(prompts) if isinstance(prompts, str) else prompts
    teacher = teacher_of(cfg, parts=("text", "vae"))
    conditioning = teacher.encode(prompts)
    del teacher.parts["text"]
    conditioning |= {"guidance": torch.full((len(prompts),), cfg.validation_guidance)}
    steps, seeds = cfg.validation_sampling_steps, cfg.validation_diversity_seeds
    draws = Validation(teacher, prompts, conditioning, steps, cfg.seed, seeds, method.sampling)
    return partial(draws, engine, tracker)


if __name__ == "__main__":
    run_script(main, "train", TrainSettings)
