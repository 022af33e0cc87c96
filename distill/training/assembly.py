"""A run, assembled from its settings: what is trained, on which data, and what saves, watches and shows it.

    run = Run.assemble(settings)          # everything checked; no network is loaded
    resumed = run.resume(watchdog)        # with the other ranks: networks, as the newest checkpoint has them
    code = run.train(resumed, watchdog)   # the loop, to its end or to what stops it

`train_run` does all three, and holds the lock of the run's folder meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from distill.config.loading import ConfigError, build, checking
from distill.config.settings import TrainSettings
from distill.data.errors import ReadError, StoreError
from distill.data.loader import Loader, make_loader
from distill.data.order import BatchShare
from distill.data.progress import Progress
from distill.data.prompts import read_prompts
from distill.data.reader import Store
from distill.data.sizes import ImageSize, read_sizes, square
from distill.data.words import counted
from distill.diffusion.guidance import guided
from distill.diffusion.prediction import Denoiser
from distill.diffusion.trajectory import Batch
from distill.methods.base import CONSISTENCY, DISTANCE, HELDOUT, MEASURES, REWARD, Method
from distill.models.denoiser import NetworkDenoiser
from distill.models.devices import described, own_device
from distill.models.exported import Exported, open_export
from distill.models.families.teacher import Teacher
from distill.models.lora import lora_layers
from distill.models.quantized import quantize
from distill.models.schedulers import scheduler_settings
from distill.training.best import Best, error_of
from distill.training.checkpoint import BEST, Checkpoints
from distill.training.ends import PREEMPTED, exit_code, say_end
from distill.training.engine import Engine, EngineSettings
from distill.training.fitting import (
    HELDOUT_SAMPLES,
    SAMPLES,
    STORE,
    as_begun,
    batch_changes,
    check_method,
    check_packages,
    fitting_store,
    heldout_store,
    say_unlogged,
)
from distill.training.health import Health
from distill.training.heldout import MOST_AT_ONCE, HeldOutLoss, mean_of
from distill.training.heldout_samples import HeldOutSamples
from distill.training.helpers import helpers_of
from distill.training.launched import launched_rank, launched_world_size, require_one_task
from distill.training.learning_rate import LearningRate
from distill.training.lock import RunLock
from distill.training.loop import Every, NoData, Observers, note_best, train
from distill.training.micro_batch import (
    TRAINING_ADVICE,
    Counting,
    Split,
    counted_split,
    halved,
    split_batch,
    within_memory,
)
from distill.training.preemption import Preemption
from distill.training.processes import Processes, collectives_timeout
from distill.training.rank_writes import WriteError
from distill.training.replicas import WrongMachine
from distill.training.rollback import PASSED, History, Rollback, gone_back, read_history, samples_between
from distill.training.run import (
    checkpoints_of,
    finished,
    identity,
    kept_files,
    mark_finished,
    note_batch,
    open_run,
    prepare_folder,
    writing,
)
from distill.training.sizes import latent_shape, require_sizes
from distill.training.skipped import Diverged
from distill.training.spikes import SpikeSettings
from distill.training.stragglers import Stragglers
from distill.training.teacher import open_teacher
from distill.training.tracking import (
    SKIPPED,
    Meter,
    Tracker,
    TrainingProgress,
    cpu_seconds_of,
    cut_after,
    note_skipped,
    open_trackers,
    read_metrics,
    time_left,
)
from distill.training.trained_network import TrainingRecipe
from distill.training.used_data import note_data
from distill.training.validation import Validation, kept_ends, teacher_ends, validation_seeds
from distill.training.watchdog import Watchdog, joining

log = logging.getLogger("distill")

LossOf = Callable[[int], dict[str, list[tuple[float, int]]]]
SamplesOf = Callable[[int], dict[str, list[float]]]


@dataclass(frozen=True)
class ResumedRun:
    """Where a run resumes: networks, what saves them, the store with the samples that it began with, steps taken, and
    how a process takes its samples of a step.
    """

    engine: Engine
    checkpoints: Checkpoints
    store: Store
    step: int
    heldout: Store | None  # solves that it is measured on, and does not learn from
    restore: Callable[[], None]  # writes what has gone of the small files in the run's folder
    split: Split
    history: History = History()  # what it has gone back for


@dataclass(frozen=True)
class Run:
    """What a run is made of, checked as far as it can be before the first network is loaded; `assemble` makes it."""

    cfg: TrainSettings
    engine: EngineSettings
    split: Split
    batch_changes: tuple[tuple[int, int], ...]
    teacher: str
    method: Method
    exports: dict[str, Exported]
    student: Any
    others: dict[str, Any]
    health: Health
    best: Best
    recipes: dict[str, TrainingRecipe]
    store: Store
    preemption: Preemption

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output_dir)

    def batch_size(self, step: int) -> int:
        """Samples of a step, over all ranks."""
        return self.method.batch_size(step) or self.cfg.global_batch_size

    @classmethod
    def assemble(cls, cfg: TrainSettings) -> Run:
        """Raises ConfigError: one line about the first thing that the user has to correct."""
        check_packages(cfg)
        folder, first = Path(cfg.output_dir), launched_rank() == 0
        engine: EngineSettings = build(cfg.engine, on_skipped=partial(note_skipped, folder))
        world_size = launched_world_size()
        split_batch(cfg, world_size)
        with checking("preemption_signals: "):
            preemption = Preemption(folder, writes=first, signals=cfg.preemption_signals)
        teacher = open_teacher(cfg.model)
        method: Method = build(cfg.method, schedule=teacher.schedule)
        check_method(cfg, method)
        with checking("the method's students: "):  # which an export will need a scheduler for
            sampling = method.sampling
            scheduler_settings(teacher.noise, sampling.sampler, sampling.spacing, steps=sampling.steps)
        exports = exports_of(cfg, teacher)
        cfg = settled(cfg, exports)
        changes = batch_changes(cfg, method, world_size)
        spikes: SpikeSettings = build(cfg.spikes)
        with checking():
            rate = LearningRate(cfg.lr_scheduler, cfg.lr_warmup_steps, cfg.max_train_steps)
            return cls(
                cfg=cfg,
                engine=replace(
                    engine, spikes=spikes, stage_starts=method.starts, compute_twice_steps=cfg.compute_twice_steps
                ),
                split=split_batch(cfg, world_size, [size for _, size in changes]),
                batch_changes=changes,
                teacher=f"{teacher.teacher_id} ({teacher.family.name})",
                method=method,
                exports=exports,
                student=build(cfg.student),
                others=others_of(cfg, method),
                health=health_of(cfg, method, first),
                best=best_of(cfg, method, first),
                recipes={name: recipe_of(cfg, method, rate, name) for name in method.trains},
                store=fitting_store(cfg, teacher, method, exports),
                preemption=preemption,
            )

    def resume(self, watchdog: Watchdog, counting: Counting | None = None) -> ResumedRun:
        """Joins the other ranks and prepares the networks, as the checkpoint has them that the run resumes from.

        Under `micro_batch_size=auto` a step is rehearsed, in micro-batches that are halved until there is memory for
        them; nothing that the run computes then differs from what it would be with that number as the setting.

        Args:
            counting: says which size to begin with; without it, all samples of a process at once.

        Raises:
            ConfigError: a checkpoint, or a store, of another run; or no memory for a single sample.
        """
        restore = kept_files(self.folder) if launched_rank() == 0 else lambda: None
        with joining(launched_rank(), launched_world_size()):
            engine = self.engine.start(collectives_timeout(self.cfg.watchdog_minutes))
        if self.cfg.micro_batch_size != "auto":
            return self._prepared(engine, self.split, restore, watchdog)
        teaches = self.exports.get("teacher") if "teacher" in self.method.requires else None
        with watchdog.over("rank 0, which counts how many samples fit"):
            lora = None if teaches is None else teaches.is_lora
            split = counted_split(self._of_its_sizes(), self.split, engine.processes, counting, lora)
        resumed = self._prepared(engine, split, restore, watchdog)
        while not self._rehearsed(resumed, watchdog):
            split, engine = halved(split, engine.processes), engine.restarted()
            del resumed
            resumed = self._prepared(engine, split, restore, watchdog)
        return resumed

    def _of_its_sizes(self) -> TrainSettings:
        """The settings with the sizes that the store has, which decide how many samples fit."""
        sizes = list(self.store.index.sizes) or None
        return self.cfg.model_copy(update={"data": self.cfg.data.model_copy(update={"sizes": sizes})})

    def _prepared(self, engine: Engine, split: Split, restore: Callable[[], None], watchdog: Watchdog) -> ResumedRun:
        """The networks on their devices, for steps that are split so, as the newest checkpoint has them."""
        cfg, processes = self.cfg, engine.processes
        engine.accumulate(split.accumulated)
        hashes = processes.from_main(hashes_of(self.exports) if processes.is_main else {})
        recorded = cfg.model_dump(mode="json")
        own = processes.from_main(identity(self.folder) if processes.is_main else "")
        checkpoints = Checkpoints(
            checkpoints_of(self.folder),
            cfg.checkpoints_total_limit,
            recorded,
            hashes,
            own,
            before=restore,
            background=cfg.checkpoints_in_background,
            watched=watchdog.beside,
        )
        with watchdog.over("the networks, or other ranks that load them"):
            teacher = open_teacher(cfg.model, parts=("network",))
            if cfg.quantize is not None:
                quantize(teacher.network, cfg.quantize, teacher.family)
            networks = {
                name: other.network(teacher, cfg.seed) for name, other in self.others.items()
            }  # of it untouched
            starts, teaches = self.exports.get("start"), self.exports.get("teacher")
            networks |= self.student.networks(teacher, cfg.seed, "teacher" in self.method.requires, starts, teaches)
            engine.prepare(networks, self.recipes, helpers_of(cfg, self.method))
        with watchdog.over("the checkpoint that the run resumes from"):
            resumed = checkpoints.resume(engine, cfg.resume_from_checkpoint)
        step = resumed.step if resumed else 0
        if step > cfg.max_train_steps:
            raise ConfigError(
                f"resume_from_checkpoint={cfg.resume_from_checkpoint} has taken {step} steps, and max_train_steps="
                f"{cfg.max_train_steps} is less: set more"
            )
        state = resumed.state if resumed else {}
        store = as_begun(self.store, state)
        heldout = heldout_store(cfg, store, state)
        heldout = heldout if processes.all_agree(heldout is not None) else None
        checkpoints.state = {SAMPLES: len(store), STORE: store.index.identity}
        checkpoints.state |= {} if heldout is None else {HELDOUT_SAMPLES: len(heldout)}
        self._check_best(heldout)
        self._recall_best(checkpoints, processes, state)
        history = processes.from_main(read_history(self.folder, state) if processes.is_main else History())
        engine.bands.way_back = lambda: processes.from_main(processes.is_main and bool(checkpoints.healthy_steps()))
        fresh = ResumedRun(engine, checkpoints, store, step, heldout, restore, split)
        return passing_over(fresh, step, history)

    def _rehearsed(self, resumed: ResumedRun, watchdog: Watchdog) -> bool:
        """Whether there is memory for a micro-batch of the next step, and of the first one of each later stage.

        Where turns repeat every few steps, it is of each of those.
        """
        last = self.cfg.max_train_steps
        first = {resumed.step, *(start for start in self.method.starts if resumed.step < start < last)}
        steps = {step + i for step in first for i in range(self.method.period)}
        for step in sorted(step for step in steps if step < last or step in first):
            with watchdog.over(f"the rehearsal of step {step + 1}: its computation, or other ranks in it"):
                with closing(iter(self.loader(resumed, step, workers=0, largest=True))) as batches:
                    batch = first_of(batches)
                if not resumed.engine.rehearse(self.method.turns(step), batch, step):
                    return False
        return True

    def train(self, resumed: ResumedRun, watchdog: Watchdog) -> int:
        """Takes the steps that are left; returns the exit code (`ends.exit_code`), whatever ends the run."""
        cfg, processes = self.cfg, resumed.engine.processes
        if processes.is_main:
            note_batch(self.folder, resumed.split.micro_batch_size, resumed.split.accumulated, processes.world_size)
            self._say_header(resumed)
        with watchdog.over("the validation's prompts and the teacher's own pictures of them"):
            validation = Validating(self.validation(resumed.engine), *self.held_out(resumed))
        began, failure = time.monotonic(), None
        with self.preemption:
            step, failure = self._steps(resumed, validation, watchdog)
            while isinstance(failure, Diverged) and (back := self._back(resumed, failure, watchdog)) is not None:
                resumed = back
                step, failure = self._steps(resumed, validation, watchdog)
            if isinstance(failure, Diverged):
                failure = RuntimeError(f"{failure}; {resumed.checkpoints.after_divergence(processes)}")
            code = exit_code(step, cfg.max_train_steps, self.health, failure, self.best)
            if code == PREEMPTED:
                self.preemption.mark(step)
        with watchdog.over("the other ranks at the end"):
            processes.barrier()  # a launcher may end all ranks when the first is gone, and this one still sends
        if processes.is_main and code == 0:
            resumed.restore()
            mark_finished(self.folder, step, cfg.max_train_steps)
        if processes.is_main and failure is None:
            seconds, interrupted = time.monotonic() - began, self.preemption.interrupted
            say_end(code, self.folder, step, cfg.max_train_steps, seconds, interrupted, self.best)
        resumed.engine.close()
        return code

    def _steps(self, resumed: ResumedRun, validation: Validating, watchdog: Watchdog) -> tuple[int, Exception | None]:
        """The steps from where a run resumes; returns those taken in all, and what has ended them before their time. On
        all ranks alike."""
        cfg, processes = self.cfg, resumed.engine.processes
        tracker = self.tracker(resumed)
        progress = TrainingProgress(cfg.max_train_steps, resumed.step, main=processes.is_main)
        before = cpu_seconds_of(read_metrics(self.folder, resumed.step))
        meter = Meter(cfg.max_train_steps, self.batch_size, resumed.step, cpu_seconds=before)
        measured = partial(validation, tracker)
        own_time = resumed.engine.own_time
        stragglers = Stragglers(processes.gathered, processes.world_size, processes.is_main)

        def times(steps: int, waited: float, step: int) -> Mapping[str, float]:
            return stragglers.read(own_time.read(), waited, steps, step)

        observers = Observers(meter, progress, tracker, self.health, measured, self.best, validation.samples, times)
        self._catch_up(resumed, observers, watchdog)
        # what is being written is finished whatever happens, while the watchdog still looks
        with closing(resumed.checkpoints), closing(iter(self.loader(resumed))) as batches:
            step, failure = self._loop(resumed, batches, observers, watchdog)
        progress.close()
        with watchdog.over("the trackers"):
            tracker.close()
        return step, failure

    def _loop(
        self, resumed: ResumedRun, batches: Iterator[Batch], observers: Observers, watchdog: Watchdog
    ) -> tuple[int, Exception | None]:
        cfg = self.cfg
        try:
            step = train(
                self.method,
                resumed.engine,
                batches,
                start_step=resumed.step,
                max_train_steps=cfg.max_train_steps,
                every=Every(cfg.log_every, cfg.checkpointing_steps, cfg.validation_steps, cfg.compare_replicas_steps),
                observers=observers,
                checkpoints=resumed.checkpoints,
                preemption=self.preemption,
                watchdog=watchdog,
            )
        except NoData as ended:
            return ended.step, ended.error
        except WrongMachine as error:
            agreed = max(resumed.step, error.step - getattr(cfg, error.setting))
            resumed.checkpoints.set_aside_after(resumed.engine.processes, agreed)
            return agreed, error
        except (Diverged, WriteError) as error:
            return resumed.step, error
        except FileNotFoundError as error:  # on this rank, in mid-run: no mistake in the settings
            raise ReadError(f"a file has gone during the run: {error}") from error
        return step, None

    def _back(self, resumed: ResumedRun, failure: Diverged, watchdog: Watchdog) -> ResumedRun | None:
        """The run at its last healthy checkpoint, which it has gone back to; None if it may not, or there is none."""
        cfg, engine, most = self.cfg, resumed.engine, self.engine.spikes.rollbacks
        if len(resumed.history.rollbacks) >= most:
            return None
        with watchdog.over("the checkpoint that the run goes back to"), checking():
            point = gone_back(resumed.checkpoints, engine)
        if point is None:
            return None
        size, passed = cfg.global_batch_size, resumed.history.passed
        share = BatchShare(size, size, changes=self.batch_changes, passed=passed)
        seen = samples_between(share, point.step, failure.step + 1)
        history = resumed.history.and_then(Rollback(point.step, failure.step + 1, seen, str(failure)))
        if engine.processes.is_main:
            history.write(self.folder)
            log.warning(
                "%s: back to the checkpoint of step %d, and the %d samples seen since are passed over (%d of %d times)",
                *(failure, point.step, seen, len(history.rollbacks), most),
            )
        self._recall_best(resumed.checkpoints, engine.processes, point.state)
        return passing_over(resumed, point.step, history)

    def say_device(self, device: torch.device) -> None:
        """A line about what the run computes on and how, before anything is loaded."""
        precision = "float32" if self.engine.mixed_precision == "no" else self.engine.mixed_precision
        log.info(
            "%s; engine=%s in %s, micro-batch %s",
            described(device, launched_world_size()),
            self.engine.name,
            precision,
            "to be found" if self.cfg.micro_batch_size == "auto" else self.split.micro_batch_size,
        )

    def _say_header(self, resumed: ResumedRun) -> None:
        """What is about to run, in some lines: teacher and data, what is trained, batch, steps and time."""
        cfg, engine, processes = self.cfg, resumed.engine, resumed.engine.processes
        of_sizes = sizes_said(resumed.store)
        log.info("teacher %s; store %s with %d samples%s", self.teacher, cfg.data.store, len(resumed.store), of_sizes)
        trained = ", ".join(f"{name} {count:,} weights" for name, count in engine.trained_parameters().items())
        log.info("%s trains %s under engine=%s", type(self.method).__name__, trained, engine.name)
        log.info(
            "batch %d = %d per micro-batch x %d accumulated x %s",
            cfg.global_batch_size,
            resumed.split.micro_batch_size,
            resumed.split.accumulated,
            counted(processes.world_size, "process", "processes"),
        )
        say_unlogged(cfg, self.method)
        for step, size in self.batch_changes:
            log.info("batch %d from step %d on, in as many micro-batches", size, step + 1)
        left = time_left(read_metrics(self.folder, resumed.step), resumed.step, cfg.max_train_steps)
        log.info("steps %d to %d, %s; output_dir=%s", resumed.step + 1, cfg.max_train_steps, left, self.folder)

    def loader(
        self, resumed: ResumedRun, step: int | None = None, workers: int | None = None, largest: bool = False
    ) -> Loader:
        """This rank's batches from a step on, where the run resumes if none is given; read by so many processes.

        Of a store with images of several sizes, those of the `largest` alone, if that is wanted.
        """
        return make_loader(
            resumed.store,
            self.method.reads,
            seed=self.cfg.seed,
            global_batch_size=self.cfg.global_batch_size,
            micro_batch_size=resumed.split.micro_batch_size,
            rank=resumed.engine.processes.rank,
            world_size=resumed.engine.processes.world_size,
            start_step=resumed.step if step is None else step,
            num_workers=self.cfg.dataloader_num_workers if workers is None else workers,
            prompts=self.method.needs_prompts,
            changes=self.batch_changes,
            passed=resumed.history.passed,
            largest=largest,
        )

    def held_out(self, resumed: ResumedRun) -> tuple[LossOf, SamplesOf]:
        """Measures the student on solves that it does not learn from, if there are any: its loss, and, for choosing the
        best, its samples."""
        if resumed.heldout is None:
            return (lambda step: {}), (lambda step: {})
        cfg, at_once = self.cfg, min(resumed.split.micro_batch_size, MOST_AT_ONCE)
        loss = HeldOutLoss(self.method, resumed.heldout, resumed.store, cfg.seed, at_once)
        if not self.best.follows:
            return partial(loss.parts, resumed.engine), lambda step: {}
        steps, sampling = cfg.validation_sampling_steps, self.method.sampling
        schedule = open_teacher(cfg.model).schedule
        samples = HeldOutSamples(resumed.heldout, schedule, sampling, steps, cfg.seed, at_once)
        return partial(loss.parts, resumed.engine), partial(samples, resumed.engine)

    def _check_best(self, heldout: Store | None) -> None:
        """Raises ConfigError where the best is to be chosen by nothing that this run measures."""
        has: set[str] = set()
        if heldout is not None:
            has = {DISTANCE, *[CONSISTENCY] * (heldout.index.times[0] == open_teacher(self.cfg.model).schedule.T)}
            has |= {HELDOUT} if self.method.held_out(0) is not None else set()
        if self.cfg.validation_prompts is not None and self.cfg.validation_reward is not None:
            has.add(REWARD)
        if self.best.follows and not has & set(self.best.measures):
            key = "choose" if self.best.choose else "stop"
            raise ConfigError(
                f"best.{key}=true: this run measures none of {', '.join(self.best.measures)}: give its store held-out "
                f"solves (distill trajectories data.heldout_samples=64), or set validation_prompts, validation_reward "
                f"and best.measures=[{REWARD}]"
            )

    def _recall_best(self, checkpoints: Checkpoints, processes: Processes, state: Mapping[str, Any]) -> None:
        """What the run that resumes had found best; a checkpoint that is gone is none any more."""
        self.best.restore(state.get(BEST, {}))
        found = self.best.found
        if found is not None and self.best.choose:
            if processes.from_main(found.step in dict(checkpoints.found())):
                checkpoints.mark_best(processes, found.step, str(found))
            else:
                self.best.restore({})
        if self.best.follows:
            checkpoints.state = {**checkpoints.state, BEST: self.best.state()}

    def _catch_up(self, resumed: ResumedRun, observers: Observers, watchdog: Watchdog) -> None:
        """Judges the checkpoint that the run resumes from, if it was to be: it is saved before its validation."""
        step, best, processes = resumed.step, self.best, resumed.engine.processes
        due = step == self.cfg.max_train_steps or step % self.cfg.validation_steps == 0
        if not best.follows or step == 0 or not due or best.has_read(step):
            return
        rows = processes.from_main(read_metrics(self.folder, step) if processes.is_main else [])
        logged = any(row["step"] == step and name in row for row in rows for name in MEASURES)
        with watchdog.over(f"the validation of step {step}"):
            if logged:
                observers.validate(step)
                best.read(observers.samples(), step, self.health.alarms)
            else:
                observers.validate_and_log(step)
            note_best(resumed.checkpoints, resumed.engine, step, best)

    def tracker(self, resumed: ResumedRun) -> Tracker:
        """Where metrics go; those after the step from which the run resumes are removed."""
        cfg, processes, step = self.cfg, resumed.engine.processes, resumed.step
        if processes.is_main:
            cut_after(self.folder / SKIPPED, step)
        self.health.forget()
        self.health.recall(processes.from_main(read_metrics(self.folder, step)))
        settings = cfg.model_dump(mode="json")
        return open_trackers(cfg.tracking, self.folder, settings, resume_step=step, main=processes.is_main)

    def validation(self, engine: Engine) -> Callable[[Tracker, int], tuple[dict[str, float], list[float]]]:
        """Samples the validation's prompts, if there are any: scalars, and the score of each picture, if it has one.

        Text encoders are needed once, and dropped.
        """
        cfg = self.cfg
        if cfg.validation_prompts is None:
            return lambda tracker, step: ({}, [])
        with checking("validation_prompts: "):
            prompts = read_prompts(cfg.validation_prompts)
        teacher = open_teacher(cfg.model, parts=("text", "vae"))
        with checking("validation_sizes: "):
            sizes = validation_sizes(cfg, teacher, len(prompts))
        conditioning, shapes = encoded(teacher, prompts, sizes), [latent_shape(teacher, size) for size in sizes]
        same = teacher.encode(prompts, sizes[0]) if len(set(sizes)) > 1 else conditioning
        ends = ends_of(cfg, engine, teacher, conditioning, sizes, self.folder)
        del teacher.parts["text"]
        guidance = {"guidance": torch.full((len(prompts),), cfg.validation_guidance)}
        conditioning, same = conditioning | guidance, same | guidance
        steps, seeds = cfg.validation_sampling_steps, cfg.validation_diversity_seeds
        reward = (
            build(cfg.validation_reward) if cfg.validation_reward is not None and engine.processes.is_main else None
        )
        validation = Validation(
            teacher, prompts, conditioning, steps, cfg.seed, seeds, self.method.sampling, ends, reward, shapes, same
        )
        return lambda tracker, step: (validation(engine, tracker, step), validation.scores)


def train_run(cfg: TrainSettings, counting: Counting | None = None) -> int:
    """Assembles, resumes and trains a run, with its folder locked; returns its exit code, and 0 if it has finished.

    Args:
        counting: see `Run.resume`.

    Raises:
        ConfigError: what the user has to correct, one line.
    """
    folder, first = Path(cfg.output_dir), launched_rank() == 0
    with checking():
        require_one_task()
        device = own_device()
        watchdog = Watchdog(cfg.watchdog_minutes, launched_rank(), folder, launched_world_size())
    if first:
        prepare_folder(folder)
    between = "the run, between its steps, checkpoints and validations"
    with within_memory(TRAINING_ADVICE), watchdog, watchdog.over(between), ExitStack() as held:
        with watchdog.over("the teacher's configs, its hash, and the store's index"):
            run = Run.assemble(cfg)
        if first:
            run.say_device(device)
        with writing(folder):
            held.enter_context(RunLock(folder, takes=first))
            open_run(run.cfg)
        if finished(folder, cfg.max_train_steps, cfg.best.get("stop", False)):
            log.info("%s has taken its %d steps already: nothing is done, or written", folder, cfg.max_train_steps)
            return 0
        if first:
            note_data(folder, run.store)
        with checking():
            resumed = run.resume(watchdog, counting)
        return run.train(resumed, watchdog)


def passing_over(resumed: ResumedRun, step: int, history: History) -> ResumedRun:
    """A run that resumes at `step` after what it has gone back for; its checkpoints and metrics say so from now on."""
    kept = {key: value for key, value in resumed.checkpoints.state.items() if key != PASSED}
    passed = [list(one) for one in history.passed]
    resumed.checkpoints.state = kept | ({PASSED: passed} if passed else {})
    resumed.engine.bands.rollbacks = len(history.rollbacks)
    return replace(resumed, step=step, history=history)


def first_of(batches: Iterator[Batch]) -> Batch | None:
    """The first batch; None if it cannot be had, of which the loop will make something."""
    try:
        return next(batches)
    except (StoreError, ReadError):
        return None


def sizes_said(store: Store) -> str:
    """How many samples of each size there are, for people; nothing where there is one size."""
    found = store.by_size().items() if store.index.sizes else ()
    said = ", ".join(f"{len(samples)} of {store.index.image_sizes[number]}" for number, samples in found)
    return said and f": {said}; each step is of one size"


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
    """The settings with what the student's leave to its start: so recorded, the run can be exported without that."""
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


