"""DeepSpeed ZeRO: the ranks share the optimizer's state (stage 1), gradients too (2), and weights too (3).

Rajbhandari et al. 2020, arXiv 1910.02054. What is named here of DeepSpeed is documented; the rest is in
`distill.training.deepspeed_internals`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn

from distill.models.devices import gpu_is_used, own_device
from distill.models.quantized import is_quantized
from distill.models.shared import part_from
from distill.training import deepspeed_internals
from distill.training.processes import Processes, drop_launchers_settings, leave_group
from distill.training.rank_writes import Writes
from distill.training.resharding import WholeState, with_progress
from distill.training.sharding.base import Sharding, UpdateSettings, trainable, wrapping_failed
from distill.training.snapshot import Copies
from distill.training.state_files import Pickled, StateFile, Weights
from distill.training.trained_network import TrainedNetwork, TrainingRecipe, weights_file

STAGES = (1, 2, 3)
# DeepSpeed wants a process group even for one process; port 0 is any free one.
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_OWN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


class ZeRO(Sharding):
    """Several processes under DeepSpeed, or one, which needs no launcher.

    Its settings are `deepspeed`, DeepSpeed's own, of which `zero_optimization.stage` is required, and `stages`, the
    stages of single networks by name.
    """

    kind = "deepspeed"
    settings_names = ("deepspeed", "stages")
    holds_whole = False
    keeps_order = False  # it joins weights, and sends them as bytes
    launch = "distill launch --num_processes N"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.deepspeed = dict(settings.get("deepspeed") or {})
        self.stages: dict[str, int] = dict(settings.get("stages") or {})
        for key in _OWN_KEYS:
            if key in self.deepspeed:
                raise ValueError(f"engine.deepspeed.{key} is set from the run's own settings; remove it")
        self.stage: int = self.deepspeed.get("zero_optimization", {}).get("stage")
        if self.stage not in STAGES:
            raise ValueError(f"engine.deepspeed.zero_optimization.stage must be 1, 2 or 3, got {self.stage}")
        for name, stage in self.stages.items():
            if stage not in STAGES:
                raise ValueError(f"engine.stages.{name} must be 1, 2 or 3, got {stage}")
        self._borrowed_environment: tuple[str, ...] = ()

    def stage_of(self, network: str | None) -> int:
        return self.stages.get(network or "", self.stage)

    def name_of(self, network: str | None = None) -> str:
        return f"zero{self.stage_of(network)}"

    def check_compile(self) -> None:
        if 3 in (self.stage, *self.stages.values()):
            raise ValueError("compile needs all weights on every rank, which ZeRO-3 shards: set compile=false or zero2")

    def check_precision(self, mixed_precision: str) -> None:
        from deepspeed.accelerator import get_accelerator

        if mixed_precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ValueError(
                f"mixed_precision=fp16: DeepSpeed computes no float16 here, for engine={self.name_of()}: set "
                "mixed_precision=bf16, or engine=ddp"
            )

    def check_networks(self, trained: Collection[str]) -> None:
        for name in self.stages:
            if name not in trained:
                known = ", ".join(trained)
                raise ValueError(f"engine.stages.{name}: no such network is trained; trained are: {known}")

    def check_launch(self, processes: int, launched: bool) -> None:
        pass  # any number of processes will do

    def join(self, launched: bool, timeout: timedelta) -> PartialState:
        on_gpu = own_device().type == "cuda"
        drop_launchers_settings()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if not launched:
            os.environ.update(_ALONE)
            self._borrowed_environment = tuple(_ALONE)
        _quiet()
        return PartialState(backend="nccl" if on_gpu else "gloo", timeout=timeout)

    def leave(self) -> None:
        if torch.distributed.is_initialized():
            from deepspeed.comm import destroy_process_group  # DeepSpeed forgets the groups that it made, too

            destroy_process_group()
        leave_group()
        for key in self._borrowed_environment:
            os.environ.pop(key, None)

    def wrap(
        self,
        modules: Mapping[str, nn.Module],
        recipes: Mapping[str, TrainingRecipe],
        update: UpdateSettings,
        processes: Processes,
    ) -> dict[str, TrainedNetwork]:
        for name in recipes:
            if self.stage_of(name) == 3:  # whose engine cuts up frozen weights too: it needs some of its own
                _check_can_be_cut(name, modules[name])
                part_from(modules[name], modules.values())
        accelerators = self._accelerators(list(recipes), update)
        return {
            name: self._wrapped(accelerators[name], name, modules[name], recipe, processes)
            for name, recipe in recipes.items()
        }

    def _accelerators(self, names: list[str], update: UpdateSettings) -> dict[str, Accelerator]:
        """One for each network: so does Accelerate keep two of DeepSpeed's engines apart."""
        plugins = {
            name: DeepSpeedPlugin(hf_ds_config=self._config(name, update), zero3_init_flag=False) for name in names
        }
        first = Accelerator(
            deepspeed_plugins=plugins,
            mixed_precision=update.mixed_precision,
            gradient_accumulation_steps=update.gradient_accumulation_steps,
            dynamo_backend="no",
        )
        steps = update.gradient_accumulation_steps
        others = [Accelerator(gradient_accumulation_steps=steps) for _ in names[1:]]
        return dict(zip(names, [first, *others], strict=True))

    def _config(self, name: str, update: UpdateSettings) -> dict[str, Any]:
        return {
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also where the optimizer is offloaded
            **self.deepspeed,
            "zero_optimization": {**self.deepspeed["zero_optimization"], "stage": self.stage_of(name)},
            "train_micro_batch_size_per_gpu": 1,  # no loader passes through DeepSpeed: it only prints with this
            "gradient_accumulation_steps": update.gradient_accumulation_steps,
            "gradient_clipping": update.max_grad_norm or 0.0,
            "bf16": {"enabled": update.mixed_precision == "bf16"},
            # A scale that DeepSpeed does not change: the engine has one rule for all ways of sharding.
            "fp16": {"enabled": update.mixed_precision == "fp16", "loss_scale": 1.0},
        }

    def _wrapped(
        self, accelerator: Accelerator, name: str, module: nn.Module, recipe: TrainingRecipe, processes: Processes
    ) -> TrainedNetwork:
        accelerator.state.select_deepspeed_plugin(name)
        parameters = recipe.arranged(trainable(module))
        given = {} if accelerator.mixed_precision == "no" else {name: p.data for name, p in parameters.items()}
        optimizer = recipe.optimizer_of(parameters)
        wrapped, _ = accelerator.prepare(module, optimizer)
        right = (
            type(wrapped).__name__ == "DeepSpeedEngine"
            and accelerator.distributed_type == DistributedType.DEEPSPEED
            and wrapped.zero_optimization_stage() == self.stage_of(name)
            and accelerator.num_processes == processes.world_size
        )
        if not right:
            raise wrapping_failed(self.name_of(name), name, wrapped, accelerator)
        for parameter in parameters.values():
            deepspeed_internals.clear_padding(parameter)
        for weight, value in given.items():  # DeepSpeed has made its masters of weights that it rounded before
            first, end = deepspeed_internals.share_of(parameters[weight])
            deepspeed_internals.set_share(parameters[weight], value.flatten()[first:end])
        return PartitionedNetwork(wrapped, parameters, recipe, processes.rank, processes.world_size)

    @classmethod
    def wrote(cls, folder: Path) -> bool:
        return deepspeed_internals.has_state(folder)

    @classmethod
    def read_whole(cls, folder: Path, shapes: Mapping[str, torch.Size]) -> WholeState:
        _quiet()
        return deepspeed_internals.read_state(folder, shapes)


