"""Numbers of variance-preserving noise, as they were before there was any other: `test_golden.py` compares them.

`python -m tests.methods.golden_vp` prints them; `golden_vp.json` is what it printed then. A change of them is a change
of every run that anybody has made, so the file is written anew only where that is meant, and said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.diffusion.adversarial import Origin
from distill.diffusion.noise import Noise
from distill.diffusion.prediction import Conditioning, Denoised, Prediction, to_denoised
from distill.diffusion.random import Context
from distill.diffusion.samplers import SAMPLERS
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.trajectory import Batch
from distill.methods.base import Method
from distill.methods.lcm import LCM
from distill.methods.lightning import LightningAdversarial, LightningConvert, LightningMSE
from distill.methods.mlcm import MLCM

FILE = Path(__file__).with_suffix(".json")
SHAPE = (2, 3, 1)
NOISES = {
    "Stable Diffusion": Noise(),
    "linear": Noise(beta_schedule="linear", beta_start=0.0002, beta_end=0.03),
    "squared cosine": Noise(beta_schedule="squaredcos_cap_v2"),
    "betas of its own": Noise(num_train_timesteps=100, trained_betas=tuple(0.001 + 0.0001 * i for i in range(100))),
    "zero terminal SNR": Noise(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "short": Noise(num_train_timesteps=128),
}


class Network(nn.Module):
    """A denoiser whose raw output is tanh(A x + b told + prompt) times a weight, plus another; no random number."""

    def __init__(self, schedule: NoiseSchedule, prediction: Prediction, gain: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Denoised:
        places = torch.arange(36, dtype=torch.float64).reshape(6, 6)
        told = self.schedule.told(t).double()[:, None] / self.schedule.T
        seen = x_t.flatten(1) @ (0.4 * (places + 1).sin()) + told * places[0].cos() + c["prompt"]
        output = self.gain * seen.tanh().reshape(x_t.shape) + self.shift
        return to_denoised(self.prediction, output, x_t, t, self.schedule)


class Critic(nn.Module):
    """A discriminator of one weight, which sees time and origin too."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        assert origin is not None
        seen = 0.1 * origin[0].flatten(1).sum(1) + t / 1000
        return [(self.gain * x).sin().flatten(1).sum(1) + seen for x in samples]


def waves(*shape: int, phase: float) -> Tensor:
    """Numbers in [-1.5, 1.5] that look like noise, and are the same wherever there is a sine."""
    n = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64)
    return 1.5 * (n * 2.3999 + phase + (n * 0.7).cos()).sin().reshape(shape)


def batch_of(schedule: NoiseSchedule, times: Sequence[tuple[int, ...]]) -> Batch:
    """A sample for each of `times`, of a batch that stands at them."""
    n, at = len(times), torch.tensor(times)
    x_0, noise = waves(n, *SHAPE, phase=0.3), waves(n, *SHAPE, phase=4.0)
    states = torch.stack([add_noise(schedule, x_0, noise, at[:, i]) for i in range(at.shape[1])], 1)
    prompt = waves(n, 6, phase=1.0)
    return Batch(
        states=states,
        times=at,
        conditioning={"prompt": prompt},
        unconditional={"prompt": torch.zeros(n, 6, dtype=torch.float64)},
        guidance=torch.linspace(2, 9, n, dtype=torch.float64),
        positions=tuple(range(n)),
        prompts=tuple("abcd"[:n]),
        next_prompts=tuple("bcda"[:n]),
    )


