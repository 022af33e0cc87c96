"""Runs a demonstration on the bundled toy world: `distill study NAME key=value ...`.

Each trains what it needs, is resumed when it is run again, and writes a report with tables and pictures.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from distill.commands import Command, run_command
from distill.config import signatures
from distill.config.settings import (
    CompareSettings,
    LatentLPIPSSettings,
    PlugInSettings,
    SabotageSettings,
    ScoreRewardSettings,
    ShowMLCMSettings,
    ShowSettings,
    SolvesSettings,
    ToyControlSettings,
    ToyTeacherSettings,
)

STUDIES = {
    "compare": Command("distill.studies.compare", "compare", CompareSettings),
    "lightning": Command("distill.studies.lightning", "show_lightning", ShowSettings),
    "mlcm": Command("distill.studies.mlcm", "show_mlcm", ShowMLCMSettings),
    "plug_in": Command("distill.studies.plug_in", "plug_in", PlugInSettings),
    "control": Command("distill.studies.control", "toy_control", ToyControlSettings),
    "latent_lpips": Command("distill.studies.latent_lpips", "latent_lpips", LatentLPIPSSettings),
    "sabotage": Command("distill.studies.sabotage", "sabotage", SabotageSettings),
    "solves": Command("distill.studies.solves", "solves", SolvesSettings),
    "score_reward": Command("distill.studies.score_reward", "score_reward", ScoreRewardSettings),
    "toy_teacher": Command("distill.studies.toy_teacher", "toy_teacher", ToyTeacherSettings),
}


def main() -> int:
    """Runs the command line: the name of a study, and its settings."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip() + "\n\n" + "\n".join(f"    {name:<13} {summary(name)}" for name in STUDIES))
        return 0 if arguments else 2
    if arguments[0] not in STUDIES:
        print(f"error: unknown study {arguments[0][:60]!r}; allowed: {', '.join(STUDIES)}", file=sys.stderr)
        return 2
    sys.argv = [f"{sys.argv[0]} {arguments[0]}", *arguments[1:]]
    run(arguments[0])


def run(name: str) -> NoReturn:
    """Runs a study with the settings of the command line."""
    run_command(["study", name], STUDIES[name])


def summary(name: str) -> str:
    """The first line of what a study says of itself."""
    return signatures.docstring(STUDIES[name].module).split("\n")[0].rstrip(":.")
