"""Runs the links of a chain, each of which builds on those before:

distill chain chain=lcm_toy
distill chain chain=lightning_toy output_dir=outputs/lightning_toy
distill chain chain=lightning_sdxl launch="distill launch --num_processes 8" overrides=[seed=1]

What is done is skipped, and what was interrupted resumes: killed at any moment, run it again. `list=true` shows how far
the links are, `list=commands` what each would run; `link=NAME` runs one.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("chain")

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from distill.commands.relay import PREEMPTED, Relay, held
from distill.config.loading import ConfigError
from distill.config.settings import RunChainSettings
from distill.training.chain import Link, links_of, one_of, seconds_left
from distill.training.preemption import INTERRUPTED, MARKER
from distill.training.tracking import setup_logging

log = logging.getLogger("distill")

NAMES = {"make_trajectories": "trajectories", "make_latents": "latents", "verify_shards": "verify"}
"""The names of commands, by what the files of chains call them."""


def main(cfg: RunChainSettings) -> None:
    setup_logging()
    links = links_of(cfg.chain, cfg.output_dir, cfg.overrides)
    if cfg.list == "commands":
        for link in links:
            print(link.name, link.state(), link.script, shlex.join(command(link, cfg.launch)), sep="\t")
        return
    if cfg.list:
        print(table(links))
        return
    chosen = links if cfg.link is None else [one_of(links, cfg.link)]
    for link in chosen:
        if conflict := link.conflict():
            raise ConfigError(conflict)
    with Relay() as relay:
        for link in chosen:
            where = f"link {links.index(link) + 1} of {len(links)}: {link.name}"
            if link.done():
                log.info("%s is done", where)
                continue
            log.info("%s, %s%s", where, link.state(), time_left(links))
            if code := take(link, cfg.launch, relay):
                sys.exit(ended(link, code))


def table(links: Sequence[Link]) -> str:
    """A table for people: a line for each link, with its steps or samples and how far it is."""
    rows = [("link", "script", "size", "state")]
    for link in links:
        size = f"{link.settings.max_train_steps} steps" if link.trains else ""
        if link.writes:
            size = f"{link.settings.data.num_samples} samples"
        waiting = [name for name in link.needs if not by(links, name).done()]
        state = link.state()
        if state == "not started" and waiting:
            state = f"waits for {', '.join(waiting)}"
        rows.append((link.name, link.script, size, state if link.conflict() is None else f"{state}; other settings"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(f"{row[i]:{widths[i]}}" for i in range(3)), row[3]]) for row in rows)


def by(links: Sequence[Link], name: str) -> Link:
    return next(link for link in links if link.name == name)


def command(link: Link, launch: str | None) -> list[str]:
    """What makes a link, its export left out."""
    started = [sys.executable] if launch is None or link.reads else shlex.split(launch)
    return [*started, "-m", "distill", NAMES.get(link.script, link.script), *link.arguments]


def time_left(links: Sequence[Link]) -> str:
    """What the log says of the time left, once steps have been timed."""
    seconds = seconds_left(links)
    return "" if seconds is None else f"; about {tqdm.format_interval(int(seconds))} of training left in all"


def take(link: Link, launch: str | None, relay: Relay) -> int:
    """Runs or resumes a link, and exports it; returns 0, or the exit code of what failed."""
    with locked(link) as lock:
        marker = link.folder / MARKER
        before = modified(marker)
        if not link.made() and (code := relay.run(command(link, launch), [lock.fileno()])):
            # A launcher has exit codes of its own: what counts is the mark that a run leaves when a signal stops it.
            return PREEMPTED if modified(marker) not in (None, before) else code
        if link.reads:
            link.mark()
        if link.trains and not link.done():
            return relay.run([sys.executable, "-m", "distill", "export", *link.export_arguments()], [lock.fileno()])
    return 0


def ended(link: Link, code: int) -> int:
    """Says in one line why the chain ends here; returns its exit code."""
    if code == PREEMPTED:
        log.info("link %s was stopped and is saved in %s: the same command resumes from there", link.name, link.folder)
    elif code == INTERRUPTED:
        log.info("link %s was interrupted: the same command continues from what is finished of it", link.name)
    else:
        print(
            f"error: link {link.name} ended with exit code {code}, see above; its run is {link.folder}", file=sys.stderr
        )
    return code


def modified(path: Path) -> int | None:
    """When a file was written; None without one."""
    return path.stat().st_mtime_ns if path.exists() else None


def locked(link: Link) -> AbstractContextManager[IO[str]]:
    """Nobody else runs the link meanwhile, but others may write shards of the same store.

    Raises:
        ConfigError: somebody does, when it is entered.
    """
    taken = f"link {link.name} is being run in {link.folder} by another process"
    return held(link.folder.with_name(f".{link.name}.lock"), taken, shared=link.writes)
