"""`distill COMMAND …`, which is also `python -m distill COMMAND …` and `accelerate launch -m distill COMMAND …`."""

from __future__ import annotations

import difflib
import re
import sys
from typing import NoReturn

from distill import __version__
from distill.commands import COMMANDS, run
from distill.commands.running import fail, flushed_output
from distill.config import signatures
from distill.config.mistakes import ConfigError

USAGE = """Distils diffusion models into students that sample in 1 to 8 steps.

    distill COMMAND key=value ...        # distill COMMAND --help says what a command does, and its settings
    distill launch --num_processes 8 COMMAND key=value ...

Commands:
{commands}

distill --version says which one this is; eval "$(distill -sc install=bash)" has the shell complete what is typed."""


def main() -> NoReturn:
    """The command line: the name of a command, and its settings."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        with flushed_output():
            print(USAGE.format(commands="\n".join(f"    {name:<13} {summary(name)}" for name in COMMANDS)))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"distill {__version__}")
        sys.exit()
    if arguments[0].partition("=")[0] in ("-sc", "--shell-completion"):
        sys.exit(complete(arguments[1] if len(arguments) == 2 else arguments[0].partition("=")[2]))
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: unknown command {name[:60]!r}{hint}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"{sys.argv[0]} {name}", *arguments[1:]]
    run(name)


def complete(what: str) -> int:
    """Prints what a shell needs to complete command lines, or its completions; returns the exit code."""
    from distill import completion

    with flushed_output():
        try:
            print(completion.answer(what))
        except ConfigError as error:
            return fail(error)
    return 0


def summary(name: str) -> str:
    """The first sentence of what a command says of itself, without loading it."""
    text = " ".join(signatures.docstring(COMMANDS[name].module).split("\n\n")[0].split())
    return re.split(r": `|: |\. ", text)[0].rstrip(":.")


if __name__ == "__main__":
    main()
