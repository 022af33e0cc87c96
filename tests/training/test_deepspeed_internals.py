"""What is used of DeepSpeed beyond its documentation: in one module, and in the installed version."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from distill.training import deepspeed_internals
from distill.training.deepspeed_internals import IN_ITS_FILES, NAMES
from distill.training.resharding import NotElastic, shared_value
from distill.training.sharding import read_whole

ROOT = Path(__file__).parents[2]
SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([4])}
COMMON = {"optimizer", "PARAM_SHAPES"}  # words that other things are called by, too


def words(path: Path) -> set[str]:
    """All names, attributes and strings of a module's code; its comments and docstrings left out."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs)
    return found | {node.value for node in strings if isinstance(node.value, str)}


def test_no_other_module_names_what_is_private() -> None:
    private = {name for names in NAMES.values() for name in names} - COMMON | IN_ITS_FILES
    for path in sorted((ROOT / "distill").rglob("*.py")):
        if path.name != "deepspeed_internals.py":
            assert private.isdisjoint(words(path)), path


@pytest.mark.parametrize("owner", NAMES)
def test_each_name_is_in_the_installed_version(owner: str) -> None:
    """A class's is an attribute, or set by one of its methods on itself; a module's is in it or in its source."""
    pytest.importorskip("deepspeed")
    try:
        found = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, name = owner.rpartition(".")
        found = getattr(importlib.import_module(module), name)
    source = inspect.getsource(found)
    fields = getattr(found, "__annotations__", {})
    for name in NAMES[owner]:
        is_set = re.search(rf"\b(self|param|\w+)\.{name}\b(\[\w+\])? *(:[^=]*)?=", source)
        assert hasattr(found, name) or name in fields or is_set, name


def test_each_name_of_the_table_is_used() -> None:
    text = Path(deepspeed_internals.__file__).read_text()
    for name in {name for names in NAMES.values() for name in names}:
        uses = re.findall(rf"(?<![\w\"]){name}\b|\"{name}\"", text)
        assert len(uses) > sum(name in names for names in NAMES.values()), name


@pytest.mark.parametrize("path", sorted(IN_ITS_FILES))
def test_what_its_files_hold_can_be_read(path: str) -> None:
    pytest.importorskip("deepspeed")
    module, _, name = path.rpartition(".")
    assert inspect.isclass(getattr(importlib.import_module(module), name))


def test_the_version_is_bounded_as_the_module_says() -> None:
    lines = (ROOT / "pyproject.toml").read_text()
    (bound,) = set(re.findall(r'"(deepspeed[^"]*)"', lines))
    specifier = Requirement(bound).specifier
    assert {part.operator for part in specifier} == {">=", "<"}
    assert deepspeed_internals.__doc__ and f"`{bound.removeprefix('deepspeed')}`" in deepspeed_internals.__doc__


# ---- what no other number of ranks can take over ----------------------------------------------------------------


def saved_by(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """The state after a step, as a rank that holds everything writes it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES.values()]


@pytest.mark.parametrize(
    "kind, settings, keys, shared",
    [
        (torch.optim.AdamW, {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), {"step": 1}),
        (torch.optim.SGD, {"momentum": 0.9}, ("momentum_buffer",), {}),
        (torch.optim.SGD, {}, (), {}),
        (torch.optim.NAdam, {}, ("exp_avg", "exp_avg_sq"), {"step": 1, "mu_product": pytest.approx(0.45, abs=0.01)}),
        (torch.optim.Rprop, {}, ("prev", "step_size"), {"step": 1}),
    ],
)
def test_whatever_an_optimizer_keeps_by_element_or_once_is_taken(
    tmp_path: Path, kind: type, settings: dict[str, object], keys: tuple[str, ...], shared: dict[str, float]
) -> None:
    saved_by(kind(weights(), lr=0.1, **settings), tmp_path)
    state = read_whole(tmp_path, SHAPES)
    assert state.keys == keys and {key: float(value) for key, value in state.shared.items()} == shared
    assert all(state.of(name)[key].shape == shape for name, shape in SHAPES.items() for key in keys)
    assert state.is_empty == (not keys and not shared)


def test_what_an_optimizer_keeps_of_rows_and_columns_is_refused_in_a_line(tmp_path: Path) -> None:
    saved_by(torch.optim.Adafactor(weights()), tmp_path)
    with pytest.raises(NotElastic, match="the optimizer keeps a 'row_var' that is not cut as the weights are: resume"):
        read_whole(tmp_path, SHAPES)


def test_a_number_that_differs_among_weights_is_refused_and_steps_are_the_most(tmp_path: Path) -> None:
    assert shared_value(tmp_path, "step", [torch.tensor(2.0), torch.tensor(3.0)]) == 3
    with pytest.raises(NotElastic, match="keeps a 'mu' of its own for each weight"):
        shared_value(tmp_path, "mu", [0.1, 0.2])


def test_a_folder_without_a_state_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(NotElastic, match="holds no optimizer's state"):
        read_whole(tmp_path, SHAPES)
