"""A method whose losses run out of memory, as those of a GPU do, for more samples at once than it has room for."""

from __future__ import annotations

import torch

from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch
from distill.methods.base import Losses, Networks
from distill.methods.lcm import LCM
from distill.training.launched import launched_rank

seen: list[int] = []
"""Samples of each micro-batch that there was room for."""


class Short(LCM):
    """LCM with `room` samples of memory, on rank `on` alone if one is named, and at steps from `first` on."""

    def __init__(self, schedule: NoiseSchedule, room: int, on: int | None = None, first: int = 0) -> None:
        super().__init__(schedule, skip=200)
        self.room, self.on, self.first = room, on, first

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        torch.rand(3)  # of a method that takes torch's own randomness, not the context's
        if batch.states.device.type != "meta":  # where a plan counts
            if len(batch) > self.room and self.on in (None, launched_rank()) and context.step >= self.first:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            seen.append(len(batch))
        return super().loss(networks, batch, context)
