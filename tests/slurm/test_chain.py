"""slurm/chain.sh: links as jobs that wait for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.test_run_chain import hydra

STORE = {"name": "store", "script": "make_trajectories"}
VERIFY = {"name": "verify", "script": "verify_shards"}
PICTURES = {"name": "pictures", "script": "sample", "run": "run", "overrides": ["steps=2", "prompts=[snow]"]}


def submitted(
    slurm: Cluster, output_dir: Path, links: list[Any], overrides: list[str], **environment: str
) -> list[str]:
    """Ids of the jobs of a chain, in its order."""
    settings = ["chain=lcm_lora_sd15", f"chain.links={hydra(links)}", f"overrides={hydra(overrides)}"]
    command = ["bash", "slurm/chain.sh", *settings, f"output_dir={output_dir}", "--", "--nodes=2", "--gpus-per-node=1"]
    said = slurm.call(*command, **environment)
    return [line.split()[2].rstrip(",") for line in said.splitlines() if ": job " in line]


def logs(output_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((output_dir / "slurm").glob("*.log")))


def test_a_link_that_fails_takes_along_what_waits_for_it(slurm: Cluster, tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny[1:], f"data.prompts={tmp_path}/nothing.txt"]
    jobs = submitted(slurm, tmp_path / "chain", [STORE, VERIFY, {"name": "run"}], overrides)
    facts = [slurm.ended(job) for job in jobs]
    assert [one["JobState"] for one in facts] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert facts[0]["ExitCode"] == "2:0" and "nothing.txt" in logs(tmp_path / "chain")


@pytest.mark.faults
def test_a_pipeline_from_prompts_to_pictures(slurm: Cluster, tiny: list[str], store: Path, tmp_path: Path) -> None:
    """The store by an array; submitted again when it is finished, nothing is."""
    overrides = [*tiny[1:], "max_train_steps=4"]
    links = [STORE, VERIFY, {"name": "run"}, PICTURES]
    jobs = submitted(slurm, tmp_path / "chain", links, overrides, ARRAY="2")
    facts = [slurm.ended(job, 1200) for job in jobs]
    assert [one["JobState"] for one in facts] == ["COMPLETED"] * 4, logs(tmp_path / "chain")
    assert [one["NumNodes"] for one in facts] == ["2", "1", "2", "1"]
    for name in ("index.json", "shard-000003.tar"):
        assert (tmp_path / "chain" / "store" / name).read_bytes() == (store / name).read_bytes()
    assert len(list((tmp_path / "chain" / "pictures").rglob("*.png"))) == 1
    assert submitted(slurm, tmp_path / "chain", links, overrides, ARRAY="2") == []
