"""Starts a command on several processes: `distill launch --num_processes 8 train engine=zero2 …`

It is `accelerate launch`, with the same flags, run so that what the command says is the last thing said:

- its exit code is that of the process that failed first (2 for a mistake in the settings, 75 for saved and to be run
  again), and nothing is printed about it that the process has said itself;
- the first Ctrl-C, SIGTERM or end of the terminal reaches every process, which saves, however long that takes; a second
  Ctrl-C ends all at once;
- `--num_processes N` starts N processes with no other flag, on CPUs too;
- with `-m` among a command's settings each run of the sweep is launched in its turn.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

from distill.commands import COMMANDS
from distill.commands.multirun import FLAGS as MULTIRUN
from distill.models.devices import gpu_is_used, hide_gpus_if_asked

INTERRUPTED = 130
_SAME_SECONDS = 0.3  # the terminal's Ctrl-C, and the same handed on by a program above this one
_KINDS = ("multi_gpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "tpu", "cpu", "use_parallelism_config")


def main() -> int:
    """Runs the launcher's flags, and a command of `distill` or a script, of the command line; returns the exit code."""
    code = launch(sys.argv[1:])
    return code if code >= 0 else 128 - code  # as shells say it


def launch(arguments: list[str]) -> int:
    """Runs `accelerate launch` with these arguments; returns the exit code of the process that failed first, or 0."""
    logging.disable(logging.ERROR)  # the launchers' own words; what they raise is handled below
    relay = SignalsToChildren()
    relay.listen()  # before seconds of imports
    hide_gpus_if_asked()  # from the ranks: Accelerate sets for a single one that the CPU is not chosen
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Torch's launcher sets a handler that ends all with SIGKILL 30 s after a signal, whatever they have still to save.
    api._terminate_process_handler = relay.hand_on  # type: ignore[assignment]
    parsed = launch_command_parser().parse_args(arguments)
    if parsed.training_script in COMMANDS and not os.path.exists(parsed.training_script):
        if any(flag in parsed.training_script_args for flag in MULTIRUN):
            return launch_each(arguments, parsed.training_script, parsed.training_script_args)
        parsed.training_script_args = [parsed.training_script, *parsed.training_script_args]
        parsed.training_script, parsed.module = "distill", True
    if (parsed.num_processes or 1) > 1 and not any(getattr(parsed, kind, False) for kind in _KINDS):
        parsed.multi_gpu = True
        _use_cpus_if_need_be()
    if parsed.main_process_port is None and (parsed.num_machines or 1) == 1:
        parsed.main_process_port = 0  # any that is free
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            _say(f"rank {rank} was ended by {_name(-first.exitcode)}; its last words, if any, are above")
        return int(first.exitcode)
    except subprocess.CalledProcessError as error:  # one process on one machine
        return error.returncode
    except ValueError as error:  # flags that do not go together
        _say(" ".join(str(error).split()))
        return 2
    return 0


def launch_each(arguments: list[str], name: str, settings: list[str]) -> int:
    """Runs a sweep of a command, each of its runs by a launch with the same flags; returns its exit code."""
    logging.disable(logging.NOTSET)
    flags = arguments[: len(arguments) - len(settings) - 1]
    sys.argv = [f"distill {name}", *settings]
    return COMMANDS[name].run(["launch", *flags, name])


class SignalsToChildren:
    """Hands signals on to what this process has started, which is to save and end; the second Ctrl-C ends it all."""

    def __init__(self) -> None:
        self._interrupted: float | None = None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.hand_on)

    def hand_on(self, number: int, frame: FrameType | None) -> None:
        children = psutil.Process().children()
        if number == signal.SIGINT:
            now = time.monotonic()
            again = self._interrupted is not None and now - self._interrupted > _SAME_SECONDS
            self._interrupted = self._interrupted or now
            if again:
                self._end(children)
        if not children:
            _say("interrupted before any process was started", "")
            os._exit(128 + number)
        for child in children:
            _send(child, signal.Signals(number))

    def _end(self, children: list[psutil.Process]) -> None:
        below = [inner for child in children for inner in _below(child)]
        for process in (*children, *below):
            _send(process, signal.SIGKILL)
        os._exit(INTERRUPTED)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        pass


def _use_cpus_if_need_be() -> None:
    if not gpu_is_used():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name} (the machine was out of memory, or somebody sent it)" if name == "SIGKILL" else name


def _say(line: str, kind: str = "error: ") -> None:
    print(f"{kind}{line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
