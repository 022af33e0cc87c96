"""`distill submit chain=…`: links as jobs that wait for each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.forked import python
from tests.slurm.cluster import Cluster
from tests.test_run_chain import hydra

STORE = {"name": "store", "script": "make_trajectories"}
VERIFY = {"name": "verify", "script": "verify_shards"}
PICTURES = {"name": "pictures", "script": "sample", "run": "run", "overrides": ["steps=2", "prompts=[snow]"]}


def submitted(slurm: Cluster, output_dir: Path, links: list[Any], overrides: list[str], *shape: str) -> list[str]:
    """Ids of the jobs of a chain, in its order."""
    settings = ["chain=lcm_lora_sd15", f"chain.links={hydra(links)}", f"overrides={hydra(overrides)}"]
    given = [*settings, f"output_dir={output_dir}", "slurm.nodes=2", "slurm.gpus_per_node=1", *shape]
    said = slurm.call(python(), "-m", "distill", "submit", *given, both=True)
    return re.findall(r": job (\d+), ", said)


def logs(output_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((output_dir / "slurm").glob("*.log")))


def test_a_link_that_fails_takes_along_what_waits_for_it(slurm: Cluster, tiny: list[str], tmp_path: Path) -> None:
    """Its prompts are there when it is submitted, and not when it begins."""
    prompts = tmp_path / "nothing.txt"
    prompts.write_text("a\nb\n")
    overrides = [*tiny[1:], f"data.prompts={prompts}"]
    blocker = slurm.call("sbatch", "--parsable", "--exclusive", "--nodes=2", "--wrap=sleep 300", "--output=/dev/null")
    jobs = submitted(slurm, tmp_path / "chain", [STORE, VERIFY, {"name": "run"}], overrides)
    prompts.unlink()
    slurm.call("scancel", blocker)
    facts = [slurm.ended(job) for job in jobs]
    assert [one["JobState"] for one in facts] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert facts[0]["ExitCode"] == "2:0" and "nothing.txt" in logs(tmp_path / "chain")


@pytest.mark.faults
def test_a_pipeline_from_prompts_to_pictures(slurm: Cluster, tiny: list[str], store: Path, tmp_path: Path) -> None:
    """The store by an array; submitted again when it is finished, nothing is."""
    overrides = [*tiny[1:], "max_train_steps=4"]
    links = [STORE, VERIFY, {"name": "run"}, PICTURES]
    jobs = submitted(slurm, tmp_path / "chain", links, overrides, "slurm.array=2")
    facts = [slurm.ended(job, 1200) for job in jobs]
    assert [one["JobState"] for one in facts] == ["COMPLETED"] * 4, logs(tmp_path / "chain")
    assert [one["NumNodes"] for one in facts] == ["2", "1", "2", "1"]
    for name in ("index.json", "shard-000003.tar"):
        assert (tmp_path / "chain" / "store" / name).read_bytes() == (store / name).read_bytes()
    assert (tmp_path / "chain" / "pictures" / "00000.png").is_file()
    assert submitted(slurm, tmp_path / "chain", links, overrides, "slurm.array=2") == []
