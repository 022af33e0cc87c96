"""One trained network: its optimizer, learning rate, clipping, moving average and files.

Either every rank holds all of it (one process, DDP), or DeepSpeed has cut it into partitions (ZeRO). The engine sees
the same in both: float32 masters, on each rank its own share, which the optimizer updates and the average follows.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from distill.models.ema import average_
from distill.models.files import save_file
from distill.training.elastic import OPTIMIZER, WholeState
from distill.training.writing import Writes

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True)
class LearningRate:
    """Which share of the optimizer's learning rate is in force at a step: diffusers' schedules, without their memory.

    Args:
        name: one of `SCHEDULES`.
        warmup_steps: steps of a linear rise from 0; `constant` has none.
        total_steps: where `linear` and `cosine` reach 0.

    Raises:
        ValueError: an unknown name, or a warm-up longer than the run.
    """

    name: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"lr_scheduler must be one of {', '.join(SCHEDULES)}, got {self.name!r}")
        if not 0 <= self.warmup_steps:
            raise ValueError(f"lr_warmup_steps must not be negative, got {self.warmup_steps}")
        if self.name in ("linear", "cosine") and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"lr_warmup_steps must be below the run's {self.total_steps} steps for lr_scheduler={self.name}, "
                f"got {self.warmup_steps}"
            )

    def __call__(self, step: int) -> float:
        if self.name == "constant":
            return 1.0
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.name == "constant_with_warmup":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return 1.0 - progress if self.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TrainedNetwork:
    """How a network is trained.

    Args:
        optimizer: makes a torch optimizer of the parameters it is given; its `lr` is what `schedule` multiplies.
        schedule: step -> factor of the learning rate.
        ema_decay: keep a moving average of the trained weights with this decay; None keeps none.
    """

    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    schedule: Callable[[int], float] = LearningRate()
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be null or lie in [0, 1), got {self.ema_decay}")


class Trained(ABC):
    """A network in training, its module wrapped or partitioned by then. Methods are called on all ranks alike.

    Args:
        wrapped: what the turn that trains this network calls; everyone else calls the module inside.
        parameters: its trained parameters by name.
        optimizer: over those parameters.
        plan: schedule and average.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        plan: TrainedNetwork,
    ) -> None:
        self.wrapped, self.parameters, self.optimizer, self.plan = wrapped, parameters, optimizer, plan
        self._base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.ema = None if plan.ema_decay is None else [m.detach().clone() for m in self.masters()]

    def set_learning_rate(self, step: int) -> float:
        """Sets the learning rate of `step` and returns that of the first parameter group."""
        factor = self.plan.schedule(step)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor
        return self._base_rates[0] * factor

    def reset_optimizer(self) -> None:
        """Sets the optimizer's state (this rank's share) to zeros, which is where torch's optimizers start."""
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def follow(self) -> None:
        """Moves the average towards the weights; called after each step that was taken."""
        if self.ema is not None and self.plan.ema_decay is not None:
            average_(self.ema, self.masters(), self.plan.ema_decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network computes with its average; afterwards with its own weights again, to the bit."""
        try:
            with self._average_in_masters():
                self.spread()
                yield
        finally:
            self.spread()

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """All trained weights (or their average) by name: whole, float32, on the CPU of rank 0; empty elsewhere."""
        if not ema:
            return self.whole()
        with self._average_in_masters():
            return self.whole()

    def save(self, folder: Path, writes: Writes) -> None:
        """Writes this network's files into `folder`, which is there, on all ranks; what fails is kept in `writes`."""
        self.save_state(folder, writes)
        for average in (False, True) if self.ema is not None else (False,):
            if weights := self.weights(average):
                weights = {name: w.contiguous() for name, w in weights.items()}
                writes(save_file, weights, folder / weights_file(average))

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        self._load_average(folder)
        self.load_state(folder)

    def load_moved(self, folder: Path, state: WholeState) -> None:
        """Reads what `save` wrote on other ranks or at another ZeRO stage; `state` is its optimizer's."""
        self._load_average(folder)
        self.load_whole(load_file(folder / weights_file()))
        self.spread()
        self.load_optimizer(state)

    def _load_average(self, folder: Path) -> None:
        """Through the masters, which are to be set afterwards."""
        if self.ema is not None:
            self.load_whole(load_file(folder / weights_file(ema=True)))
            _copy(self.masters(), self.ema)

    @property
    def _average(self) -> list[Tensor]:
        if self.ema is None:
            raise ValueError("no moving average is kept: set ema_decay")
        return self.ema

    @contextmanager
    def _average_in_masters(self) -> Iterator[None]:
        kept = [m.detach().clone() for m in self.masters()]
        _copy(self._average, self.masters())
        try:
            yield
        finally:
            _copy(kept, self.masters())

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients meet over the ranks in the last of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` (scalar), one of the step's micro-batches, to their mean."""

    @abstractmethod
    def step(self) -> tuple[float, bool]:
        """Clips and takes an optimizer step, or none if the gradient is not finite: (global norm, was it taken)."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The float32 values that the optimizer updates: this rank's share, not copies."""

    @abstractmethod
    def whole(self) -> dict[str, Tensor]:
        """The masters by name: whole, on the CPU of rank 0; empty elsewhere."""

    @abstractmethod
    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        """Sets the masters from whole weights, the same on all ranks."""

    @abstractmethod
    def spread(self) -> None:
        """Makes the network compute with the masters as they are now."""

    @abstractmethod
    def save_state(self, folder: Path, writes: Writes) -> None:
        """Writes this rank's share of the optimizer's state into `folder`."""

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Reads weights and the optimizer's state."""

    @abstractmethod
    def load_optimizer(self, state: WholeState) -> None:
        """Sets the optimizer's state (this rank's share) from a whole one, the same on all ranks."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of what the network is wrapped in."""


class Replicated(Trained):
    """Every rank holds the whole network: one process, or DDP. Rank 0 writes files that any number of ranks reads."""

    def __init__(
        self, *args: Any, accumulation_steps: int = 1, max_grad_norm: float | None = None, writes: bool = True
    ) -> None:
        self.accumulation_steps, self.max_grad_norm, self.writes = accumulation_steps, max_grad_norm, writes
        super().__init__(*args)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation_steps).backward()

    def step(self) -> tuple[float, bool]:
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = float(clip_grad_norm_(list(self.parameters.values()), limit))
        if taken := math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, taken

    def masters(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters.values()]

    def whole(self) -> dict[str, Tensor]:
        return {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()} if self.writes else {}

    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        _copy([weights[name] for name in self.parameters], self.masters())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Weights and average change places, without a copy: a target network may do so in every step."""
        for p, average in zip(self.parameters.values(), self._average, strict=True):
            p.data, average.data = average.data, p.data

    def spread(self) -> None:
        pass  # the masters are the network's weights

    def save_state(self, folder: Path, writes: Writes) -> None:
        if self.writes:
            writes(torch.save, self.optimizer.state_dict(), folder / OPTIMIZER)

    def load_state(self, folder: Path) -> None:
        self.load_whole(load_file(folder / weights_file()))
        self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))

    def load_optimizer(self, state: WholeState) -> None:
        steps = torch.tensor(state.steps)
        values = {
            i: {"step": steps.clone(), **{key: v.reshape(p.shape) for key, v in state.of(name).items()}}
            for i, (name, p) in enumerate(self.parameters.items())
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": values if state.steps else {}, "param_groups": groups})

    def close(self) -> None:
        pass


class Partitioned(Trained):
    """DeepSpeed has cut gradients and optimizer state (ZeRO-1, 2), and at ZeRO-3 the weights, into a share a rank.

    `wrapped` is the DeepSpeedEngine: it clips, skips steps without a finite gradient, and counts micro-batches itself.
    """

    def __init__(self, *args: Any, rank: int) -> None:
        self.rank = rank
        super().__init__(*args)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts; at the boundary, `step` below takes the real one

    def step(self) -> tuple[float, bool]:
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()

    def masters(self) -> list[Tensor]:
        return _fp32_partitions(self._engine.optimizer)

    def whole(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.parameters.items():
            full = safe_get_full_fp32_param(parameter)  # on all ranks: it gathers
            if self.rank == 0:
                weights[name] = full.detach().to("cpu", copy=True)
        return weights

    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            _set_fp32(parameter, weights[name].to(parameter.device))

    def spread(self) -> None:
        _spread_partitions(self._engine.optimizer)

    def save_state(self, folder: Path, writes: Writes) -> None:
        with _keeping_failures(self._engine, writes):
            self._engine.save_checkpoint(
                str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True
            )

    def load_state(self, folder: Path) -> None:
        # Frozen weights are not in the file, so the names cannot match strictly; the checkpoint's manifest has been
        # compared with this run's trained names and shapes by now.
        path, _ = self._engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint in {folder}")

    def load_optimizer(self, state: WholeState) -> None:
        if state.steps:
            _begin_state(self._engine.optimizer, state.of(next(iter(self.parameters))), state.steps)
            for name, parameter in self.parameters.items():
                for key, value in state.of(name).items():
                    _set_state(parameter, key, value.to(parameter.device))

    def close(self) -> None:
        self._engine.destroy()

    @property
    def _engine(self) -> Any:
        return self.wrapped


def weights_file(ema: bool = False) -> str:
    """The file of a network's whole trained weights, or of their average, in its folder of a checkpoint."""
    return "ema.safetensors" if ema else "weights.safetensors"


@torch.no_grad()
def _copy(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _fp32_partitions(optimizer: Any) -> list[Tensor]:
    """This rank's share of the float32 weights."""
    return [partition.detach() for partition in _flat_groups(optimizer)]


def _flat_groups(optimizer: Any) -> list[Tensor]:
    """What the optimizer inside updates. DeepSpeed's internals: named in these functions, nowhere else."""
    for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if partitions := getattr(optimizer, attribute, None):
            return list(partitions)
    raise RuntimeError(f"this DeepSpeed's {type(optimizer).__name__} does not show its float32 partitions")


@torch.no_grad()
def _set_fp32(parameter: Any, value: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        _set_share(parameter, None, value)
    else:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)


@torch.no_grad()
def _set_state(parameter: Any, key: str, value: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        _set_share(parameter, key, value)
    else:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)


def _set_share(parameter: Any, key: str | None, value: Tensor) -> None:
    """DeepSpeed's own setters at ZeRO-3 cannot set values whose elements the ranks do not share evenly."""
    optimizer = parameter._z3_optimizer
    share, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    first = share.numel() * optimizer._get_param_partition_rank(parameter)
    mine = value.flatten()[first : first + share.numel()]
    share[: mine.numel()].copy_(mine)


def _begin_state(optimizer: Any, like: Mapping[str, Tensor], steps: float) -> None:
    """Gives the optimizer inside, which has not taken a step, the state that its first one would; of zeros."""
    for flat in _flat_groups(optimizer):
        zeros = {key: torch.zeros_like(flat.detach()) for key in like}
        optimizer.optimizer.state[flat] = {"step": torch.tensor(steps), **zeros}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()  # so that the setters find it


@contextmanager
def _keeping_failures(engine: Any, writes: Writes) -> Iterator[None]:
    """Inside, what DeepSpeed cannot write is kept in `writes`. It saves between barriers, and must miss none."""
    for owner, name in ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")):
        setattr(owner, name, functools.partial(writes, getattr(owner, name)))
    try:
        yield
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script


@torch.no_grad()
def _spread_partitions(optimizer: Any) -> None:
    """Makes the network compute with the float32 partitions as they are now."""
    if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2: every rank holds whole weights, gathered from all
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()
