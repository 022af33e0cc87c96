"""Noise levels as angles: x_t / sqrt(alpha² + sigma²) = cos(phi) x0 + sin(phi) eps with tan(phi) = sigma / alpha.

This is TrigFlow (Lu & Song 2024, arXiv 2410.11081, sec. 3) with data of standard deviation 1. States of
variance-preserving noise are as they are; those of flow matching, (1 - sigma) x0 + sigma eps, are divided by that root.
On the circle the ODE is dx/dphi = cos(phi) eps - sin(phi) x0, the velocity, and a DDIM step is a rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.diffusion.prediction import Denoised
from distill.diffusion.schedule import NoiseSchedule, wide


def angle(schedule: NoiseSchedule, t: Tensor | int, like: Tensor) -> Tensor:
    """phi at t, from 0 at clean data to pi/2 without signal; shaped like `NoiseSchedule.alpha`."""
    return torch.atan2(schedule.sigma(t, like), schedule.alpha(t, like))


def cosine(schedule: NoiseSchedule, t: Tensor | int, like: Tensor) -> Tensor:
    """cos(phi) at t: alpha itself where noise is variance preserving, and exactly 0 without signal."""
    return schedule.alpha(t, like) / _length(schedule, t, like)


def on_circle(schedule: NoiseSchedule, x_t: Tensor, t: Tensor | int) -> Tensor:
    """x_t / sqrt(alpha² + sigma²), [B, ...]."""
    x_t = wide(x_t)
    return x_t / _length(schedule, t, x_t)


def velocity(schedule: NoiseSchedule, denoised: Denoised, t: Tensor | int) -> Tensor:
    """F = cos(phi) eps - sin(phi) x0 of a belief about x_t; v-prediction, of variance-preserving noise. [B, ...]"""
    x0, eps = denoised.x0, denoised.eps
    return (schedule.alpha(t, x0) * eps - schedule.sigma(t, x0) * x0) / _length(schedule, t, x0)


def velocity_of_step(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The velocity at x_t whose rotation, a DDIM step, leads from t to x_s at s < t. [B, ...]"""
    h = angle(schedule, t, wide(x_t)) - angle(schedule, s, wide(x_t))
    return (h.cos() * on_circle(schedule, x_t, t) - on_circle(schedule, x_s, s)) / h.sin()


def _length(schedule: NoiseSchedule, t: Tensor | int, like: Tensor) -> Tensor:
    return torch.hypot(schedule.alpha(t, like), schedule.sigma(t, like))
