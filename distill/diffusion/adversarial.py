"""Adversarial losses on latents: what a discriminator is shown, and what its logits cost whom.

After SDXL-Lightning (Lin et al. 2024, arXiv 2402.13929): no data is shown, but samples of a better network beside those
of a faster one, both noised again to a time at which a diffusion network sees structure (section 3.7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from distill.diffusion.consistency import where
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise, same_snr, wide
from distill.diffusion.tables import Table


@dataclass(frozen=True)
class AdversarialLoss:
    """What logits cost, elementwise: `generator` of those of fakes, `discriminator` of those of real ones and fakes."""

    generator: Callable[[Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]


def _margins(real: Tensor, fake: Tensor) -> Tensor:
    return relu(1 - real) + relu(1 + fake)


def _squares(real: Tensor, fake: Tensor) -> Tensor:
    return ((1 - real.sigmoid()).pow(2) + fake.sigmoid().pow(2)) / 2


ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {
    # -log D and -log D(real) - log(1 - D(fake)), D being the logits' sigmoid (Lightning, eq. 18-21)
    "nonsaturating": AdversarialLoss(lambda fake: softplus(-fake), lambda real, fake: softplus(-real) + softplus(fake)),
    # how far logits are within -1 ... 1; the generator's has no end
    "hinge": AdversarialLoss(lambda fake: -fake, _margins),
    # the same, and the generator is content with a logit of 1 (PCM, Wang et al. 2024, arXiv 2405.18407)
    "hinge_clipped": AdversarialLoss(lambda fake: relu(1 - fake), _margins),
    # least squares of the logits' sigmoid (Flash Diffusion, Chadebec et al. 2024, arXiv 2406.02347)
    "least_squares": AdversarialLoss(lambda fake: (1 - fake.sigmoid()).pow(2), _squares),
}

Origin = tuple[Tensor, Tensor]
"""The state that samples were made from, [B, C, h, w], and its time [B]."""


class Critic(Protocol):
    """A discriminator: several batches [B, C, h, w] of one time t [B] each to logits that they are real.

    Logits are [B], or [B, n] of n places: the loss of a sample is then the mean over its places.

    `origin` is for a conditional one, which decides whether a sample is what ought to become of that state; others
    ignore it.
    """

    def __call__(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]: ...


@dataclass(frozen=True)
class AdversarialScalars:
    """The names under which adversarial training is logged: what a run's alarms read.

    Args:
        discriminator: the network; `Verdict.accuracies` and its loss are logged after its name.
        student_loss: which of the student's scalars is its adversarial loss.
    """

    discriminator: str = "discriminator"
    student_loss: str = "adversarial_loss"

    @property
    def accuracies(self) -> tuple[str, str]:
        """Those on real and on fake samples."""
        return f"{self.discriminator}/real_accuracy", f"{self.discriminator}/fake_accuracy"

    def balance(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """The student's adversarial loss over the discriminator's, where both were logged."""
        student = scalars.get(f"student/{self.student_loss}")
        loss = scalars.get(f"{self.discriminator}/loss", 0.0)
        return {} if student is None or loss == 0 else {f"{self.discriminator}/balance": student / loss}


@dataclass(frozen=True)
class Verdict:
    """What a discriminator made of real and fake samples: its loss [B], and both logits, [B] or [B, n]."""

    loss: Tensor
    real: Tensor
    fake: Tensor

    def accuracies(self) -> dict[str, Tensor]:
        """Shares of real and of fake samples, or their places, that it took for what they are; .5 each by guessing."""
        right = {"real": self.real > 0, "fake": self.fake < 0}
        return {f"{name}_accuracy": hits.float().mean() for name, hits in right.items()}


@dataclass(frozen=True)
class Adversary:
    """Adversarial training of a student against a discriminator. Both losses show it samples at one random time t*.

    Args:
        schedule: of the noise that samples are shown with.
        loss: one of `ADVERSARIAL_LOSSES`: `nonsaturating` (Lightning, eq. 18-21), `hinge`, ...
        times, weights: t* is one of `times`, with odds `weights` (Lightning, sec. 3.7.2); without any, clean samples
            are shown as they are. For flow matching they are Stable Diffusion's times, as the paper prints them, and t*
            is the one of equal signal-to-noise ratio.
        r1: weight of the approximate R1 penalty (Lin et al. 2025, arXiv 2501.08316); Lightning has none.
        r1_sigma: how far it looks around a real sample.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    schedule: NoiseSchedule
    loss: str = "nonsaturating"
    times: tuple[int, ...] = (10, 250, 500, 750)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    r1: float = 0.0
    r1_sigma: float = 0.01

    def __post_init__(self) -> None:
        if self.loss not in ADVERSARIAL_LOSSES:
            raise ValueError(f"adversarial_loss must be one of {', '.join(ADVERSARIAL_LOSSES)}, got {self.loss!r}")
        latest = self.schedule.published.T
        if not all(1 <= t <= latest for t in self.times):
            raise ValueError(f"renoise_times must be within 1 ... {latest}, got {list(self.times)}")
        if self.times and len(self.weights) != len(self.times):
            raise ValueError(f"renoise_weights must be {len(self.times)} as the times are, got {list(self.weights)}")
        if self.times and (not all(0 <= w < math.inf for w in self.weights) or sum(self.weights) == 0):
            raise ValueError(f"renoise_weights must not be negative, nor all 0, got {list(self.weights)}")
        if not 0 <= self.r1 < math.inf:
            raise ValueError(f"r1 must be at least 0, got {self.r1}")
        if not 0 < self.r1_sigma < math.inf:
            raise ValueError(f"r1_sigma must be above 0, got {self.r1_sigma}")

    @cached_property
    def _times(self) -> Table:
        published = self.schedule.published
        return Table([same_snr(published, t, self.schedule) for t in self.times], torch.int64)

    @cached_property
    def _shares(self) -> Table:
        """Where in [0, 1) the share of each time ends, but for the last."""
        return Table((torch.tensor(self.weights, dtype=torch.float64).cumsum(0) / sum(self.weights))[:-1])

    def generator(
        self,
        critic: Critic,
        fake: Tensor,
        c: Conditioning,
        context: Context,
        origin: Origin | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        """The loss of the network that generated `fake` [B, C, h, w], [B]; differentiable with respect to them.

        They are of time s [B], and clean without it.
        """
        (shown,), t = self.shown([fake], s, context)
        (logits,) = critic([shown], t, c, origin)
        return generator_loss(logits, self.loss)

    def discriminator(
        self,
        critic: Critic,
        real: Tensor,
        fake: Tensor,
        c: Conditioning,
        context: Context,
        origin: Origin | None = None,
        s: Tensor | None = None,
    ) -> Verdict:
        """What the discriminator makes of samples [B, C, h, w] of time s [B], clean without it; it is called once."""
        shown, t = self.shown([real, fake], s, context)
        if self.r1:  # around what the discriminator sees, not around what it was made of
            shown.append(shown[0] + self.r1_sigma * context.normal(shown[0], "r1"))
        r, f, *near = critic(shown, t, c, origin)
        penalty = self.r1 * _per_sample((r - near[0]).pow(2)) if near else 0.0
        return Verdict(discriminator_loss(r, f, self.loss) + penalty, r, f)

    def shown(self, samples: Sequence[Tensor], s: Tensor | None, context: Context) -> tuple[list[Tensor], Tensor]:
        """What a discriminator sees of samples of time s [B], and the time of that: the clean ones are noised to t*."""
        s = torch.zeros(len(samples[0]), dtype=torch.int64, device=samples[0].device) if s is None else s
        if not self.times:
            return list(samples), s
        t = self.sample_time(context, s.device)
        return [where(s == 0, self.renoised(x, t, context), x) for x in samples], torch.where(s == 0, t, s)

    def sample_time(self, context: Context, device: torch.device) -> Tensor:
        """t* [B]."""
        uniform = context.uniform(0, 1, "t*", device).double()
        return self._times.on(device)[torch.bucketize(uniform, self._shares.on(device), right=True)]

    def renoised(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """Clean samples at t*, all with the same noise: a pair then differs by what it was before."""
        return add_noise(self.schedule, x, context.normal(x, "noise*"), t)


def generator_loss(fake: Tensor, loss: str = "nonsaturating") -> Tensor:
    """What logits [B] or [B, n] of its samples cost a generator, [B] in float32 or wider: of `ADVERSARIAL_LOSSES`."""
    return _per_sample(ADVERSARIAL_LOSSES[loss].generator(wide(fake)))


def discriminator_loss(real: Tensor, fake: Tensor, loss: str = "nonsaturating") -> Tensor:
    """What logits [B] or [B, n] of real samples and of fakes cost a discriminator, likewise. [B]"""
    return _per_sample(ADVERSARIAL_LOSSES[loss].discriminator(wide(real), wide(fake)))


def _per_sample(x: Tensor) -> Tensor:
    """The mean over the places of each sample, [B]."""
    return x if x.ndim == 1 else x.flatten(1).mean(1)
