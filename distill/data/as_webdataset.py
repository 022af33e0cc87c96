"""A trajectory store as a WebDataset pipeline, for training loops of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import safetensors.torch

from distill.data.reader import Store, open_store
from distill.data.record import CONDITIONING, GUIDANCE, STATES, TIMES, StoreError, parse_json
from distill.data.sharing import TEXT_OF

if TYPE_CHECKING:
    import webdataset


def as_webdataset(url: str, shuffle: int = 0, **options: Any) -> webdataset.WebDataset:
    """The samples of a store as dictionaries, shard by shard in the order that they were written in.

    Each has `__key__`, `index` and `prompt`; `states` [K, C, h, w] of the solve at `times` [K], noise first;
    `guidance`, the w it was solved with; and `conditioning`, tensors without a batch dimension. Shards are cut over
    ranks and loader workers as WebDataset does it (`nodesplitter`, `workersplitter`); checksums are not compared, which
    `distill verify` does for all of a store. The order of `distill train`, which does not depend on the number of
    ranks, is that of `distill.data.loader`.

    Args:
        url: a local folder.
        shuffle: size of the buffer from which the next sample is chosen at random; shards are shuffled too. 0: neither.
        options: of `webdataset.WebDataset`.

    Raises:
        StoreError: no store there, unfinished, or not on this machine's file systems.
        ImportError: webdataset is not installed; the line says what to type.
    """
    try:
        import webdataset
    except ImportError:
        raise ImportError("distill.as_webdataset needs webdataset: pip install 'distill[webdataset]'") from None
    store = open_store(url)
    if store.folder.local is None:
        raise StoreError(f"{url} is remote, and WebDataset reads such with programs of its own: copy it, or mount it")
    shards = [str(store.folder.local / shard.name) for shard in store.index.shards if shard.samples]
    options = {"shardshuffle": len(shards) if shuffle else False, "empty_check": False, **options}
    dataset = webdataset.WebDataset(shards, **options)
    return (dataset.shuffle(shuffle) if shuffle else dataset).map(partial(_decoded, store))


def _decoded(store: Store, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a sample's two files hold, as tensors and texts, and its text if another sample holds it; nothing in them is
    executed."""
    tensors, facts = safetensors.torch.load(sample["safetensors"]), parse_json(sample["json"])
    if TEXT_OF in facts:
        found = store.read(facts["index"], states=(0,)).conditioning
        tensors |= {CONDITIONING + name: found[name] for name in store.index.shared}
    return {
        "__key__": sample["__key__"],
        "index": facts["index"],
        "prompt": facts["prompt"],
        "states": tensors[STATES],
        "times": tensors[TIMES].long(),
        "guidance": float(tensors[GUIDANCE]),
        "conditioning": {
            name.removeprefix(CONDITIONING): tensor for name, tensor in tensors.items() if name.startswith(CONDITIONING)
        },
    }
