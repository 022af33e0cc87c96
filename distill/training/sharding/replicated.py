"""Nothing is sharded: every rank holds the full network and its optimizer, in one process or under DDP."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, convert_to_fp32
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from distill.models.devices import own_device
from distill.training.processes import Processes, drop_launchers_settings, leave_group
from distill.training.rank_writes import Writes
from distill.training.resharding import OPTIMIZER, WholeState, read_replicated
from distill.training.sharding.base import PRECISIONS, Sharding, UpdateSettings, trainable, wrapping_failed
from distill.training.snapshot import Copies
from distill.training.state_files import Pickled, StateFile, Weights
from distill.training.trained_network import TrainedNetwork, TrainingRecipe, copy_into, weights_file


class OneProcess(Sharding):
    """One process, without a process group."""

    kind = "single"
    launch = "python"

    def check_launch(self, processes: int, launched: bool) -> None:
        if processes > 1:
            raise ValueError(f"engine=single, but {processes} processes were launched: use engine=ddp or a zero engine")

    def join(self, launched: bool, timeout: timedelta) -> PartialState:
        cpu = own_device().type == "cpu"
        drop_launchers_settings()
        os.environ.pop("LOCAL_RANK", None)  # launched as the only process of a group, it needs no group
        return PartialState(cpu=cpu, timeout=timeout)

    def leave(self) -> None:
        leave_group()

    def wrap(
        self,
        modules: Mapping[str, nn.Module],
        recipes: Mapping[str, TrainingRecipe],
        update: UpdateSettings,
        processes: Processes,
    ) -> dict[str, TrainedNetwork]:
        handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        # Autocast is entered here: Accelerate refuses that of float16 on CPUs, and would bring a scaler of its own.
        accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers, dynamo_backend="no")
        return {
            name: self._wrapped(accelerator, name, modules[name], recipe, update, processes)
            for name, recipe in recipes.items()
        }

    def _wrapped(
        self,
        accelerator: Accelerator,
        name: str,
        module: nn.Module,
        recipe: TrainingRecipe,
        update: UpdateSettings,
        processes: Processes,
    ) -> TrainedNetwork:
        parameters = recipe.arranged(trainable(module))
        if update.mixed_precision != "no":
            _autocast(module, processes.device, PRECISIONS[update.mixed_precision])
        wrapped = accelerator.prepare(module)
        if not self._is_right(wrapped, accelerator) or accelerator.num_processes != processes.world_size:
            raise wrapping_failed(self.kind, name, wrapped, accelerator)
        return ReplicatedNetwork(wrapped, parameters, recipe, update, writes=processes.is_main)

    def _is_right(self, wrapped: nn.Module, accelerator: Accelerator) -> bool:
        return accelerator.distributed_type == DistributedType.NO

    @classmethod
    def wrote(cls, folder: Path) -> bool:
        return (folder / OPTIMIZER).is_file()

    @classmethod
    def read_whole(cls, folder: Path, shapes: Mapping[str, torch.Size]) -> WholeState:
        return read_replicated(folder, shapes)


class DataParallel(OneProcess):
    """Several processes, each with the full network; gradients are averaged over them (torch's DDP)."""

    kind = "ddp"
    launch = "distill launch --multi_gpu --num_processes N"

    def check_launch(self, processes: int, launched: bool) -> None:
        if not launched:
            raise ValueError(f"engine=ddp needs a launcher: {self.launch}; or use engine=single")

    def join(self, launched: bool, timeout: timedelta) -> PartialState:
        cpu = own_device().type == "cpu"
        drop_launchers_settings()
        return PartialState(cpu=cpu, timeout=timeout)

    def _is_right(self, wrapped: nn.Module, accelerator: Accelerator) -> bool:
        return isinstance(wrapped, DistributedDataParallel)


def _autocast(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """From now on the module multiplies in `dtype`, whatever its weights are in, and returns float32.

    Autocast ends with each call, so that what it keeps of one pass (with a gradient, say) is not used by another.
    """
    forward = module.forward

    @functools.wraps(forward)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            answer = forward(*args, **kwargs)
        return convert_to_fp32(answer)

    module.forward = autocast  # type: ignore[method-assign]


class ReplicatedNetwork(TrainedNetwork):
    """A network of which every rank holds all weights. Rank 0 writes files that any number of ranks reads.

    Args:
        writes: whether this is the rank that writes.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        parameters: dict[str, nn.Parameter],
        recipe: TrainingRecipe,
        update: UpdateSettings,
        writes: bool,
    ) -> None:
        self.accumulation_steps, self.writes = update.gradient_accumulation_steps, writes
        self.max_grad_norm = math.inf if update.max_grad_norm is None else update.max_grad_norm
        self._factor = 1.0
        super().__init__(wrapped, parameters, recipe.optimizer_of(parameters), recipe)

    def scale_gradients(self, factor: float) -> None:
        self._factor = factor

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation_steps * self._factor).backward()

    def step(self) -> tuple[Tensor | float, Tensor | bool]:
        if self._factor != 1:
            torch._foreach_mul_([p.grad for p in self.parameters.values() if p.grad is not None], 1 / self._factor)
        norm = clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm)
        taken = norm.isfinite()
        if self._skips_by_itself:
            optimizer: Any = self.optimizer
            optimizer.grad_scale, optimizer.found_inf = None, (~taken).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif taken:  # a wait for the device
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, taken

    @property
    def _skips_by_itself(self) -> bool:
        """Whether the optimizer's kernels take or skip a step as a number on the device says, as torch's fused ones do.

        Not for the first step: the momentum of a fused SGD would be left as memory that nothing was written to.
        """
        return getattr(self.optimizer, "_step_supports_amp_scaling", False) and bool(self.optimizer.state)

    def reset_optimizer(self) -> None:
        new = self.recipe.optimizer_of(self.parameters)  # some have a state before their first step
        self.optimizer.state.clear()
        self.optimizer.state.update(new.state)

    def masters(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters.values()]

    def whole(self) -> dict[str, Tensor]:
        return {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()} if self.writes else {}

    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        copy_into([weights[name] for name in self.parameters], self.masters())

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

    def files(self, folder: Path, copies: Copies, writes: Writes) -> list[StateFile]:
        if not self.writes:
            return []
        found: list[StateFile] = []
        state = self.optimizer.state_dict()
        writes(lambda: found.append(Pickled(f"{folder.name}/{OPTIMIZER}", copies.later(state))))
        for name, values in ((weights_file(), self.masters()), (weights_file(ema=True), self.ema)):
            if values is not None:
                writes(lambda name=name, values=values: found.append(self._weights(folder, name, values, copies)))
        return found

    def _weights(self, folder: Path, name: str, values: Sequence[Tensor], copies: Copies) -> Weights:
        pieces = [(weight, copies.dense(value)) for weight, value in zip(self.parameters, values, strict=True)]
        return Weights(f"{folder.name}/{name}", self.shapes(), pieces, shared=False)

    def load_state(self, folder: Path) -> None:
        self.load_whole(load_file(folder / weights_file()))
        self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
        self._lay_out_state()

    def load_optimizer(self, state: WholeState) -> None:
        values: dict[int, dict[str, Any]] = {}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            of_weight = {key: value.reshape(parameter.shape).clone() for key, value in state.of(name).items()}
            if of_weight or not state.keys:
                values[i] = {**state.new_shared(), **of_weight}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {} if state.is_empty else values, "param_groups": groups})
        self._lay_out_state()

    def _lay_out_state(self) -> None:
        """What is kept for a weight's elements lies in memory as the weight does: fused kernels go by the place."""
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                same = isinstance(value, Tensor) and value.shape == parameter.shape
                if same and value.stride() != parameter.stride():
                    values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def close(self) -> None:
        pass
