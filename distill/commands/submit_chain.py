"""Submits the links of a chain that are not done, each to begin once the one before it has ended well:

distill submit chain=lightning_sdxl output_dir=runs/l overrides=[engine=zero2] slurm.nodes=4 slurm.gpus_per_node=8
distill submit chain=lcm_lora_sdxl output_dir=runs/l "overrides=['data.prompts=prompts.txt']" slurm.array=16

`slurm.array=16` makes so many jobs of a link that writes a store; one that only looks at what was made takes one node.
All links are checked before the first one is submitted. Submitted again, the chain resumes; a link that fails cancels
those that wait for it. Settings, scripts and logs are in OUTPUT_DIR/slurm/.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from distill.cluster import batch
from distill.cluster.job import Job
from distill.commands.submit import (
    array_of,
    check,
    check_processes,
    launcher_of,
    limits_of,
    options_of,
    processes,
    python_of,
)
from distill.config.loading import ConfigError, checking
from distill.config.settings import RunChainSettings, SlurmSettings, SubmitChainSettings
from distill.data.storage import make_folder
from distill.training.chain import Link, links_of
from distill.training.micro_batch import split_batch
from distill.training.run import write_atomically
from distill.training.tracking import setup_logging

log = logging.getLogger("distill")


def main(cfg: SubmitChainSettings) -> None:
    setup_logging()
    links = links_of(cfg.chain, cfg.output_dir, cfg.overrides)
    left = [link for link in links if not link.done()]
    check_chain(links, cfg.slurm)
    folder = Path(cfg.output_dir).resolve() / "slurm"
    texts = {link.name: script_of(link, cfg, folder) for link in left}
    make_folder(folder)
    for link in left:
        job_of(link, cfg, folder).write(folder / f"{link.name}.json")
        write_atomically(folder / f"{link.name}.yaml", yaml.safe_dump(link_settings(link, cfg), sort_keys=False))
        write_atomically(folder / f"{link.name}.sbatch", texts[link.name])
    after: list[str] = []
    for link in links:
        if link not in left:
            log.info("%s: done", link.name)
        elif cfg.dry_run:
            print(f"# {link.name}, {link.state()}\n{texts[link.name]}")
        else:
            with checking():
                job = batch.submitted(folder / f"{link.name}.sbatch", "--kill-on-invalid-dep=yes", *after)
            log.info("%s: job %s, %s", link.name, job, link.state())
            after = [f"--dependency=afterok:{job}"]


def sweep(config: str, arguments: Sequence[str]) -> int:
    """Raises ConfigError: chains are not swept over."""
    raise ConfigError("-m is for runs that train: submit a chain once for each output_dir")


def check_chain(links: Sequence[Link], slurm: SlurmSettings) -> None:
    """What can be checked of a chain before its first link is run.

    Raises:
        ConfigError: what one of its jobs would end with.
    """
    if slurm.array is not None and not any(link.writes for link in links):
        raise ConfigError("slurm.array is for links that write a store, and this chain has none")
    if slurm.parallel is not None and slurm.array is None:
        raise ConfigError("slurm.parallel is for arrays: set slurm.array too, or leave it out")
    for link in links:
        if conflict := link.conflict():
            raise ConfigError(conflict)
        try:
            if not link.done():
                check_link(link, slurm, ready=all_done(links, link.needs))
        except (ConfigError, FileNotFoundError) as error:
            raise ConfigError(f"link {link.name}: {error}") from None


def check_link(link: Link, slurm: SlurmSettings, ready: bool) -> None:
    """Raises ConfigError; `ready`: whether all that it builds on is there, so that everything can be checked."""
    if link.writes:
        check(link.settings, slurm, "trajectories")
    elif link.trains and ready:
        check(link.settings, slurm.model_copy(update={"array": None}), "train")
    elif link.trains:
        check_processes(link.settings, slurm)
        split_batch(link.settings, processes(slurm))


def all_done(links: Sequence[Link], names: Sequence[str]) -> bool:
    return all(link.done() for link in links if link.name in names)


def link_settings(link: Link, cfg: SubmitChainSettings) -> dict[str, object]:
    """The settings of `distill chain` for one link; what it launches is started on all nodes."""
    launch = None if link.reads else shlex.join(launcher_of(cfg.slurm).command())
    given = cfg.model_dump(mode="json", exclude={"slurm", "dry_run"})
    found = RunChainSettings.model_validate({**given, "launch": launch, "link": link.name, "list": False})
    return found.model_dump(mode="json")


def job_of(link: Link, cfg: SubmitChainSettings, folder: Path) -> Job:
    """The job of a link: `distill chain`, which starts it and exports what it has trained."""
    command = (python_of(cfg.slurm), "-m", "distill", "chain", f"settings={folder / link.name}.yaml")
    return Job(link.name, command, link.progress, str(folder), **limits_of(cfg.slurm))


def script_of(link: Link, cfg: SubmitChainSettings, folder: Path) -> str:
    """The batch script of a link, in the shape that it needs: all nodes, an array, or one node."""
    array = array_of(cfg.slurm) if link.writes else None
    options = options_of(cfg.slurm, folder, link.name, array, nodes=1 if link.reads else 0)
    body = batch.supervised(python_of(cfg.slurm), folder / f"{link.name}.json")
    return batch.script(options, cfg.slurm.setup, body)