class Validating:
    """All that a run measures at a validation.

    Args:
        shown: the validation's prompts: scalars, and the score of each picture.
        losses: on held-out solves, `HeldOutLoss.parts`; compared: what `HeldOutSamples` finds.
    """

    def __init__(
        self,
        shown: Callable[[Tracker, int], tuple[dict[str, float], list[float]]],
        losses: LossOf,
        compared: SamplesOf,
    ) -> None:
        self._shown, self._losses, self._compared = shown, losses, compared
        self._samples: dict[str, list[float]] = {}

    def __call__(self, tracker: Tracker, step: int) -> dict[str, float]:
        """The scalars after so many steps; pictures go to the tracker."""
        (found, scores), losses, compared = self._shown(tracker, step), self._losses(step), self._compared(step)
        self._samples = {name: [loss for loss, _ in parts] for name, parts in losses.items()} | compared
        self._samples |= {REWARD: scores} if scores else {}
        means = {name: mean_of(parts) for name, parts in losses.items()}
        for name, values in compared.items():
            means |= {name: fmean(values), f"{name}_se": error_of(values)}
        return {**found, **means}

    def samples(self) -> dict[str, list[float]]:
        """What each sample of the last validation measured, by the measure's name."""
        return self._samples


def best_of(cfg: TrainSettings, method: Method, main: bool) -> Best:
    """What chooses the run's best checkpoint, by the measures of the settings, or else those of the method."""
    best: Best = build(cfg.best, main=main)
    best.measures = best.measures or method.judged_by
    return best


