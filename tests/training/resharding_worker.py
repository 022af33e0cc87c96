"""A rank of a run that loads a checkpoint and saves it again: `resharding_worker.py LEGS.json`, under a launcher.

A leg has the engine's settings, the folder to load from (null: two steps are trained) and the one to save to. Each rank
writes beside that folder what loading has added to the memory of its process, at the most.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.training.checkpoint import Checkpoints
from distill.training.engine import Engine, EngineSettings
from distill.training.learning_rate import LearningRate
from distill.training.trained_network import TrainingRecipe
from tests.training.test_checkpoint import Line, advance

SIZES = (1000, 2501, 1403, 7)  # of which neither two nor three ranks have equal shares


def network() -> Line:
    """Three trained layers behind a frozen one: six million weights."""
    torch.manual_seed(0)
    trained = [nn.Linear(a, b) for a, b in zip(SIZES, SIZES[1:], strict=False)]
    return Line(nn.Sequential(nn.Linear(4, SIZES[0]).requires_grad_(False), *trained))


def shapes() -> dict[str, torch.Size]:
    """Of the trained weights."""
    return {name: p.shape for name, p in network().module.named_parameters() if p.requires_grad}


def kilobytes(what: str) -> int:
    """A line of this process's status: VmRSS is its memory now, files that are mapped included, VmHWM the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def travel(leg: dict[str, Any]) -> Engine:
    """Loads, or trains, and saves."""
    engine = EngineSettings(**leg["engine"]).start()
    recipe = TrainingRecipe(lambda p: torch.optim.AdamW(p, lr=0.01), LearningRate("constant", 0, 20), ema_decay=0.9)
    engine.prepare({"student": network()}, {"student": recipe})  # type: ignore[dict-item]
    there = Path(leg["to"])
    if leg["from"] is None:
        advance(engine, 0, 2)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the most begins anew with what there is now
        before = kilobytes("VmRSS")
        assert Checkpoints(Path(leg["from"])).resume(engine, "latest") is not None
        added = 1024 * (kilobytes("VmHWM") - before)
        there.with_name(f"{there.name}.rank-{engine.processes.rank}").write_text(str(added))
    assert engine.is_healthy()
    Checkpoints(there).save(engine, 2)
    return engine


def main(path: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that nothing was written to is NaN then
    for leg in json.loads(Path(path).read_text()):
        engine = travel(leg)
        engine.close() if engine.processes.world_size == 1 else engine.release()
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
