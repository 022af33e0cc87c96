"""What a class or function takes, read from its source: a setting can be checked before torch is loaded.

Only what a reader sees at once is understood: arguments with built-in types, dataclasses, imported names, base classes.
What is not understood is `UNKNOWN`, and left to the check of the real signature.
"""

from __future__ import annotations

import ast
import importlib.util
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

UNKNOWN = Any
PLAIN: dict[str, Any] = {
    **{plain.__name__: plain for plain in (int, float, str, bool, list, tuple, dict, set)},
    **{"Sequence": Sequence, "Mapping": Mapping, "Iterable": Iterable, "Iterator": Iterator, "Callable": Callable},
    **{"Any": Any, "Annotated": Annotated, "Literal": Literal, "Optional": Optional, "Union": Union, "None": None},
    **{"List": list, "Tuple": tuple, "Dict": dict},
}
MAX_HOPS = 8  # imports and base classes that are followed


class NoSuchName(ValueError):
    """There is no such module, or it does not define or import the name."""


def parameters(module: str, name: str) -> dict[str, Any] | None:
    """The arguments of a class or function by name, each with its type, or `UNKNOWN`; None if they cannot be read.

    Raises:
        NoSuchName: there is no such thing.
    """
    return _parameters(module, name, MAX_HOPS)


def defining_module(module: str, name: str) -> str:
    """The module whose source defines a name that `module` defines or imports.

    Raises:
        NoSuchName: there is no such thing.
    """
    return _definition(module, name, MAX_HOPS)[0]


def docstring(module: str) -> str:
    """What a module says of itself; empty for one that says nothing, or cannot be read."""
    source = _source(module)
    return (ast.get_docstring(source[1]) or "") if source else ""


def _parameters(module: str, name: str, hops: int) -> dict[str, Any] | None:
    home, definition = _definition(module, name, hops)
    if isinstance(definition, ast.FunctionDef):
        return _arguments(definition.args, skip=0)
    if not isinstance(definition, ast.ClassDef):
        return None
    for statement in definition.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _arguments(statement.args, skip=1)
    bases = [base.id for base in definition.bases if isinstance(base, ast.Name)]
    if any(_is_dataclass(decorator) for decorator in definition.decorator_list):
        return None if definition.bases else _fields(definition)
    if len(bases) != 1 or len(definition.bases) != 1 or definition.keywords or hops == 0:
        return None
    try:
        return _parameters(home, bases[0], hops - 1)
    except NoSuchName:
        return None


def _definition(module: str, name: str, hops: int) -> tuple[str, ast.stmt]:
    source = _source(module)
    if source is None:
        raise NoSuchName(f"no module {module}")
    path, tree = source
    for statement in reversed(list(_statements(tree.body))):
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and statement.name == name:
            return module, statement
        if isinstance(statement, ast.ImportFrom) and hops:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_absolute(module, path, statement), alias.name, hops - 1)
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, statement
    raise NoSuchName(f"no {name} in {module}")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, and those under its `if` and `try`."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try)):
                for inner in getattr(statement, part, []):
                    yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _absolute(module: str, path: Path, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - statement.level + 1]
    return ".".join([*package, *([statement.module] if statement.module else [])])


@cache
def _source(module: str) -> tuple[Path, ast.Module] | None:
    path = _path(module)
    if path is None:
        return None
    try:
        return path, ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _path(module: str) -> Path | None:
    """Where the source of a module is, found without importing the packages that it is in."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not all(part.isidentifier() for part in inner):
        return None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *inner)
        for found in (path / "__init__.py", path.with_suffix(".py")):
            if found.is_file():
                return found
    return None


def _arguments(arguments: ast.arguments, skip: int) -> dict[str, Any] | None:
    if arguments.kwarg or arguments.vararg:
        return None
    positional = [*arguments.posonlyargs, *arguments.args][skip:]
    return {argument.arg: _type(argument.annotation) for argument in [*positional, *arguments.kwonlyargs]}


def _fields(definition: ast.ClassDef) -> dict[str, Any]:
    fields = (part for part in definition.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name))
    return {field.target.id: _type(field.annotation) for field in fields if isinstance(field.target, ast.Name)}


def _is_dataclass(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Name) and called.id == "dataclass"


def _type(annotation: ast.expr | None) -> Any:
    """A type made of built-in ones alone."""
    if annotation is None:
        return UNKNOWN
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    calls = any(isinstance(node, (ast.Call, ast.Attribute, ast.Lambda)) for node in ast.walk(annotation))
    if calls or not all(name in PLAIN for name in names):
        return UNKNOWN
    try:
        found = eval(compile(ast.Expression(annotation), "<annotation>", "eval"), {"__builtins__": {}}, dict(PLAIN))
    except (TypeError, SyntaxError):
        return UNKNOWN
    return typing.cast(Any, type(None) if found is None else found)
