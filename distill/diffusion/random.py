"""Randomness that depends on what a draw is for, never on when, where or after what it is made.

Every draw is keyed by (seed, step, position of the sample in the global batch, name of the stream), and in further
turns of the same network by the number of the turn. So a resumed run needs no stored generator state, and 1, 2 or 4
ranks with the same global batch draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from a list of numbers and names; different lists give unrelated seeds.

    Raises:
        TypeError: a part of another type (NumPy's integers, say), whose seed would not be that of the number it equals.
    """
    if strange := [part for part in parts if type(part) not in (int, str)]:
        raise TypeError(f"a seed is made of int and str, got {type(strange[0]).__name__} {strange[0]!r}")
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator for `seed_of(*parts)`: the same numbers on every machine, whatever its accelerator."""
    return torch.Generator().manual_seed(seed_of(*parts))


def starting_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """x_T [B, C, h, w], the first numbers of each of B generators."""
    return torch.cat([torch.randn((1, *shape), generator=g, device=g.device) for g in generators])


@dataclass(frozen=True)
class Context:
    """What a loss may draw from: one micro-batch's place in the run.

    Args:
        seed: the run's.
        step: optimizer steps taken so far.
        positions: place of each of the B samples in the stream of global batches.
        turn: turns of the same network before this one in the step. The first turns of different networks draw the
            same numbers, so that a discriminator can learn about what the student is about to be judged by.
    """

    seed: int
    step: int
    positions: tuple[int, ...]
    turn: int = 0

    def normal(self, like: Tensor, stream: str) -> Tensor:
        """Standard normal noise of the shape [B, ...], device and wide dtype of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        draws = self._draw(stream, lambda g: torch.randn(like.shape[1:], generator=g, dtype=dtype))
        return draws.to(like.device)

    def uniform(self, low: float, high: float, stream: str, device: torch.device | str = "cpu") -> Tensor:
        """[B] float32, uniform in [low, high)."""
        return self._draw(stream, lambda g: low + (high - low) * torch.rand((), generator=g)).to(device)

    def integers(self, low: int, high: int, stream: str, device: torch.device | str = "cpu") -> Tensor:
        """[B] int64, uniform in low ... high - 1."""
        return self._draw(stream, lambda g: torch.randint(low, high, (), generator=g)).to(device)

    def _draw(self, stream: str, one: Callable[[torch.Generator], Tensor]) -> Tensor:
        turn = ("turn", self.turn) if self.turn else ()  # so the first one draws what it always has
        return torch.stack([one(generator(self.seed, self.step, p, stream, *turn)) for p in self.positions])
