"""Going back: a run that diverges resumes from its last healthy checkpoint, and passes over the samples seen since.

The samples of steps are a function of the step and of what has been passed over, so what a run has gone back for is all
that has to be kept: in `rollbacks.json` in its folder, and in the state of its checkpoints.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.data.order import BatchShare
from distill.data.storage import write_whole
from distill.training.checkpoint import CheckpointError, Checkpoints, ResumePoint
from distill.training.engine import Engine

log = logging.getLogger(__name__)

ROLLBACKS = "rollbacks.json"
PASSED = "passed_over"  # the key in a checkpoint's state
Passed = tuple[tuple[int, int], ...]
"""Steps, rising, and how many samples are passed over before each: of `BatchShare`."""


@dataclass(frozen=True)
class Rollback:
    """A run has gone back.

    Args:
        step: the steps taken at the checkpoint that it went back to; `diverged`: those it had taken when it did.
        samples: how many are passed over there, over all ranks: those of the steps between.
        why: a line.
    """

    step: int
    diverged: int
    samples: int
    why: str


@dataclass(frozen=True)
class History:
    """What a run has gone back for, oldest first, and what it therefore passes over."""

    rollbacks: tuple[Rollback, ...] = ()
    passed: Passed = ()

    def and_then(self, one: Rollback) -> History:
        """The history with one more. What was passed over later than there is among its samples."""
        passed = {step: samples for step, samples in self.passed if step <= one.step}
        passed[one.step] = passed.get(one.step, 0) + one.samples
        return History((*self.rollbacks, one), tuple(sorted(passed.items())))

    def write(self, folder: Path) -> None:
        """Writes it to the folder of its run."""
        rows = {"rollbacks": [asdict(one) for one in self.rollbacks], PASSED: self.passed}
        write_whole(folder / ROLLBACKS, json.dumps(rows, indent=1) + "\n")


def read_history(folder: Path, state: Mapping[str, Any]) -> History:
    """That of the run in `folder`; one that has not gone back yet passes over what the checkpoint with `state` says,
    which may be of a run that it continues.

    Raises:
        ValueError: the file is damaged; one line.
    """
    path = folder / ROLLBACKS
    inherited = History((), tuple((int(step), int(samples)) for step, samples in state.get(PASSED, ())))
    try:
        text = path.read_bytes().strip(b"\0 \r\n\t")
    except FileNotFoundError:
        return inherited
    if not text:  # emptied by a power loss
        return inherited
    try:
        found = json.loads(text)
        passed = tuple((int(step), int(samples)) for step, samples in found[PASSED])
        return History(tuple(Rollback(**row) for row in found["rollbacks"]), passed)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not say what the run has passed over ({error}): put back what was there"
        ) from None


def samples_between(share: BatchShare, step: int, diverged: int) -> int:
    """How many samples the steps from `step` to `diverged` have, and what is passed over among them."""
    return share.extent(diverged)[0] - share.passed_before(diverged) - share.extent(step)[0]


def gone_back(checkpoints: Checkpoints, engine: Engine) -> ResumePoint | None:
    """Loads the newest intact healthy checkpoint; None if there is none. Call it on all ranks.

    Raises:
        CheckpointError: what is newer cannot be renamed.
    """
    engine.drop_step()
    for step in engine.processes.from_main(checkpoints.healthy_steps() if engine.processes.is_main else []):
        try:
            return checkpoints.resume(engine, step)
        except CheckpointError as error:
            if engine.processes.is_main:
                log.warning("%s; trying the one before", error)
    return None
