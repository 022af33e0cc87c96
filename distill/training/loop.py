"""The training loop: it knows steps, turns, checkpoints and clocks, and no method, network or device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from distill.data.errors import ReadError, StoreError
from distill.diffusion.trajectory import Batch
from distill.methods.base import Method
from distill.training.best import Best, Samples
from distill.training.checkpoint import BEST, Checkpoints
from distill.training.engine import Engine
from distill.training.health import Health
from distill.training.preemption import Preemption
from distill.training.processes import Processes
from distill.training.tracking import Meter, Tracker, TrainingProgress
from distill.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Every:
    """How many steps lie between two log lines, checkpoints and validations; each also comes after the last step.

    `compare` are the steps between two comparisons of the weights that ranks share; None compares nothing.
    """

    log: int
    checkpoint: int
    validate: int
    compare: int | None = None


@dataclass(frozen=True)
class Observers:
    """What sees a run go by. Nothing that is computed depends on them; `health` and `best` may end the run.

    Attributes:
        meter: times steps; `progress`: shows them on the console; `tracker`: writes scalars and images.
        health: reads alarms from scalars.
        validate: called with the number of steps taken, on all ranks; what it returns is logged.
        best: chooses a checkpoint by `samples`, what the last validation has measured of each sample, on all ranks.
        times: of each rank, from the steps since the last log line and the seconds that this one waited for data.
    """

    meter: Meter
    progress: TrainingProgress
    tracker: Tracker
    health: Health
    validate: Callable[[int], Mapping[str, float]]
    best: Best = field(default_factory=Best)
    samples: Callable[[], Samples] = dict
    times: Callable[[int, float, int], Mapping[str, float]] = lambda steps, waited, step: {}

    @property
    def end_run(self) -> bool:
        """Whether the run is to end before its time; the same on all ranks."""
        return self.health.ends_run or self.best.ends_run

    def step_taken(self) -> None:
        self.meter.step()
        self.progress.step()

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        of_ranks = self.times(*self.meter.since, step)
        scalars = {**scalars, **self.meter.read()}
        self.tracker.log(scalars | self.health.read(scalars, step) | dict(of_ranks), step)
        self.progress.show(step, scalars)

    def validate_and_log(self, step: int) -> None:
        if found := self.validate(step):
            found = {**found, **self.health.read(found, step)}
            found |= self.best.read(self.samples(), step, self.health.alarms)
            self.tracker.log(found, step)
            self.progress.show_validation(step, found)


class NoData(Exception):
    """Some rank could not get its part of a step: raised on all of them, after what was trained is saved.

    `error` is why, a StoreError (damage) or a ReadError; `step` counts the steps taken.
    """

    def __init__(self, error: StoreError | ReadError, step: int) -> None:
        super().__init__(str(error))
        self.error, self.step = error, step


def train(
    method: Method,
    engine: Engine,
    batches: Iterator[Batch],
    *,
    start_step: int,
    max_train_steps: int,
    every: Every,
    observers: Observers,
    checkpoints: Checkpoints,
    preemption: Preemption,
    watchdog: Watchdog,
) -> int:
    """Takes optimizer steps until `max_train_steps`, a signal or an observer that ends the run; returns them in all.

    A step runs every turn of the method, each on the same micro-batches; its number is what metrics, checkpoints and
    schedules count. The next step's micro-batches are fetched while the device computes, before results are read. While
    updates are being skipped or out of their bands, a checkpoint that is due waits until they are not. One that cannot
    be written is a warning, and the next one is tried. The checkpoint that the run ends with, or is stopped with, is
    saved in any case, and must be.

    Raises:
        WriteError: the last checkpoint could not be written.
        Diverged: too many steps in a row were skipped, or a loss or a gradient has left its band.
        NoData: the loader of some rank failed.
        WrongMachine: ranks hold other weights than each other, or a gradient computed twice is not the same.
    """
    step = start_step
    stop = due = False

    count = engine.settings.gradient_accumulation_steps
    micro_batches, problem = _fetched(batches, count if step < max_train_steps else 0, observers, watchdog)
    with watchdog.over("a batch from the loader of another rank"):
        bad = engine.processes.any(problem is not None)
    while step < max_train_steps and not stop and not observers.end_run:
        if bad:
            with watchdog.over(f"the checkpoint of step {step}"):
                if step > start_step:
                    _save(checkpoints, engine, step, must=True)
                raise NoData(_agreed(engine.processes, problem), step)
        with watchdog.over(f"step {step + 1}: its computation, or other ranks in it"):
            _take_turns(method, engine, micro_batches, step)
        if step + 1 < max_train_steps and not preemption.requested:
            micro_batches, problem = _fetched(batches, count, observers, watchdog)
        with watchdog.over(f"step {step + 1}: its computation, or other ranks in it"):
            scalars, (stop, bad) = engine.read(preemption.requested, problem is not None)
        step += 1
        last = step == max_train_steps
        observers.step_taken()
        if last or stop or step % every.log == 0:
            observers.log(scalars, step)
        with watchdog.over(f"the checkpoint of step {step}"):
            due = _saved_or_due(checkpoints, engine, step, due or step % every.checkpoint == 0, last or stop, every)
        with watchdog.over(f"the validation of step {step}"):
            if last or (step % every.validate == 0 and not stop):
                observers.validate_and_log(step)
                note_best(checkpoints, engine, step, observers.best)
        if observers.end_run:
            _save(checkpoints, engine, step, must=True)
    return step


def _fetched(
    batches: Iterator[Batch], count: int, observers: Observers, watchdog: Watchdog
) -> tuple[list[Batch], StoreError | ReadError | None]:
    """This rank's micro-batches of a step, or why there are none: a rank alone must not leave the others waiting."""
    with observers.meter.waiting(), watchdog.over("a batch from the loader"):
        try:
            return [next(batches) for _ in range(count)], None
        except (StoreError, ReadError) as error:
            return [], error


