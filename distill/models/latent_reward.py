"""A reward of latents: they are decoded with a gradient, a few at a time, and the pictures scored."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.models.families.teacher import Teacher
from distill.models.rewards import Reward

_computed_again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class LatentReward(nn.Module):
    """Scores of latents [B, C, h, w] for prompts, [B], differentiable in the latents.

    Args:
        teacher: with its autoencoder, which is frozen.
        reward: of pictures.
        slice_size: latents that are decoded and scored at once.
        checkpoint: hold no activations of the decoder and of the reward: in the backward pass each slice is computed
            again, and in it each block of the decoder. (Those of one 1024 x 1024 picture in SDXL's are 23 GiB.)

    Raises:
        ValueError: slice_size is below 1.
    """

    def __init__(self, teacher: Teacher, reward: Reward, slice_size: int = 1, checkpoint: bool = True) -> None:
        super().__init__()
        if slice_size < 1:
            raise ValueError(f"slices of latents must hold at least 1, got {slice_size}")
        self.teacher, self.vae, self.reward = teacher, teacher.vae, reward
        self.slice_size, self.checkpoint = slice_size, checkpoint
        self.requires_grad_(False).eval()
        if checkpoint:
            self.vae.enable_gradient_checkpointing(_computed_again)
        else:
            self.vae.disable_gradient_checkpointing()

    def forward(self, latents: Tensor, *prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """float32 [B] for each list of B prompts: the pictures are decoded once for all of them."""
        parts = []
        for start in range(0, len(latents), self.slice_size):
            chosen = slice(start, start + self.slice_size)
            texts = [words[chosen] for words in prompts]
            if self.checkpoint:
                part = _computed_again(self._scores, latents[chosen], texts)
            else:
                part = self._scores(latents[chosen], texts)
            parts.append(part)
        return torch.cat(parts, dim=1).unbind()

    def _scores(self, latents: Tensor, prompts: Sequence[Sequence[str]]) -> Tensor:
        """[n, b] for n lists of b prompts."""
        images = (self.teacher.pictures(latents) + 1) / 2  # [b, 3, H, W] in [0, 1]
        return torch.stack([self.reward(images, words) for words in prompts])
