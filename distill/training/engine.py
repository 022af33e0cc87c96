"""The engine: networks on their devices, and the optimizer's update of those that are trained.

    settings = EngineSettings(kind="deepspeed", deepspeed={"zero_optimization": {"stage": 2}}, mixed_precision="bf16")
    engine = settings.start()                                         # joins the other processes, takes the device
    engine.prepare({"student": student, "teacher": teacher}, {"student": TrainingRecipe(...)})
    engine.update(turn, micro_batches, step)                           # once for each turn of a step
    scalars, _ = engine.read()

A loss never meets a device or a rank. How trained networks are kept on the ranks is `distill.training.sharding`. One
engine at a time in a process. The settings given here are the only ones: what a launcher says about precision, ZeRO or
accumulation is put aside, so that it decides the number of processes and nothing else.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.random import Context, RandomRequest, seed_of
from distill.diffusion.trajectory import Batch
from distill.methods.base import Networks, Turn
from distill.models.denoiser import NetworkDenoiser
from distill.models.execution import Compile, execute
from distill.models.lora import recomputed_with_its_adapters
from distill.training.loss_scale import LossScale
from distill.training.micro_batch import give_back_memory, is_out_of_memory
from distill.training.processes import NO_LIMIT, Processes, forget_accelerate, record_collectives
from distill.training.rank_writes import Writes, together
from distill.training.replicas import checksum, checksums, require_same
from distill.training.sharding import SHARDINGS, read_whole, written_by
from distill.training.sharding.base import PRECISIONS, Sharding, UpdateSettings, trainable
from distill.training.skipped import Skipped, SkippedUpdates, suspects
from distill.training.snapshot import Copies, InPlace
from distill.training.spikes import Bands, SpikeSettings
from distill.training.state_files import StateFile, write_files
from distill.training.stragglers import OwnTime
from distill.training.trained_network import TrainedNetwork, TrainingRecipe, unlike
from distill.training.twice import Twice

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Averaged:
    """A trained network that answers, without gradient, as the moving average of its weights."""

    denoiser: Denoiser
    trained: TrainedNetwork

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        with self.trained.averaged():
            return self.denoiser(x_t, t, conditioning)


@dataclass(frozen=True)
class Taken:
    """An optimizer step that the device may not have finished: what is read of it, once for all turns of a step.

    Attributes:
        step: the optimizer steps before it; `network`: whose it is; `rate`: its learning rate.
        names: of its scalars, in order; `numbers`: those that the host knows.
        means: the others, over micro-batches and ranks, in the order of `names`.
        norm: of the gradient; `was_taken`: or else the step was skipped.
        micro_batches: this rank's, with their `losses`.
    """

    step: int
    network: str
    rate: float
    names: tuple[str, ...]
    numbers: dict[str, float]
    means: Tensor
    norm: Tensor | float
    was_taken: Tensor | bool
    micro_batches: Sequence[Batch]
    losses: Tensor

    def on_device(self) -> Tensor:
        """What the host does not know, in a row of float64, which holds float32 exactly."""
        device = self.means.device
        values = [torch.as_tensor(value, dtype=torch.float64).to(device) for value in self._waiting()]
        return torch.cat([self.means.double(), *(value.reshape(1) for value in values)])

    def read(self, row: list[float]) -> tuple[dict[str, float], float, bool]:
        """The scalars, the gradient's norm, and whether the step was taken; from the numbers of `on_device`."""
        values = iter(row)
        scalars = {name: self.numbers[name] if name in self.numbers else next(values) for name in self.names}
        norm, taken = (next(values) if isinstance(v, Tensor) else float(v) for v in (self.norm, self.was_taken))
        return scalars, norm, bool(taken)

    def _waiting(self) -> list[Tensor]:
        return [value for value in (self.norm, self.was_taken) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class EngineSettings:
    """How networks are trained, checked before any process is joined.

    Args:
        kind: the way of sharding, of `SHARDINGS`: `single` (one process), `ddp`, or `deepspeed` (ZeRO, also in
            one process without a launcher).
        deepspeed: DeepSpeed's own settings, of which `zero_optimization.stage` (1, 2, 3) is required. Batch sizes,
            precision, clipping and accumulation come from the arguments below.
        stages: ZeRO stages of single networks, by name, in place of that of `deepspeed`.
        mixed_precision: `no` (float32), `bf16`, or `fp16`, with a loss scale. Trained weights have float32 masters.
        gradient_accumulation_steps: micro-batches of a step.
        max_grad_norm: clip the global norm of a network's gradient to this; None does not.
        gradient_checkpointing: recompute activations of networks in the backward pass.
        compile, channels_last: how networks are executed; see `distill.models.execution`.
        max_nonfinite_steps: give up after so many skipped steps in a row.
        seed: of all random numbers of losses, and of dropout.
        on_skipped: called on rank 0 with each update that is skipped.
        spikes: when a loss or a gradient counts as one; nothing is watched by default.
        stage_starts: steps from which on losses are of another kind.
        compute_twice_steps: after so many steps one's gradients are computed twice, and compared; None: never.

    Raises:
        ValueError: a setting out of its range, naming it.
    """

    kind: str = "single"
    deepspeed: dict[str, Any] | None = None
    stages: dict[str, Literal[1, 2, 3]] | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0
    gradient_checkpointing: bool = False
    compile: Compile = False
    channels_last: bool = False
    max_nonfinite_steps: int = 10
    seed: int = 0
    on_skipped: Callable[[Skipped], None] = lambda skipped: None
    spikes: SpikeSettings = SpikeSettings(rollbacks=0)
    stage_starts: tuple[int, ...] = (0,)
    compute_twice_steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SHARDINGS:
            raise ValueError(f"engine.kind must be one of {', '.join(SHARDINGS)}, got {self.kind!r}")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision must be one of {', '.join(PRECISIONS)}, got {self.mixed_precision!r}")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps must be at least 1, got {self.gradient_accumulation_steps}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be above 0, or null for no clipping, got {self.max_grad_norm}")
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"engine.max_nonfinite_steps must be at least 1, got {self.max_nonfinite_steps}")
        sharding = self.sharding()  # which checks its own settings
        if self.compile is not False:
            sharding.check_compile()

    def sharding(self) -> Sharding:
        """The way of sharding, with its own settings."""
        return SHARDINGS[self.kind]({"deepspeed": self.deepspeed, "stages": self.stages})

    @property
    def name(self) -> str:
        """What the engine is called before there are networks: single, ddp, zero1, zero2 or zero3."""
        return self.sharding().name_of()

    def start(self, timeout: timedelta = NO_LIMIT) -> Engine:
        """Joins the other processes and takes this one's device.

        Args:
            timeout: of collectives; `collectives_timeout` derives it from the watchdog's limit.

        Raises:
            ValueError: what the launcher started does not fit `kind`, or the GPU not `mixed_precision`; the message
                says what would.
        """
        sharding, expected = self.sharding(), int(os.environ.get("WORLD_SIZE", 1))
        launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
        sharding.check_launch(expected, launched)
        forget_accelerate()
        record_collectives()
        processes = Processes(sharding.join(launched, timeout), sharding.leave, timeout)
        check_precision(self.mixed_precision, processes.device)
        sharding.check_precision(self.mixed_precision)
        if processes.world_size != expected:
            raise ValueError(
                f"{expected} processes were launched, but this one sees {processes.world_size}: "
                f"launch with {sharding.launch}"
            )
        return Engine(self, sharding, processes)


