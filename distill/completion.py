"""Completion of command lines in a shell: commands, settings, files of groups, values and flags.

    eval "$(distill -sc install=bash)"        # zsh likewise; fish: distill -sc install=fish | source

The shell runs `distill -sc query=bash` whenever Tab is pressed, with the line in COMP_LINE and the cursor's place in
COMP_POINT, which is empty where the line ends at the cursor: the protocol is Hydra's. Where nothing is found the shell
completes paths. Nothing here loads torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.commands import COMMANDS, Command
from distill.commands.configs import groups
from distill.commands.flags import SHOWS, WITH_VALUE, WORDS
from distill.commands.multirun import FLAGS as MULTIRUN
from distill.config.composition import add_config_dir, group_files, groups_of
from distill.config.describe import named_values
from distill.config.loading import ConfigError, keys_of
from distill.config.overrides import fields_of, kinds_of
from distill.studies.study import STUDIES

FLAGS = ("-sc", "--shell-completion")
BASH = r"""
_distill() {
    local line="${COMP_LINE:0:COMP_POINT}" cut="" IFS=$'\n'
    local word="${line##*[[:space:]]}"
    case "$COMP_WORDBREAKS" in *=*) cut="${word%"${word##*[=:]}"}" ;; esac # where bash begins a word of its own
    COMPREPLY=($(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" distill -sc query=bash 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    return 0
}
complete -o default -F _distill distill
"""
ZSH = r"""
_distill() {
    local -a found settings
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX" # of this command alone, whatever precedes it
    found=("${(@f)$(COMP_LINE="$line" COMP_POINT= distill -sc query=zsh 2>/dev/null)}")
    found=(${found:#})
    settings=(${(M)found:#*=}) found=(${found:#*=})
    if (( ! $#found && ! $#settings )); then compset -P '*='; _files; return; fi
    (( $#settings )) && compadd -Q -S '' -- $settings
    (( $#found )) && compadd -Q -- $found
    return 0
}
compdef _distill distill
"""
FISH = r"""
function __distill
    env COMP_LINE=(commandline -cp | string collect) COMP_POINT= distill -sc query=fish 2>/dev/null
end
complete -c distill -a '(__distill)'
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
UNINSTALL = {"bash": "complete -r distill", "zsh": "compdef -d distill", "fish": "complete -c distill -e"}


def answer(argument: str) -> str:
    """What `distill -sc install=SHELL`, `uninstall=SHELL` or `query=SHELL` prints.

    Raises:
        ConfigError: it is none of them.
    """
    what, _, shell = argument.partition("=")
    if what not in ("install", "uninstall", "query") or shell not in SHELLS:
        raise ConfigError(f"-sc {argument}: allowed are install=, uninstall= and query={'|'.join(SHELLS)}")
    if what == "install":
        return SHELLS[shell].strip()
    if what == "uninstall":
        return UNINSTALL[shell]
    line = os.environ.get("COMP_LINE", "")
    return "\n".join(completed(line[: int(os.environ.get("COMP_POINT") or len(line))]))


def completed(line: str) -> list[str]:
    """What the last word of a line, which begins with the program's name, may become."""
    *before, word = line.split()[1:] if line[-1:].strip() else [*line.split()[1:], ""]
    try:
        return sorted({found for found in _possible(before, word) if found.startswith(word)})
    except ConfigError:  # a mistake in the line is said when it is run
        return []


def _possible(before: Sequence[str], word: str) -> Iterator[str]:
    """What may stand where `word` does; more than begins like it. Raises ConfigError."""
    if before[:1] == ["launch"]:  # its own flags, and then a command
        before = before[next((i for i, one in enumerate(before) if i and one in COMMANDS), len(before)) :]
    if not before:
        yield from (*COMMANDS, "--help", "--version", *FLAGS)
    elif before[0] == "configs":
        yield from _configs(before[1:])
    elif before[0] == "study" and len(before) == 1:
        yield from STUDIES
    else:
        table: Mapping[str, Command] = STUDIES if before[0] == "study" else COMMANDS
        command = table.get(before[1 if before[0] == "study" else 0])
        yield from _of_command(command, before[1:], word) if command else ()


def _configs(before: Sequence[str]) -> Iterator[str]:
    if not before:
        yield from (*groups(), "show", "copy")
    elif before in (["show"], ["copy"]):
        yield from (f"{group}/{name}" for group in groups() for name in group_files(group))


def _of_command(command: Command, before: Sequence[str], word: str) -> Iterator[str]:
    """Flags and settings of a command."""
    last = before[-1] if before else ""
    yield from ("--help", "-h")
    if command.settings is None:
        return
    for flag, folder in zip(before, before[1:], strict=False):
        if WITH_VALUE.get(flag) == "DIR":
            add_config_dir(folder)
    fields = fields_of(command.settings)
    if last in SHOWS:
        yield from WORDS[SHOWS[last]]
    if WITH_VALUE.get(last) == "KEY":
        yield from keys_of(command.settings)
    elif last in WITH_VALUE:
        return
    elif word.startswith("-"):
        yield from (*SHOWS, *WITH_VALUE, *MULTIRUN)
    elif "=" in word:
        yield from _values(command.config, fields, word)
    else:
        for key in command.words[: 1 + len([one for one in before if "=" not in one])]:
            yield from named_values(fields[key])
        yield from (f"{key}=" for key in (*keys_of(command.settings), *_groups(command.config)))


def _groups(config: str) -> list[str]:
    return [group.key for group in groups_of(config).values()]


def _values(config: str, fields: Mapping[str, Any], word: str) -> Iterator[str]:
    """Whole words `key=value`; of several values, the last one is completed."""
    key, _, written = word.partition("=")
    first = written[: written.rfind(",") + 1]
    folder, _, place = key.partition("@")
    group = groups_of(config).get(place or folder)
    hint = fields.get(key)
    values = group.options if group else [*named_values(hint), *(("true", "false") if bool in kinds_of(hint) else ())]
    yield from (f"{key}={first}{value}" for value in values)
