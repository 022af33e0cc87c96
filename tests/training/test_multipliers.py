"""The input for the guidance learns at a rate of its own, under every engine, and a student hears w because of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config.loading import load
from distill.config.settings import TrainSettings
from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.methods.lcm import LCM
from distill.models.denoiser import NetworkDenoiser
from distill.models.families.registry import FAMILIES
from distill.training.engine import Engine, EngineSettings
from distill.training.trained_network import TrainingRecipe, unlike
from tests.tiny import tiny_unet
from tests.training.engine_worker import TWO_LEVELS, tiny_batch

PUBLISHED_RATE, DIM, STEPS = 1e-6, 16, 12
SCHEDULE = NoiseSchedule.scaled_linear()


def engine_of(multipliers: dict[str, float], random: bool = False, rate: float = PUBLISHED_RATE, **kind: Any) -> Engine:
    unet = tiny_unet("sdxl", **TWO_LEVELS)
    FAMILIES["sd15"].guidance.add(unet, DIM, seed=3 if random else None)
    student = NetworkDenoiser(unet.requires_grad_(True), SCHEDULE, Prediction.EPSILON)
    engine = EngineSettings(**kind).start()
    recipe = TrainingRecipe(partial(torch.optim.AdamW, lr=rate, weight_decay=0.0), multipliers=multipliers)
    engine.prepare({"student": student}, {"student": recipe})
    return engine


def train(engine: Engine, steps: range) -> None:
    (turn,) = LCM(SCHEDULE).turns(0)
    for step in steps:
        engine.updated(turn, [tiny_batch(step, 0, 4)], step)


def sensitivity(engine: Engine) -> float:
    """How far answers at w = 2 and at w = 8 are apart, as a share of their size."""
    batch = tiny_batch(0, 0, 4)
    with engine.inference("student") as student:
        answers = [
            student(batch.states[:, 0], batch.times[:, 0], {**batch.conditioning, "guidance": torch.full((4,), w)}).eps
            for w in (2.0, 8.0)
        ]
    return float((answers[0] - answers[1]).square().mean().sqrt() / answers[0].square().mean().sqrt())


def test_at_the_published_rate_a_student_hears_w_by_its_own_rate_or_by_its_start() -> None:
    found = {}
    for name, multiplier, random in (("plain", 1.0, False), ("own rate", 100.0, False), ("random", 1.0, True)):
        engine = engine_of({"cond_proj": multiplier}, random)
        found[name, "before"] = sensitivity(engine)
        train(engine, range(STEPS))
        found[name, "after"] = sensitivity(engine)
        engine.release()
    assert found["plain", "before"] == found["own rate", "before"] == 0
    assert 0 < found["plain", "after"] < 1e-3
    assert found["own rate", "after"] > 30 * found["plain", "after"]
    assert found["random", "before"] > found["own rate", "after"]
    assert found["random", "after"] == pytest.approx(found["random", "before"], rel=0.05)


def stage(number: int) -> dict[str, Any]:
    zero = {"stage": number, "reduce_bucket_size": 1_000_000}
    return {
        "kind": "deepspeed",
        "deepspeed": {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}},
    }


def weights_after(engine: Engine, steps: range) -> dict[str, torch.Tensor]:
    train(engine, steps)
    return engine.export_weights("student")


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6, msg=name)


def test_every_sharding_multiplies_the_rate_and_resumes_with_it(tmp_path: Path) -> None:
    """From its own checkpoint, and from one that ZeRO has written. ZeRO-3 is last: torch rounds otherwise after it."""
    pytest.importorskip("deepspeed")
    engine = engine_of({"cond_proj": 10.0}, rate=1e-3)
    start = engine.export_weights("student")
    wanted = weights_after(engine, range(3))
    moved = {name: float((w - start[name]).abs().max()) for name, w in wanted.items()}
    assert moved["time_embedding.cond_proj.weight"] > 5 * max(m for n, m in moved.items() if "cond_proj" not in n)
    final = weights_after(engine, range(3, 5))
    engine.release()
    for number in (1, 2, 3):
        zero = engine_of({"cond_proj": 10.0}, rate=1e-3, **stage(number))
        assert_alike(weights_after(zero, range(3)), wanted)
        folder, saved = tmp_path / str(number), zero.describe()
        zero.save(folder)
        zero.release()
        if number < 3:
            again = engine_of({"cond_proj": 10.0}, rate=1e-3)
            assert again.misfit(saved) is None
            again.load(folder, saved)
            assert_alike(weights_after(again, range(3, 5)), final)
            again.release()
        again = engine_of({"cond_proj": 10.0}, rate=1e-3, **stage(number))
        again.load(folder, saved)
        assert_alike(weights_after(again, range(3, 5)), final)
        again.release()


def test_a_checkpoint_says_of_which_weights_the_rate_was_multiplied() -> None:
    plain, multiplied = engine_of({}), {"parameters": 1, "shapes": "", "ema": False, "rates": ["cond_proj"]}
    here = plain.describe()["networks"]["student"]
    plain.release()
    assert "rates" not in here  # as in the checkpoints of before
    assert unlike("student", multiplied, here) == (
        "the student had learning_rate_multipliers of cond_proj when it was saved, and has them of none here"
    )


@pytest.mark.parametrize(
    ("multipliers", "line"),
    [
        (
            {"cond": 2.0},
            r"learning_rate_multipliers\.cond: no weight .* leave it out \(~learning_rate_multipliers\.cond",
        ),
        ({"cond_proj": 2.0, "weight": 3.0}, "cond_proj.weight has two of them, cond_proj and weight"),
    ],
)
def test_a_multiplier_of_no_weight_or_a_second_one_is_refused(multipliers: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        engine_of(multipliers)


def test_experiments_of_whole_networks_multiply_the_rate_of_w() -> None:
    settings = load("train", TrainSettings, ["experiment=lcm_sdxl", "data.store=s"])
    assert settings.learning_rate_multipliers == {"cond_proj": 100.0} and settings.learning_rate == PUBLISHED_RATE
    given = ["experiment=lcm_sdxl", "data.store=s", "~learning_rate_multipliers.cond_proj"]
    assert load("train", TrainSettings, given).learning_rate_multipliers == {}
