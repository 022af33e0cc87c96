"""How the code is kept: names that stand once, functions that fit on a screen, no module that imports itself."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 60  # of a function, its docstring included


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "distill").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def named_twice(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Classes of one name in several modules, with those modules."""
    places = defaultdict(list)
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    return {name: found for name, found in places.items() if len(found) > 1}


def long_functions(trees: dict[str, ast.Module]) -> list[str]:
    found = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
                if (lines := node.end_lineno - node.lineno + 1) > MAX_LINES:
                    found.append(f"{module}.{node.name} has {lines} lines")
    return found


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which modules each one imports, in its functions too; a name of a package that is a module is that module."""
    return {module: {name for name in _imported(tree) if name in trees} - {module} for module, tree in trees.items()}


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The modules that import each other, directly or by way of others: strongly connected ones (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            together = [stack.pop()]
            while together[-1] != module:
                together.append(stack.pop())
            if len(together) > 1:
                found.append(sorted(together))

    for module in graph:
        if module not in number:
            visit(module)
    return found


def test_no_class_name_stands_for_two_things() -> None:
    assert named_twice(modules()) == {}


def test_no_function_is_longer_than_a_screen() -> None:
    assert long_functions(modules()) == []


def test_no_modules_import_each_other() -> None:
    """Imports inside functions count: they hide a circle, and do not open it."""
    assert circles(imports(modules())) == []


def test_no_module_is_found_by_where_a_script_lies() -> None:
    """Whatever is imported is in the package or installed, and nothing is added to `sys.path`."""
    beside = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {"scripts", "tests"}
    for module, tree in modules().items():
        assert {name.partition(".")[0] for name in _imported(tree)}.isdisjoint(beside), module
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, module
            assert not isinstance(node, ast.Attribute) or ast.unparse(node) != "sys.path", module


@pytest.mark.parametrize(
    "sources, wanted",
    [
        ({"a": "import b", "b": "def f():\n    from a import x"}, [["a", "b"]]),
        ({"a": "import b", "b": "from c import y", "c": "import a"}, [["a", "b", "c"]]),
        ({"a": "import b, c", "b": "import c", "c": ""}, []),
    ],
)
def test_a_circle_is_found(sources: dict[str, str], wanted: list[list[str]]) -> None:
    assert circles(imports({name: ast.parse(source) for name, source in sources.items()})) == wanted


def test_a_name_twice_and_a_long_function_are_found() -> None:
    long = "def f():\n" + "    x = 1\n" * MAX_LINES
    trees = {name: ast.parse("class A: pass\n" + long) for name in "ab"}
    assert named_twice(trees) == {"A": ["a", "b"]}
    assert long_functions(trees) == [f"{name}.f has {MAX_LINES + 1} lines" for name in "ab"]
