"""What can be measured of any pictures, without a judge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def laplacian_energy(images: Tensor) -> Tensor:
    """Mean squared response of the 3x3 Laplacian of each of the pictures [B, C, H, W]: float64 [B]. Blur lowers it."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    response = F.conv2d(images.flatten(0, 1)[:, None], kernel[None, None].to(images))  # [B C, 1, H - 2, W - 2]
    return response.square().reshape(len(images), -1).double().mean(1)


def rmse(images: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference of each of the pictures [B, C, H, W] from its reference: float64 [B]."""
    return (images - reference).double().square().flatten(1).mean(1).sqrt()
