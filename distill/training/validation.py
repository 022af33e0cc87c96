"""Pictures of the student while it trains: the same prompts and the same noise every time; and how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.diffusion.prediction import Denoiser
from distill.diffusion.random import seed_of
from distill.methods.base import Method
from distill.methods.sampling import Sampling, sample, starting_noise
from distill.models.families import Teacher
from distill.training.engine import Engine
from distill.training.health import DIVERSITY
from distill.training.tracking import Tracker, to_pictures

DIVERSITY_PROMPTS = 4


class Validation:
    """Draws `prompts` with the student's weights, or their moving average where there is one.

    Args:
        teacher: with its VAE.
        conditioning: of the prompts, [B, ...]; its "guidance" [B] is told to a student that takes it as an input.
        steps: where `sampling` leaves them open.
        seed: of the pictures' noise.
        diversity_seeds: noises from which each of the first `DIVERSITY_PROMPTS` prompts is drawn, to see how the
            results differ; 0 does not.
        sampling: how the method's students are drawn.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompts: Sequence[str],
        conditioning: Mapping[str, Tensor],
        steps: int,
        seed: int,
        diversity_seeds: int = 0,
        sampling: Sampling = Method.sampling,
    ) -> None:
        self.teacher, self.prompts, self.conditioning = teacher, list(prompts), dict(conditioning)
        self.sampler, self.times = sampling.sampler, sampling.times(teacher.schedule.T, steps)
        self.seeds = [seed_of(seed, "validation", i) for i in range(len(prompts))]
        self.many_seeds = [
            [seed_of(seed, "diversity", i, j) for j in range(diversity_seeds)]
            for i in range(min(len(prompts), DIVERSITY_PROMPTS) if diversity_seeds else 0)
        ]

    def __call__(self, engine: Engine, tracker: Tracker, step: int) -> dict[str, float]:
        """Every rank draws (under ZeRO-3 it must); the main one shows. Returns `validation/diversity`, if asked for."""
        with engine.inference("student", ema=engine.has_ema("student")) as student:
            conditioning = {k: v.to(engine.device) for k, v in self.conditioning.items()}
            latents = self.draw(student, self.seeds, conditioning, engine.device)
            groups = []
            for i, seeds in enumerate(self.many_seeds):
                one = {k: v[i : i + 1].expand(len(seeds), *v.shape[1:]) for k, v in conditioning.items()}
                groups.append(self.draw(student, seeds, one, engine.device))
        if engine.is_main:
            self.teacher.to(engine.device)
            pictures = torch.cat([self.teacher.decode(latent[None]).cpu() for latent in latents])
            self.teacher.to("cpu")
            tracker.images("validation", to_pictures(pictures), step, self.prompts)
        return {DIVERSITY: engine.from_main(diversity(torch.stack(groups)))} if groups else {}

    def draw(
        self, student: Denoiser, seeds: Sequence[int], conditioning: Mapping[str, Tensor], device: torch.device
    ) -> Tensor:
        """Clean latents [B, C, h, w] from the noise of B seeds."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = starting_noise(generators, self.teacher.latent_shape).to(device)
        return sample(student, self.teacher.schedule, x, self.times, conditioning, self.sampler, generators)


def diversity(latents: Tensor) -> float:
    """How much latents [prompts, seeds, C, h, w] of one prompt differ: 2 if they have nothing in common, 0 if alike.

    It is the mean squared difference of an element between two seeds of a prompt, over the variance of all elements.
    """
    x = latents.double().flatten(2)
    within = x.var(1).mean()  # half of the mean squared difference of two
    return float(2 * within / x.var().clamp(min=torch.finfo(x.dtype).tiny))
