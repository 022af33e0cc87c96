"""Checks a store from end to end: sizes, hashes, structure, and every sample's schema and numbers:

    distill verify STORE [SHARD ...] [add_checksums=true]

STORE is a folder or an fsspec URL; SHARD limits the check to some shards (`shard-000003.tar`). `add_checksums=true`
writes the checksums that training compares what it reads with, of shards that are found intact: for a store that an
earlier version wrote without, or where they are lost. Exit status 0 if all is well, 1 if something is wrong, 2 if STORE
cannot be opened, 75 if something could not be read.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("verify")

import logging
from dataclasses import replace

from distill.config.settings import VerifySettings
from distill.data.index import INDEX
from distill.data.progress import Progress
from distill.data.reader import read_index, read_unconditional
from distill.data.record import StoreError
from distill.data.storage import Folder
from distill.data.verify import ShardReport, add_checksums, verify_shard
from distill.data.words import counted
from distill.training.watchdog import watched


@watched
def main(cfg: VerifySettings) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    verdicts = verify(cfg.store, cfg.shards, cfg.add_checksums)
    for verdict in verdicts:
        print(f"{verdict.shard:<20} {verdict.samples:>8} good samples   {'ok' if not verdict.problems else 'BAD'}")
        for problem in verdict.problems:
            print(f"    {verdict.shard}: {problem}")
    bad = [verdict for verdict in verdicts if verdict.problems]
    good = sum(verdict.samples for verdict in verdicts)
    print(", ".join((counted(len(verdicts), "shard"), counted(good, "good sample"), counted(len(bad), "bad shard"))))
    return 1 if bad else 0


def verify(url: str, only: list[str], add: bool = False) -> list[ShardReport]:
    """Verdicts on the shards of a store, in order, and on what the store lacks; `add` writes their checksums."""
    folder = Folder(url)
    index = read_index(folder)
    read_unconditional(folder, index)
    if unknown := set(only) - {shard.name for shard in index.shards}:
        raise StoreError(f"no shards {', '.join(sorted(unknown))} in {url}")
    if not index.complete:
        print(f"{url} is unfinished: {len(index.shards)} of {index.planned_shards} shards are written")
    shards = [shard for shard in index.shards if not only or shard.name in only]
    progress = Progress("verifying", sum(shard.samples for shard in shards), "samples")
    if not add:
        return [verify_shard(folder, index, shard, progress.update) for shard in shards]
    found = [add_checksums(folder, index, shard, progress.update) for shard in shards]
    new = {shard.name: shard for _, shard in found}
    listed = tuple(new.get(shard.name, shard) for shard in index.shards)
    if listed != index.shards:
        folder.publish(INDEX, replace(index, shards=listed).to_json())
    return [verdict for verdict, _ in found]
