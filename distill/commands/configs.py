"""Lists what can be chosen by name, and writes a file out to be edited: `distill configs`

distill configs                                        # groups, and what each has
distill configs experiment                             # the files of one group, a line each
distill configs show experiment/lcm_lora_sdxl          # one file, as it is
distill configs copy experiment/lcm_lora_sdxl          # to ./configs/experiment/my_lcm_lora_sdxl.yaml
distill configs copy experiment/lcm_lora_sdxl mine     # under another name, for experiment=mine
"""

from __future__ import annotations

import sys
from pathlib import Path

from distill.config.composition import CONFIGS, config_dirs, group_files
from distill.config.mistakes import ConfigError, suggest


def main() -> int:
    """Runs the command line; returns the exit code."""
    try:
        found = answer(sys.argv[1:])
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found)
    return 0


def answer(arguments: list[str]) -> str:
    """The answer to a command line.

    Raises:
        ConfigError: there is no such group, file or action.
    """
    if not arguments:
        return "\n".join(f"{group}: {', '.join(sorted(group_files(group)))}" for group in groups())
    if arguments[0] in ("-h", "--help"):
        return (__doc__ or "").strip()
    if arguments[0] == "show" and len(arguments) == 2:
        return found(arguments[1]).read_text(encoding="utf-8").rstrip()
    if arguments[0] == "copy" and len(arguments) in (2, 3):
        return copied(*arguments[1:])
    if len(arguments) == 1 and arguments[0] not in ("show", "copy"):
        files = group_files(known(arguments[0], groups()))
        width = max(map(len, files))
        return "\n".join(f"{name:<{width}}  {first_comment(path)}" for name, path in sorted(files.items()))
    raise ConfigError(
        f"distill configs {' '.join(arguments)}: allowed are GROUP, show GROUP/NAME, copy GROUP/NAME [NEW]"
    )


def groups() -> list[str]:
    """The folders of `configs/`."""
    folders = [path for root in config_dirs() for path in root.iterdir() if path.is_dir()]
    return sorted({folder.name for folder in folders if any(folder.glob("*.yaml"))})


def known(name: str, allowed: list[str]) -> str:
    """The name, if it is allowed. Raises ConfigError."""
    if name not in allowed:
        raise ConfigError(f"unknown {name[:60]!r}{suggest(name, allowed)}; allowed: {', '.join(allowed)}")
    return name


def found(name: str) -> Path:
    """The file of `GROUP/NAME`, or of a command's settings. Raises ConfigError."""
    first, _, rest = name.removesuffix(".yaml").partition("/")
    group, file = (first, rest) if rest else ("", first)
    files = group_files(known(group, groups())) if group else {path.stem: path for path in CONFIGS.glob("*.yaml")}
    return files[known(file, sorted(files))]


def copied(name: str, new: str | None = None) -> str:
    """Writes `GROUP/NAME` to `./configs`, and says where; nothing is overwritten. Raises ConfigError."""
    source = found(name)
    group = name.partition("/")[0] if "/" in name else ""
    if not group:
        raise ConfigError(f"{name} is no file of a group: those of commands are not replaced, their keys are set")
    target = Path("configs") / group / f"{new or 'my_' + source.stem}.yaml"
    if target.exists() or target.stem in group_files(group):
        raise ConfigError(f"there is a {group}={target.stem} already: give the copy another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return f"{target}: choose it with {group}={target.stem}, from this folder"


def first_comment(path: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".")
