"""Rectified Diffusion (Wang et al. 2024, arXiv 2410.07303): the paths between stored states are made straight.

After InstaFlow (Liu et al. 2023, arXiv 2309.06380), and in segments after PeRFlow (Yan et al. 2024, arXiv 2405.07510).
Noise and image of a stored solve are a fixed couple. A network that answers the same (x0, eps) all along the line
between the two generates the image in one step, and in any number of steps. The noise levels and what the network
predicts stay the teacher's, so that the student may be a LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from distill.diffusion.consistency import inverse_jump
from distill.diffusion.guidance import with_guidance
from distill.diffusion.losses import l2, pseudo_huber
from distill.diffusion.prediction import Denoised
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.segments import Segments
from distill.diffusion.solver import ddim_step
from distill.diffusion.trajectory import Batch, Reads, Steps, Transition
from distill.methods.base import Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling

DISTANCES = ("huber", "l2")
SPACES = ("z_end", "x0", "v")
ENDS = ("exact", "paper")


class Rectified(Method):
    """Regression to one answer along the whole line between two stored states.

    Args:
        schedule: the teacher's.
        segments: M; the lines join the milestones of M equal segments of the times. 1: noise and image. A student of
            more takes M steps, or a multiple of that.
        loss: `huber` (the pseudo-Huber distance with constant `huber_c`) or `l2`.
        loss_space: where answers are compared: where they lead at the segment's start (`z_end`), as x0 (`x0`), or as
            that over sigma (`v`, the velocities).
        ends: of the line for one segment. `exact`: it passes through both stored states. `paper`: the stored noise is
            taken for eps, as the published training does, whose line misses x_T by alpha_T x_0.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    title = "Rectified diffusion"
    paper = "Rectified Diffusion (Wang et al. 2024, arXiv 2410.07303), after InstaFlow (Liu et al. 2023, 2309.06380)"
    tag = "rectified-diffusion"

    def __init__(
        self,
        schedule: NoiseSchedule,
        segments: int = 1,
        loss: str = "huber",
        huber_c: float = 0.001,
        loss_space: str = "z_end",
        ends: str = "exact",
    ) -> None:
        for key, value, allowed in (
            ("loss", loss, DISTANCES),
            ("loss_space", loss_space, SPACES),
            ("ends", ends, ENDS),
        ):
            if value not in allowed:
                raise ValueError(f"method.{key} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 < huber_c < math.inf:
            raise ValueError(f"method.huber_c must be above 0, got {huber_c}")
        if ends == "paper" and segments != 1:
            raise ValueError(f"method.ends=paper is of one segment, got segments={segments}: set method.ends=exact")
        try:
            self.segments = Segments(schedule.T, segments)
        except ValueError as error:
            raise ValueError(f"method.{error}") from None
        self.schedule, self.distance, self.huber_c = schedule, loss, huber_c
        self.loss_space, self.ends = loss_space, ends
        self.sampling = Sampling("ddim", "trailing")

    def reads(self, step: int = 0) -> Reads:
        falling = reversed(self.segments.milestones)
        return Steps(tuple(pairwise(falling)))

    def turns(self, step: int) -> Iterable[Turn]:
        return (Turn("student", self.loss),)

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """|| what the student answers at x_t - the line that x_t lies on ||, t uniform within the segment."""
        step = batch.transition()
        line, t = self.line(step), self.sample_time(step, context)
        x_t = ddim_step(self.schedule, line, t)
        answer = networks["student"](x_t, t, with_guidance(batch.conditioning, batch.guidance, x_t))

        d = self.d(answer, line, t, step.s)  # [B]
        loss = d.mean()
        parts: dict[str, Tensor | float] = {"loss": loss.detach()}
        if self.segments.count > 1:
            inside = [(self.segments.index(t) == i).to(d) for i in range(self.segments.count)]
            parts |= {f"segment_{i + 1}": len(inside) * (d * m).mean().detach() for i, m in enumerate(inside)}
        return Losses(loss, parts)

    def line(self, step: Transition) -> Denoised:
        """(x0, eps) of the line from x_t at t to x_s at s, [B, C, h, w] each."""
        x0 = inverse_jump(self.schedule, step.x_s, step.x_t, step.t, step.s)
        if self.ends == "paper":
            return Denoised(x0, step.x_t.to(x0))
        return Denoised(x0, (step.x_t - self.schedule.alpha(step.t, x0) * x0) / self.schedule.sigma(step.t, x0))

    def sample_time(self, step: Transition, context: Context) -> Tensor:
        """t [B], uniform over the whole numbers s + 1 ... the noisier end."""
        share = context.uniform(0, 1, "t", step.t.device).double()
        return step.s + 1 + (share * (step.t - step.s)).long()

    def d(self, answer: Denoised, line: Denoised, t: Tensor, s: Tensor) -> Tensor:
        """The distance of an answer at t from the line, in the space of the loss, [B]."""
        if self.loss_space == "z_end":
            a, b = ddim_step(self.schedule, answer, s), ddim_step(self.schedule, line, s)
        else:
            sigma = self.schedule.sigma(t, line.x0) if self.loss_space == "v" else torch.ones_like(line.x0)
            a, b = answer.x0 / sigma, line.x0 / sigma
        return pseudo_huber(a, b, self.huber_c) if self.distance == "huber" else l2(a, b)
