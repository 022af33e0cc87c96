"""How every command starts and ends: settings from its command line, its body, and one line for what stops it."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import yaml

from distill.commands.flags import flags_of, with_words
from distill.commands.multirun import multirun
from distill.config import signatures
from distill.config.composition import groups_of
from distill.config.describe import Described, described
from distill.config.information import KINDS as INFORMATION
from distill.config.information import information
from distill.config.loading import Settings, check_components, given, keys_of
from distill.config.mistakes import MAX_LINE, ConfigError, checking, first_line
from distill.config.overrides import check_flags, switches_of
from distill.config.packages import install_line, is_installed
from distill.data.errors import AGAIN, NOT_WRITTEN, NotWritten, ReadError, StoreError, short
from distill.models.devices import hide_gpus_if_asked
from distill.training import arithmetic
from distill.training.launched import follow_launcher, launched_rank, settle

RANK_0_SECONDS = 10.0
S = TypeVar("S", bound=Settings)


def run_script(
    main: Callable[[S], int | None] | str,
    config_name: str,
    schema: type[S],
    command: Sequence[str] = (),
    sweep: str = "",
    words: Sequence[str] = (),
) -> int:
    """What every command calls: settings from the command line, one line and exit code 2 for a user's mistakes.

    `--cfg` prints the composed settings and stops; `settings=FILE` takes what it printed, instead of composing any.
    `--help` says what the command does, and which settings there are, `--info` what they are composed of; `-m` runs it
    with several values of settings.

    Args:
        main: what runs with the settings, or the module whose `main` does, which is imported once they are right. Where
            it returns a number, that is the exit code.
        command: what is typed before the settings, for the runs of a sweep.
        sweep: the module whose `sweep` runs a command line with -m; empty: one combination runs after another.
        words: keys of what may be given without its key.
    """
    try:
        return _answered(main, config_name, schema, command, sweep, words)
    except ReadError as error:
        sys.exit(fail(error, AGAIN))
    except NotWritten as error:
        sys.exit(fail(error, NOT_WRITTEN))
    except (ConfigError, StoreError, FileNotFoundError) as error:
        sys.exit(fail(error))
    except BrokenPipeError:  # an OSError, of which `flushed_output` makes an end
        raise
    except (OSError, ImportError) as error:
        line = surroundings_line(error)
        if line is None:
            raise
        passing = isinstance(error, OSError) and error.errno in _PASSING
        sys.exit(fail(ConfigError(line), IO_ERROR if passing else 2))


def _answered(
    main: Callable[[S], int | None] | str,
    config_name: str,
    schema: type[S],
    command: Sequence[str],
    sweep: str,
    words: Sequence[str],
) -> int:
    """Does what the command line says: prints, sweeps or runs. The arguments are those of `run_script`."""
    flags = flags_of(sys.argv[1:])
    if flags.shows == "help":
        print(help_of(main if isinstance(main, str) else main.__module__, config_name, schema))
        return 0
    check_flags(flags.rest, keys_of(schema), switches_of(schema))
    rest = with_words(flags.rest, words, schema)
    if flags.several and not flags.shows and sweep:
        return int(importlib.import_module(sweep).sweep(config_name, rest))
    if flags.several and not flags.shows:
        return multirun(command, config_name, schema, rest)
    if flags.shows == "info":
        print(information(flags.kind or INFORMATION[0], config_name, schema, rest))
        return 0
    settings = given(rest, config_name, schema)
    if flags.shows:
        print(part_of(settings.model_dump(mode="json"), flags.package))
        return 0
    return _run(main, settings)


def _run(main: Callable[[S], int | None] | str, settings: S) -> int:
    """Runs a command with its settings; returns its exit code."""
    # Nothing above loads torch: what has to be set before it is loaded is set here.
    with checking():
        settle()
    follow_launcher()
    hide_gpus_if_asked()
    deterministic: arithmetic.Deterministic = getattr(settings, "deterministic", "auto")
    arithmetic.prepare(deterministic)
    body: Callable[[S], int | None] = importlib.import_module(main).main if isinstance(main, str) else main
    arithmetic.settle(deterministic, getattr(settings, "matmul_precision", "highest"))
    arithmetic.choose_attention(getattr(settings, "attention", "auto"))
    return body(check_components(settings)) or 0


_MENDABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EROFS,
    errno.ELOOP,
    errno.ENOTEMPTY,
}
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
IO_ERROR = 74  # EX_IOERR, which jobs are run again for


def surroundings_line(error: OSError | ImportError) -> str | None:
    """One line for what is wrong around the program: a path it was given, or a package; None for a bug of its own."""
    if isinstance(error, ImportError):
        if error.name is None:
            return first_line(error)  # a library that says what it lacks
        package = error.name.partition(".")[0]
        missing = f"the package {package} is not installed: {install_line(package)}"
        return None if is_installed(package) else missing
    if error.errno is None:
        return short(error, MAX_LINE)  # libraries' own words about files and networks
    known = error.errno in _PASSING or (error.errno in _MENDABLE and error.filename is not None)
    return _file_line(error) if known else None


def _file_line(error: OSError) -> str:
    said = (error.strerror or type(error).__name__).lower()
    return f"{os.fsdecode(error.filename)}: {said}" if isinstance(error.filename, (str, bytes)) else said


@contextmanager
def flushed_output() -> Iterator[None]:
    """Ends the process quietly, with the exit code shells know, if what reads its output has closed it (`head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def part_of(settings: dict[str, Any], key: str) -> str:
    """Settings as YAML, or what `--package` names of them. Raises ConfigError: there is no such key."""
    found: Any = settings
    for name in key.split(".") if key else ():
        if not isinstance(found, dict) or name not in found:
            raise ConfigError(f"--package {key}: there is no such key; --cfg without it prints them all")
        found = found[name]
    return yaml.safe_dump(found, sort_keys=False).removesuffix("...\n")  # which ends a single value


def help_of(module: str, config_name: str, schema: type[Settings]) -> str:
    """What a command does, by its module's docstring; what can be chosen by name; and every setting."""
    groups = [f"  {group.key}: {', '.join(group.options)}" for group in groups_of(config_name).values()]
    parts = [
        signatures.docstring(module),
        "Settings are given as key=value. --cfg prints those that the command would run with, and runs nothing "
        "(--cfg job and --cfg all are the same; --package KEY prints a part); --info says which files they come from; "
        "--config-dir DIR finds files of your own there, as in ./configs; -m runs the command with every combination "
        "of several values, key=a,b, key=range(1,4) or group=glob(*), and with hydra/sweeper=optuna it searches "
        "key=interval(a,b).",
        *(["Chosen by name (distill configs GROUP says more):\n" + "\n".join(groups)] if groups else []),
        "Settings, with their defaults (???: to be given):\n" + "\n".join(map(_line, described(config_name, schema))),
    ]
    return "\n\n".join(part for part in parts if part)


def _line(one: Described) -> str:
    """A setting for people: the key and its default, and below them what it may be and what it means."""
    said = " ".join(filter(None, [f"({one.kind})" if one.kind else "", one.said]))
    head = f"  {one.key}={one.default}"
    return f"{head:<38}{said}" if len(head) < 38 else f"{head}\n{'':<38}{said}"


def fail(error: Exception, code: int = 2) -> int:
    """Prints the one line of what ends the program; returns its exit code, which is 2 for a mistake.

    Where several ranks fail alike, the first one prints it.
    """
    said = _file_line(error) if isinstance(error, OSError) and error.errno else str(error)
    if launched_rank() > 0:
        time.sleep(RANK_0_SECONDS)  # by then the launcher has ended this one, unless it is alone in it
    print(f"error: {' '.join(said.split())}", file=sys.stderr)
    return code