CLEAN = [(0,), (0,), (0,), (0,)]
LAST_STAGE = {"segments": 1, "skip": 100, "iterations": 5, "grid": 8, "source": "student"}
METHODS: dict[str, tuple[type[Method], dict[str, Any], list[tuple[int, ...]]]] = {
    "LCM, stored": (LCM, {}, [(1000, 980), (20, 0), (500, 480), (40, 20)]),
    "LCM, noised": (LCM, {"source": "noised", "target": "ema", "loss": "l2"}, CLEAN),
    "MLCM, stored": (
        MLCM,
        {"stages": [{"segments": 4, "skip": 20, "iterations": 5}]},
        [(1000, 980), (760, 750), (500, 480), (20, 0)],
    ),
    "MLCM, rollout": (
        MLCM,
        {"stages": [{"segments": 4, "skip": 50, "iterations": 5, "source": "rollout", "loss_space": "x0"}]},
        CLEAN,
    ),
    "MLCM, critics": (
        MLCM,
        {"stages": [{**LAST_STAGE, "loss_space": "v", "matching": 0.5, "adversarial": 0.2, "reward": 0.1}]},
        CLEAN,
    ),
    "Lightning, MSE": (LightningMSE, {"student_steps": 8, "teacher_steps": 32, "guidance": 6.0}, CLEAN),
    "Lightning, stored": (
        LightningMSE,
        {"student_steps": 4, "teacher_steps": 8, "source": "trajectory"},
        [(1000, 750), (750, 500), (500, 250), (250, 0)],
    ),
    "Lightning, adversarial": (
        LightningAdversarial,
        {"student_steps": 1, "teacher_steps": 4, "times": [250, 500, 750, 1000], "r1": 2.0},
        CLEAN,
    ),
    "Lightning, scaled": (LightningAdversarial, {"student_steps": 2, "teacher_steps": 4, "x_T": "scaled"}, CLEAN),
    "Lightning, convert": (LightningConvert, {"student_steps": 2}, CLEAN),
}


def schedule_facts(noise: Noise) -> dict[str, Any]:
    """Its fingerprint, a digest of all told times, and alpha and sigma at some times."""
    schedule, like = NoiseSchedule.of(noise), torch.zeros((), dtype=torch.float64)
    told = schedule.told(torch.arange(schedule.T + 1))
    at = [0, 1, 2, schedule.T // 3, schedule.T // 2, schedule.T - 1, schedule.T]
    return {
        "fingerprint": schedule.fingerprint,
        "told": hashlib.sha256(told.numpy().astype("<i8").tobytes()).hexdigest(),
        "alpha": [float(schedule.alpha(t, like)) for t in at],
        "sigma": [float(schedule.sigma(t, like)) for t in at],
    }


def solver_facts(noise: Noise) -> dict[str, Any]:
    """Every state of every sampler on its way to clean data."""
    schedule, facts = NoiseSchedule.of(noise), {}
    times = [schedule.T, 3 * schedule.T // 4, 3 * schedule.T // 10, schedule.T // 50, 0]
    network = Network(schedule, Prediction(noise.prediction_type))
    for sampler in ("lcm", "euler", "ddim", "heun", "dpmpp_2m"):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        x, c = waves(2, *SHAPE, phase=2.0), {"prompt": waves(2, 6, phase=1.0)}
        with torch.no_grad():
            states = list(SAMPLERS.find(sampler).generate()(network, schedule, x, times, c, generators))
        facts[sampler] = [state.flatten().tolist() for _, state in states]
    return facts


def networks_of(schedule: NoiseSchedule, prediction: Prediction) -> dict[str, Any]:
    return {
        "student": Network(schedule, prediction, 0.9, 0.05),
        "student_ema": Network(schedule, prediction, 0.95, 0.02),
        "teacher": Network(schedule, prediction),
        "fake_score": Network(schedule, prediction, 0.8, -0.1),
        "discriminator": Critic(),
        "reward": lambda x0, *prompts: tuple(x0.flatten(1).sum(1) * (i + 1) for i in range(len(prompts))),
    }


def method_facts(name: str, prediction: Prediction) -> dict[str, Any]:
    """Loss and gradient of each turn."""
    kind, arguments, times = METHODS[name]
    schedule: NoiseSchedule = NoiseSchedule.scaled_linear()
    method: Any = kind(schedule, **arguments)  # type: ignore[call-arg]
    networks, facts = networks_of(schedule, prediction), {}
    for turn in method.turns(3):
        losses = turn.loss(networks, batch_of(schedule, times), Context(7, 3, tuple(range(len(times)))))
        trained = list(networks[turn.updates].parameters())
        gradient = torch.autograd.grad(losses.total, trained)
        facts[turn.updates] = [losses.total.item(), *(g.item() for g in gradient)]
    return facts


def facts() -> dict[str, Any]:
    """All of them, as JSON holds them."""
    predictions = (Prediction.EPSILON, Prediction.V, Prediction.SAMPLE)
    return {
        "schedules": {name: schedule_facts(noise) for name, noise in NOISES.items()},
        "samplers": {name: solver_facts(NOISES[name]) for name in ("Stable Diffusion", "zero terminal SNR", "short")},
        "methods": {f"{name}, {p.value}": method_facts(name, p) for name in METHODS for p in predictions},
    }


if __name__ == "__main__":
    print(json.dumps(facts(), indent=1))