def health_of(cfg: TrainSettings, method: Method, main: bool) -> Health:
    """The run's alarms, which know what the method's adversarial training is logged as."""
    health: Health = build(cfg.health, main=main)
    health.adversarial = method.adversarial
    return health


def recipe_of(cfg: TrainSettings, method: Method, rate: LearningRate, name: str) -> TrainingRecipe:
    """How a network is trained; for those beside the student an average is kept only if the method requires it."""
    averaged = name == "student" or f"{name}_ema" in method.requires
    schedule = partial(scheduled, cfg, method, rate, name)
    multipliers = cfg.learning_rate_multipliers if name == "student" else {}
    return TrainingRecipe(build(cfg.optimizer), schedule, cfg.ema_decay if averaged else None, multipliers)


def scheduled(cfg: TrainSettings, method: Method, rate: LearningRate, name: str, step: int) -> float:
    """The factor of `learning_rate` at a step: the schedule's, times that of the method's own rate, if it has one."""
    return rate(step) * (method.learning_rate(step, name) or cfg.learning_rate) / cfg.learning_rate


def validation_sizes(cfg: TrainSettings, teacher: Teacher, prompts: int) -> list[ImageSize]:
    """The size of each prompt's picture: those of the settings in turn, or the teacher's square.

    Raises:
        ValueError: sizes that the teacher cannot have.
    """
    sizes = read_sizes(cfg.validation_sizes) if cfg.validation_sizes else (square(teacher.resolution),)
    require_sizes(teacher, sizes)
    return list(islice(cycle(sizes), prompts))


