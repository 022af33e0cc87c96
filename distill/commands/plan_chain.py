"""Says what each link of a chain takes, and all of them: `distill plan chain=lightning_sdxl cluster=a100-80gb-x8`.

A line for each link that writes a store or trains: memory of a GPU, hours, disk; then the sums. `overrides` are those
of `distill chain`, and `cluster` is a file of `configs/cluster/`. Nothing is loaded: losses are walked through on
networks without weights, which takes a minute or so for each kind of link.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill.commands.plan import machines, table
from distill.config.settings import ClusterSettings, PlanChainSettings
from distill.planning.chains import PlannedLink, planned_links
from distill.planning.phases import GIB, ranks_of, usable
from distill.training.chain import links_of
from distill.training.tracking import setup_logging


def main(cfg: PlanChainSettings) -> None:
    setup_logging(0)
    links = links_of(cfg.chain, cfg.output_dir, cfg.overrides)
    print("\n".join(report(planned_links(links, cfg.cluster), cfg.cluster)))


def report(links: Sequence[PlannedLink], cluster: ClusterSettings) -> Iterator[str]:
    """The table, its sums, and what does not fit."""
    ranks, room = ranks_of(cluster), usable(cluster)
    yield f"{len(links)} links on {machines(cluster)}; {room / GIB:.1f} GiB of a {cluster.device} are usable"
    heads = ["link", "work", "engine, micro-batches", "GiB", "fits", "hours", f"{cluster.device} hours", "disk, GiB"]
    rows = [
        [link.name, link.work, "not counted", *["?"] * 5]
        if link.not_counted
        else [link.name, link.work, link.engine, f"{link.memory / GIB:.2f}", "yes" if link.fits else "no"]
        + [f"{link.hours:.2f}", f"{link.hours * ranks:.1f}", f"{link.disk / GIB:.1f}"]
        for link in links
    ]
    took, disk = sum(link.hours for link in links), sum(link.disk for link in links)
    most = max(link.memory for link in links)
    fits = "yes" if most <= room else "no"
    sums = ["in all", "", "", f"{most / GIB:.2f}", fits, f"{took:.2f}", f"{took * ranks:.1f}", f"{disk / GIB:.1f}"]
    yield from table(heads, [*rows, sums])
    yield "Hours are without saving and failures; disk is the stores, the checkpoints that are kept, and the exports."
    for link in links:
        if link.not_counted:
            yield f"Not counted, and in no sum: {link.name}: {link.not_counted.partition(':')[0]}"
    if large := [link.name for link in links if not link.fits]:
        yield f"What does not fit: {', '.join(large)}; micro_batch_size=auto takes what fits of a batch"
