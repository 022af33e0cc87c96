"""Whether a job ends, or goes back to the queue: a function of how its work ended and how far it got."""

from __future__ import annotations

from dataclasses import dataclass

MISTAKE = 2  # exit codes of commands: settings or data that are wrong
ALARM = 3  # a run that was ended because it did not learn
HUNG = 4  # something did not come in time: the watchdog's
NOT_WRITTEN = 74  # the last checkpoint could not be written
AGAIN = 75  # saved, and to be run again; or something could not be read
WRONG_MACHINE = 76  # a machine computes or remembers wrongly
OF_THE_MACHINE = frozenset({HUNG, NOT_WRITTEN, AGAIN, WRONG_MACHINE})
BY_SIGNAL = 128  # exit codes above it say which signal has ended the work
NOT_ENOUGH_TIME = 1  # what a job ends with that was stopped before it got any further


@dataclass(frozen=True)
class Attempt:
    """How one start of a job went.

    Args:
        code: the exit code of its work.
        before, after: how far the work was when it started, and is now, in words.
        stopped: whether a signal stopped it, before its time was up or from the cluster.
        cancelled: whether somebody has cancelled the job.
        failures: how many starts in a row, just before this one, have failed without getting any further.
    """

    code: int
    before: str
    after: str
    stopped: bool = False
    cancelled: bool = False
    failures: int = 0

    @property
    def got_further(self) -> bool:
        return self.after != self.before

    @property
    def failed(self) -> bool:
        """Whether it counts among the failures: it ended unasked, and got no further."""
        return self.code != 0 and not self.stopped and not self.got_further

    @property
    def failures_in_a_row(self) -> int:
        """The starts that have failed since the work last got further, this one included."""
        return 0 if self.got_further else self.failures + self.failed

    @property
    def may_be_the_machines_fault(self) -> bool:
        """Whether the same start may go well elsewhere or later: unlike a program's own error, which comes again."""
        return self.code in OF_THE_MACHINE or self.code > BY_SIGNAL


@dataclass(frozen=True)
class Decision:
    """What becomes of a job.

    Args:
        requeue: whether it goes back to the queue.
        code: its exit code, if it does not.
        words: why, for its log; empty if all is well.
    """

    requeue: bool
    code: int
    words: str


def decide(attempt: Attempt, max_failures: int) -> Decision:
    """A job is run again if that may help: it got further, or a machine may have been at fault; but not for ever.

    Args:
        max_failures: so many failures in a row, without any progress between them, are allowed.
    """
    code, after = attempt.code, attempt.after
    if code == 0:
        return Decision(False, 0, "")
    if code == MISTAKE:
        return Decision(False, code, "the settings or the data are wrong, see above")
    if code == ALARM:
        return Decision(False, code, f"an alarm has ended the run, which is saved at {after}")
    if attempt.cancelled:
        return Decision(False, code, f"cancelled at {after}")
    if attempt.stopped and not attempt.got_further:
        words = f"stopped before it got any further ({after}): it needs more time than --time gives"
        return Decision(False, NOT_ENOUGH_TIME, words)
    if not attempt.got_further and not attempt.may_be_the_machines_fault:
        return Decision(False, code, f"ended with exit code {code} and got no further than {after}")
    failures = attempt.failures_in_a_row
    if failures > max_failures:
        words = f"ended with exit code {code} and has failed {failures} times in a row without getting further than "
        return Decision(False, code, words + after)
    return Decision(True, code, f"ended with exit code {code} and is at {after}: back to the queue")