class PartitionedNetwork(TrainedNetwork):
    """A network whose optimizer's state, and at stage 3 weights, DeepSpeed has cut into a share for each rank.

    `wrapped` is the DeepSpeedEngine: it clips, skips steps without a finite gradient, and counts micro-batches itself.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        parameters: dict[str, nn.Parameter],
        recipe: TrainingRecipe,
        rank: int,
        world_size: int,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        super().__init__(wrapped, parameters, deepspeed_internals.base_optimizer(wrapped), recipe)

    def scale_gradients(self, factor: float) -> None:
        deepspeed_internals.set_loss_scale(self._engine.optimizer, factor)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts; at the boundary, `step` below takes the real one

    def step(self) -> tuple[Tensor | float, Tensor | bool]:
        self._engine.step()
        return self._engine.get_global_grad_norm(), self._engine.was_step_applied()

    def reset_optimizer(self) -> None:
        deepspeed_internals.renew_state(self._engine.optimizer, self.recipe.optimizer)

    def masters(self) -> list[Tensor]:
        return [partition.detach() for partition in deepspeed_internals.flat_groups(self._engine.optimizer)]

    def shapes(self) -> dict[str, torch.Size]:
        return {name: deepspeed_internals.whole_shape(p) for name, p in self.parameters.items()}

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
            first, end = deepspeed_internals.share_of(parameter)
            deepspeed_internals.set_share(parameter, weights[name].flatten()[first:end])

    def spread(self) -> None:
        deepspeed_internals.spread_partitions(self._engine.optimizer)

    def files(self, folder: Path, copies: Copies, writes: Writes) -> list[StateFile]:
        states: dict[str, Callable[[], Any]] = {}
        shares: dict[str, list[Tensor]] = {}
        given: list[Any] = []

        def keep(state: Any, path: str) -> None:
            given.append(state)
            states[Path(path).name] = copies.later(state)

        with deepspeed_internals.capturing(self._engine, keep, writes):
            self._engine.save_checkpoint(
                str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True
            )
        writes(lambda: shares.update({weights_file(): [copies.of_storage(m) for m in self.masters()]}))
        if self.ema is not None:
            average = self.ema
            writes(lambda: shares.update({weights_file(ema=True): [copies.of_storage(m) for m in average]}))
        shapes, places = self.shapes(), deepspeed_internals.places(given, self.rank, self.world_size)
        pickled = [Pickled(f"{folder.name}/{name}", content) for name, content in states.items()]
        weights = [
            Weights(f"{folder.name}/{name}", shapes, [(p.name, flat[p.group][p.begin : p.end]) for p in places], True)
            for name, flat in shares.items()
        ]
        return [*pickled, *weights]

    def load_state(self, folder: Path) -> None:
        # Frozen weights are not in the file, so the names cannot match strictly; the checkpoint's manifest has been
        # compared with this run's trained names and shapes by now.
        path, _ = self._engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint in {folder}")

    def load_optimizer(self, state: WholeState) -> None:
        if state.is_empty:
            return
        deepspeed_internals.begin_state(self._engine.optimizer, state)
        for name, parameter in self._with_progress():
            for key, values in state.part(name, *deepspeed_internals.share_of(parameter)).items():
                deepspeed_internals.set_share(parameter, values, key)

    def _with_progress(self) -> Iterable[tuple[str, nn.Parameter]]:
        shapes = self.shapes()
        if self.rank != 0:
            return self.parameters.items()
        total = sum(shape.numel() for shape in shapes.values())

        def count(item: tuple[str, nn.Parameter]) -> int:
            return shapes[item[0]].numel()

        return with_progress(self.parameters.items(), count, total, "re-sharding the optimizer's state")

    def close(self) -> None:
        self._engine.destroy()

    @property
    def _engine(self) -> Any:
        return self.wrapped


def _check_can_be_cut(name: str, module: nn.Module) -> None:
    if is_quantized(module):
        raise ValueError(f"engine=zero3 does not shard quantized weights, of which the {name} has some: use zero2")


def _quiet() -> None:
    """Settings that DeepSpeed needs before it is used."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that torch means to drop, once or more a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not gpu_is_used():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it says on every rank that it has found no other
    deepspeed_internals.forget_shared_memory()
