"""Devices, ranks, precision, Accelerate and DeepSpeed: all of them live here, and a loss never meets one.

    engine = Engine(kind="deepspeed", deepspeed={"zero_optimization": {"stage": 2}}, mixed_precision="bf16")
    engine.start()                                                   # process group and device
    engine.prepare({"student": student, "teacher": teacher}, {"student": TrainedNetwork(...)})
    scalars = engine.update(turn, micro_batches, step)

One engine at a time in a process. The settings given here are the only ones: what a launcher says about precision,
ZeRO or accumulation is put aside, so that it decides the number of processes and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.random import Context, seed_of
from distill.diffusion.trajectory import Batch
from distill.methods.base import Losses, Networks, Turn
from distill.models.denoiser import NetworkDenoiser
from distill.training.elastic import NotElastic, WholeState, is_partitioned, read_whole, to_universal
from distill.training.trained import LearningRate, Partitioned, Replicated, Trained, TrainedNetwork
from distill.training.writing import Writes

__all__ = ["Engine", "LearningRate", "NonFiniteError", "Skipped", "TrainedNetwork"]

log = logging.getLogger(__name__)
T = TypeVar("T")

KINDS = ("single", "ddp", "deepspeed")
PRECISIONS = ("no", "bf16")
LAUNCH = {
    "ddp": "distill launch --multi_gpu --num_processes N",
    "deepspeed": "distill launch --num_processes N",
}
# DeepSpeed wants a process group even for one process; port 0 is any free one.
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_OWN_DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite for too many steps in a row."""


@dataclass(frozen=True)
class Skipped:
    """An update that no rank took, because a loss or a gradient was not finite on one of them.

    Attributes:
        step: the optimizer steps before it; `network`: whose update it was.
        loss, grad_norm: over all ranks.
        keys: samples whose loss it may be; those of the whole step where every loss was finite.
    """

    step: int
    network: str
    loss: float
    grad_norm: float
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Averaged:
    """A trained network that answers, without gradient, as the moving average of its weights."""

    denoiser: Denoiser
    trained: Trained

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        with self.trained.averaged():
            return self.denoiser(x_t, t, conditioning)


