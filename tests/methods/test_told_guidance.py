"""Guidance as an input of the networks: one pass of a teacher, and the same w for it and for the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.diffusion.prediction import Conditioning, Denoised, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch
from distill.methods.base import Method
from distill.methods.lcm import LCM
from distill.methods.lightning import LightningAdversarial, LightningConvert, LightningMSE
from distill.methods.mlcm import MLCM, Stage
from distill.methods.pcm import PCM
from distill.methods.tcd import TCD, TCDStage

FLOW = NoiseSchedule.linear(3.0)
STORED, CALLED = (2.0, 5.0), 3.0
"""w of the two samples' trajectories, and of the method where it calls the teacher."""
LIGHTNING: dict[str, Any] = {"student_steps": 4, "teacher_steps": 8, "guidance": CALLED}
CRITICS: dict[str, Any] = {"matching": 1.0, "adversarial": 1.0}
METHODS: dict[str, tuple[Method, Any]] = {
    "lcm": (LCM(FLOW, skip=250), STORED),
    "lcm, noised": (LCM(FLOW, skip=250, source="noised", w_min=CALLED, w_max=CALLED), (CALLED, CALLED)),
    "mlcm": (MLCM(FLOW, [Stage(segments=2, skip=250, iterations=1)], guidance=CALLED), STORED),
    "mlcm, rollout": (
        MLCM(FLOW, [Stage(segments=2, skip=250, iterations=1, source="rollout")], guidance=CALLED),
        (CALLED, CALLED),
    ),
    "mlcm, critics": (
        MLCM(FLOW, [Stage(segments=1, skip=250, iterations=1, source="student", grid=4, **CRITICS)], guidance=CALLED),
        (CALLED, CALLED),
    ),
    "tcd": (TCD(FLOW, skip=250, stages=[TCDStage(2, 1, adversarial=1.0)]), STORED),
    "pcm": (PCM(FLOW, segments=2, skip=250), STORED),
    "mse": (LightningMSE(FLOW, source="trajectory", **LIGHTNING), STORED),
    "mse, noised": (LightningMSE(FLOW, source="noised", **LIGHTNING), (CALLED, CALLED)),
    "adversarial": (LightningAdversarial(FLOW, source="noised", **LIGHTNING), (CALLED, CALLED)),
    "convert": (LightningConvert(FLOW, 4), STORED),
}


class Noting:
    """A network that notes which w it is told, and computes with it."""

    def __init__(self) -> None:
        self.told: list[list[float]] = []
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def note(self, c: Conditioning, n: int) -> Tensor:
        assert c.keys() == {"text", "guidance"} and c["guidance"].dtype == torch.float32 and len(c["guidance"]) == n
        self.told.append(c["guidance"].tolist())
        return self.weight * c["guidance"].reshape(-1, 1, 1, 1)

    def __call__(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        return to_denoised(Prediction.FLOW, self.note(c, len(x_t)) * x_t, x_t, t, FLOW)


class NotingCritic(Noting):
    def __call__(self, samples: Any, t: Tensor, c: Conditioning, origin: Any = None) -> Any:  # type: ignore[override]
        self.note(c, len(t))
        return [self.weight * x.mean((1, 2, 3)) for x in samples]


def batch() -> Batch:
    states = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([[1000, 750], [500, 250]])
    return Batch(states, times, {"text": torch.ones(2, 1)}, {}, torch.tensor(STORED), positions=(0, 1))


@pytest.mark.parametrize("name", METHODS)
def test_every_network_is_told_a_w_and_student_and_teacher_the_same(name: str) -> None:
    method, expected = METHODS[name]
    networks: Mapping[str, Noting] = {n: Noting() for n in ("student", "teacher", "fake_score")}
    critic = NotingCritic()
    for turn in method.turns(0):
        turn.loss({**networks, "discriminator": critic}, batch(), Context(0, 0, (0, 1)))
    assert networks["student"].told and all(told == list(expected) for told in networks["student"].told)
    taught = networks["teacher"].told
    assert all(told == list(expected) for told in taught), "in one pass, of as many samples as there are"
    assert bool(taught) == ("teacher" in method.requires or name == "convert")
    for judge in (networks["fake_score"], critic):
        assert all(told == [1.0, 1.0] for told in judge.told)
    if name == "mlcm, critics":
        assert networks["fake_score"].told and critic.told
    if name == "adversarial":
        assert critic.told
