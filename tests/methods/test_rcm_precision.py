"""What half precision leaves of a tangent, on the bundled toy teacher and its own solves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.diffusion.solver import solve, trailing_times
from distill.diffusion.trajectory import Batch
from distill.methods.rcm import SCM
from distill.models.denoiser import NetworkDenoiser
from distill.models.families.loading import load_teacher
from distill.toy.teacher import teacher_folder

N = 16


@pytest.mark.slow
def test_float16_keeps_the_direction_of_a_short_difference_and_bfloat16_does_not() -> None:
    teacher = load_teacher(teacher_folder(), parts=("network", "text"))
    c = dict(teacher.encode(["red stripes", "blue rings", "green dots", "purple checks"] * (N // 4)))
    times = trailing_times(1000, 50)
    noise = torch.randn(N, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = torch.stack([x for _, x in solve(teacher.denoiser(), teacher.schedule, noise, times, c)], 1)

    def tangent(network: NetworkDenoiser, skip: int) -> Tensor:
        apart, method = skip // 20, SCM(teacher.schedule, skip=skip)
        found = []
        for i in range(0, len(times) - apart, 6):
            at = torch.tensor([[times[i], times[i + apart]]]).expand(N, 2)
            batch = Batch(states[:, [i, i + apart]], at, c, {}, torch.ones(N), positions=tuple(range(N)))
            with torch.no_grad():
                step, _, f_s, denoised = method.answers(network, batch)
                found.append(method.tangent(step, denoised, f_s).flatten(1))
        return torch.cat(found)

    def cosine(dtype: torch.dtype, skip: int) -> float:
        full = teacher.denoiser()
        half = replace(full, module=copy.deepcopy(full.module).to(dtype))
        return float(torch.cosine_similarity(tangent(half, skip), tangent(full, skip), dim=1).mean())

    assert cosine(torch.float16, 20) > 0.99 > 0.9 > cosine(torch.bfloat16, 20)
    assert cosine(torch.bfloat16, 100) > 0.97
