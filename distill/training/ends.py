"""How a run ends, as the exit code and the console say it."""

from __future__ import annotations

import logging
from pathlib import Path

from tqdm import tqdm

from distill.cluster.scheduler import note_wrong_machines
from distill.data.errors import AGAIN, ReadError, StoreError
from distill.training.best import Best
from distill.training.health import Health
from distill.training.launched import launched_rank
from distill.training.rank_writes import WriteError
from distill.training.replicas import WrongMachine

log = logging.getLogger("distill")

PREEMPTED = AGAIN  # saved, and to be run again
NOT_SAVED = 74  # EX_IOERR: the last checkpoint could not be written
WRONG_MACHINE = 76  # one computes or remembers wrongly: to be run again, on others
DAMAGED = 2  # data that were damaged: as wrong settings, they have to be repaired first
UNHEALTHY = 3  # an alarm, or losses that are not finite, have ended the run; it is not to be run again as it is


def exit_code(step: int, max_train_steps: int, health: Health, failure: Exception | None, best: Best) -> int:
    """0 for a run that has taken its steps or no longer gets better; otherwise why not, which rank 0 says in a line."""
    say = log.error if launched_rank() == 0 else log.debug
    if failure is not None:
        saved = isinstance(failure, (ReadError, StoreError)) and step > 0
        if isinstance(failure, WrongMachine) and launched_rank() == 0:
            note_wrong_machines(failure.machines)
        say("%s%s", failure, f"; saved at step {step}: the same command resumes from there" if saved else "")
        codes = {WrongMachine: WRONG_MACHINE, WriteError: NOT_SAVED, ReadError: PREEMPTED, StoreError: DAMAGED}
        return next((code for kind, code in codes.items() if isinstance(failure, kind)), UNHEALTHY)
    if health.ends_run:
        say("ended at step %d, for %s; health.stop=false continues", step, " and ".join(health.alarms))
        return UNHEALTHY
    if best.ends_run:
        say_why = log.info if launched_rank() == 0 else log.debug
        say_why("ended at step %d of %d: %s; best.stop=false continues", step, max_train_steps, best.reason)
        return 0
    return 0 if step == max_train_steps else PREEMPTED


def say_end(code: int, folder: Path, step: int, total: int, seconds: float, interrupted: bool, best: Best) -> None:
    """What came of a run that nothing has ended before its time, and what is to be typed next, on the console."""
    if code == 0 and best.choose and best.found is not None:
        log.info("the best checkpoint, which distill export takes, is that of step %d: %s", best.found.step, best.found)
    if code == 0:
        took = tqdm.format_interval(int(seconds))
        log.info(
            "finished: %d steps, %s since this start; the run is %s, next is: distill export run=%s output_dir=FOLDER",
            *(step, took, folder, folder),
        )
    elif code == PREEMPTED:
        why = "interrupted" if interrupted else "stopped"
        log.info("%s: saved at step %d of %d; the same command resumes from there", why, step, total)