class Engine:
    """Trains networks on one process, under DDP, or under DeepSpeed ZeRO.

    Args:
        kind: `single`, `ddp`, or `deepspeed` (which also runs in one process without a launcher).
        deepspeed: DeepSpeed's own settings, of which `zero_optimization.stage` (1, 2, 3) is required. Batch sizes,
            precision, clipping and accumulation come from the arguments below.
        stages: ZeRO stages of single networks, by name, in place of that of `deepspeed`.
        mixed_precision: `no` (float32) or `bf16`. Trained weights have float32 masters either way.
        gradient_accumulation_steps: micro-batches of a step.
        max_grad_norm: clip the global norm of a network's gradient to this; None does not.
        gradient_checkpointing: recompute activations of trained networks in the backward pass.
        max_nonfinite_steps: give up after so many skipped steps in a row.
        seed: of all randomness that losses draw, and of dropout.
        on_skipped: called on rank 0 with each update that is skipped.

    Raises:
        ValueError: a setting out of its range, naming it.
    """

    def __init__(
        self,
        kind: Literal["single", "ddp", "deepspeed"] = "single",
        deepspeed: dict[str, Any] | None = None,
        stages: dict[str, Literal[1, 2, 3]] | None = None,
        mixed_precision: Literal["no", "bf16"] = "no",
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = 1.0,
        gradient_checkpointing: bool = False,
        max_nonfinite_steps: int = 10,
        seed: int = 0,
        on_skipped: Callable[[Skipped], None] = lambda skipped: None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"engine.kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision must be one of {', '.join(PRECISIONS)}, got {mixed_precision!r}")
        if gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps must be at least 1, got {gradient_accumulation_steps}")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be above 0, or null for no clipping, got {max_grad_norm}")
        if max_nonfinite_steps < 1:
            raise ValueError(f"engine.max_nonfinite_steps must be at least 1, got {max_nonfinite_steps}")
        self.stage = _check_deepspeed(kind, deepspeed)
        self._stages = _check_stages(kind, stages)
        self.kind, self.mixed_precision, self.seed = kind, mixed_precision, seed
        self.gradient_accumulation_steps, self.max_grad_norm = gradient_accumulation_steps, max_grad_norm
        self.gradient_checkpointing, self.max_nonfinite_steps = gradient_checkpointing, max_nonfinite_steps
        self.skipped_steps = 0
        self._skipped_in_a_row: dict[str, int] = {}  # of each network whose last update was skipped
        self._on_skipped = on_skipped
        self._deepspeed = deepspeed or {}
        self._borrowed_environment: tuple[str, ...] = ()
        self._state: PartialState | None = None
        self._accelerators: list[Accelerator] = []
        self._denoisers: dict[str, NetworkDenoiser] = {}
        self._helpers: dict[str, nn.Module] = {}
        self._trained: dict[str, Trained] = {}

    # ---- processes ----------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Joins the other processes and takes this one's device.

        Raises:
            ValueError: what the launcher started does not fit `kind`; the message says what would.
        """
        processes = int(os.environ.get("WORLD_SIZE", 1))
        launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
        if self.kind == "single" and processes > 1:
            raise ValueError(f"engine=single, but {processes} processes were launched: use engine=ddp or a zero engine")
        if self.kind == "ddp" and not launched:
            raise ValueError(f"engine=ddp needs a launcher: {LAUNCH['ddp']}; or use engine=single")
        _forget_accelerate()
        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
        _take_over_environment(self.kind)
        if self.kind == "deepspeed":
            if not launched:
                os.environ.update(_ALONE)
                self._borrowed_environment = tuple(_ALONE)
            _quiet_deepspeed()
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            self._state = PartialState(backend=backend)
        else:
            self._state = PartialState(cpu=on_cpu)
        if self.world_size != processes:
            raise ValueError(
                f"{processes} processes were launched, but this one sees {self.world_size}: "
                f"launch with {LAUNCH.get(self.kind, 'python')}"
            )
        return self

    @property
    def rank(self) -> int:
        return self._running.process_index

    @property
    def world_size(self) -> int:
        return self._running.num_processes

    @property
    def device(self) -> torch.device:
        return self._running.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The kind of device of this rank, for people."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()

    def trained_parameters(self) -> dict[str, int]:
        """How many weights of each network are trained."""
        return {name: described["parameters"] for name, described in self.describe()["networks"].items()}

    def barrier(self) -> None:
        """Waits for all ranks."""
        self._running.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank; the same answer on all."""
        return self._reduced(flag, dist.ReduceOp.MAX)

    def all_agree(self, flag: bool) -> bool:
        """Whether `flag` is set on every rank; the same answer on all."""
        return self._reduced(flag, dist.ReduceOp.MIN)

    def gathered(self, value: T) -> list[T]:
        """A picklable value of every rank, in the order of ranks, on all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's picklable `value`, on all ranks."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def release(self) -> None:
        """Lets go of the networks and their memory. Another engine may start in this process, with the same others."""
        for trained in self._trained.values():
            trained.close()
        self._trained, self._denoisers, self._helpers, self._state = {}, {}, {}, None
        self._accelerators.clear()
        _forget_accelerate()

    def close(self) -> None:
        """Releases, and leaves the process group for good: launched processes do not form another."""
        self.release()
        if dist.is_initialized():
            if self.kind == "deepspeed":
                from deepspeed.comm import destroy_process_group  # DeepSpeed forgets the groups that it made, too
            else:
                from torch.distributed import destroy_process_group
            destroy_process_group()
        for key in self._borrowed_environment:
            os.environ.pop(key, None)

    @property
    def _running(self) -> PartialState:
        if self._state is None:
            raise RuntimeError("the engine has not been started: call start()")
        return self._state

    def _reduced(self, flag: bool, op: Any) -> bool:
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(tensor, op)
        return bool(tensor)

    # ---- networks -----------------------------------------------------------------------------------------------

    def prepare(
        self,
        networks: Mapping[str, NetworkDenoiser],
        trained: Mapping[str, TrainedNetwork],
        helpers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Takes the networks to the device and the `trained` ones under an optimizer.

        What is trained of a network is what asks for gradients now. Networks that share a module stay views of one
        module (a LoRA student and its teacher). A network that is not trained and shares nothing is frozen; under bf16
        it is cast to bf16. `helpers` are further frozen modules that losses call by name, like networks; their dtype
        stays.

        Raises:
            ValueError: a trained network that is not there, has nothing to train, or shares its module with another.
            RuntimeError: Accelerate or DeepSpeed did not wrap as asked.
        """
        modules = {name: denoiser.module for name, denoiser in networks.items()}
        _check_trained(modules, trained)
        _check_known(self._stages, trained)
        parameters = {name: _trainable(modules[name]) for name in trained}
        for name, module in modules.items():
            if name in trained:
                self._ready_for_training(name, module)
            elif not any(module is modules[other] for other in trained):
                module.requires_grad_(False).eval().to(self.device, self._frozen_dtype)
        accelerators = self._make_accelerators(list(trained))
        for name, plan in trained.items():
            self._trained[name] = self._wrap(accelerators[name], name, modules[name], parameters[name], plan)
        self._denoisers = dict(networks)
        self._helpers = {name: helper.requires_grad_(False).to(self.device) for name, helper in (helpers or {}).items()}

    @contextmanager
    def networks(self, turn: Turn) -> Iterator[Networks]:
        """This turn's networks: the one it updates wrapped and trainable, the others bare and frozen, until the end.

        The moving average of a trained network is there too, as "NAME_ema".
        """
        updated = self._in_training(turn.updates)
        others = [p for name, t in self._trained.items() if name != turn.updates for p in t.parameters.values()]
        for p in others:
            p.requires_grad_(False)
        try:
            wrapped = replace(self._denoisers[turn.updates], module=updated.wrapped)
            yield {**self._helpers, **self._denoisers, **self._averages(), turn.updates: wrapped}
        finally:
            for p in others:
                p.requires_grad_(True)

    def _averages(self) -> dict[str, Denoiser]:
        kept = {name: trained for name, trained in self._trained.items() if trained.ema is not None}
        return {f"{name}_ema": Averaged(self._denoisers[name], trained) for name, trained in kept.items()}

    @contextmanager
    def inference(self, name: str, ema: bool = False) -> Iterator[Denoiser]:
        """A network for sampling, without gradients; `ema` takes its moving average. Enter it on all ranks.

        Under ZeRO-3 its calls gather weights, so all ranks must make the same number of them.
        """
        denoiser = self._denoisers[name]
        was_training = denoiser.module.training
        denoiser.module.eval()
        try:
            with torch.no_grad():
                if ema:
                    with self._in_training(name).averaged():
                        yield denoiser
                else:
                    yield denoiser
        finally:
            denoiser.module.train(was_training)

    def export_weights(self, name: str, ema: bool = False) -> dict[str, Tensor]:
        """The trained weights of a network (or their average) by name: whole, float32, on the CPU of rank 0.

        Call it on all ranks; the others get an empty dict.
        """
        return self._in_training(name).weights(ema)

    def reset_optimizers(self) -> None:
        """Lets the optimizers forget what they have gathered; weights and averages stay."""
        for trained in self._trained.values():
            trained.reset_optimizer()

    @property
    def is_skipping(self) -> bool:
        """Whether the last update of a network was skipped; the same on all ranks."""
        return bool(self._skipped_in_a_row)

    def is_healthy(self) -> bool:
        """Whether no update is being skipped, and all trained weights are finite. Call it on all ranks."""
        finite = all(bool(m.isfinite().all()) for trained in self._trained.values() for m in trained.masters())
        return self.all_agree(finite) and not self.is_skipping

    def has_ema(self, name: str) -> bool:
        """Whether a moving average of the network is kept."""
        return self._in_training(name).ema is not None

    def _in_training(self, name: str) -> Trained:
        if name not in self._trained:
            raise ValueError(f"network {name!r} is not trained; trained are: {', '.join(self._trained) or 'none yet'}")
        return self._trained[name]

    @property
    def _frozen_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32

    def _ready_for_training(self, name: str, module: nn.Module) -> None:
        module.train()
        for p in module.parameters():
            p.data = p.data.to(torch.float32 if p.requires_grad else self._frozen_dtype)
        if self.gradient_checkpointing:
            enable: Any = getattr(module, "enable_gradient_checkpointing", None)
            if enable is None:
                raise ValueError(f"gradient_checkpointing: {name} ({type(module).__name__}) does not offer it")
            enable(functools.partial(checkpoint, use_reentrant=False))

    def _make_accelerators(self, names: list[str]) -> dict[str, Accelerator]:
        """One for all networks; under DeepSpeed one a network: so does Accelerate keep two of its engines apart."""
        if self.kind != "deepspeed":
            handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
            one = Accelerator(mixed_precision=self.mixed_precision, kwargs_handlers=handlers, dynamo_backend="no")
            self._accelerators = [one]
            return dict.fromkeys(names, one)
        plugins = {
            name: DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(name), zero3_init_flag=False) for name in names
        }
        first = Accelerator(
            deepspeed_plugins=plugins,
            mixed_precision=self.mixed_precision,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            dynamo_backend="no",
        )
        others = [Accelerator(gradient_accumulation_steps=self.gradient_accumulation_steps) for _ in names[1:]]
        self._accelerators = [first, *others]
        return dict(zip(names, self._accelerators, strict=True))

    def _stage_of(self, name: str) -> int | None:
        return self._stages.get(name, self.stage)

    def _deepspeed_config(self, name: str) -> dict[str, Any]:
        return {
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also where the optimizer is offloaded
            **self._deepspeed,
            "zero_optimization": {**self._deepspeed["zero_optimization"], "stage": self._stage_of(name)},
            "train_micro_batch_size_per_gpu": 1,  # no loader passes through DeepSpeed: it only prints with this
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.max_grad_norm or 0.0,
            "bf16": {"enabled": self.mixed_precision == "bf16"},
        }

    def _wrap(
        self,
        accelerator: Accelerator,
        name: str,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        plan: TrainedNetwork,
    ) -> Trained:
        if self.kind == "deepspeed":
            accelerator.state.select_deepspeed_plugin(name)
            optimizer = plan.optimizer(list(parameters.values()))
            wrapped, _ = accelerator.prepare(module, optimizer)
            self._check_wrapping(accelerator, name, wrapped)
            return Partitioned(wrapped, parameters, optimizer, plan, rank=self.rank)
        wrapped = accelerator.prepare(module)
        self._check_wrapping(accelerator, name, wrapped)
        return Replicated(
            wrapped,
            parameters,
            plan.optimizer(list(parameters.values())),
            plan,
            accumulation_steps=self.gradient_accumulation_steps,
            max_grad_norm=self.max_grad_norm,
            writes=self.is_main,
        )

    def _check_wrapping(self, accelerator: Accelerator, name: str, wrapped: nn.Module) -> None:
        """Accelerate falls back to a plain module in silence; this does not."""
        found = type(wrapped).__name__
        if self.kind == "deepspeed":
            right = found == "DeepSpeedEngine" and accelerator.distributed_type == DistributedType.DEEPSPEED
            right = right and wrapped.zero_optimization_stage() == self._stage_of(name)  # type: ignore[operator]
        elif self.kind == "ddp":
            right = isinstance(wrapped, DistributedDataParallel)
        else:
            right = accelerator.distributed_type == DistributedType.NO
        if not right or accelerator.num_processes != self.world_size:
            raise RuntimeError(
                f"engine={self.name} was asked for, but {name} came back as {found} of "
                f"{accelerator.distributed_type.value} with {accelerator.num_processes} processes"
            )

    # ---- a step -------------------------------------------------------------------------------------------------

    def update(self, turn: Turn, micro_batches: Sequence[Batch], step: int, before: int = 0) -> dict[str, float]:
        """One optimizer step of the network that `turn` updates.

        The loss is the mean over micro-batches and ranks. If it or the gradient is not finite on any rank, all ranks
        skip the step together.

        Args:
            turn: the network, and its loss.
            micro_batches: `gradient_accumulation_steps` of them, of one size.
            step: optimizer steps of the run so far.
            before: turns of the same network in this step so far; each has its own randomness.

        Returns:
            "loss", the loss's parts, "grad_norm" (before clipping), "lr" and "skipped" (0 or 1), alike on all ranks;
            each with "<network>/" before it if several networks are trained.

        Raises:
            ValueError: not `gradient_accumulation_steps` micro-batches, or of unequal size.
            NonFiniteError: `max_nonfinite_steps` steps in a row were skipped.
        """
        _check_micro_batches(micro_batches, self.gradient_accumulation_steps)
        trained = self._in_training(turn.updates)
        rate = trained.set_learning_rate(step)
        further = (before,) if before else ()  # so the first turn has the masks that it always had
        torch.manual_seed(seed_of(self.seed, step, self.rank, turn.updates, *further))  # dropout's, and nobody else's
        means, mine = self._backward(turn, trained, micro_batches, step, before)
        norm, taken = trained.step()
        if taken:
            trained.follow()
            self._skipped_in_a_row.pop(turn.updates, None)
        scalars = {**means, "grad_norm": norm, "lr": rate, "skipped": float(not taken)}
        if not taken:
            self._skipped(turn, micro_batches, step, scalars, mine)
        return {f"{turn.updates}/{k}": v for k, v in scalars.items()} if len(self._trained) > 1 else scalars

    def _backward(
        self, turn: Turn, trained: Trained, micro_batches: Sequence[Batch], step: int, before: int
    ) -> tuple[dict[str, float], Tensor]:
        """Forward and backward of every micro-batch: each scalar's mean over all, and this rank's losses."""
        rows: list[Tensor] = []
        names: list[str] = []
        with self.networks(turn) as networks:
            for i, batch in enumerate(micro_batches):
                last = i == len(micro_batches) - 1
                with trained.micro_batch(last):
                    batch = batch.to(self.device, non_blocking=True)
                    losses = turn.loss(networks, batch, Context(self.seed, step, batch.positions, before))
                    names = ["loss", *(name for name in losses.parts if name != "loss")]
                    rows.append(_row(losses, names))
                    loss = losses.total
                    if last:
                        means = self._mean_over_ranks(torch.stack(rows).mean(0))
                        # 1, or NaN on every rank if any loss of the step is not finite: then so is every gradient,
                        # and the check of the gradient's norm decides for all ranks alike.
                        loss = loss * (1 + 0 * means[0]).to(loss.dtype)
                    trained.backward(loss)
        return dict(zip(names, means.tolist(), strict=True)), torch.stack(rows)[:, 0]

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def _skipped(
        self, turn: Turn, micro_batches: Sequence[Batch], step: int, scalars: Mapping[str, float], mine: Tensor
    ) -> None:
        self.skipped_steps += 1
        in_a_row = self._skipped_in_a_row[turn.updates] = self._skipped_in_a_row.get(turn.updates, 0) + 1
        bad = [k for loss, batch in zip(mine, micro_batches, strict=True) if not loss.isfinite() for k in batch.keys]
        keys = [key for rank in self.gathered(bad) for key in rank]
        if not keys:  # every loss was finite, a gradient was not: any sample may be the one
            keys = [key for rank in self.gathered([k for b in micro_batches for k in b.keys]) for key in rank]
        what = f"step {step}: {turn.updates} skipped, loss {scalars['loss']} and gradient norm {scalars['grad_norm']}"
        if self.is_main:
            log.warning("%s; samples: %s", what, " ".join(keys))
            self._on_skipped(Skipped(step, turn.updates, scalars["loss"], scalars["grad_norm"], tuple(keys)))
        if in_a_row >= self.max_nonfinite_steps:
            raise NonFiniteError(f"{what}; that makes {in_a_row} in a row, giving up")

    # ---- files --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """single, ddp, zero1, zero2 or zero3; once networks of several stages are there, "student:zero3 …" of each."""
        if self.kind != "deepspeed":
            return self.kind
        stages = {name: f"zero{self._stage_of(name)}" for name in self._trained}
        if len(set(stages.values())) > 1:
            return " ".join(f"{name}:{stage}" for name, stage in sorted(stages.items()))
        return next(iter(stages.values()), f"zero{self.stage}")

    def describe(self) -> dict[str, Any]:
        """What a checkpoint of this engine must fit; values of JSON."""
        return {
            "engine": self.name,
            "world_size": self.world_size,
            "mixed_precision": self.mixed_precision,
            "networks": {name: _describe(trained) for name, trained in self._trained.items()},
        }

    def misfit(self, saved: Mapping[str, Any]) -> str | None:
        """Why a checkpoint with `saved` as its `describe()` cannot be loaded here, in a line; None if it can."""
        here = self.describe()
        if saved.get("mixed_precision") != here["mixed_precision"]:
            precisions = saved.get("mixed_precision"), here["mixed_precision"]
            return "it was saved with mixed_precision={}, this run has mixed_precision={}".format(*precisions)
        theirs = saved.get("networks", {})
        for name in sorted(theirs.keys() | here["networks"].keys()):
            if theirs.get(name) != here["networks"].get(name):
                return _unlike(name, theirs.get(name), here["networks"].get(name))
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the engine counts; values of JSON."""
        counts = {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": max(self._skipped_in_a_row.values(), default=0),
        }
        return counts | ({"skipped_in_a_row_of": dict(self._skipped_in_a_row)} if self._skipped_in_a_row else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the counts of `state_dict`; an earlier version's had one streak for all networks."""
        self.skipped_steps = state["skipped_steps"]
        one = dict.fromkeys(self._trained, state["skipped_in_a_row"]) if state["skipped_in_a_row"] else {}
        self._skipped_in_a_row = dict(state.get("skipped_in_a_row_of", one))

    def save(self, folder: Path) -> None:
        """Writes the training state of every trained network to a folder of its name in `folder`, on all ranks.

        Raises:
            WriteError: this rank could not write. The others know nothing of it, and do not wait.
        """
        writes = Writes()
        for name, trained in self._trained.items():
            writes(functools.partial((folder / name).mkdir, parents=True, exist_ok=True))
            trained.save(folder / name, writes)
        self.barrier()
        writes.finish()

    def load(self, folder: Path, saved: Mapping[str, Any], scratch: Path) -> None:
        """Reads what `save` wrote, on all ranks. It unpickles: only from a folder whose bytes have been verified.

        Args:
            saved: the `describe()` of the engine that wrote it. If its ranks or stages are not this one's, the
                optimizer's state is dealt out anew; the weights are equal to the bit then, too.
            scratch: a folder of all ranks for what is needed meanwhile.

        Raises:
            NotElastic: it would have to be dealt out anew, and cannot be.
        """
        moved = not self._holds_state_as(saved)
        if moved and self.is_main:
            here, there = (f"{e['engine']} on {e['world_size']}" for e in (self.describe(), saved))
            log.info("dealing out the optimizers' state anew: it was saved by %s, this is %s", there, here)
        for name, trained in self._trained.items():
            if moved:
                trained.load_moved(folder / name, self._whole_state(folder / name, trained, scratch / name))
            else:
                trained.load(folder / name)
        self.barrier()
        if moved and self.is_main:
            shutil.rmtree(scratch, ignore_errors=True)

    def _holds_state_as(self, saved: Mapping[str, Any]) -> bool:
        """Whether each rank's share of the optimizers' state is here what it was there."""
        here = self.describe()
        whole = ("single", "ddp")  # both keep all of the state in one place, whatever the number of ranks
        if {saved.get("engine"), here["engine"]} <= set(whole):
            return True
        return all(saved.get(key) == here[key] for key in ("engine", "world_size"))

    def _whole_state(self, folder: Path, trained: Trained, universal: Path) -> WholeState:
        problem = None
        if self.is_main and is_partitioned(folder):
            try:
                to_universal(folder, universal)
            except NotElastic as error:
                problem = str(error)
        if problem := self.from_main(problem):
            raise NotElastic(problem)
        return read_whole(folder, list(trained.parameters), universal)


