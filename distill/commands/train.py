"""Distils: `python scripts/launch.py scripts/train.py experiment=lcm_lora_sd15 data.store=STORE output_dir=runs/a`.

Settings are `configs/train.yaml` and its groups; `--cfg` prints them. Run again, it goes on from its newest checkpoint.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("train")

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distill.data.errors import AGAIN, ReadError, StoreError
from distill.data.index import StoreIndex, StoreMismatch
from distill.data.loader import Loader, make_loader
from distill.data.progress import Progress as Bar
from distill.data.prompts import read_prompts
from distill.data.reader import Store, open_store
from distill.data.words import counted
from distill.methods.base import Method
from distill.models.exported import Exported, open_export
from distill.models.families import Teacher
from distill.models.latent_reward import LatentReward
from distill.models.schedulers import scheduler_settings
from distill.training.checkpoint import Checkpoints
from distill.training.config import ConfigError, build, checking
from distill.training.engine import Engine, LearningRate, NonFiniteError, TrainedNetwork
from distill.training.health import Health
from distill.training.launched import launched_rank, launched_world_size, require_one_task
from distill.training.lock import RunLock
from distill.training.loop import Every, NoData, train
from distill.training.preemption import Preemption
from distill.training.recorded import given_keys
from distill.training.run import (
    checkpoints_of,
    finished,
    identity,
    kept_files,
    mark_finished,
    open_run,
    prepare_folder,
    writing,
)
from distill.training.settings import TrainSettings
from distill.training.teacher import open_teacher
from distill.training.tracking import (
    SKIPPED,
    Meter,
    Progress,
    Tracker,
    cut_after,
    note_skipped,
    open_trackers,
    read_metrics,
    setup_logging,
)
from distill.training.used import note_data
from distill.training.validation import Validation, teacher_ends, validation_seeds
from distill.training.watchdog import Watchdog, joining
from distill.training.writing import WriteError

log = logging.getLogger("distill")

PREEMPTED = AGAIN  # saved, and to be run again
NOT_SAVED = 74  # EX_IOERR: the last checkpoint could not be written
DAMAGED = 2  # data that were damaged: as wrong settings, they have to be mended first
SAMPLES, STORE = "samples", "store"  # in a checkpoint: how many the run began with, and of which store
UNHEALTHY = 3  # an alarm, or losses that are not finite, have ended the run; it is not to be run again as it is


@dataclass(frozen=True)
class Parts:
    """What a run is made of, checked as far as it can be before the first network is loaded."""

    cfg: TrainSettings
    engine: Engine
    micro_batch_size: int
    teacher: str
    method: Method
    exports: dict[str, Exported]
    student: Any
    others: dict[str, Any]
    health: Health
    plans: dict[str, TrainedNetwork]
    store: Store
    preemption: Preemption


def main(cfg: TrainSettings) -> None:
    setup_logging(launched_rank())
    folder, first = Path(cfg.output_dir), launched_rank() == 0
    with checking():
        require_one_task()
        watchdog = Watchdog(cfg.watchdog_minutes, launched_rank())
    if first:
        prepare_folder(folder)
    with watchdog, ExitStack() as held:
        with watchdog.over("the teacher's configs, its hash, and the store's index"):
            parts = checked(cfg)
        with writing(folder):
            held.enter_context(RunLock(folder, takes=first))
            open_run(parts.cfg)
        if finished(folder, cfg.max_train_steps):
            log.info("%s has taken its %d steps already: nothing is done, or written", folder, cfg.max_train_steps)
            return
        if first:
            note_data(folder, parts.store)
        code = distil(parts, folder, watchdog)
    if code:
        sys.exit(code)


def checked(cfg: TrainSettings) -> Parts:
    """Everything that the user may have to mend; raises ConfigError."""
    folder, first = Path(cfg.output_dir), launched_rank() == 0
    engine: Engine = build(cfg.engine, on_skipped=partial(note_skipped, folder))
    micro_batch_size = split_batch(cfg, launched_world_size())
    with checking("preemption_signals: "):
        preemption = Preemption(folder, writes=first, signals=cfg.preemption_signals)
    teacher = open_teacher(cfg.model)
    method: Method = build(cfg.method, schedule=teacher.schedule)
    check_method(cfg, method)
    with checking("the method's students: "):  # which an export will need a scheduler for
        drawn = method.sampling
        scheduler_settings(teacher.noise, drawn.sampler, drawn.spacing, steps=drawn.steps)
    exports = exports_of(cfg, teacher)
    cfg = settled(cfg, exports)
    with checking():
        rate = LearningRate(cfg.lr_scheduler, cfg.lr_warmup_steps, cfg.max_train_steps)
        return Parts(
            cfg=cfg,
            engine=engine,
            micro_batch_size=micro_batch_size,
            teacher=f"{teacher.teacher_id} ({teacher.family.name})",
            method=method,
            exports=exports,
            student=build(cfg.student),
            others=others_of(cfg, method),
            health=build(cfg.health, main=first),
            plans={name: plan_of(cfg, method, rate, name) for name in method.trains},
            store=fitting_store(cfg, teacher, method, exports),
            preemption=preemption,
        )


def distil(parts: Parts, folder: Path, watchdog: Watchdog) -> int:
    """Loads the networks, goes on where the run was, and trains; returns the exit code."""
    cfg, engine, method, health = parts.cfg, parts.engine, parts.method, parts.health
    restore = kept_files(folder) if launched_rank() == 0 else lambda: None
    with checking():
        checkpoints, store, start_step = started(parts, folder, watchdog, restore)
    if engine.is_main:
        cut_after(folder / SKIPPED, start_step)
    health.recall(engine.from_main(read_metrics(folder, start_step)))
    report_to = [cfg.report_to] if isinstance(cfg.report_to, str) else cfg.report_to
    tracker = open_trackers(report_to, folder, cfg.model_dump(mode="json"), resume_step=start_step, main=engine.is_main)
    progress = Progress(cfg.max_train_steps, start_step, main=engine.is_main)
    if engine.is_main:
        say_header(parts, store, start_step, folder)
    step, began = start_step, time.monotonic()
    failure: NonFiniteError | WriteError | StoreError | ReadError | None = None
    with watchdog.over("the validation's prompts and the teacher's own pictures of them"):
        validate = validation_of(cfg, method, engine, tracker, folder)
    loader = loader_of(cfg, store, method, engine, parts.micro_batch_size, start_step)
    with parts.preemption, closing(iter(loader)) as batches:
        try:
            step = train(
                method,
                engine,
                batches,
                start_step=start_step,
                max_train_steps=cfg.max_train_steps,
                every=Every(cfg.log_every, cfg.checkpointing_steps, cfg.validation_steps),
                meter=Meter(cfg.max_train_steps, cfg.global_batch_size, start_step),
                progress=progress,
                tracker=tracker,
                checkpoints=checkpoints,
                preemption=parts.preemption,
                watchdog=watchdog,
                health=health,
                validate=validate,
            )
        except NonFiniteError as error:  # on all ranks alike
            failure = NonFiniteError(f"{error}; {checkpoints.after_divergence(engine)}")
        except NoData as ended:  # on all ranks alike
            failure, step = ended.error, ended.step
        except WriteError as error:  # on all ranks alike
            failure = error
        except FileNotFoundError as error:  # on this rank, in mid-run: no mistake in the settings
            raise ReadError(f"a file is gone while the run goes on: {error}") from error
        code = exit_code(step, cfg.max_train_steps, health, failure)
        if code == PREEMPTED:
            parts.preemption.mark(step)
    progress.close()
    with watchdog.over("the trackers, and the other ranks at the end"):
        tracker.close()
        engine.barrier()  # a launcher may end all ranks when the first is gone, and this one still sends
    if engine.is_main and code == 0:
        restore()
        mark_finished(folder, step)
    if engine.is_main and failure is None:
        say_end(code, parts, step, time.monotonic() - began, folder)
    engine.close()
    return code


def say_end(code: int, parts: Parts, step: int, seconds: float, folder: Path) -> None:
    """What came of a run that nothing has ended before its time, and what is to be typed next, on the console."""
    if code == 0:
        log.info(
            "finished: %d steps, %s since this start; the run is %s, next is: python scripts/export.py run=%s "
            "output_dir=FOLDER",
            step,
            tqdm.format_interval(int(seconds)),
            folder,
            folder,
        )
    elif code == PREEMPTED:
        why = "interrupted" if parts.preemption.interrupted else "stopped"
        total = parts.cfg.max_train_steps
        log.info("%s: saved at step %d of %d; the same command resumes from there", why, step, total)


def say_header(parts: Parts, store: Store, start_step: int, folder: Path) -> None:
    """What is about to run, on the console: machine, teacher, data, what is trained, batch, steps, folder."""
    cfg, engine = parts.cfg, parts.engine
    precision = "float32" if engine.mixed_precision == "no" else engine.mixed_precision
    log.info("engine=%s in %s on %d x %s", engine.name, precision, engine.world_size, engine.device_name)
    log.info("teacher %s; store %s with %d samples", parts.teacher, cfg.data.store, len(store))
    trained = ", ".join(f"{name} {count:,} weights" for name, count in engine.trained_parameters().items())
    log.info("%s trains %s", type(parts.method).__name__, trained)
    log.info(
        "batch %d = %d a micro-batch x %d accumulated x %s; steps %d to %d; output_dir=%s",
        cfg.global_batch_size,
        parts.micro_batch_size,
        cfg.gradient_accumulation_steps,
        counted(engine.world_size, "process", "processes"),
        start_step + 1,
        cfg.max_train_steps,
        folder,
    )


def started(
    parts: Parts, folder: Path, watchdog: Watchdog, restore: Callable[[], None]
) -> tuple[Checkpoints, Store, int]:
    """Joins the other ranks and prepares the networks, as the checkpoint has them that the run goes on from.

    Returns what saves the run, the store with the samples that it began with, and the steps taken.
    """
    cfg, engine = parts.cfg, parts.engine
    with joining(launched_rank(), launched_world_size()):
        engine.start()
    hashes = engine.from_main(hashes_of(parts.exports) if engine.is_main else {})
    recorded = cfg.model_dump(mode="json")
    own = engine.from_main(identity(folder) if engine.is_main else "")
    checkpoints = Checkpoints(
        checkpoints_of(folder), cfg.checkpoints_total_limit, recorded, hashes, own, before=restore
    )
    with watchdog.over("the networks, or other ranks that load them"):
        teacher = open_teacher(cfg.model, parts=("unet",))
        networks = {name: other.network(teacher, cfg.seed) for name, other in parts.others.items()}  # of it untouched
        starts, teaches = parts.exports.get("start"), parts.exports.get("teacher")
        networks |= parts.student.networks(teacher, cfg.seed, "teacher" in parts.method.asks, starts, teaches)
        engine.prepare(networks, parts.plans, helpers_of(cfg, parts.method))
    with watchdog.over("the checkpoint that the run resumes from"):
        resumed = checkpoints.resume(engine, cfg.resume_from_checkpoint)
    step = resumed.step if resumed else 0
    if step > cfg.max_train_steps:
        raise ConfigError(
            f"resume_from_checkpoint={cfg.resume_from_checkpoint} has taken {step} steps, and max_train_steps="
            f"{cfg.max_train_steps} is less: set more"
        )
    store = as_begun(parts.store, resumed.state if resumed else {})
    checkpoints.state = {SAMPLES: len(store), STORE: store.index.identity}
    return checkpoints, store, step


def as_begun(store: Store, state: Mapping[str, Any]) -> Store:
    """The samples that a run began with, of a store that may have grown since: their number decides the order of data.

    Raises:
        StoreError: it is another store, or has fewer samples now.
    """
    if state.get(STORE, store.index.identity) != store.index.identity:
        raise StoreError(
            f"data.store={store.folder.url} is not the store that the run has learned from until now: set data.store "
            "to that one, wherever it lies today, or choose another output_dir"
        )
    samples = state.get(SAMPLES, len(store))
    if samples > len(store):
        raise StoreError(
            f"data.store={store.folder.url} has {len(store)} samples and had {samples} when the run began: "
            "bring the old store back, or choose another output_dir"
        )
    if samples < len(store) and launched_rank() == 0:
        log.info(
            "the store has grown to %d samples: this run goes on with the first %d, which it began with; "
            "a new output_dir uses them all",
            *(len(store), samples),
        )
    return store.first(samples)


def exit_code(step: int, max_train_steps: int, health: Health, failure: Exception | None) -> int:
    """0 for a run that has taken its steps; otherwise why it has not, which rank 0 says in a line."""
    say = log.error if launched_rank() == 0 else log.debug
    if failure is not None:
        saved = isinstance(failure, (ReadError, StoreError)) and step > 0
        say("%s%s", failure, f"; saved at step {step}: the same command resumes from there" if saved else "")
        codes = {WriteError: NOT_SAVED, ReadError: PREEMPTED, StoreError: DAMAGED}
        return next((code for kind, code in codes.items() if isinstance(failure, kind)), UNHEALTHY)
    if health.ends_run:
        say("ended at step %d, for %s; health.stop=false goes on", step, " and ".join(health.alarms))
        return UNHEALTHY
    return 0 if step == max_train_steps else PREEMPTED


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
        raise ConfigError(
            f"the method's stages take {method.steps} steps, not max_train_steps={cfg.max_train_steps}: set "
            "max_train_steps=null, which follows them, or other method.stages"
        )
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
    check_read(cfg, method)


def check_read(cfg: TrainSettings, method: Method) -> None:
    """Refuses what is set and nothing of the run would read."""
    stages = ", or method.stages of which one does" if method.steps else ""
    for name in ("reward", "perceptual"):
        if getattr(cfg, name) is not None and name not in method.asks:
            raise ConfigError(
                f"{name} is set, and the method uses none: leave it out, or set a method that does{stages}"
            )
    nodes = [cfg.student, *(cfg.networks[name] for name in method.trains if name in cfg.networks)]
    has = {key for node in nodes for key in node}
    given = given_keys()
    unread = {
        "reward_batch_size": cfg.reward is None and "the method uses no reward",
        "lora_rank": "rank" not in has and "no network of this run has a LoRA",
        "lora_alpha": "alpha" not in has and "no network of this run has a LoRA",
        "lr_warmup_steps": cfg.lr_scheduler == "constant"
        and cfg.lr_warmup_steps
        and "lr_scheduler=constant has no warm-up",
        "validation_reward": cfg.validation_prompts is None and "there are no validation_prompts",
    }
    for key, reason in unread.items():
        if reason and key in given:
            raise ConfigError(f"{key} is set, and has no effect: {reason}")
    for key in given:
        network = key.split(".")[1] if key.startswith("networks.") else None
        if network is not None and network not in method.trains:
            raise ConfigError(f"{key} is set, and the method trains no {network}: it trains {', '.join(method.trains)}")


def helpers_of(cfg: TrainSettings, method: Method) -> dict[str, torch.nn.Module]:
    """What the method's losses call beside networks, of what they ask for: a reward and a distance of latents."""
    helpers: dict[str, torch.nn.Module] = {}
    if "reward" in method.asks and cfg.reward is not None:
        teacher = open_teacher(cfg.model, parts=("vae",))
        helpers["reward"] = LatentReward(teacher, build(cfg.reward), cfg.reward_batch_size)
    if "perceptual" in method.asks and cfg.perceptual is not None:
        helpers["perceptual"] = build(cfg.perceptual)
    return helpers


