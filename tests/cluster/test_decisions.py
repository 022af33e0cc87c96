"""Whether a job ends or goes back to the queue, for everything that can have become of it."""

from __future__ import annotations

import itertools

import pytest

from distill.cluster.decisions import Attempt, Decision, decide

CODES = (0, 1, 2, 3, 4, 74, 75, 130, 137, 143)
MOST = 3


@pytest.mark.parametrize(
    ("attempt", "decision"),
    [
        (Attempt(0, "step 1", "step 9"), Decision(False, 0, "")),
        (Attempt(0, "step 9", "step 9", stopped=True), Decision(False, 0, "")),
        (Attempt(2, "a", "b"), Decision(False, 2, "the settings or the data are wrong, see above")),
        (Attempt(3, "a", "b"), Decision(False, 3, "an alarm has ended the run, which is saved at b")),
        (Attempt(143, "a", "b", stopped=True, cancelled=True), Decision(False, 143, "cancelled at b")),
        (
            Attempt(75, "a", "a", stopped=True),
            Decision(False, 1, "stopped before it got any further (a): it needs more time than --time gives"),
        ),
        (Attempt(1, "a", "a"), Decision(False, 1, "ended with exit code 1 and got no further than a")),
        (Attempt(1, "a", "b"), Decision(True, 1, "ended with exit code 1 and is at b: back to the queue")),
        (Attempt(1, "a", "b", failures=3), Decision(True, 1, "ended with exit code 1 and is at b: back to the queue")),
        (
            Attempt(75, "a", "b", failures=9),
            Decision(True, 75, "ended with exit code 75 and is at b: back to the queue"),
        ),
        (Attempt(75, "a", "a"), Decision(True, 75, "ended with exit code 75 and is at a: back to the queue")),
        (Attempt(137, "a", "a"), Decision(True, 137, "ended with exit code 137 and is at a: back to the queue")),
        (Attempt(4, "a", "a", failures=2), Decision(True, 4, "ended with exit code 4 and is at a: back to the queue")),
        (
            Attempt(75, "a", "a", failures=3),
            Decision(
                False, 75, "ended with exit code 75 and has failed 4 times in a row without getting further than a"
            ),
        ),
        (
            Attempt(143, "a", "b", stopped=True, failures=3),
            Decision(True, 143, "ended with exit code 143 and is at b: back to the queue"),
        ),
    ],
)
def test_what_becomes_of_a_job(attempt: Attempt, decision: Decision) -> None:
    assert decide(attempt, MOST) == decision


def test_over_the_whole_table_a_job_is_run_again_only_if_that_may_help() -> None:
    """Every exit code, stopped or not, cancelled or not, further or not, with each count of earlier failures."""
    flags = itertools.product(CODES, (False, True), (False, True), ("a", "b"), range(MOST + 2))
    seen = 0
    for code, stopped, cancelled, after, failures in flags:
        attempt = Attempt(code, "a", after, stopped, cancelled, failures)
        decision = decide(attempt, MOST)
        further = after == "b"
        machine = code in (4, 74, 75) or code > 128
        may_help = code not in (0, 2, 3) and not cancelled and (further or (machine and not stopped))
        counts = not stopped and not further
        assert decision.requeue == (may_help and not (counts and failures >= MOST)), attempt
        assert attempt.failed == (counts and code != 0)
        assert not further or attempt.failures_in_a_row == 0
        assert decision.requeue or (decision.code == 0) == (code == 0), attempt  # a failure never looks like a success
        assert bool(decision.words) == (code != 0) and "\n" not in decision.words
        seen += 1
    assert seen == len(CODES) * 2 * 2 * 2 * (MOST + 2)


@pytest.mark.parametrize("code", CODES[1:])
def test_a_job_that_fails_and_gets_no_further_ends(code: int) -> None:
    """However it fails: no more starts in a row than `max_failures` and one."""
    failures, starts = 0, 1
    while decide(attempt := Attempt(code, "a", "a", failures=failures), MOST).requeue:
        failures, starts = attempt.failures_in_a_row, starts + 1
    assert starts == (MOST + 1 if code in (4, 74, 75) or code > 128 else 1)


def test_a_job_that_gets_further_each_time_is_run_to_its_end_however_often_it_fails() -> None:
    """A run of weeks on machines of which one fails every few days."""
    failures = 0
    for start in range(50):
        attempt = Attempt(137, str(start), str(start + 1), failures=failures)
        assert decide(attempt, MOST).requeue
        failures = attempt.failures_in_a_row
    between = [Attempt(137, "a", "a", failures=2), Attempt(1, "a", "b", failures=3), Attempt(137, "b", "b", failures=0)]
    assert [one.failures_in_a_row for one in between] == [3, 0, 1]
