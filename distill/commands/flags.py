"""What is not `key=value` on a command line: flags, which are Hydra's, and words that stand for a setting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from distill.commands.multirun import FLAGS as MULTIRUN
from distill.config.composition import add_config_dir
from distill.config.information import KINDS as INFORMATION
from distill.config.mistakes import ConfigError
from distill.config.overrides import fields_of, kinds_of

SHOWS = {
    "--help": "help",
    "-h": "help",
    "--cfg": "cfg",
    "-c": "cfg",
    "--info": "info",
    "-i": "info",
}
WORDS = {"help": (), "cfg": ("job", "all"), "info": INFORMATION}
"""What may follow a flag that shows something; the first one is meant where nothing does. job and all are the same."""
WITH_VALUE = {"--config-dir": "DIR", "-cd": "DIR", "--package": "KEY", "-p": "KEY"}
INSTEAD = {
    "--config-name": "choose a file by its group, such as experiment=NAME",
    "--config-path": "folders of further files are given as --config-dir DIR",
    "--resolve": "--cfg prints values that are resolved already: leave it out",
    "--run": "leave it out: a command runs unless -m is given",
    "--hydra-help": "--help says which flags there are",
}
INSTEAD |= {"-cn": INSTEAD["--config-name"], "-cp": INSTEAD["--config-path"]}
"""Flags of Hydra that this command line has in another form."""


@dataclass(frozen=True)
class Flags:
    """A command line, taken apart.

    Args:
        rest: the settings.
        shows: what is to be printed in the place of running: `help`, `cfg`, `info`, or nothing.
        kind: which information, for `info`.
        package: the part of the settings that `cfg` prints; all of them where it is empty.
        several: `-m`: the settings have several values.
    """

    rest: list[str]
    shows: str = ""
    kind: str = ""
    package: str = ""
    several: bool = False


def flags_of(arguments: Sequence[str]) -> Flags:
    """Takes flags and settings apart; `--config-dir DIR` acts from now on. Raises ConfigError."""
    rest, shows, kind, package, several = [], "", "", "", False
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, value = argument.partition("=")
        if name in WITH_VALUE:
            if not equals and not left:
                raise ConfigError(f"{name} is followed by what it means: {name} {WITH_VALUE[name]}")
            value = value if equals else left.pop(0)
            if WITH_VALUE[name] == "DIR":
                add_config_dir(value)
            else:
                package = value
        elif name in SHOWS and (not equals or value in WORDS[SHOWS[name]]):
            if not equals and left and left[0] in WORDS[SHOWS[name]]:
                value = left.pop(0)
            elif not equals and SHOWS[name] == "info" and left and re.fullmatch(r"[a-z-]+", left[0]):
                raise ConfigError(f"{name} {left[0]}: allowed are {', '.join(INFORMATION)}")
            if shows != "help":
                shows, kind = SHOWS[name], value
        elif name in SHOWS:
            raise ConfigError(f"{argument}: allowed are {', '.join(WORDS[SHOWS[name]]) or 'no words'}")
        elif argument in MULTIRUN:
            several = True
        elif name in INSTEAD:
            raise ConfigError(f"{name}: {INSTEAD[name]}")
        else:
            rest.append(argument)
    if package and shows != "cfg":
        raise ConfigError("--package is the part of the settings that --cfg prints: add --cfg")
    return Flags(rest, shows, kind, package, several)


def with_words(arguments: Sequence[str], words: Sequence[str], schema: type[BaseModel]) -> list[str]:
    """The arguments as settings, those without a key under the keys that `words` gives them in turn.

    The last of `words` takes all that are left, if it is a list. A path with a `=` in it is a word, too.

    Raises:
        ConfigError: there are more words than keys.
    """
    bare = [argument for argument in arguments if words and not re.match(r"[-~+]|[\w.@/-]*?\w=(?!=)", argument)]
    bare += [argument for argument in arguments if argument not in bare and words and _is_path(argument)]
    if not bare:
        return list(arguments)
    settings = [argument for argument in arguments if argument not in bare]
    for key in words:
        if bare and kinds_of(fields_of(schema)[key]) == {list}:
            settings.append(f"{key}=[{','.join(map(_quoted, bare))}]")
            bare = []
        elif bare:
            settings.append(f"{key}={bare.pop(0)}")
    if bare:
        raise ConfigError(f"{bare[0]!r} is one word too many: allowed are {' '.join(words).upper()}, and key=value")
    return settings


def _is_path(argument: str) -> bool:
    """Whether the part before a `=` has a slash or a colon in it, which no key of a command with words has."""
    return not argument.startswith("-") and re.search(r"[/:]", argument.partition("=")[0]) is not None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"
