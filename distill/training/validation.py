"""Pictures of the student while it trains: the same prompts and the same noise every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.diffusion.random import seed_of
from distill.diffusion.solver import lcm_times
from distill.methods.sampling import sample, starting_noise
from distill.models.families import Teacher
from distill.training.engine import Engine
from distill.training.tracking import Tracker, to_pictures


class Validation:
    """Draws `prompts` with the student's weights, or their moving average where there is one.

    Args:
        teacher: with its VAE.
        conditioning: of the prompts, [B, ...]; its "guidance" [B] is told to a student that takes it as an input.
        steps: of LCM sampling.
        seed: of the pictures' noise.
    """

    def __init__(
        self, teacher: Teacher, prompts: Sequence[str], conditioning: Mapping[str, Tensor], steps: int, seed: int
    ) -> None:
        self.teacher, self.prompts, self.conditioning = teacher, list(prompts), dict(conditioning)
        self.times = lcm_times(teacher.schedule.T, steps)
        self.seeds = [seed_of(seed, "validation", i) for i in range(len(prompts))]

    def __call__(self, engine: Engine, tracker: Tracker, step: int) -> None:
        """Every rank draws (under ZeRO-3 it must); the main one shows."""
        with engine.inference("student", ema=engine.has_ema("student")) as student:
            generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
            x = starting_noise(generators, self.teacher.latent_shape).to(engine.device)
            conditioning = {k: v.to(engine.device) for k, v in self.conditioning.items()}
            latents = sample(student, self.teacher.schedule, x, self.times, conditioning, "lcm", generators)
        if engine.is_main:
            self.teacher.to(engine.device)
            pictures = torch.cat([self.teacher.decode(latent[None]).cpu() for latent in latents])
            self.teacher.to("cpu")
            tracker.images("validation", to_pictures(pictures), step, self.prompts)
