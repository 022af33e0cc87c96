"""The product's own arithmetic, on one thread, no network, and a fresh global seed for every test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

from pathlib import Path

import pytest

from distill.training import arithmetic

arithmetic.prepare()  # as every command does before torch is loaded, and for the commands that tests start
import torch  # noqa: E402

arithmetic.settle()
torch.use_deterministic_algorithms(True)  # beside a GPU, too
torch.utils.deterministic.fill_uninitialized_memory = True  # memory that is read before it is written shows as NaN
torch.set_num_threads(1)

SLURM = Path(__file__).parent / "slurm"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file stays on one worker, and all that start several processes are on the same one."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    busy = {item.path for item in items if any(item.iter_markers("distributed"))} | set(SLURM.rglob("test_*.py"))
    for item in items:
        item.add_marker(
            pytest.mark.xdist_group("processes" if item.path in busy else f"{item.path.parent.name}/{item.path.stem}")
        )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests may draw from the global generator; whatever ran before, they draw the same."""
    torch.manual_seed(0)
