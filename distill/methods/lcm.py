"""Latent consistency distillation: LCM (Luo et al. 2023, arXiv 2310.04378) and LCM-LoRA (arXiv 2311.05556)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from distill.diffusion.guidance import guided, with_guidance
from distill.diffusion.losses import l2, pseudo_huber
from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import ddim_step
from distill.diffusion.trajectory import Batch, CleanEnd, Pair, Reads, Transition
from distill.methods.base import Losses, Method, Networks, Turn
from distill.methods.sampling import Sampling

SOURCES = ("trajectory", "noised")
DISTANCES = ("huber", "l2")
TARGETS = {"student": "student", "ema": "student_ema"}


class LCM(Method):
    """Consistency distillation over one solver step (LCM, algorithm 1).

    Args:
        schedule: the teacher's.
        source: where (x_t, x_s) comes from. `trajectory`: two stored states of a teacher solve, so that no teacher is
            in memory. `noised`: the store's clean latent with fresh noise, and one guided DDIM step of the "teacher".
        target: whose answer at x_s is matched: the `student` itself without gradient (LCM-LoRA), or the moving average
            of its weights (`ema`: the paper's theta⁻, for full networks).
        skip: t - s, in units of time: T divided by the number of solver steps (the papers' k = 20).
        w_min, w_max: guidance of the noised source, uniform for each sample, in this project's convention
            (`uncond + w (cond - uncond)`: the papers' printed w plus 1). A trajectory has its own.
        loss: `huber` (the pseudo-Huber distance with constant `huber_c`) or `l2`.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    title = "Latent consistency distillation"
    paper = "LCM (Luo et al. 2023, arXiv 2310.04378) and LCM-LoRA (arXiv 2311.05556)"
    tag = "latent-consistency-distillation"

    def __init__(
        self,
        schedule: NoiseSchedule,
        source: str = "trajectory",
        target: str = "student",
        skip: int = 20,
        w_min: float = 4.0,
        w_max: float = 16.0,
        loss: str = "huber",
        huber_c: float = 0.001,
    ) -> None:
        if source not in SOURCES:
            raise ValueError(f"method.source must be one of {', '.join(SOURCES)}, got {source!r}")
        if target not in TARGETS:
            raise ValueError(f"method.target must be one of {', '.join(TARGETS)}, got {target!r}")
        if loss not in DISTANCES:
            raise ValueError(f"method.loss must be one of {', '.join(DISTANCES)}, got {loss!r}")
        if not 1 <= skip <= schedule.T or schedule.T % skip:
            raise ValueError(f"method.skip must divide the schedule's {schedule.T} times, got {skip}")
        if not 0 <= w_min <= w_max < math.inf:
            raise ValueError(f"method.w_min and w_max must satisfy 0 <= w_min <= w_max, got {w_min} and {w_max}")
        if not 0 < huber_c < math.inf:
            raise ValueError(f"method.huber_c must be above 0, got {huber_c}")
        self.schedule, self.source, self.skip = schedule, source, skip
        self.sampling = Sampling(*schedule.usual_sampling)
        self.w_min, self.w_max = w_min, w_max
        self.guidance = (w_min, w_max) if source == "noised" else None
        self.distance, self.huber_c = loss, huber_c
        self.target = TARGETS[target]
        self.requires = (("teacher",) if source == "noised" else ()) + ((self.target,) if target == "ema" else ())

    def reads(self, step: int = 0) -> Reads:
        return Pair(self.skip) if self.source == "trajectory" else CleanEnd()

    def turns(self, step: int) -> Iterable[Turn]:
        return (Turn("student", self.loss),)

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        """|| f(x_t, w, t) - f⁻(x_s, w, s) ||, x_s one solver step of guidance w from x_t (LCM, algorithm 1, eq. 14)."""
        if self.source == "trajectory":
            step, w = batch.transition(), batch.guidance
        else:
            step, w = self.noised(networks["teacher"], batch, context)
        c = with_guidance(batch.conditioning, w, step.x_t)  # a network without an input of w does not see it

        with torch.no_grad():  # first, while no activations are held for the backward pass
            f_s = self.f(networks[self.target], step.x_s, step.s, c)
        f_t = self.f(networks["student"], step.x_t, step.t, c)

        loss = self.d(f_t, f_s).mean()
        return Losses(loss, {"loss": loss.detach()})

    def f(self, student: Denoiser, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The consistency function c_skip(t) x + c_out(t) x0(x, w, c, t), which is x itself at t = 0 (LCM, eq. 9).

        What the two are, if anything, is the schedule's matter.
        """
        return self.schedule.clean(student(x, t, c).x0, x, t)

    def d(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of two latents, [B]."""
        return pseudo_huber(a, b, self.huber_c) if self.distance == "huber" else l2(a, b)

    @torch.no_grad()
    def noised(self, teacher: Denoiser, batch: Batch, context: Context) -> tuple[Transition, Tensor]:
        """One DDIM step of the teacher from clean latents noised to a time of the solver's grid; and its w [B]."""
        x_0 = batch.states[:, 0]  # [B, C, h, w]
        device = x_0.device
        t = self.skip * context.integers(1, self.schedule.T // self.skip + 1, "t", device)
        w = context.uniform(self.w_min, self.w_max, "w", device)
        x_t = add_noise(self.schedule, x_0, context.normal(x_0, "noise"), t)

        s = t - self.skip
        x_s = ddim_step(self.schedule, guided(teacher, batch.unconditional, w)(x_t, t, batch.conditioning), s)
        return Transition(x_t, t, x_s, s), w
