"""The product's own arithmetic, on one thread, no network, and a fresh global seed for every test."""

from __future__ import annotations

import logging
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from distill.training import arithmetic

# Tests compute on the CPU, also beside a GPU, unless those that are marked `gpu` are asked for: pytest -m gpu. Workers
# of xdist have no such arguments, and take this over from the process that starts them.
GPU_TESTS = "DISTILL_GPU_TESTS"
if any(" ".join(pair).startswith("-m") and "gpu" in pair[-1] for pair in zip(sys.argv, sys.argv[1:], strict=False)):
    os.environ[GPU_TESTS] = "1"
if GPU_TESTS not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for GPUs

arithmetic.prepare()  # as every command does before torch is loaded, and for the commands that tests start
import torch  # noqa: E402

arithmetic.settle()
torch.use_deterministic_algorithms(True)  # beside a GPU, too
torch.utils.deterministic.fill_uninitialized_memory = True  # memory that is read before it is written shows as NaN
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@cache
def no_gpu() -> str:
    """Why a test that is marked `gpu` cannot run; empty if it can."""
    if GPU_TESTS not in os.environ:
        return "GPUs are hidden from the other tests: run it with pytest -m gpu"
    return "" if torch.cuda.is_available() else "there is no GPU that torch can use"


@cache
def group_of(file: str) -> str:
    """Of files that start several busy processes, or wait for SLURM, one group each; `file` is relative to the root."""
    if file.startswith("tests/slurm/"):
        return "slurm"
    return "processes" if "mark.distributed" in (ROOT / file).read_text(encoding="utf-8") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take longest first, so that no worker is left with them at the end; what needs a GPU is skipped."""
    for item in items:
        if item.get_closest_marker("gpu") is not None and (why := no_gpu()):
            item.add_marker(pytest.mark.skip(reason=why))
    first = ("processes", "slurm")
    items.sort(key=lambda item: group_of(item.nodeid.partition("::")[0]) not in first)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `-n 3` a group of files stays with one worker."""
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
