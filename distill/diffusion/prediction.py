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
    FLOW = "flow_prediction"
    """The velocity eps - x0 of flow matching; `V` is alpha eps - sigma x0, of variance-preserving noise."""


def predictions_of(schedule: NoiseSchedule) -> tuple[Prediction, ...]:
    """What networks on this noise may predict: `V` and `FLOW` each have a formula on one kind of noise alone, and from
    `EPSILON` nothing follows about x0 where there is no signal, as at T of every flow-matching schedule."""
    if schedule.is_linear:
        return Prediction.FLOW, Prediction.SAMPLE
    return Prediction.EPSILON, Prediction.V, Prediction.SAMPLE


def check_prediction(prediction: Prediction, schedule: NoiseSchedule) -> None:
    """Raises ValueError for a prediction that networks on this noise cannot have, naming the setting of a student's."""
    allowed = predictions_of(schedule)
    if prediction not in allowed:
        names = " or ".join(other.value for other in allowed)
        raise ValueError(
            f"a network on {schedule.kind} noise cannot predict {prediction.value}: allowed is {names} "
            "(student.prediction; null is the teacher's own)"
        )


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
    if prediction is Prediction.FLOW:
        return Denoised(x_t - sigma * output, x_t + alpha * output)
    return Denoised(output, (x_t - alpha * output) / sigma)


def from_denoised(prediction: Prediction, denoised: Denoised, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The raw output that a network of this kind gives for `denoised`: the inverse of `to_denoised`."""
    if prediction is Prediction.EPSILON:
        return denoised.eps
    if prediction is Prediction.V:
        alpha, sigma = schedule.alpha(t, denoised.x0), schedule.sigma(t, denoised.x0)
        return alpha * denoised.eps - sigma * denoised.x0
    if prediction is Prediction.FLOW:
        return denoised.eps - denoised.x0
    return denoised.x0
