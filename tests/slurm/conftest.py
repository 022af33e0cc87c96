"""One cluster for all tests of this folder, and what their jobs are about: a tiny teacher and a store of its solves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import python
from tests.slurm.cluster import ROOT, Cluster, cluster, missing
from tests.test_user_commands import PROMPTS, run
from tests.tiny import save_tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if why is not None:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A cluster of two nodes, whose jobs find this project and its Python."""
    for name, value in environment().items():
        os.environ.setdefault(name, value)
    with cluster() as one:
        yield one


def environment() -> dict[str, str]:
    found = {"PYTHON": python(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return found | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of trajectories of a tiny teacher, and of runs that learn from them."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    teacher = f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher', 'sd15')}"
    data = [f"data.prompts={folder}/prompts.txt", "data.num_samples=24", "data.samples_per_shard=2"]
    data += ["data.batch_size=2", "data.solver_steps=8", "data.guidance=7.5"]
    sizes = ["global_batch_size=4", "lora_rank=2", "lora_alpha=2", "mixed_precision=no", "dataloader_num_workers=0"]
    return ["experiment=lcm_lora_sd15", teacher, *data, *sizes, "engine=zero2", "log_every=1", "method.skip=125"]


@pytest.fixture(scope="session")
def store(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by one undisturbed process."""
    folder = tmp_path_factory.mktemp("store") / "store"
    run(python(), "scripts/make_trajectories.py", *tiny, f"data.store={folder}")
    return folder
