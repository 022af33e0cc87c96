"""Optimizers beside AdamW: what they keep is dealt out anew to other ranks, or that is refused in a line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config.loading import ConfigError, load
from distill.config.packages import is_installed
from distill.config.settings import TrainSettings
from distill.training.engine import Engine, EngineSettings
from distill.training.resharding import NotElastic
from distill.training.sharding import read_whole
from distill.training.trained_network import TrainingRecipe
from tests.training.engine_worker import Distance, micro_batches, student

OPTIMIZERS: dict[str, Any] = {
    "AdamW, fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "AdamW, amsgrad": partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "SGD": partial(torch.optim.SGD, lr=1e-2),
    "SGD, momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "SGD, momentum, fused": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "Adadelta": partial(torch.optim.Adadelta, lr=1e-1),
    "Adamax": partial(torch.optim.Adamax, lr=1e-3),
    "NAdam": partial(torch.optim.NAdam, lr=1e-3),
    "RAdam": partial(torch.optim.RAdam, lr=1e-3),
}
REFUSED = {"Adafactor": (partial(torch.optim.Adafactor, lr=1e-2), "col_var|row_var|variance")}


@pytest.fixture
def engines() -> Iterator[Any]:
    started: list[Engine] = []

    def start(optimizer: Any) -> Engine:
        engine = EngineSettings(max_grad_norm=None).start()
        started.append(engine)
        engine.prepare(student(lora=True), {"student": TrainingRecipe(optimizer)})
        return engine

    yield start
    for engine in started:
        engine.release()


def losses(engine: Engine, steps: range) -> list[float]:
    turn = next(iter(Distance().turns(0)))
    return [engine.updated(turn, micro_batches(engine, step), step)["loss"] for step in steps]


def saved(engines: Any, optimizer: Any, folder: Path) -> tuple[list[float], Engine]:
    """The losses of five steps, and an engine that has not begun; in `folder` is the state after three of them."""
    engine = engines(optimizer)
    first = losses(engine, range(3))
    engine.save(folder)
    whole = [*first, *losses(engine, range(3, 5))]
    engine.release()
    return whole, engines(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_put_together_and_dealt_out(name: str, engines: Any, tmp_path: Path) -> None:
    whole, engine = saved(engines, OPTIMIZERS[name], tmp_path)
    trained = engine._trained["student"]
    trained.load_moved(tmp_path / "student", read_whole(tmp_path / "student", trained.shapes()))
    assert losses(engine, range(3, 5)) == whole[3:]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_kept_for_elements_or_for_all_weights_is_refused_in_a_line(
    name: str, engines: Any, tmp_path: Path
) -> None:
    """With as many ranks and the same engine it resumes."""
    optimizer, key = REFUSED[name]
    whole, engine = saved(engines, optimizer, tmp_path)
    with pytest.raises(NotElastic, match=rf"keeps a '({key})' that is not cut .*: resume with as many ranks"):
        read_whole(tmp_path / "student", engine._trained["student"].shapes())
    engine.load(tmp_path, engine.describe())
    assert losses(engine, range(3, 5)) == whole[3:]


def test_an_update_that_is_not_finite_leaves_a_fused_optimizer_as_it_was(engines: Any) -> None:
    """Also the first one, before there is a momentum."""
    for optimizer in ("SGD, momentum, fused", "AdamW, fused"):
        poisoned, plain = engines(OPTIMIZERS[optimizer]), engines(OPTIMIZERS[optimizer])
        for engine, bad in ((poisoned, True), (plain, False)):
            trained = engine._trained["student"]
            for poison in (bad, False, bad, False) if bad else (False, False):
                for i, p in enumerate(trained.parameters.values()):
                    p.grad = torch.full_like(p, float("nan") if poison else 0.1 * (1 + i % 3))
                trained.step()
        for a, b in zip(poisoned._trained["student"].masters(), plain._trained["student"].masters(), strict=True):
            assert torch.equal(a, b)


def test_eight_bit_adam_is_a_setting_that_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["experiment=quickstart", "optimizer=adamw8bit", "data.store=STORE"]
    if is_installed("bitsandbytes"):
        cfg = load("train", TrainSettings, overrides)
        assert cfg.optimizer["_target_"] == "bitsandbytes.optim.AdamW8bit"
    else:
        with pytest.raises(ConfigError, match=r"bitsandbytes, which is not there: pip install 'distill\[8bit\]'"):
            load("train", TrainSettings, overrides)
