"""The classifier of toy pictures ("judge"): which caption a picture shows, and features for Fréchet distances.

A small CNN trained on real renders. Beside the caption it has learnt to recognise background, geometry and blur, so
that its features see what the caption leaves open and notice a picture that is an average of several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.toy.world import CAPTIONS, labels_of

FEATURES = 64
DETAILS = 8  # what `Judge.details` regresses, see distill study toy_teacher


class Judge(nn.Module):
    """Pictures [B, 3, 32, 32] in [-1, 1] -> features [B, 64], caption logits [B, 20] and details [B, 8]."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _block(3, 24),  # [B, 24, 16, 16]
            _block(24, 48),  # [B, 48, 8, 8]
            _block(48, 64),  # [B, 64, 4, 4]
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES),
        )
        self.caption = nn.Linear(FEATURES, len(CAPTIONS))
        self.detail = nn.Linear(FEATURES, DETAILS)
        self.register_buffer("feature_mean", torch.zeros(FEATURES))
        self.register_buffer("feature_std", torch.ones(FEATURES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Caption logits [B, 20] and details [B, 8], from one pass."""
        hidden = F.silu(self.trunk(images))
        return self.caption(hidden), self.detail(hidden)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, 64]; each has mean 0 and variance 1 over real pictures of all captions."""
        return (self.trunk(images) - self.feature_mean) / self.feature_std

    def logits(self, images: Tensor) -> Tensor:
        """Caption logits [B, 20]."""
        return self(images)[0]

    @torch.no_grad()
    def caption_accuracy(self, images: Tensor, captions: Sequence[str]) -> tuple[float, float]:
        """Share of pictures whose likeliest caption is theirs, and its standard error."""
        if len(images) != len(captions) or not len(captions):
            raise ValueError(f"need one caption a picture and at least one, got {len(images)} and {len(captions)}")
        labels = labels_of(captions).to(images.device)
        share = (self.logits(images).argmax(dim=1) == labels).double().mean().item()
        return share, math.sqrt(share * (1 - share) / len(captions))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 4, stride=2, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def judge_file() -> Path:
    """The weights of the bundled classifier."""
    return Path(__file__).parent / "judge.safetensors"


def load_judge(path: Path | None = None) -> Judge:
    """The bundled classifier, or the one at `path`, frozen and in evaluation mode."""
    judge = Judge()
    judge.load_state_dict(load_file(path or judge_file()))
    return judge.eval().requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features [n, F] and [m, F] (Heusel et al. 2017, eq. 6), in float64.

    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A B)^1/2), the last from the eigenvalues of A^1/2 B A^1/2. It is biased
    upwards for small samples: compare only distances of equal n and m.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need features [n >= 2, F] of one width, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def laplacian_energy(images: Tensor) -> float:
    """Mean squared response of the 3x3 Laplacian over pictures [B, C, H, W]: their high-frequency energy."""
    middle = images[..., 1:-1, 1:-1]
    sides = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return (sides - 4 * middle).square().mean().item()


def sharpness(images: Tensor, real: Tensor) -> float:
    """High-frequency energy relative to real pictures of the same captions; below 1 is blurred, above is noisy."""
    return laplacian_energy(images) / laplacian_energy(real)
