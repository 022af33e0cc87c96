"""The processes of a run: this one's rank and device, and what all of them say to each other."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.distributed import distributed_c10d

T = TypeVar("T")
LONGER_THAN_WATCHDOG = timedelta(minutes=5)
NO_LIMIT = timedelta(days=30)
RECORDED_COLLECTIVES = 2000


class Channel:
    """What ranks say to each other over one process group, each call on all ranks in the same order.

    Calls over two channels do not meet: what a thread says over its own is not mixed with what the training says.

    Args:
        group: torch's; None is the training's own.
        device: where what is sent lies on its way.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self.rank, self.world_size = rank, world_size
        self._device, self._group = device, group

    def gathered(self, value: T) -> list[T]:
        """A picklable value of every rank, in the order of ranks, on all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, values: Tensor, rank: int) -> None:
        """Sends float32 values, flat, to a rank that calls `receive`."""
        dist.send(values.to(self._device, torch.float32), rank, group=self._group)

    def receive(self, count: int, rank: int) -> Tensor:
        """So many float32 values, flat, on the host, from a rank that calls `send`."""
        values = torch.empty(count, dtype=torch.float32, device=self._device)
        dist.recv(values, rank, group=self._group)
        return values.cpu()


class Processes:
    """The ranks of a run, once they have found each other. Methods are called on all ranks alike.

    Args:
        state: Accelerate's, of the process group.
        leave: leaves the process group.
        timeout: of collectives.

    Attributes:
        rank: of this process, 0 ... world_size - 1; rank 0 is the main one.
        device: of this process.
    """

    def __init__(self, state: PartialState, leave: Callable[[], None], timeout: timedelta = NO_LIMIT) -> None:
        self.rank: int = state.process_index
        self.world_size: int = state.num_processes
        self.device: torch.device = state.device
        self.timeout = timeout
        self._state, self._leave = state, leave
        self.channel = Channel(self.rank, self.world_size, self.device, None)

    @functools.cached_property
    def second_channel(self) -> Channel:
        """A channel over a process group of its own (gloo), for a thread beside the training.

        The first use makes the group: all ranks come to it at the same place.
        """
        group = dist.new_group(backend="gloo", timeout=self.timeout) if self.world_size > 1 else None
        assert group is None or isinstance(group, dist.ProcessGroup)  # every rank is in it
        return Channel(self.rank, self.world_size, torch.device("cpu"), group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def apply_timeout(self) -> None:
        """Gives the timeout to every process group: libraries make further ones, with 10 minutes for NCCL's."""
        if dist.is_initialized():
            for group in list(distributed_c10d._world.pg_map):
                _set_timeout(self.timeout, group)

    def barrier(self) -> None:
        """Waits for all ranks."""
        self._state.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank; the same answer on all."""
        return self._reduced(flag, dist.ReduceOp.MAX)

    def flags_of_all(self, flags: Sequence[bool]) -> Tensor | None:
        """Above 0 for each flag that is set on at least one rank, on this rank's device: the host does not wait for it.

        None: there is no other rank, or no flag.
        """
        if self.world_size == 1 or not flags:
            return None
        # filled on the device: a tensor made of Python's numbers would be copied there, and waited for
        tensor = torch.cat([torch.full((1,), float(flag), device=self.device) for flag in flags])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all_agree(self, flag: bool) -> bool:
        """Whether `flag` is set on every rank; the same answer on all."""
        return self._reduced(flag, dist.ReduceOp.MIN)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of every rank's `values`, a tensor on its device; the same on all."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def gathered(self, value: T) -> list[T]:
        """A picklable value of every rank, in the order of ranks, on all of them."""
        return self.channel.gathered(value)

    def from_main(self, value: T) -> T:
        """Rank 0's picklable `value`, on all ranks."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def close(self) -> None:
        """Leaves the process group for good: launched processes do not form another."""
        forget_accelerate()
        self._leave()

    def _reduced(self, flag: bool, op: Any) -> bool:
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(tensor, op)
        return bool(tensor)


def collectives_timeout(watchdog_minutes: float | None) -> timedelta:
    """How long a collective may take: longer than anything that the watchdog lets pass, so that a rank may be busy for
    as long while the others wait for it, and the watchdog is what ends a run that hangs. None and 0 set no limit."""
    return NO_LIMIT if not watchdog_minutes else timedelta(minutes=watchdog_minutes) + LONGER_THAN_WATCHDOG


def record_collectives() -> None:
    """Has NCCL's flight recorder keep the last collectives, for the files of a hang; before the group is made.

    What the environment says already stays. Newer versions of torch read the second name.
    """
    if torch.cuda.is_available():
        for name in ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"):
            os.environ.setdefault(name, str(RECORDED_COLLECTIVES))


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # public in newer versions
    change(timeout, group)


def leave_group() -> None:
    """Destroys torch's process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def forget_accelerate() -> None:
    """Accelerate keeps its state in class attributes; a stale one would answer for a new engine."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def drop_launchers_settings() -> None:
    """Drops what a launcher says about precision, ZeRO and accumulation, which Accelerate would mix into ours."""
    for key in list(os.environ):
        if key.startswith(("ACCELERATE_", "FSDP_")) and key not in ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"):
            del os.environ[key]
