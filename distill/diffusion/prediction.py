"""What a network predicts, and the wall at which that question ends.

Above this module everything is a `Denoiser`: it sees (x_t, t, conditioning) and answers with the clean data and the
noise that it believes x_t to be made of. Whether its network predicts noise, velocity or data no longer matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from distill.diffusion.schedule import NoiseSchedule, wide

Conditioning = Mapping[str, Tensor]
"""The inputs of a network beside x_t and t: its keyword tensors, each [B, ...]."""


@dataclass(frozen=True)
class Denoised:
    """A network's belief about x_t = alpha x0 + sigma eps; both [B, ...], float32 or wider."""

    x0: Tensor
    eps: Tensor


class Denoiser(Protocol):
    """A network behind the wall: x_t [B, C, h, w] and t [B] (int64, 1 ... T) to `Denoised`.

    At t = 0, where a sample is clean, x0 has to be finite and nothing else: callers give it no weight.
    """

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised: ...


class Prediction(str, Enum):
    """Diffusers' `prediction_type`."""

    EPSILON = "epsilon"
    V = "v_prediction"
    SAMPLE = "sample"


def to_denoised(prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Denoised:
    """Reads a network's raw output [B, ...] at x_t, in float32 or wider.

    With zero terminal SNR an eps prediction says nothing about x0 at t = T; it is not guarded against here.
    """
    x_t, output = wide(x_t), wide(output)
    alpha, sigma = schedule.alpha(t, x_t), schedule.sigma(t, x_t)
    if prediction is Prediction.EPSILON:
        return Denoised((x_t - sigma * output) / alpha, output)
    if prediction is Prediction.V:
        return Denoised(alpha * x_t - sigma * output, alpha * output + sigma * x_t)
    return Denoised(output, (x_t - alpha * output) / sigma)


def from_denoised(prediction: Prediction, denoised: Denoised, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The raw output that a network of this kind gives for `denoised`: the inverse of `to_denoised`."""
    if prediction is Prediction.EPSILON:
        return denoised.eps
    if prediction is Prediction.V:
        alpha, sigma = schedule.alpha(t, denoised.x0), schedule.sigma(t, denoised.x0)
        return alpha * denoised.eps - sigma * denoised.x0
    return denoised.x0
