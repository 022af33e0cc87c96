"""Multistep latent consistency: MLCM (Xie et al. 2024, arXiv 2406.05768), after Heek et al. 2024 (arXiv 2403.06807)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.diffusion.adversarial import AdversarialScalars, Adversary, Origin
from distill.diffusion.consistency import inverse_jump, landing, where
from distill.diffusion.guidance import guided, with_guidance
from distill.diffusion.losses import l2, pseudo_huber
from distill.diffusion.matching import denoising_loss, matching_loss, matching_time
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.segments import Segments
from distill.diffusion.solver import ddim_step
from distill.diffusion.trajectory import Batch, CleanEnd, Pair, Reads, Transition
from distill.methods.base import Losses, Method, Networks, Reward, Turn
from distill.methods.sampling import Sampling

SOURCES = ("trajectory", "rollout", "student")
SPACES = ("z_end", "x0", "v")
DISTANCES = ("l2", "huber", "perceptual")
REWARD_FORMS = ("hinge", "maximise")


@dataclass(frozen=True)
class Stage:
    """A part of the run, of which the run takes `iterations` steps.

    Args:
        segments: M; the student jumps from t to the start of t's segment. 1 is consistency down to clean data.
        skip: t - s of a pair, which ends at the segment's start if that is nearer.
        grid: t is sampled from times that are T/grid apart; None takes all there are (the stored ones, or 1 ... T).
        source: of the pairs. `trajectory`: stored states, no teacher in memory. `rollout`: the teacher solves from
            noise to x_t in M - segment + 1 steps (the paper's multistep denoising, algorithm 1), and on to x_s.
            `student`: x_t is noised from a sample that the student generates in `student_steps`; the teacher
            continues to x_s in `substeps` (the paper's second stage, algorithm 2).
        loss_space: where the two answers are compared: where they land (`z_end`), as the x0 that leads there (`x0`),
            or that over sigma (`v`: the distance of the velocities; for variance-preserving noise it is the weight
            SNR + 1 of Heek et al. 2024).
        distance: `l2`, `huber` (with `huber_c`), or `perceptual`: the one of latents that the run is given.
        reward: the weight of a score of the student's answer, decoded; 0 does not score it.
        reward_form: `hinge` raises it to `reward_target` for the sample's prompt and lowers it to 0 for another's (the
            paper's third stage, eq. 11); `maximise` raises it without end.
        matching: the weight of distribution matching, which pulls the student's answers to the teacher's distribution
            (the paper's eq. 12). From student samples only; a "fake_score" learns beside the student.
        adversarial: the weight of the student's loss against a "discriminator", which separates its answers
            in one step from its samples in `student_steps` (the paper's eq. 13). From student samples only.
        batch_size: samples of a step, over all ranks; None keeps the run's.
        learning_rate: the student's; None keeps the run's.
        fresh_optimizer: forgets the optimizer's state when the stage begins.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    segments: int
    skip: int
    iterations: int
    grid: int | None = None
    source: str = "trajectory"
    loss_space: str = "z_end"
    distance: str = "l2"
    huber_c: float = 0.001
    reward: float = 0.0
    reward_form: str = "hinge"
    reward_target: float = 16.0
    matching: float = 0.0
    adversarial: float = 0.0
    student_steps: int = 4
    substeps: int = 1
    batch_size: int | None = None
    learning_rate: float | None = None
    fresh_optimizer: bool = False

    def __post_init__(self) -> None:
        chosen = {"source": SOURCES, "loss_space": SPACES, "distance": DISTANCES, "reward_form": REWARD_FORMS}
        for key, allowed in chosen.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"a stage's {key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        for key in ("segments", "skip", "iterations", "student_steps", "substeps"):
            if getattr(self, key) < 1:
                raise ValueError(f"a stage's {key} must be at least 1, got {getattr(self, key)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"a stage's batch_size must be at least 1, got {self.batch_size}")
        for key in ("huber_c", "learning_rate"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"a stage's {key} must be above 0, got {value}")
        for key in ("reward", "matching", "adversarial"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"a stage's {key} must be at least 0, got {getattr(self, key)}")
        if not math.isfinite(self.reward_target):
            raise ValueError(f"a stage's reward_target must be a number, got {self.reward_target}")
        if self.grid is not None and (self.grid < self.segments or self.grid % self.segments):
            raise ValueError(f"a stage's grid must be a multiple of its {self.segments} segments, got {self.grid}")
        if self.source == "student" and self.segments != 1:
            raise ValueError(f"a stage from student samples goes down to clean data: segments=1, got {self.segments}")
        if self.source == "student" and self.grid is None:
            raise ValueError("a stage from student samples stands at milestones: set grid to their number")
        if self.source != "student" and (self.matching or self.adversarial):
            raise ValueError(f"matching and adversarial are of a stage with source=student, got {self.source!r}")


class MLCM(Method):
    """Multistep consistency distillation in stages (MLCM, algorithms 1 and 2), the student its own target.

    Args:
        schedule: the teacher's.
        stages: `Stage`s, or their arguments. The last one lasts as long as the run does.
        guidance: w of the teacher where it is called; stored trajectories have their own.
        discriminator_learning_rate, fake_learning_rate: of the other two networks; None keeps the run's.
        adversarial_loss: `nonsaturating` or `hinge`.
        renoise_times, renoise_weights: the discriminator sees samples at one of these times (for flow matching, of
            Stable Diffusion's by their signal-to-noise ratio), with these odds.
        r1: weight of the discriminator's approximate R1 penalty.

    Raises:
        ValueError: a value out of its range, naming it, and the stage it is of.
    """

    title = "Multistep latent consistency distillation"
    paper = "MLCM (Xie et al. 2024, arXiv 2406.05768), after Heek et al. 2024 (arXiv 2403.06807)"
    tag = "mlcm"

    def __init__(
        self,
        schedule: NoiseSchedule,
        stages: list[Stage],
        guidance: float = 8.0,
        discriminator_learning_rate: float | None = None,
        fake_learning_rate: float | None = None,
        adversarial_loss: str = "nonsaturating",
        renoise_times: Sequence[int] = (10, 250, 500, 750),
        renoise_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        r1: float = 0.0,
    ) -> None:
        if not stages:
            raise ValueError("method.stages is empty: give at least one")
        if not 0 <= guidance < math.inf:
            raise ValueError(f"method.guidance must be at least 0, got {guidance}")
        rates = {"discriminator": discriminator_learning_rate, "fake_score": fake_learning_rate}
        for name, rate in rates.items():
            if rate is not None and not 0 < rate < math.inf:
                key = name.partition("_score")[0]
                raise ValueError(f"method.{key}_learning_rate must be above 0, got {rate}")
        self.schedule, self.w, self.rates = schedule, guidance, rates
        self.sampling = Sampling(*schedule.usual_sampling)
        try:
            self.adversary = Adversary(schedule, adversarial_loss, tuple(renoise_times), tuple(renoise_weights), r1)
        except ValueError as error:
            raise ValueError(f"method.{error}") from None
        self.stages = [_stage(i, stage, schedule) for i, stage in enumerate(stages)]
        self.segments = {stage.segments: Segments(schedule.T, stage.segments) for stage in self.stages}
        lengths = [stage.iterations for stage in self.stages]
        self.starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        self.steps = sum(lengths)
        self.requires = ("teacher",) if any(stage.source != "trajectory" for stage in self.stages) else ()
        self.guidance = (guidance, guidance) if self.requires else None
        adversarial = any(stage.adversarial > 0 for stage in self.stages)
        matched = any(stage.matching > 0 for stage in self.stages)
        self.trains = ("student", *["discriminator"] * adversarial, *["fake_score"] * matched)
        self.adversarial = AdversarialScalars() if adversarial else None
        scored = [stage for stage in self.stages if stage.reward > 0]
        self.requires += ("reward",) if scored else ()
        self.requires += ("perceptual",) if any(stage.distance == "perceptual" for stage in self.stages) else ()
        self.needs_prompts = bool(scored)
        self.least_samples = 2 if any(stage.reward_form == "hinge" for stage in scored) else 1

    def place(self, step: int) -> int:
        """Which stage a step is in."""
        return sum(step >= start for start in self.starts) - 1

    def reads(self, step: int = 0) -> Reads:
        stage = self.stages[self.place(step)]
        if stage.source != "trajectory":
            return CleanEnd()  # for its shape and its prompt alone
        return Pair(stage.skip, self.segments[stage.segments], self._apart(stage))

    def learning_rate(self, step: int, network: str = "student") -> float | None:
        return self.stages[self.place(step)].learning_rate if network == "student" else self.rates[network]

    def batch_size(self, step: int) -> int | None:
        return self.stages[self.place(step)].batch_size

    def resets(self, step: int) -> bool:
        return step in self.starts[1:] and self.stages[self.place(step)].fresh_optimizer

    def turns(self, step: int) -> Iterable[Turn]:
        stage = self.stages[self.place(step)]

        def loss(networks: Networks, batch: Batch, context: Context) -> Losses:
            losses = self.loss(stage, networks, batch, context)
            return Losses(losses.total, {**losses.parts, "stage": float(self.place(step) + 1)})

        if stage.adversarial > 0:
            yield Turn("discriminator", partial(self.discriminator_loss, stage))
        if stage.matching > 0:
            yield Turn("fake_score", partial(self.fake_score_loss, stage))
        yield Turn("student", loss)

    def held_out(self, step: int) -> Turn:
        """The consistency alone: the other terms are no measure of what holds for new prompts and noise."""
        stage = replace(self.stages[self.place(step)], reward=0.0, matching=0.0, adversarial=0.0)
        return Turn("student", partial(self.loss, stage))

    def loss(self, stage: Stage, networks: Networks, batch: Batch, context: Context) -> Losses:
        """|| g(x_t, t) - g⁻(x_s, s) ||, both of which land where t's segment starts (MLCM, eq. 7 and 10)."""
        segments, c = self.segments[stage.segments], self.conditioning(stage, batch)
        step = self.pair(stage, networks, batch, context)
        end = segments.start(step.t)

        with torch.no_grad():  # x_s itself where it is there already
            g_s = self.g(networks["student"], step.x_s, step.s, end, c)
        f_t = networks["student"](step.x_t, step.t, c)

        d = self.d(stage, networks, f_t, g_s, step, end)  # [B]
        inside = [(segments.index(step.t) == i).to(d) for i in range(stage.segments)]
        parts: dict[str, Tensor | float] = {
            f"segment_{i + 1}": stage.segments * (d * mask).mean().detach() for i, mask in enumerate(inside)
        }
        total = d.mean()
        weights = stage.reward, stage.matching, stage.adversarial
        for weight, term in zip(
            weights, (self.preference_loss, self.distribution_matching_loss, self.generator_loss), strict=True
        ):
            if weight > 0:
                further = term(stage, networks, f_t.x0, step, batch, context)
                total, parts = total + weight * further.total, {**parts, **further.parts}
        return Losses(total, {"loss": total.detach(), **parts})

    def g(self, student: Denoiser, x: Tensor, t: Tensor, end: Tensor, c: Conditioning) -> Tensor:
        """The DDIM jump from t to `end` along the student's answer, and x itself where t is `end` (MLCM, sec. 4.1)."""
        return landing(self.schedule, student, x, t, end, c)

    def d(self, stage: Stage, networks: Networks, f_t: Denoised, g_s: Tensor, step: Transition, end: Tensor) -> Tensor:
        """The distance, in the stage's space, of the answer f_t at x_t from one that lands at g_s, [B]."""
        a, b = ddim_step(self.schedule, f_t, end), g_s
        if stage.loss_space != "z_end":
            a, b = f_t.x0, inverse_jump(self.schedule, g_s, step.x_t, step.t, end)
        if stage.loss_space == "v":
            sigma = self.schedule.sigma(step.t, a)
            a, b = a / sigma, b / sigma
        if stage.distance == "perceptual":
            return networks["perceptual"](a, b)
        return l2(a, b) if stage.distance == "l2" else pseudo_huber(a, b, stage.huber_c)

    # ---- preference learning ------------------------------------------------------------------------------------

    def preference_loss(
        self, stage: Stage, networks: Networks, x0: Tensor, step: Transition, batch: Batch, context: Context
    ) -> Losses:
        """The preference loss of the student's answers, scored (MLCM, eq. 11)."""
        scores = self.scores(stage, networks["reward"], x0, batch)
        loss = self.preference(stage, *scores).mean()
        return Losses(loss, {"reward": scores[0].mean().detach(), "reward_loss": loss.detach()})

    def scores(self, stage: Stage, s: Reward, x0: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """s(x0, c_pos) and, for the hinge, s(x0, c_neg), [B] each; c_neg is the next sample's prompt.

        Where that is the same prompt, s(x0, c_neg) is -inf: there is nothing to lower.

        Raises:
            ValueError: not two prompts for each sample.
        """
        c_pos, c_neg = batch.prompts, batch.next_prompts
        if not len(c_pos) == len(c_neg) == len(x0):
            raise ValueError(
                f"a reward needs each sample's prompt and the next one's: the batch has {len(c_pos)} and {len(c_neg)} "
                f"for {len(x0)} samples"
            )
        if stage.reward_form == "maximise":
            return s(x0, c_pos)
        s_pos, s_neg = s(x0, c_pos, c_neg)
        same = torch.tensor([a == b for a, b in zip(c_pos, c_neg, strict=True)])
        same = same.to(s_neg.device, non_blocking=True)
        return s_pos, s_neg.masked_fill(same, -math.inf)

    def preference(self, stage: Stage, s_pos: Tensor, s_neg: Tensor | None = None) -> Tensor:
        """max(s0 - s(x0, c_pos), 0) + max(s(x0, c_neg), 0), [B] (MLCM, eq. 11); or -s(x0, c_pos)."""
        if s_neg is None:
            return -s_pos
        return (stage.reward_target - s_pos).clamp(min=0) + s_neg.clamp(min=0)

    # ---- distribution matching and adversarial training ---------------------------------------------------------

    def distribution_matching_loss(
        self, stage: Stage, networks: Networks, x0: Tensor, step: Transition, batch: Batch, context: Context
    ) -> Losses:
        """-(s_real - s_fake) for the gradient of the student's answers; s_real is guided (MLCM, eq. 12; DMD)."""
        s_real, s_fake = guided(networks["teacher"], batch.unconditional, self.w), networks["fake_score"]
        t = matching_time(self.schedule.T, context, x0.device)
        noise = context.normal(x0, "noise'")
        c = with_guidance(batch.conditioning, 1.0, x0)
        loss = matching_loss(self.schedule, s_real, s_fake, x0, t, noise, c).mean()
        return Losses(loss, {"matching_loss": loss.detach()})

    def fake_score_loss(self, stage: Stage, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The fake score learns to denoise the student's answers, at all times (DMD, eq. 6)."""
        fake, _, _ = self.fake_and_real(stage, networks["student"], batch, context)
        t = context.integers(1, self.schedule.T + 1, "t of the fake score", fake.device)
        noise = context.normal(fake, "noise of the fake score")
        c = with_guidance(batch.conditioning, 1.0, fake)
        loss = denoising_loss(self.schedule, networks["fake_score"], fake, t, noise, c).mean()
        return Losses(loss, {"loss": loss.detach()})

    def generator_loss(
        self, stage: Stage, networks: Networks, x0: Tensor, step: Transition, batch: Batch, context: Context
    ) -> Losses:
        """The student's adversarial loss: D is to take its answers for real (MLCM, eq. 13)."""
        D, c, origin = networks["discriminator"], with_guidance(batch.conditioning, 1.0, x0), (step.x_t, step.t)
        loss = self.adversary.generator(D, x0, c, context, origin).mean()
        return Losses(loss, {"adversarial_loss": loss.detach()})

    def discriminator_loss(self, stage: Stage, networks: Networks, batch: Batch, context: Context) -> Losses:
        """The loss of D: fake are the student's answers in one step, real its samples in more (MLCM, eq. 13)."""
        fake, real, origin = self.fake_and_real(stage, networks["student"], batch, context)
        D, c = networks["discriminator"], with_guidance(batch.conditioning, 1.0, fake)
        verdict = self.adversary.discriminator(D, real, fake, c, context, origin)
        loss = verdict.loss.mean()
        return Losses(loss, {"loss": loss.detach(), **verdict.accuracies()})

    @torch.no_grad()
    def fake_and_real(
        self, stage: Stage, student: Denoiser, batch: Batch, context: Context
    ) -> tuple[Tensor, Tensor, Origin]:
        """The student's answer at this step's x_t, the sample that x_t is noised from, and (x_t, t); [B, C, h, w]."""
        x_0, x_t, t = self.own_state(stage, student, batch, context)
        return student(x_t, t, self.conditioning(stage, batch)).x0, x_0, (x_t, t)

    def conditioning(self, stage: Stage, batch: Batch) -> Conditioning:
        """The student's, with the w that it learns: its trajectories', or the teacher's where that one is called.

        Critics judge at w = 1: they know samples, and no guidance.
        """
        w = batch.guidance if stage.source == "trajectory" else self.w
        return with_guidance(batch.conditioning, w, batch.states)

    # ---- where the pairs come from ------------------------------------------------------------------------------

    def pair(self, stage: Stage, networks: Networks, batch: Batch, context: Context) -> Transition:
        """x_t, and x_s a step of the teacher's guided ODE later."""
        if stage.source == "trajectory":
            return batch.transition()
        teacher = guided(networks["teacher"], batch.unconditional, self.w)
        with torch.no_grad():
            if stage.source == "rollout":
                return self.rollout(stage, teacher, batch, context)
            return self.from_student(stage, teacher, networks["student"], batch, context)

    def rollout(self, stage: Stage, teacher: Denoiser, batch: Batch, context: Context) -> Transition:
        """The teacher's own solve from noise: L steps to x_t, fewer to noisier segments, and one to x_s (alg. 1)."""
        segments = self.segments[stage.segments]
        x = context.normal(batch.states[:, 0], "x_T")  # [B, C, h, w]
        t = self.sample_time(stage, context, x.device)
        L = stage.segments - segments.index(t)  # [B], 1 ... M
        T = torch.full_like(t, self.schedule.T)
        for i in range(stage.segments):  # also where all L are smaller: ranks call networks alike
            here, there = (T - (T - t) * L.clamp(max=j) // L for j in (i, i + 1))
            x = self.step(teacher, x, here, there, batch.conditioning)
        s = torch.maximum(t - stage.skip, segments.start(t))
        return Transition(x, t, self.step(teacher, x, t, s, batch.conditioning), s)

    def from_student(
        self, stage: Stage, teacher: Denoiser, student: Denoiser, batch: Batch, context: Context
    ) -> Transition:
        """The student's own sample, noised to a milestone; the teacher continues to the next one (alg. 2)."""
        _, x_t, t = self.own_state(stage, student, batch, context)
        s = (t - stage.skip).clamp(min=0)
        x = x_t
        for i in range(stage.substeps):
            here, there = (t - (t - s) * j // stage.substeps for j in (i, i + 1))
            x = self.step(teacher, x, here, there, batch.conditioning)
        return Transition(x_t, t, x, s)

    def own_state(
        self, stage: Stage, student: Denoiser, batch: Batch, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x_0, x_t, t): the student's own sample, the same noised to a milestone, and which one (MLCM, eq. 9)."""
        x_0 = self.student_sample(stage, student, batch, context)
        t = self.sample_time(stage, context, x_0.device)
        return x_0, add_noise(self.schedule, x_0, context.normal(x_0, "noise"), t), t

    def student_sample(self, stage: Stage, student: Denoiser, batch: Batch, context: Context) -> Tensor:
        """Clean latents by the stage's jumps of the student, fresh noise after each but the last, [B, C, h, w]."""
        T, x_0, steps, c = self.schedule.T, batch.states[:, 0], stage.student_steps, self.conditioning(stage, batch)
        for i in range(steps):
            noise = context.normal(x_0, f"student {i}")
            t = torch.full((len(x_0),), T - i * T // steps, device=x_0.device)
            x = noise if i == 0 else add_noise(self.schedule, x_0, noise, t)
            x_0 = student(x, t, c).x0
        return x_0

    def step(self, teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor, c: Conditioning) -> Tensor:
        """A DDIM step from t to s <= t, [B] each; x itself where they are one time."""
        return where(t == s, x, ddim_step(self.schedule, teacher(x, t, c), s))

    def sample_time(self, stage: Stage, context: Context, device: torch.device) -> Tensor:
        """t [B], uniform over the stage's grid."""
        apart = self._apart(stage) or 1
        return apart * context.integers(1, self.schedule.T // apart + 1, "t", device)

    def _apart(self, stage: Stage) -> int | None:
        """What the times of the stage's grid are multiples of, if it has one."""
        return None if stage.grid is None else self.schedule.T // stage.grid


def _stage(i: int, stage: Stage | dict[str, Any], schedule: NoiseSchedule) -> Stage:
    try:
        stage = stage if isinstance(stage, Stage) else Stage(**stage)
        Segments(schedule.T, stage.segments)
        if stage.grid is not None and schedule.T % stage.grid:
            raise ValueError(f"a stage's grid must divide the schedule's {schedule.T} times, got {stage.grid}")
        if stage.skip > schedule.T:
            raise ValueError(f"a stage's skip must be within 1 ... {schedule.T}, got {stage.skip}")
    except ValueError as error:
        raise ValueError(f"method.stages[{i}]: {error}") from None
    return stage
