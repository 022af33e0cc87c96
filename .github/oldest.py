"""Prints the oldest versions that pyproject.toml allows, `name==version` a line, for a test with exactly those:

    pip install tomli packaging             # Python 3.11 and later need no tomli
    python .github/oldest.py > oldest.txt
    pip install -r oldest.txt -e '.[all,dev]'

The packages are those of [project.dependencies] and of the extras that users install (not `dev`); what they depend on
themselves is left to pip.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def declared(file: Path = PYPROJECT) -> list[str]:
    """The requirements of [project.dependencies] and of the users' extras, as they are written there."""
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    further = [text for name, texts in extras.items() if name not in ("all", "dev") for text in texts]
    return [*project["dependencies"], *further]


def oldest(requirements: Iterable[str]) -> list[str]:
    """Each requirement with its lower bound as its only version, in the order given.

    Raises:
        ValueError: a requirement without exactly one lower bound (`>=`, `~=` or `==`).
    """
    return [_pinned(Requirement(text)) for text in requirements]


def _pinned(requirement: Requirement) -> str:
    bounds = [each.version for each in requirement.specifier if each.operator in (">=", "~=", "==")]
    if len(bounds) != 1 or "*" in bounds[0]:
        raise ValueError(f"{requirement}: one lower bound is needed, as in {requirement.name}>=1.0")
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}{extras}=={bounds[0]}{marker}"


if __name__ == "__main__":
    print("\n".join(oldest(declared())))
