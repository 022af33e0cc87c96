"""What a student of the toy may be rewarded for: the caption's log-odds, by a network that never evaluates.

The classifier (`judge.py`) measures; students are trained on this one. It has another architecture, was trained with
another seed, on sharp pictures alone, and is smaller: a student can please it with pictures that the classifier does
not take for real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.toy.world import CAPTIONS, labels_of


class ToyReward(nn.Module):
    """Pictures [B, 3, 32, 32] in [0, 1] and B captions -> [B], log p / (1 - p) of the caption, differentiable."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1, groups=4),
            nn.GELU(),
        )  # [B, 64, 4, 4]
        self.caption = nn.Linear(2 * 64, len(CAPTIONS))

    def logits(self, images: Tensor) -> Tensor:
        """Caption logits [B, 20] of pictures in [0, 1]."""
        places = self.body(2 * images - 1)
        return self.caption(torch.cat([places.mean((2, 3)), places.amax((2, 3))], dim=1))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        logits, labels = self.logits(images), labels_of(prompts).to(images.device)
        own = F.one_hot(labels, len(CAPTIONS)).bool()
        others = logits.masked_fill(own, -torch.inf).logsumexp(1)
        return logits[own] - others


def reward_file() -> Path:
    """The bundled reward's weights."""
    return Path(__file__).parent / "reward.safetensors"


def load_reward(path: str | None = None) -> ToyReward:
    """The bundled reward, or the one at `path`, frozen and in evaluation mode."""
    reward = ToyReward()
    reward.load_state_dict(load_file(path or reward_file()))
    return reward.eval().requires_grad_(False)
