"""Weights that ranks share, compared by checksum: a machine that computes or remembers wrongly is found, and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill.cluster.scheduler import this_machine
from distill.training.processes import Processes

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class WrongMachine(RuntimeError):
    """A machine computes or remembers wrongly; one line that names it, the same on all ranks.

    `step` is the number of the step in which it was found, the first one is 1. `setting` is the key that says after how
    many steps it is looked for: what was right the last time is the state after so many steps less. `machines` may be
    it.
    """

    setting: ClassVar[str]

    def __init__(self, line: str, step: int, machines: Iterable[str] = ()) -> None:
        super().__init__(line)
        self.step, self.machines = step, tuple(dict.fromkeys(machines))


class UnlikeReplicas(WrongMachine):
    """Ranks hold other weights than each other where they should hold the same."""

    setting = "compare_replicas_steps"


def summed_bits(tensor: Tensor) -> Tensor:
    """The sum of all elements' bits, read as integers, on their device: any single bit that flips changes it."""
    return tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


def checksum(tensors: Iterable[Tensor]) -> int:
    """That of all elements of several tensors."""
    sums = list(map(summed_bits, tensors))
    return int(torch.stack(sums).sum()) if sums else 0


def checksums(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """That of each module's parameters as they are on this rank; a share of ZeRO-3's counts as none."""
    return {name: checksum(module.parameters()) for name, module in modules.items()}


def require_same(found: Mapping[str, int], processes: Processes, step: int) -> None:
    """Compares the ranks' checksums of what all of them hold. Call it on all ranks.

    Raises:
        UnlikeReplicas: they differ; it names the ranks, and their hosts, that are unlike most.
    """
    gathered = processes.gathered((dict(found), this_machine()))
    for name in found:
        values = [sums[name] for sums, _ in gathered]
        (common, count), *others = Counter(values).most_common()
        if not others:
            continue
        unsure = any(other == count for _, other in others)
        wrong = [rank for rank, value in enumerate(values) if unsure or value != common]
        named = ", ".join(f"rank {rank} on {gathered[rank][1]}" for rank in wrong)
        which = "differ between" if unsure else "are not those of the other ranks on"
        line = f"step {step}: the weights of the {name}, which all ranks share, {which} {named}"
        raise UnlikeReplicas(line, step, [gathered[rank][1] for rank in wrong])
