"""Classifier-free guidance (Ho & Salimans 2022): `uncond + w (cond - uncond)`, so w = 1 is no guidance.

The LCM papers and scripts print `cond + w (cond - uncond)`: their w is this w minus 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.diffusion.prediction import Conditioning, Denoised, Denoiser


def lcm_guidance(w: float) -> float:
    """This module's w for a guidance weight as the LCM papers print it."""
    return w + 1


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Fourier features [B, dim] of guidance weights w [B] (Meng et al. 2023), for networks that take w as an input.

    Number for number what a diffusers pipeline shows its UNet for `guidance_scale` = w, which is of the printed w - 1.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10_000.0) / (half - 1)))
    angles = 1000 * (w.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def guide(cond: Denoised, uncond: Denoised, w: Tensor | float) -> Denoised:
    """Guides x0 and eps alike, which is one thing: at a fixed x_t each is affine in the other. w: scalar or [B]."""
    if isinstance(w, Tensor) and w.ndim:
        w = w.to(cond.x0).reshape(-1, *[1] * (cond.x0.ndim - 1))
    return Denoised(uncond.x0 + w * (cond.x0 - uncond.x0), uncond.eps + w * (cond.eps - uncond.eps))


def with_guidance(conditioning: Conditioning, w: Tensor | float, x_t: Tensor) -> Conditioning:
    """The conditioning of states x_t [B, ...] with w, a number or [B], as its entry "guidance": [B] in float32.

    It reaches networks that have w as an input, and no others.
    """
    if not isinstance(w, Tensor):  # made on the device: a copy from the host would be waited for
        return {**conditioning, "guidance": torch.full((len(x_t),), w, dtype=torch.float32, device=x_t.device)}
    return {**conditioning, "guidance": w.to(x_t.device, torch.float32).expand(len(x_t))}


def guided(denoiser: Denoiser, unconditional: Conditioning, w: Tensor | float) -> Denoiser:
    """A denoiser that follows guidance w, with both passes in one batched forward.

    `unconditional` replaces the entries of the conditioning that it names ([B, ...] or [1, ...]); the others, such as
    SDXL's time ids, are the same in both passes. A plain w = 1 makes no unconditional pass at all.

    An empty `unconditional` is that of a network which has w as an input: one pass, which is given w, 1 as well.

    Raises:
        ValueError: when called, if the conditioning lacks an entry that `unconditional` names.
    """
    if not unconditional:
        return lambda x_t, t, conditioning: denoiser(x_t, t, with_guidance(conditioning, w, x_t))
    if not isinstance(w, Tensor) and w == 1:
        return denoiser

    def call(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        if missing := sorted(unconditional.keys() - conditioning.keys()):
            raise ValueError(f"the conditioning lacks {missing[0]!r}, which the unconditional pass replaces")
        empty = {k: unconditional.get(k, v).to(v).expand_as(v) for k, v in conditioning.items()}
        both = {k: torch.cat([conditioning[k], empty[k]]) for k in conditioning}
        out = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        (c0, u0), (ce, ue) = out.x0.chunk(2), out.eps.chunk(2)
        return guide(Denoised(c0, ce), Denoised(u0, ue), w)

    return call