def encoded(teacher: Teacher, prompts: Sequence[str], sizes: Sequence[ImageSize]) -> dict[str, torch.Tensor]:
    """The conditioning of prompts for pictures of these sizes, [B, ...]."""
    if len(set(sizes)) == 1:
        return teacher.encode(prompts, sizes[0])
    parts = [teacher.encode([prompt], size) for prompt, size in zip(prompts, sizes, strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def ends_of(
    cfg: TrainSettings,
    engine: Engine,
    teacher: Teacher,
    conditioning: Mapping[str, torch.Tensor],
    sizes: Sequence[ImageSize],
    folder: Path,
) -> Sequence[torch.Tensor] | None:
    """The teacher's end points from the validation's noise; generated once per run, by all ranks together."""
    if not cfg.validation_teacher_steps:
        return None
    steps, processes = cfg.validation_teacher_steps, engine.processes
    guidance = cfg.data.guidance if isinstance(cfg.data.guidance, float) else cfg.validation_guidance
    seeds = validation_seeds(cfg.seed, len(next(iter(conditioning.values()))))

    def make() -> Sequence[torch.Tensor]:
        progress = Progress("the teacher's own pictures", len(seeds), "pictures")
        empty = {name: value.to(processes.device) for name, value in teacher.unconditional().items()}
        advance = progress.update if processes.is_main else lambda n: None
        with model_itself(cfg, engine) as denoiser:
            follow = guided(denoiser, empty, guidance)
            shapes = [latent_shape(teacher, size) for size in sizes]
            return teacher_ends(teacher, follow, conditioning, seeds, steps, processes, advance, shapes)

    said = [] if cfg.validation_sizes is None else list(map(str, sizes))
    return kept_ends(folder / "validation.safetensors", seeds, steps, guidance, processes, make, said)


@contextmanager
def model_itself(cfg: TrainSettings, engine: Engine) -> Iterator[Denoiser]:
    """The model's own network, for sampling: the one that is on the device, where it is; else a frozen one, loaded.

    Enter it on all ranks.
    """
    with engine.inference("student") as student:
        if isinstance(student, NetworkDenoiser) and lora_layers(student.module):
            yield replace(student, adapter=None)
            return
    if "teacher" in engine.names and cfg.teacher is None:
        with engine.inference("teacher") as teacher:
            yield teacher
        return
    loaded = open_teacher(cfg.model, parts=("network",), dtype=engine.frozen_dtype).to(engine.processes.device)
    with torch.no_grad():
        yield loaded.denoiser()
