"""A comparison whose truth is known: Gaussian data, two prompts, pictures that are the latents themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.schedule import NoiseSchedule
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Comparison, ComparisonPlan
from distill.evaluation.statistics import frechet_with_error
from tests.analytic import gaussian

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (3, 2, 2)
MEANS = {"up": 0.5, "down": -0.5}
SD = 0.3


@dataclass
class GaussianDenoiser:
    """Exact for N(mean, sd²) where the conditioning holds the mean; counts the network evaluations asked of it."""

    sd: float = SD
    evaluations: int = 0

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        self.evaluations += len(x_t)
        centred = gaussian(SCHEDULE, torch.zeros(SHAPE, dtype=x_t.dtype), self.sd)
        mean = conditioning["mean"].reshape(-1, 1, 1, 1)
        alpha = SCHEDULE.alpha(t, x_t)
        out = centred(x_t - alpha * mean, t, {})
        return Denoised(out.x0 + mean, out.eps)


class Surroundings:
    """What a `Teacher` is beside its network."""

    schedule = SCHEDULE
    latent_shape = SHAPE

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return {"mean": torch.tensor([[MEANS[prompt]] for prompt in prompts])}

    def unconditional(self) -> Conditioning:
        return {"mean": torch.zeros(1, 1)}

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


@dataclass
class PixelScorer:
    """Fréchet distance of the pixels themselves from real data. Killed after `lives` batches."""

    lives: int = 10**9
    name: str = "pixels"
    protocol: str = "pixels"
    against: str = ""
    notes: Sequence[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    def prompts(self, split: str, n: int) -> list[str]:
        return [("up", "down")[i % 2] for i in range(n)]

    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.lives -= 1
        if self.lives < 0:
            raise KeyboardInterrupt
        return {"pixels": images.flatten(1)}

    def summarise(self, measured: Mapping[str, Tensor], split: str) -> dict[str, float]:
        self.seen.setdefault(split, []).append(measured["pixels"])
        n = len(measured["pixels"])
        means = torch.tensor([[MEANS[prompt]] for prompt in self.prompts(split, n)])
        noise = torch.randn(n, measured["pixels"].shape[1], generator=torch.Generator().manual_seed(7))
        value, error = frechet_with_error(measured["pixels"], means + SD * noise)
        return {"frechet": value, "frechet_se": error}


def comparison(
    folder: Path,
    student: Denoiser | None = None,
    scorer: PixelScorer | None = None,
    student_hash: str = "s",
    **plan: object,
) -> Comparison:
    """A small one; the student is exact unless given."""
    settings = {"guidance": 1.0, "n": 64, "tuning_n": 32, "steps": (1, 4), "guidances": (1.0, 3.0), "batch_size": 25}
    return Comparison(
        teacher=Surroundings(),
        denoisers={"teacher": GaussianDenoiser(), "student": student or GaussianDenoiser()},
        hashes={"teacher": "t", "student": student_hash},
        scorer=scorer or PixelScorer(),
        plan=ComparisonPlan(**settings | plan),  # type: ignore[arg-type]
        cache=Cache(folder),
    )
