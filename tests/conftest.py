"""The product's own arithmetic, on one thread, no network, and a fresh global seed for every test."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from distill.training import arithmetic

arithmetic.prepare()  # as every command does before torch is loaded, and for the commands that tests start
import torch  # noqa: E402

arithmetic.settle()
torch.use_deterministic_algorithms(True)  # beside a GPU, too
torch.utils.deterministic.fill_uninitialized_memory = True  # memory that is read before it is written shows as NaN
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@cache
def group_of(file: str) -> str:
    """Of files that start several busy processes, or wait for SLURM, one group each; `file` is relative to the root."""
    if file.startswith("tests/slurm/"):
        return "slurm"
    return "processes" if "mark.distributed" in (ROOT / file).read_text(encoding="utf-8") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take longest first, so that no worker is left with them at the end."""
    first = ("processes", "slurm")
    items.sort(key=lambda item: group_of(item.nodeid.partition("::")[0]) not in first)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `-n 2` a group of files stays with one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # as they were collected
    return Files(config, log)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests may draw from the global generator; whatever ran before, they draw the same."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unlogged() -> Iterator[None]:
    """A command that a test calls in this process logs to that test's standard error, which is closed after it."""
    yield
    for handler in [one for one in logging.root.handlers if type(one).__module__.startswith("distill.")]:
        logging.root.removeHandler(handler)