def fitting_store(cfg: TrainSettings, teacher: Teacher, method: Method, exports: Mapping[str, Exported]) -> Store:
    """The store, once it is known to be this teacher's and to hold what the method reads.

    A method that asks no network to teach learns from the solves of the one that `teacher` names.
    """
    store = open_store(
        cfg.data.store,
        max_bad_fraction=cfg.data.max_bad_fraction,
        verify_sha256=cfg.data.verify_on_first_read,
        retry_seconds=cfg.data.read_retry_seconds,
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
        wanted = {
            "schedule_fingerprint": teacher.schedule.fingerprint,
            "teacher_hash": solved.weights_hash if solved else teacher.teacher_hash,
            "guidance": cfg.data.guidance,
            "resolution": teacher.resolution,
        }
        if store.index.kind == "trajectories":  # settings of the writer: what a person has set here must be so there
            solve = {"solver": cfg.data.solver, "solver_steps": cfg.data.solver_steps}
            wanted |= {name: value for name, value in solve.items() if f"data.{name}" in given_keys()}
        try:
            store.index.require(**wanted)
        except StoreMismatch as error:
            raise ConfigError(
                f"{error}; {remedy(store.index, wanted, learns_from_export=solved is not None)}"
            ) from None
    return store


def remedy(index: StoreIndex, wanted: Mapping[str, Any], learns_from_export: bool) -> str:
    """What to type for a store that does not fit."""
    if any(getattr(index, name) != wanted[name] for name in ("schedule_fingerprint", "teacher_hash")):
        key = "teacher" if learns_from_export else "model.pretrained_model_name_or_path"
        return f"set {key} to what solved it ({index.teacher_id}), or data.store to a new store for this one"
    guidance = json.dumps(index.guidance).replace(" ", "")
    settings = {
        "data.guidance": ("guidance", guidance),
        "data.solver": ("solver", index.solver),
        "data.solver_steps": ("solver_steps", index.solver_steps),
        "model.resolution": ("resolution", index.resolution),
    }
    differing = {name for name, value in wanted.items() if value not in (None, getattr(index, name))}
    given = [f"{key}={value}" for key, (name, value) in settings.items() if name in differing]
    return f"set {' '.join(given)}, or data.store to a new store for these settings"


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
    cfg: TrainSettings, method: Method, engine: Engine, tracker: Tracker, folder: Path
) -> Callable[[int], dict[str, float]]:
    """Draws the validation prompts, if there are any. Text encoders and the teacher are needed once, and dropped."""
    if cfg.validation_prompts is None:
        return lambda step: {}
    with checking("validation_prompts: "):
        prompts = read_prompts(cfg.validation_prompts)
    teacher = open_teacher(cfg.model, parts=("text", "vae"))
    conditioning = teacher.encode(prompts)
    ends = ends_of(cfg, engine, conditioning, folder)
    del teacher.parts["text"]
    conditioning |= {"guidance": torch.full((len(prompts),), cfg.validation_guidance)}
    steps, seeds = cfg.validation_sampling_steps, cfg.validation_diversity_seeds
    reward = build(cfg.validation_reward) if cfg.validation_reward is not None and engine.is_main else None
    draws = Validation(teacher, prompts, conditioning, steps, cfg.seed, seeds, method.sampling, ends, reward)
    return partial(draws, engine, tracker)


def ends_of(
    cfg: TrainSettings, engine: Engine, conditioning: Mapping[str, torch.Tensor], folder: Path
) -> torch.Tensor | None:
    """Where the model itself gets to from the validation's noise, on the main rank; drawn once a run."""
    if not cfg.validation_teacher_steps or not engine.is_main:
        return None
    guidance = cfg.data.guidance if isinstance(cfg.data.guidance, float) else cfg.validation_guidance
    teacher = open_teacher(cfg.model, parts=("unet", "text")).to(engine.device)
    seeds = validation_seeds(cfg.seed, len(next(iter(conditioning.values()))))
    progress = Bar("the teacher's own pictures", len(seeds), "pictures")
    there = {name: value.to(engine.device) for name, value in conditioning.items()}
    kept = folder / "validation.safetensors"
    return teacher_ends(teacher, there, seeds, cfg.validation_teacher_steps, guidance, kept, progress.update)
