"""One thread, deterministic kernels, no network, and a fresh global seed for every test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import pytest
import torch

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests may draw from the global generator; whatever ran before, they draw the same."""
    torch.manual_seed(0)