class Engine:
    """Trains networks, once there are some (`prepare`). All ranks call its methods together.

    Args:
        settings: what it was started from.
        processes: all ranks, with this one's device.
    """

    def __init__(self, settings: EngineSettings, sharding: Sharding, processes: Processes) -> None:
        self.settings, self.sharding, self.processes = settings, sharding, processes
        self.skipped = SkippedUpdates(settings.max_nonfinite_steps, settings.on_skipped)
        self.bands = Bands(settings.spikes, settings.stage_starts, processes.is_main)
        self._denoisers: dict[str, NetworkDenoiser] = {}
        self._helpers: dict[str, nn.Module] = {}
        self._trained: dict[str, TrainedNetwork] = {}
        self._scales: dict[str, LossScale] = {}
        self._taken: list[Taken] = []
        self._turns: Counter[str] = Counter()
        self.own_time = OwnTime(processes.device)
        self._scalars: dict[str, float] = {}
        self._foreseen: dict[tuple[str, int], tuple[RandomRequest, ...]] = {}  # what each turn requested the last time

    def release(self) -> None:
        """Lets go of the networks and their memory. Another engine may start in this process, with the same others."""
        for trained in self._trained.values():
            trained.close()
        self._trained, self._denoisers, self._helpers = {}, {}, {}
        self._taken, self._scalars, self._foreseen = [], {}, {}
        forget_accelerate()

    def close(self) -> None:
        """Releases, and leaves the process group for good: launched processes do not form another."""
        self.release()
        self.processes.close()

    def restarted(self) -> Engine:
        """Another engine of the same processes, for which this one is released."""
        self.release()
        if self.processes.device.type == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"  # which the first one has taken from the environment
        timeout = self.processes.timeout
        state = self.sharding.join(launched=True, timeout=timeout)
        return Engine(self.settings, self.sharding, Processes(state, self.sharding.leave, timeout))

    def accumulate(self, micro_batches: int) -> None:
        """Gives a step so many micro-batches, for the networks that are prepared from now on."""
        self.settings = replace(self.settings, gradient_accumulation_steps=micro_batches)

    # ---- networks -----------------------------------------------------------------------------------------------

    def prepare(
        self,
        networks: Mapping[str, NetworkDenoiser],
        recipes: Mapping[str, TrainingRecipe],
        helpers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Takes the networks to the device, and those that have a recipe under an optimizer.

        The weights of a network that require gradients now are trained. Networks that share a module stay views of one
        module (a LoRA student and its teacher), and modules that share frozen weights still do. A network
        that is not trained and shares nothing is frozen; under bf16 or fp16 it is cast to that. `helpers` are further
        frozen modules that losses call by name, like networks; their dtype stays.

        Raises:
            ValueError: a trained network that is not there, has nothing to train, or shares its module with another
                one, or trained weights with any.
            RuntimeError: Accelerate or DeepSpeed did not wrap the network as it should.
        """
        modules = {name: denoiser.module for name, denoiser in networks.items()}
        _check_trained(modules, recipes)
        self.sharding.check_networks(recipes)
        device = self.processes.device
        for name, module in modules.items():
            if name in recipes:
                self._ready_for_training(name, module)
            elif not any(module is modules[other] for other in recipes):
                module.requires_grad_(False).eval().to(device, self.frozen_dtype)
                if self.settings.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
                    _recompute(module)  # for losses whose gradient passes through it; other calls keep no activations
        settings = self.settings
        for module in {id(module): module for module in modules.values()}.values():
            execute(module, settings.compile, settings.channels_last, self.sharding.keeps_order)
        update = UpdateSettings(settings.mixed_precision, settings.gradient_accumulation_steps, settings.max_grad_norm)
        self._trained = self.sharding.wrap(modules, recipes, update, self.processes)
        self.processes.apply_timeout()
        self._scales = {name: LossScale() for name in recipes} if settings.mixed_precision == "fp16" else {}
        self._denoisers = dict(networks)
        self._helpers = {name: helper.requires_grad_(False).to(device) for name, helper in (helpers or {}).items()}

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
        return self.skipped.goes_on

    def is_healthy(self) -> bool:
        """Whether no update is being skipped or out of its band, and all trained weights are finite. Call it on all
        ranks."""
        finite = all(trained.is_finite() for trained in self._trained.values())
        return self.processes.all_agree(finite) and not self.is_skipping and not self.bands.outside

    def compare_replicas(self, step: int) -> None:
        """Compares what all ranks hold of the networks, after so many steps. Call it on all ranks.

        Raises:
            UnlikeReplicas: see `distill.training.replicas`.
        """
        found = checksums({name: denoiser.module for name, denoiser in self._denoisers.items()} | self._helpers)
        if self.sharding.holds_whole:
            averages = {name: trained.ema for name, trained in self._trained.items() if trained.ema is not None}
            found |= {f"average of the {name}": checksum(ema) for name, ema in averages.items()}
        require_same(found, self.processes, step)

    @property
    def names(self) -> Collection[str]:
        """The networks, trained or not."""
        return self._denoisers.keys()

    def has_ema(self, name: str) -> bool:
        """Whether a moving average of the network is kept."""
        return self._in_training(name).ema is not None

    def _in_training(self, name: str) -> TrainedNetwork:
        if name not in self._trained:
            raise ValueError(f"network {name!r} is not trained; trained are: {', '.join(self._trained) or 'none yet'}")
        return self._trained[name]

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The dtype of the networks that are not trained."""
        return PRECISIONS[self.settings.mixed_precision]

    def _ready_for_training(self, name: str, module: nn.Module) -> None:
        module.train()
        for p in module.parameters():
            if p.is_floating_point():  # others are codes of quantized weights
                p.data = p.data.to(torch.float32 if p.requires_grad else self.frozen_dtype)
        if self.settings.gradient_checkpointing:
            enable: Any = getattr(module, "enable_gradient_checkpointing", None)
            if enable is None:
                raise ValueError(f"gradient_checkpointing: {name} ({type(module).__name__}) does not offer it")
            _recompute(module)

    # ---- a step -------------------------------------------------------------------------------------------------

    def moved(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """Micro-batches on the device, where all turns of a step find them; the host does not wait for them."""
        return [batch.to(self.processes.device, non_blocking=True) for batch in micro_batches]

    def updated(self, turn: Turn, micro_batches: Sequence[Batch], step: int, before: int = 0) -> dict[str, float]:
        """`update`, and at once what `read` says of it."""
        self.update(turn, micro_batches, step, before)
        return self.read()[0]

    def update(self, turn: Turn, micro_batches: Sequence[Batch], step: int, before: int | None = None) -> None:
        """Takes an optimizer step of the network that `turn` updates, without waiting for the device.

        The loss is the mean over micro-batches and ranks. If it or the gradient is not finite on any rank, all ranks
        skip the step together. `read` is to follow, after the last turn of a step.

        Args:
            turn: the network, and its loss.
            micro_batches: `gradient_accumulation_steps` of them, of one size.
            step: optimizer steps of the run so far.
            before: turns of the same network in this step so far, each of which has its own randomness; by default
                those since the last `read`.

        Raises:
            ValueError: not `gradient_accumulation_steps` micro-batches, or of unequal size.
            NonFiniteError: see `read`.
            UnlikeGradients: a gradient was computed twice, and is not the same, on any rank.
        """
        _check_micro_batches(micro_batches, self.settings.gradient_accumulation_steps)
        before = self._turns[turn.updates] if before is None else before
        self._turns[turn.updates] += 1
        earlier = {one.network for one in self._taken}
        if any(self._trained[name].ema is not None for name in earlier) or earlier & {turn.updates} & set(self._scales):
            self._read_taken()  # averages and loss scales follow steps of which is known whether they were taken
        trained = self._in_training(turn.updates)
        rate = trained.set_learning_rate(step)
        further = (before,) if before else ()  # so the first turn has the masks that it always had
        seed, rank = self.settings.seed, self.processes.rank
        torch.manual_seed(seed_of(seed, step, rank, turn.updates, *further))  # dropout's, and nobody else's
        scale = self._scales.get(turn.updates)
        if scale is not None:
            trained.scale_gradients(scale.value)
        twice = self._twice(trained, step)
        names, numbers, means, mine = self._backward(turn, trained, micro_batches, step, before, twice)
        if twice is not None:
            twice.require_same(turn.updates, self.processes, step + 1)
        norm, was_taken = trained.step()
        self._taken.append(Taken(step, turn.updates, rate, names, numbers, means, norm, was_taken, micro_batches, mine))

    def read(self, *flags: bool) -> tuple[dict[str, float], tuple[bool, ...]]:
        """What the turns since the last `read` came to, and which of `flags` are set on any rank.

        It is the one wait of the host for the device in a step.

        Returns:
            "loss", the loss's parts, "grad_norm" (before clipping), "lr" and "skipped" (0 or 1), alike on all ranks;
            under fp16 "loss_scale", by which this step's loss was multiplied; once the run has gone back, "rollbacks",
            how often. Each but the last has "<network>/" before it if
            several networks are trained. And the flags.

        Raises:
            NonFiniteError: `max_nonfinite_steps` steps of a network in a row were skipped.
            SpikeError: a loss or a gradient has left its band.
        """
        self._turns.clear()
        common = self._read_taken(*flags)
        scalars, self._scalars = self._scalars, {}
        return scalars | ({"rollbacks": float(self.bands.rollbacks)} if self.bands.rollbacks else {}), common

    def drop_step(self) -> None:
        """Forgets a step that was not finished: what it has computed is not read, and another may begin."""
        self._turns.clear()
        self._taken, self._scalars = [], {}

    def _read_taken(self, *flags: bool) -> tuple[bool, ...]:
        taken, self._taken = self._taken, []
        shared = self.processes.flags_of_all(flags)
        rows = [*(one.on_device() for one in taken), *([] if shared is None else [shared.double()])]
        values = torch.cat(rows).tolist() if rows else []
        for one, row in zip(taken, rows, strict=False):
            self._scalars |= self._outcome(one, values[: len(row)])
            del values[: len(row)]
        return tuple(flags) if shared is None else tuple(value > 0 for value in values)

    def _outcome(self, one: Taken, row: list[float]) -> dict[str, float]:
        scalars, norm, was_taken = one.read(row)
        scale = self._scales.get(one.network)
        scaled = {} if scale is None else {"loss_scale": scale.value}
        if was_taken:
            self._trained[one.network].follow()
            self.skipped.taken(one.network)
            if scale is not None:
                scale.taken()
            self.bands.read(one.network, one.step, scalars["loss"], norm)
        elif scale is not None and not scale.is_least and math.isfinite(scalars["loss"]):
            scale.overflowed()
            self.skipped.overflowed(one.network, one.step, scale.value, self.processes.is_main)
        else:
            keys = suspects(self.processes, one.micro_batches, one.losses)
            self.skipped.add(Skipped(one.step, one.network, scalars["loss"], norm, keys), self.processes.is_main)
        scalars |= {"grad_norm": norm, "lr": one.rate, "skipped": float(not was_taken), **scaled}
        return {f"{one.network}/{k}": v for k, v in scalars.items()} if len(self._trained) > 1 else scalars

    def rehearse(self, turns: Iterable[Turn], batch: Batch | None, step: int) -> bool:
        """Whether there is memory for a micro-batch in all turns of a step; the same answer on all ranks.

        Losses and gradients are computed and dropped: weights, optimizers and torch's generators are then what they
        were. The optimizer's state, which the first real step allocates, is held meanwhile. Each rank has its answer
        without the others, except at ZeRO's stage 3, which gathers weights: there all have to run out together, or the
        watchdog ends them.
        """
        enough, device = True, self.processes.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                if batch is not None:
                    self._rehearse(turns, batch.to(device), step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                enough = False
        give_back_memory()
        return self.processes.all_agree(enough)

    def _rehearse(self, turns: Iterable[Turn], batch: Batch, step: int) -> None:
        device = self.processes.device
        to_come = [torch.empty(t.bytes_to_come(), dtype=torch.uint8, device=device) for t in self._trained.values()]
        for turn in turns:
            trained = list(self._in_training(turn.updates).parameters.values())
            with self.networks(turn) as networks:
                # Not the wrapped one, and not `backward`: neither DDP nor ZeRO sees these gradients, or sends them.
                bare = {**networks, turn.updates: self._denoisers[turn.updates]}
                loss = turn.loss(bare, batch, Context(self.settings.seed, step, batch.positions)).total
                torch.autograd.grad(loss, trained, allow_unused=True)
        del to_come

    def _twice(self, trained: TrainedNetwork, step: int) -> Twice | None:
        """What compares the gradients of a step, where they are to be computed twice."""
        every = self.settings.compute_twice_steps
        if every is None or (step + 1) % every:
            return None
        return Twice(trained.parameters, self.processes.device, self.frozen_dtype)

    def _again(self, turn: Turn, networks: Networks, batch: Batch, step: int, before: int) -> Callable[[], Tensor]:
        """The loss of a micro-batch once more, by the bare network, so that nothing is sent to other ranks."""
        bare = {**networks, turn.updates: self._denoisers[turn.updates]}
        return lambda: turn.loss(bare, batch, Context(self.settings.seed, step, batch.positions, before)).total

    def _backward(
        self,
        turn: Turn,
        trained: TrainedNetwork,
        micro_batches: Sequence[Batch],
        step: int,
        before: int,
        twice: Twice | None = None,
    ) -> tuple[tuple[str, ...], dict[str, float], Tensor, Tensor]:
        """Forward and backward of every micro-batch; `twice` looks at them and has them computed again.

        Returns:
            The names of the loss's scalars, those that are numbers, the means of the others over micro-batches and
            ranks, and this rank's losses [micro-batches].
        """
        rows: list[Tensor] = []
        key = turn.updates, before
        with self.networks(turn) as networks:
            for i, batch in enumerate(micro_batches):
                last = i == len(micro_batches) - 1
                with trained.micro_batch(last), nullcontext() if twice is None else twice.first_pass():
                    batch = batch.to(self.processes.device, non_blocking=True)  # unless `moved` has done so
                    context = Context(self.settings.seed, step, batch.positions, before)
                    context.foresee(self._foreseen.get(key, ()), self.processes.device)
                    with self.own_time.measured():
                        losses = turn.loss(networks, batch, context)
                    self._foreseen[key] = context.requested
                    scalars = {"loss": losses.total, **{k: v for k, v in losses.parts.items() if k != "loss"}}
                    rows.append(_row(scalars))
                    loss = losses.total
                    if twice is not None:
                        twice.follow(loss)
                    if last:
                        means = self.processes.mean(torch.stack(rows).mean(0))
                        # 1, or NaN on every rank if any loss of the step is not finite: then so is every gradient,
                        # and the check of the gradient's norm decides for all ranks alike.
                        loss = loss * (1 + 0 * means[0]).to(loss.dtype)
                    trained.backward(loss)
                if twice is not None:
                    twice.second_pass(self._again(turn, networks, batch, step, before))
        numbers = {name: float(value) for name, value in scalars.items() if not isinstance(value, Tensor)}
        return tuple(scalars), numbers, means, torch.stack(rows)[:, 0]

    @torch.no_grad()
    def measure(self, turn: Turn, batches: Sequence[Batch], contexts: Sequence[Context]) -> list[float]:
        """The loss of `turn` on each of this rank's batches; nothing is trained, and the global generator not used.

        Call it on all ranks with as many batches: under ZeRO-3 its calls gather weights.
        """
        networks = {**self._helpers, **self._denoisers, **self._averages()}
        losses = []
        with self.inference(turn.updates):
            for batch, context in zip(batches, contexts, strict=True):
                found = turn.loss(networks, batch.to(self.processes.device), context)
                loss = found.parts.get("loss")
                losses.append((loss if isinstance(loss, Tensor) else found.total).double())
        return torch.stack(losses).tolist()

    # ---- files --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """single, ddp, zero1, zero2 or zero3; once networks of several stages are there, "student:zero3 …" of each."""
        names = {network: self.sharding.name_of(network) for network in self._trained}
        if len(set(names.values())) > 1:
            return " ".join(f"{network}:{name}" for network, name in sorted(names.items()))
        return next(iter(names.values()), self.sharding.name_of())

    def trained_parameters(self) -> dict[str, int]:
        """How many weights of each network are trained."""
        return {name: trained.describe()["parameters"] for name, trained in self._trained.items()}

    def describe(self) -> dict[str, Any]:
        """What a checkpoint of this engine must fit; values of JSON."""
        return {
            "engine": self.name,
            "world_size": self.processes.world_size,
            "mixed_precision": self.settings.mixed_precision,
            "networks": {name: trained.describe() for name, trained in self._trained.items()},
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
                return unlike(name, theirs.get(name), here["networks"].get(name))
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the engine counts; values of JSON."""
        scales = {name: scale.state_dict() for name, scale in self._scales.items()}
        bands = self.bands.state_dict()
        state = self.skipped.state_dict() | ({"loss_scales": scales} if scales else {})
        return state | ({"bands": bands} if bands else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the counts of `state_dict`."""
        self.skipped.load_state_dict(state, self._trained)
        for name, scale in state.get("loss_scales", {}).items():
            self._scales[name].load_state_dict(scale)
        self.bands.load_state_dict(state.get("bands", {}))

    def files(self, folder: Path, copies: Copies) -> list[StateFile]:
        """The files of the training state of every trained network, this rank's share of them, on all ranks.

        Each network has a folder of its name in `folder`. What its library cannot but write at once lies there then.

        Args:
            copies: makes the copies from which they will be written.

        Raises:
            WriteError: something failed on this rank. The others know nothing of it, and do not wait.
        """
        writes, files = Writes(), []
        for name, trained in self._trained.items():
            writes(functools.partial((folder / name).mkdir, parents=True, exist_ok=True))
            files += trained.files(folder / name, copies, writes)
        self.processes.barrier()
        writes.finish()
        return files

    def save(self, folder: Path) -> None:
        """Writes the training state of every trained network to a folder of its name in `folder`, on all ranks.

        Raises:
            WriteError: on all ranks alike, if one of them could not write.
        """
        gathered = self.processes.gathered
        files = together(gathered, lambda: self.files(folder, InPlace()))
        together(gathered, lambda: write_files(files, folder, self.processes.channel))

    def load(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Reads what `save` wrote, on all ranks. It unpickles: only from a folder whose bytes have been verified.

        Args:
            saved: the `describe()` of the engine that wrote it. If its ranks or its sharding are not this one's, the
                optimizer's state is re-sharded; the weights are equal to the bit then, too.

        Raises:
            NotElastic: it would have to be re-sharded, and cannot be.
        """
        here = self.describe()
        same = all(saved.get(key) == here[key] for key in ("engine", "world_size"))
        for name, trained in self._trained.items():
            if same or (self.sharding.holds_whole and written_by(folder / name).holds_whole):
                trained.load(folder / name)
            else:
                if self.processes.is_main:
                    there, now = (f"{e.get('engine')} on {e.get('world_size')}" for e in (saved, here))
                    log.info("re-sharding the %s's optimizer: it was saved by %s, this is %s", name, there, now)
                trained.load_moved(folder / name, read_whole(folder / name, trained.shapes()))
        self.processes.barrier()


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Raises ValueError for bf16 on a GPU older than the A100's generation, where torch emulates it, slowly."""
    if mixed_precision == "bf16" and device.type == "cuda" and torch.version.cuda is not None:
        if torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"mixed_precision=bf16, but {name} computes no bfloat16: set mixed_precision=fp16")


def _recompute(module: Any) -> None:
    """Activations of the module's blocks are recomputed in the backward pass, with the adapters that made them."""
    context = recomputed_with_its_adapters(module)
    module.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, context_fn=context))


def _check_trained(modules: Mapping[str, nn.Module], trained: Collection[str]) -> None:
    if not trained:
        raise ValueError("no network is to be trained")
    for name in trained:
        if name not in modules:
            raise ValueError(f"network {name!r} is to be trained but is not among {', '.join(modules)}")
        if not trainable(modules[name]):
            raise ValueError(f"network {name!r} is to be trained, but none of its weights requires gradients")
        if any(modules[other] is modules[name] for other in trained if other != name):
            raise ValueError(f"network {name!r} is to be trained, but shares its module with another trained one")
        own = {id(p) for p in trainable(modules[name]).values()}
        for other, module in modules.items():
            if module is not modules[name] and any(id(p) in own for p in module.parameters()):
                raise ValueError(f"network {name!r} trains weights that {other!r} computes with")


def _check_micro_batches(micro_batches: Sequence[Batch], expected: int) -> None:
    if len(micro_batches) != expected:
        raise ValueError(f"a step takes gradient_accumulation_steps={expected} micro-batches, got {len(micro_batches)}")
    if len(sizes := {len(batch) for batch in micro_batches}) > 1:
        raise ValueError(
            f"micro-batches of a step must be of one size, got {sorted(sizes)}: their mean would be skewed"
        )


def _row(scalars: Mapping[str, Tensor | float]) -> Tensor:
    """Those scalars of a loss that are on its device, float32 [n]; "loss" is the first."""
    return torch.stack([value.detach().float() for value in scalars.values() if isinstance(value, Tensor)])
