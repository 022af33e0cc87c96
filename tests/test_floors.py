"""The floors of the house, stated once: who may import whom."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "diffusion": 0,
    "data": 1,
    "models": 1,
    "toy": 1,
    "methods": 2,
    "config": 2,
    "cluster": 2,
    "training": 3,
    "evaluation": 3,
    "planning": 4,
    "commands": 5,
    "benchmarks": 6,
    "studies": 6,
}
DOORS = {"__init__.py", "__main__.py", "api.py", "completion.py", "py.typed"}  # of the package: above all rooms

TORCH_ONLY = {"diffusion", "methods"}  # torch and the standard library, and of this project floor 0 alone


def violations(path: Path, source: str) -> list[str]:
    """What in `source`, the module at `path` (distill/room/...), breaks the table; empty if nothing does."""
    room = path.parts[1]
    if room not in FLOORS:
        return [f"{path} is in none of the rooms {', '.join(FLOORS)}"]
    return [
        f"{path}:{line}: {room} (floor {FLOORS[room]}) imports {name}"
        for line, name in imported(path, ast.parse(source))
        if not allowed(room, name)
    ]


def allowed(room: str, name: str) -> bool:
    top, _, rest = name.partition(".")
    if top == "distill":
        other = rest.partition(".")[0]
        if other == room:
            return True
        if room in TORCH_ONLY and other != "diffusion":
            return False
        return other in FLOORS and FLOORS[other] < FLOORS[room]
    if room in TORCH_ONLY:
        return top == "torch" or top in sys.stdlib_module_names
    return top not in {"scripts", "tests"}


def imported(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions too; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            # `from distill import data` names a room; `from distill.data import x` stays in it either way
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("room", FLOORS)
def test_room_imports_from_strictly_lower_floors_only(room: str) -> None:
    modules = sorted((ROOT / "distill" / room).rglob("*.py"))
    assert modules, f"distill/{room} has no modules"
    assert [v for m in modules for v in violations(m.relative_to(ROOT), m.read_text())] == []


def test_every_module_lives_in_a_room() -> None:
    stray = [str(p.relative_to(ROOT)) for p in (ROOT / "distill").iterdir() if p.suffix == ".py" or p.is_dir()]
    stray = [p for p in stray if Path(p).name not in {*FLOORS, *DOORS, "__pycache__"}]
    assert stray == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distill/diffusion/x.py", "import numpy"),
        ("distill/diffusion/x.py", "from distill.methods.base import Turn"),
        ("distill/methods/x.py", "from distill.data.loader import make_loader"),
        ("distill/methods/x.py", "def f():\n    import diffusers"),
        ("distill/methods/x.py", "from ..models import lora"),
        ("distill/data/x.py", "import distill.models.families"),
        ("distill/data/x.py", "from distill import toy"),
        ("distill/evaluation/x.py", "from distill.training.loop import run"),
        ("distill/training/x.py", "from scripts import train"),
        ("distill/attic/x.py", ""),
    ],
)
def test_a_breach_is_found(path: str, source: str) -> None:
    assert len(violations(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distill/diffusion/x.py", "import hashlib, torch.nn\nfrom . import solver"),
        (
            "distill/methods/x.py",
            "from distill.diffusion.solver import ddim_step\nfrom distill.methods.base import Turn",
        ),
        ("distill/data/x.py", "import webdataset\nfrom distill.diffusion.random import generator"),
        ("distill/training/x.py", "from distill.methods.base import Method\nfrom distill.data import loader"),
    ],
)
def test_a_lawful_import_is_not(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


DISTRIBUTIONS = {"PIL": "pillow", "hydra": "hydra-core", "open_clip": "open_clip_torch", "yaml": "pyyaml"}
DISTRIBUTIONS |= {"pydantic_core": "pydantic"}  # which brings it, and whose own parts it is


def test_what_is_imported_is_declared() -> None:
    lines = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\ndev = ")[0]
    declared = {name.lower() for name in re.findall(r'"([\w-]+)', lines)}
    own = {"distill", *sys.stdlib_module_names}
    found = {}
    for path in sorted((ROOT / "distill").rglob("*.py")):
        for line, name in imported(path.relative_to(ROOT), ast.parse(path.read_text())):
            package = name.partition(".")[0]
            if package not in own and DISTRIBUTIONS.get(package, package).lower() not in declared:
                found[f"{path.relative_to(ROOT)}:{line}"] = package
    assert found == {}
