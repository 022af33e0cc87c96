"""The training loop: it knows steps, turns, checkpoints and clocks, and no method, network or device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from distill.diffusion.trajectory import Batch
from distill.methods.base import Method
from distill.training.checkpoint import Checkpoints
from distill.training.engine import Engine
from distill.training.health import Health
from distill.training.preemption import Preemption
from distill.training.tracking import Meter, Progress, Tracker


@dataclass(frozen=True)
class Every:
    """After how many steps a thing is done again; it is done after the last one too."""

    log: int
    checkpoint: int
    validate: int


def train(
    method: Method,
    engine: Engine,
    batches: Iterator[Batch],
    *,
    start_step: int,
    max_train_steps: int,
    every: Every,
    meter: Meter,
    progress: Progress,
    tracker: Tracker,
    checkpoints: Checkpoints,
    preemption: Preemption,
    health: Health,
    validate: Callable[[int], Mapping[str, float]],
) -> int:
    """Takes optimizer steps until `max_train_steps`, a signal or an alarm that ends the run; returns the steps in all.

    A step runs every turn of the method, each on the same micro-batches; its number is what metrics, checkpoints and
    schedules count. What `validate` returns is logged.
    """
    step = start_step
    stop = False
    while step < max_train_steps and not stop and not health.ends_run:
        with meter.waiting():
            micro_batches = [next(batches) for _ in range(engine.gradient_accumulation_steps)]
        if method.resets(step):
            engine.reset_optimizers()
        scalars: dict[str, float] = {}
        for turn in method.turns(step):
            scalars |= engine.update(turn, micro_batches, step)
        step += 1
        meter.step()
        progress.step()

        last = step == max_train_steps
        stop = engine.any(preemption.requested)
        if last or stop or step % every.log == 0:
            scalars |= meter.read()
            tracker.log(scalars | health.read(scalars, step), step)
            progress.show(step, scalars)
        if last or stop or step % every.checkpoint == 0:
            checkpoints.save(engine, step)
        if last or (step % every.validate == 0 and not stop):
            if found := validate(step):
                tracker.log({**found, **health.read(found, step)}, step)
        if health.ends_run:
            checkpoints.save(engine, step)
    return step
