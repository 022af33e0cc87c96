"""The product's own arithmetic, on one thread, no network, and a fresh global seed for every test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import pytest

from distill.training import arithmetic

arithmetic.prepare()  # as every command does before torch is loaded, and for the commands that tests start
import torch  # noqa: E402

arithmetic.settle()
torch.use_deterministic_algorithms(True)  # beside a GPU, too
torch.utils.deterministic.fill_uninitialized_memory = True  # memory that is read before it is written shows as NaN
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests may draw from the global generator; whatever ran before, they draw the same."""
    torch.manual_seed(0)
