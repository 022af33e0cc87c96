"""What a run learns from, as its store says it: noted in the run's folder, for exports that are made without the store.

What the training command was given is no such fact: it need not repeat how many samples the store was made with.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.config.settings import TrainSettings
from distill.data.errors import StoreError
from distill.data.reader import Store, open_store
from distill.data.storage import write_whole

USED = "data.json"


@dataclass(frozen=True)
class UsedData:
    """The store that a run learns from.

    Args:
        kind: `trajectories` or `pictures`.
        samples: how many it holds, those left out not counted.
        solver, solver_steps: the teacher's solve of each; none and 0 for pictures.
        guidance: the lowest and the highest w of the teacher in them.
        sizes: of their images, as WIDTHxHEIGHT, where these are not all the square that the settings name.
    """

    kind: str
    samples: int
    solver: str
    solver_steps: int
    guidance: tuple[float, float]
    sizes: tuple[str, ...] = ()


def used_data(store: Store) -> UsedData:
    """What an open store says of itself."""
    index = store.index
    low, high = index.guidance_range
    w = float(low), float(high)
    there = tuple(str(index.image_sizes[number]) for number in store.by_size()) if index.sizes else ()
    return UsedData(index.kind, len(store), index.solver, index.solver_steps, w, there)


def note_data(folder: Path, store: Store) -> None:
    """Notes in the folder of a run what it learns from; a run that is resumed on a grown store notes the larger one."""
    write_whole(folder / USED, json.dumps(asdict(used_data(store)), indent=1) + "\n")


def data_of(folder: str | Path, settings: TrainSettings) -> UsedData | None:
    """What the run in `folder` learned from, by its note or, in runs of earlier versions, by its store.

    None: neither is there, or the store is another one by now.
    """
    try:
        noted = json.loads((Path(folder) / USED).read_text(encoding="utf-8"))
        low, high = noted["guidance"]
        facts = (noted["kind"], noted["samples"], noted["solver"], noted["solver_steps"])
        if [type(fact) for fact in facts] == [str, int, str, int]:
            return UsedData(*facts, (float(low), float(high)), tuple(map(str, noted.get("sizes", ()))))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    store = Path(settings.data.store).expanduser()
    if not store.is_dir():  # no address that somebody else's settings hold is opened
        return None
    try:
        found = used_data(open_store(str(store)))
    except (OSError, StoreError):
        return None
    return found if set_guidance(settings) in (None, found.guidance) else None


def set_guidance(settings: TrainSettings) -> tuple[float, float] | None:
    """The w of the trajectories that the run's settings name, which it compared with its store; None: none."""
    w = settings.data.guidance
    return None if w is None else (float(w[0]), float(w[1])) if isinstance(w, tuple) else (float(w), float(w))