def _agreed(processes: Processes, problem: StoreError | ReadError | None) -> StoreError | ReadError:
    """One of the ranks' problems, the same on all ranks: damage comes before what another try may get past."""
    found = [other for other in processes.gathered(problem) if other is not None]
    return next((error for error in found if isinstance(error, StoreError)), found[0])


def _take_turns(method: Method, engine: Engine, micro_batches: Sequence[Batch], step: int) -> None:
    if method.resets(step):
        engine.reset_optimizers()
    micro_batches = engine.moved(micro_batches)
    for turn in method.turns(step):
        engine.update(turn, micro_batches, step)


def _saved_or_due(checkpoints: Checkpoints, engine: Engine, step: int, due: bool, must: bool, every: Every) -> bool:
    """Saves a checkpoint that must be, or that is due while updates are taken; returns whether one is due still.

    Before that it compares what ranks share, where that is due.
    """
    if every.compare is not None and step % every.compare == 0:
        engine.compare_replicas(step)
    if must or (due and engine.is_healthy()):
        _save(checkpoints, engine, step, must)
        return False
    if step % every.checkpoint == 0 and engine.processes.is_main:
        log.warning("no checkpoint of step %d: it waits until an update is taken again, and within its band", step)
    return due


def note_best(checkpoints: Checkpoints, engine: Engine, step: int, best: Best) -> None:
    """Saves and marks a checkpoint that is the best so far, and notes for the next one what a run resumes with."""
    if not best.follows:
        return
    if best.is_at(step):
        _save(checkpoints, engine, step, must=False)
        if checkpoints.is_saved():  # a mark wants it complete
            checkpoints.mark_best(engine.processes, step, str(best.found))
    checkpoints.state = {**checkpoints.state, BEST: best.state()}


def _save(checkpoints: Checkpoints, engine: Engine, step: int, must: bool) -> None:
    checkpoints.begin(engine, step, must=must)
    if must:
        checkpoints.finish()
