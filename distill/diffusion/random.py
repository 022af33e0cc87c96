"""Random numbers that depend on what they are for, never on when, where or after what they are sampled.

Their key is (seed, step, position of the sample in the global batch, name of the stream), and in further turns of the
same network the number of the turn. So a resumed run needs no stored generator state, and 1, 2 or 4 ranks with the
same global batch have the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

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
class RandomRequest:
    """The random numbers that a loss takes for each of its samples.

    Args:
        stream: its name; requests of one name have the same random numbers.
        shape: of one sample's, `[B, *shape]` in all; `dtype` is its type.
        bounds: of `integers` low ... high - 1, of `uniform` [low, high); None is a normal distribution.
    """

    stream: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bounds: tuple[float, float] | None = None

    def of(self, generator: torch.Generator) -> Tensor:
        """The numbers of one sample, on the CPU."""
        if self.bounds is None:
            return torch.randn(self.shape, generator=generator, dtype=self.dtype)
        low, high = self.bounds
        if self.dtype == torch.int64:
            return torch.randint(int(low), int(high), self.shape, generator=generator)
        return low + (high - low) * torch.rand(self.shape, generator=generator)


@dataclass(frozen=True)
class Context:
    """The random numbers of a loss: one micro-batch's place in the run determines them.

    Numbers are sampled on the CPU, so that they are the same on all machines. `foresee` samples and copies ahead what a
    loss is known to request; anything else is copied when it is requested, which makes the host wait for the device.

    Args:
        seed: the run's.
        step: optimizer steps taken so far.
        positions: place of each of the B samples in the stream of global batches.
        turn: turns of the same network before this one in the step. The first turns of different networks have the
            same numbers, so that a discriminator learns from those that the student's turn will use.
    """

    seed: int
    step: int
    positions: tuple[int, ...]
    turn: int = 0
    _ahead: dict[RandomRequest, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _requested: dict[RandomRequest, None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def normal(self, like: Tensor, stream: str) -> Tensor:
        """Standard normal noise of the shape [B, ...], device and wide dtype of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return self._numbers(RandomRequest(stream, tuple(like.shape[1:]), dtype), like.device)

    def uniform(self, low: float, high: float, stream: str, device: torch.device | str = "cpu") -> Tensor:
        """[B] float32, uniform in [low, high)."""
        return self._numbers(RandomRequest(stream, (), torch.float32, (low, high)), torch.device(device))

    def integers(self, low: int, high: int, stream: str, device: torch.device | str = "cpu") -> Tensor:
        """[B] int64, uniform in low ... high - 1."""
        return self._numbers(RandomRequest(stream, (), torch.int64, (low, high)), torch.device(device))

    @property
    def requested(self) -> tuple[RandomRequest, ...]:
        """What has been requested for devices other than the CPU so far."""
        return tuple(self._requested)

    def foresee(self, requests: Sequence[RandomRequest], device: torch.device) -> None:
        """Samples what a loss is going to request on `device`, and copies it there at once. A CPU needs no copies."""
        if requests and device.type != "cpu":
            self._ahead.update(zip(requests, packed([self._on_cpu(one) for one in requests], device), strict=True))

    def _numbers(self, request: RandomRequest, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self._on_cpu(request)
        self._requested[request] = None
        ahead = self._ahead.get(request)
        return ahead if ahead is not None and ahead.device == device else self._on_cpu(request).to(device)

    def _on_cpu(self, request: RandomRequest) -> Tensor:
        turn = ("turn", self.turn) if self.turn else ()  # the first turn has the numbers that it has always had
        parts = [(self.seed, self.step, p, request.stream, *turn) for p in self.positions]
        return torch.stack([request.of(generator(*part)) for part in parts])


def packed(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on `device`, by one copy, for which the host does not wait. They share their memory there."""
    aligned = 64  # bytes; what kernels want, and a multiple of all sizes of elements
    starts = list(accumulate((-(-t.nbytes // aligned) * aligned for t in tensors), initial=0))
    pinned = device.type == "cuda" and torch.cuda.is_available()
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)

    def place(memory: Tensor, start: int, tensor: Tensor) -> Tensor:
        return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    for start, tensor in zip(starts, tensors, strict=False):
        place(buffer, start, tensor).copy_(tensor)
    there = buffer.to(device, non_blocking=True)
    return [place(there, start, tensor) for start, tensor in zip(starts, tensors, strict=False)]
