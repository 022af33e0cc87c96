"""Teacher solves for the store: prompts in, trajectories out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from distill.data.index import StorePlan
from distill.data.record import TEXT_DTYPES
from distill.diffusion.guidance import guided
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import generator, seed_of
from distill.diffusion.solver import make_times, solve
from distill.diffusion.trajectory import Trajectory
from distill.models.families.teacher import Teacher
from distill.training.sizes import latent_shape


@dataclass(frozen=True)
class TrajectorySolver:
    """Solves the teacher's guided ODE as a plan says, from noise that depends on (seed, sample number) alone.

    Args:
        teacher: with its UNet and text encoders, on `device`.
        plan: the store's.
        size_of: which of the plan's sizes a sample has; None follows the plan's weights.
    """

    teacher: Teacher
    plan: StorePlan
    device: torch.device | str
    size_of: Callable[[int], int] | None = None

    @torch.no_grad()
    def __call__(self, indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        """The trajectories of samples `indices`, all of one size, one for each prompt."""
        plan, schedule = self.plan, self.teacher.schedule
        size = plan.image_sizes[(self.size_of or plan.size_of)(indices[0])]
        shape = latent_shape(self.teacher, size)
        seeds = tuple(seed_of(plan.seed, "x_T", i) for i in indices)
        x = torch.stack([torch.randn(shape, generator=generator(plan.seed, "x_T", i)) for i in indices])
        w = torch.tensor([plan.guidance_of(i) for i in indices], device=self.device)
        conditioning, empty = self.teacher.encode(prompts, size), self.teacher.unconditional()
        if plan.empty_prompts:
            conditioning = without_prompts(conditioning, empty, [prompt == "" for prompt in prompts])

        weight = 1.0 if plan.guidance == 1 else w  # the number 1 saves the unconditional passes
        denoiser = guided(self.teacher.denoiser(), empty, weight)
        times = make_times(plan.spacing, schedule.T, plan.solver_steps)
        steps = solve(denoiser, schedule, x.to(self.device), times, conditioning, plan.solver)
        states = torch.stack([state for t, state in steps if t in plan.times], dim=1)  # [B, K, C, h, w]
        return Trajectory(states, plan.times, stored(conditioning, plan), w, seeds)


def without_prompts(conditioning: Conditioning, empty: Conditioning, which: Sequence[bool]) -> dict[str, torch.Tensor]:
    """The conditioning, in which samples have that of no prompt, `empty` [1, ...], in the place of their own."""
    mask = torch.tensor(which)

    def chosen(name: str, x: torch.Tensor) -> torch.Tensor:
        rows = mask.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(rows, empty[name].to(x), x) if name in empty else x

    return {name: chosen(name, x) for name, x in conditioning.items()}


def stored(conditioning: Conditioning, plan: StorePlan) -> Conditioning:
    """Text in the dtype of a store; masks, and sizes in pixels, stay exact."""
    dtype = TEXT_DTYPES[plan.text_dtype or plan.dtype]
    exact = {name for name, x in conditioning.items() if name == "time_ids" or not x.is_floating_point()}
    return {name: x if name in exact else x.to(dtype) for name, x in conditioning.items()}


def shared_texts(share: bool | Literal["auto"], teacher: Teacher) -> tuple[str, ...]:
    """The parts of the conditioning that samples of a prompt share in their store: all of the text, or none.

    Args:
        share: `data.share_texts`; auto leaves it to the family.
    """
    text = teacher.family.text
    if not (text.shared if share == "auto" else share):
        return ()
    return tuple(sorted(text.shapes(teacher.network.config, tokens=1)))