def _check_deepspeed(kind: str, settings: Mapping[str, Any] | None) -> int | None:
    """The ZeRO stage asked for, if any."""
    if kind != "deepspeed":
        if settings:
            raise ValueError(f"engine.deepspeed has no meaning for engine.kind={kind}")
        return None
    for key in _OWN_DEEPSPEED_KEYS:
        if key in (settings or {}):
            raise ValueError(f"engine.deepspeed.{key} is set from the run's own settings; remove it")
    stage = (settings or {}).get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"engine.deepspeed.zero_optimization.stage must be 1, 2 or 3, got {stage}")
    return int(stage)


def _check_stages(kind: str, stages: Mapping[str, int] | None) -> dict[str, int]:
    """The ZeRO stages of single networks."""
    if stages and kind != "deepspeed":
        raise ValueError(f"engine.stages has no meaning for engine.kind={kind}")
    for name, stage in (stages or {}).items():
        if stage not in (1, 2, 3):
            raise ValueError(f"engine.stages.{name} must be 1, 2 or 3, got {stage}")
    return dict(stages or {})


def _forget_accelerate() -> None:
    """Accelerate keeps its state in class attributes; a stale one would answer for a new engine."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _take_over_environment(kind: str) -> None:
    """Drops the launcher's settings that are this engine's to make, which Accelerate would mix into them."""
    for key in list(os.environ):
        if key.startswith(("ACCELERATE_", "FSDP_")) and key not in ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"):
            del os.environ[key]
    if kind == "deepspeed":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if kind == "single":  # launched as the only process of a group, it needs no group
        os.environ.pop("LOCAL_RANK", None)


def _quiet_deepspeed() -> None:
    """What DeepSpeed has to be told before it is asked for anything."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that torch means to drop, once or more a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it says on every rank that it has found no other
    import deepspeed.ops

    # An optional shared-memory transport for CPU ranks; compiling it takes a minute and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_trained(modules: Mapping[str, nn.Module], trained: Mapping[str, TrainedNetwork]) -> None:
    if not trained:
        raise ValueError("no network is to be trained")
    for name in trained:
        if name not in modules:
            raise ValueError(f"network {name!r} is to be trained but is not among {', '.join(modules)}")
        if not _trainable(modules[name]):
            raise ValueError(f"network {name!r} is to be trained, but none of its weights asks for gradients")
        if any(modules[other] is modules[name] for other in trained if other != name):
            raise ValueError(f"network {name!r} is to be trained, but shares its module with another trained one")


