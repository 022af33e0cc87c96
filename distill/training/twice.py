"""The gradients of a step, computed twice: a processor that does not compute the same each time is found, and named.

Each rank compares its own, before ranks add them up, with those of a second pass over the same samples, random numbers
and weights, which no optimizer sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.cluster.scheduler import this_machine
from distill.training.processes import Processes
from distill.training.replicas import WrongMachine, summed_bits

TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""By how much two norms of a weight's gradient may differ, relatively, where the same bits are not promised; by the
dtype of products."""


class UnlikeGradients(WrongMachine):
    """A gradient came out as another one when it was computed again."""

    setting = "compute_twice_steps"


class Twice:
    """Compares this rank's gradients of one network in a step; bits, where `deterministic` promises the same ones.

    Args:
        weights: the trained ones, by name.
        device: of this rank.
        dtype: of products, which says how far norms may differ where bits do.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], device: torch.device, dtype: torch.dtype) -> None:
        self._weights = weights
        self._devices = [device] if device.type == "cuda" else []
        self._tolerance = 0.0 if torch.are_deterministic_algorithms_enabled() else TOLERANCES[dtype]
        self._first: dict[str, Tensor] = {}
        self._arrived: Tensor | None = None
        self._generators: list[Tensor] = []
        self._unlike: dict[str, None] = {}

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Surrounds forward and backward of a micro-batch, and notes its gradients as they are computed."""
        self._first, self._arrived = {}, None
        self._generators = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
        hooks = [weight.register_hook(self._noted(name)) for name, weight in self._weights.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def follow(self, loss: Tensor) -> None:
        """Notes by what the loss is scaled after this, from the gradient that comes back to it in the first pass."""

        def arrived(gradient: Tensor) -> None:
            self._arrived = gradient.detach().clone()

        loss.register_hook(arrived)

    def second_pass(self, loss: Callable[[], Tensor]) -> None:
        """Computes the micro-batch's loss and gradients again, and compares them; no gradient is added to any."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._generators[0])
            for device, state in zip(self._devices, self._generators[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            found = torch.autograd.grad(loss(), list(self._weights.values()), self._arrived, allow_unused=True)
        second = {n: self._summary(g) for n, g in zip(self._weights, found, strict=True) if g is not None}
        both = [name for name in self._weights if name in self._first and name in second]
        alike = self._alike([self._first[n] for n in both], [second[n] for n in both])
        self._unlike |= dict.fromkeys(self._first.keys() ^ second.keys())
        self._unlike |= {name: None for name, same in zip(both, alike, strict=True) if not same}

    def require_same(self, network: str, processes: Processes, step: int) -> None:
        """Raises UnlikeGradients, on all ranks alike, if a gradient differed on one. Call it on all ranks."""
        mine = (this_machine(), len(self._unlike), next(iter(self._unlike), "")) if self._unlike else None
        found = [(rank, of) for rank, of in enumerate(processes.gathered(mine)) if of is not None]
        if found:
            named = ", ".join(f"rank {rank} on {host} ({n} weights, {name})" for rank, (host, n, name) in found)
            line = f"step {step}: computed twice, the gradient of the {network} is not the same on {named}"
            raise UnlikeGradients(line, step, [host for _, (host, _, _) in found])

    def _noted(self, name: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            self._first[name] = self._summary(gradient)

        return note

    def _summary(self, gradient: Tensor) -> Tensor:
        """What is kept of a gradient, a number on its device: the sum of its bits, or its norm."""
        return gradient.detach().double().norm() if self._tolerance else summed_bits(gradient)

    def _alike(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[bool]:
        if not first:
            return []
        a, b = torch.stack(list(first)), torch.stack(list(second))
        same: Any = torch.isclose(a, b, rtol=self._tolerance, atol=0, equal_nan=True) if self._tolerance else a == b
        return list(same.tolist())
