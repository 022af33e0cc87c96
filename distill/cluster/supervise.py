"""Supervises a job: `python -m distill.cluster.supervise OUTPUT_DIR/slurm/train.json`, which a batch script runs.

The job saves before its time is up, and goes back to the queue while it gets further. The file is what `distill submit`
has written. Without one, a command and its settings say what to run:

    python -m distill.cluster.supervise train experiment=lcm_lora_sdxl data.store=STORE output_dir=runs/a

Outside SLURM it supervises as well: it then ends with 75 where the job would go back to the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from distill.cluster.by_hand import job_by_hand
from distill.cluster.decisions import AGAIN, ALARM, MISTAKE, Attempt, Decision, decide
from distill.cluster.job import Job
from distill.cluster.progress import progress
from distill.cluster.scheduler import LISTENED, NOTES, WRONG_MACHINES, Alone, Slurm, scheduler, with_signals
from distill.data.storage import make_folder, write_whole

EXCLUDED, MOST_EXCLUDED = "excluded", 4  # the note of machines that a job is kept off, and how many at most
LAST_SECONDS = 60  # before the end of its time, work that has not ended since USR1 is sent TERM


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of the job."""
    try:
        if arguments in ([], ["-h"], ["--help"]):
            print(__doc__)
            return 0 if arguments else MISTAKE
        if len(arguments) == 1 and arguments[0].endswith(".json"):
            job = Job.read(arguments[0])
        else:
            job = job_by_hand(arguments[0], arguments[1:])
        return supervise(job, scheduler())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def supervise(job: Job, cluster: Slurm | Alone) -> int:
    """Runs a job and says what becomes of it; returns its exit code.

    The signals of `LISTENED` are held back from now on, and looked at one after another: none is lost, and none
    interrupts anything.
    """
    listen()
    notes = Path(job.notes) / cluster.job
    make_folder(notes)
    for old in (*notes.glob("exit-*"), notes / WRONG_MACHINES):
        old.unlink(missing_ok=True)
    before = progress(*job.progress)
    work = Work(job, cluster, notes)
    code = work.run()
    after, failures = progress(*job.progress), failures_in(notes)
    attempt = Attempt(code_of(notes, code), before, after, work.stopped, cluster.cancelled(), failures)
    if attempt.failures_in_a_row != failures:
        write(notes / "failures", attempt.failures_in_a_row)
    code = concluded(decide(attempt, job.max_failures), job, cluster, notes)
    if code:  # for the page of a sweep
        write(notes / "code", code)
    return code


def listen() -> None:
    """Holds signals back, for `Work.run` to take. Whoever started this may have ignored them for the time until now."""
    signal.pthread_sigmask(signal.SIG_BLOCK, LISTENED)
    for number in LISTENED:
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Work:
    """The command of a job while it runs.

    Args:
        notes: the folder for the exit codes of the nodes.
    """

    job: Job
    cluster: Slurm | Alone
    notes: Path
    stopped: bool = False
    _deadline: float | None = None

    def run(self) -> int:
        """Runs it to its end; returns its exit code, as shells say it. It has time to save when a signal comes."""
        if signal.sigpending() & {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}:
            self.stopped = True  # before it has begun
            return AGAIN
        environment = {**os.environ, NOTES: str(self.notes), **self.cluster.settings()}
        child = subprocess.Popen(self.job.command, env=environment, preexec_fn=with_signals)
        while (code := child.poll()) is None:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            taken = signal.sigwaitinfo(LISTENED) if left is None else signal.sigtimedwait(LISTENED, left)
            self._handle(child, signal.SIGTERM if taken is None else taken.si_signo)
        return code if code >= 0 else 128 - code

    def _handle(self, child: subprocess.Popen[bytes], number: int) -> None:
        if number == signal.SIGCHLD:
            return
        self.stopped = True
        if number != signal.SIGUSR1:
            self._deadline = None
        elif self._deadline is None:  # what has nothing to save does not listen to USR1
            self._deadline = time.monotonic() + max(0, self.job.grace_seconds - LAST_SECONDS)
        self.cluster.signal(child, number)


def code_of(notes: Path, code: int) -> int:
    """The exit code that counts. srun's own may be that of a node which it killed for another's."""
    answers = {path.read_text().strip() for path in notes.glob("exit-*")}
    for answer in (MISTAKE, ALARM):
        if str(answer) in answers:
            return answer
    return AGAIN if answers == {str(AGAIN)} and code else code


def failures_in(notes: Path) -> int:
    """How many starts of this job in a row have failed without getting any further."""
    try:
        return int((notes / "failures").read_text())
    except (OSError, ValueError):
        return 0


def write(path: Path, number: int) -> None:
    """Writes a small file that is complete or not there, after a power loss too."""
    write_whole(path, f"{number}\n")


def concluded(decision: Decision, job: Job, cluster: Slurm | Alone, notes: Path) -> int:
    """Does and says what was decided; returns the exit code of this start."""
    name = os.environ.get("SLURM_JOB_NAME", job.name)
    if not decision.requeue:
        if decision.words:
            print(f"error: {name}: {decision.words}", file=sys.stderr, flush=True)
        return decision.code
    if isinstance(cluster, Alone):
        print(f"{name} {decision.words.removesuffix(': back to the queue')}: run it again", flush=True)
        exclude(cluster, name, notes)
        return AGAIN
    print(f"{name} {decision.words}", flush=True)
    if cluster.requeue():
        exclude(cluster, name, notes)
        return 0
    print(f"error: {name}: SLURM has not put it back to the queue: submit it again", file=sys.stderr, flush=True)
    return decision.code


def exclude(cluster: Slurm | Alone, name: str, notes: Path) -> None:
    """Keeps a job that is to be run again off the machines that its work has found to be wrong, and says so.

    No more than `MOST_EXCLUDED` in all: what so many find wrong is rather the program.
    """
    earlier = lines(notes / EXCLUDED)
    new = [machine for machine in lines(notes / WRONG_MACHINES) if machine not in earlier]
    if not new:
        return
    if len(earlier) + len(new) > MOST_EXCLUDED:
        said = (
            f"{', '.join(new)} stay: no more than {MOST_EXCLUDED} machines are left out; is the program deterministic?"
        )
    else:
        said = cluster.exclude(new)
        write_whole(notes / EXCLUDED, "".join(f"{machine}\n" for machine in (*earlier, *new)))
    print(f"{name}: {said}", flush=True)


def lines(path: Path) -> list[str]:
    """Those of a small file; none without it."""
    try:
        return path.read_text().split()
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