def _check_known(stages: Mapping[str, int], trained: Mapping[str, TrainedNetwork]) -> None:
    for name in stages:
        if name not in trained:
            raise ValueError(f"engine.stages.{name}: no such network is trained; trained are: {', '.join(trained)}")


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _check_micro_batches(micro_batches: Sequence[Batch], expected: int) -> None:
    if len(micro_batches) != expected:
        raise ValueError(f"a step takes gradient_accumulation_steps={expected} micro-batches, got {len(micro_batches)}")
    if len(sizes := {len(batch) for batch in micro_batches}) > 1:
        raise ValueError(
            f"micro-batches of a step must be of one size, got {sorted(sizes)}: their mean would be skewed"
        )


def _row(losses: Losses, names: Sequence[str]) -> Tensor:
    """The scalars of a loss in the order of `names`, float32 [len(names)]."""
    values = {**losses.parts, "loss": losses.total}
    return torch.stack([values[name].detach().float() for name in names])


def _describe(trained: Trained) -> dict[str, Any]:
    """Names and shapes of what is trained, as a count and a hash, and whether an average of it is kept."""
    shapes = [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in trained.parameters.items()]
    count = sum(torch.Size(shape).numel() for _, shape in shapes)
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
    return {"parameters": count, "shapes": digest, "ema": trained.ema is not None}


def _unlike(name: str, saved: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> str:
    """How a trained network differs from the one that was saved, of `_describe`; in a sentence."""
    if saved is None or here is None:
        which = (
            "was not trained when it was saved" if saved is None else "was trained when it was saved, and is not here"
        )
        return f"the {name} {which}"
    if saved["ema"] != here["ema"]:
        return f"an average of the {name} was {'' if saved['ema'] else 'not '}kept when it was saved (ema_decay)"
    counts = saved["parameters"], here["parameters"]
    if counts[0] == counts[1]:
        return f"the {name} has other trained weights than when it was saved, although as many ({counts[0]:,})"
    return f"the {name} had {counts[0]:,} trained weights when it was saved, and has {counts[1]:,} here"
