"""Noise levels as angles, on variance-preserving noise and on flow matching alike."""

from __future__ import annotations

import math

import pytest
import torch

from distill.diffusion.angles import angle, cosine, on_circle, velocity, velocity_of_step
from distill.diffusion.prediction import Denoised, Prediction, from_denoised
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.diffusion.solver import ddim_step

VP, FLOW = NoiseSchedule.scaled_linear(), NoiseSchedule.linear(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
T = torch.tensor([1000, 700, 400, 60, 1])
LIKE = torch.zeros(5, 4, 3, 2, dtype=torch.float64)


def belief() -> Denoised:
    x0, eps = torch.randn(2, *LIKE.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Denoised(x0, eps)


@SCHEDULES
def test_a_state_is_a_point_on_the_circle_of_data_and_noise(schedule: NoiseSchedule) -> None:
    at, phi = belief(), angle(schedule, T, LIKE)
    x = on_circle(schedule, add_noise(schedule, at.x0, at.eps, T), T)
    torch.testing.assert_close(x, phi.cos() * at.x0 + phi.sin() * at.eps, rtol=0, atol=1e-14)
    torch.testing.assert_close(cosine(schedule, T, LIKE), phi.cos(), rtol=0, atol=1e-15)


def test_angles_run_from_clean_data_to_noise_alone() -> None:
    for schedule in (VP, FLOW):
        phi = angle(schedule, torch.arange(1001), torch.zeros(1001, 1, dtype=torch.float64)).flatten()
        assert phi[0] == 0 and bool((phi.diff() > 0).all())
    assert float(phi[-1]) == math.pi / 2 and float(cosine(FLOW, 1000, LIKE)) == 0


def test_variance_preserving_states_are_on_the_circle_as_they_are() -> None:
    x, at = torch.ones(5, 4, 3, 2, dtype=torch.float64), belief()
    torch.testing.assert_close(on_circle(VP, x, T), x, rtol=0, atol=1e-14)
    v = from_denoised(Prediction.V, at, T, VP)
    torch.testing.assert_close(velocity(VP, at, T), v, rtol=0, atol=1e-14)


@SCHEDULES
def test_data_follow_from_state_and_velocity(schedule: NoiseSchedule) -> None:
    at, phi = belief(), angle(schedule, T, LIKE)
    x = on_circle(schedule, add_noise(schedule, at.x0, at.eps, T), T)
    torch.testing.assert_close(phi.cos() * x - phi.sin() * velocity(schedule, at, T), at.x0, rtol=0, atol=1e-14)


@SCHEDULES
def test_a_ddim_step_is_a_rotation_whose_velocity_is_the_networks(schedule: NoiseSchedule) -> None:
    at, s = belief(), torch.tensor([980, 600, 399, 20, 0])
    x_t, x_s = add_noise(schedule, at.x0, at.eps, T), ddim_step(schedule, at, s)
    found = velocity_of_step(schedule, x_t, T, x_s, s)
    torch.testing.assert_close(found, velocity(schedule, at, T), rtol=0, atol=1e-11)
    h = angle(schedule, T, LIKE) - angle(schedule, s, LIKE)
    turned = h.cos() * on_circle(schedule, x_t, T) - h.sin() * velocity(schedule, at, T)
    torch.testing.assert_close(turned, on_circle(schedule, x_s, s), rtol=0, atol=1e-13)
