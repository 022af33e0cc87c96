"""What `plan.py` prints about: a run on networks without weights, and what its parts weigh, take and send."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill.config.loading import ConfigError, build, checking
from distill.config.settings import ClusterSettings, DataSettings, PlanSettings
from distill.data.index import kept_times
from distill.data.progress import Progress
from distill.data.prompts import read_prompts
from distill.data.record import STATE_DTYPES, make_key
from distill.data.sharing import TEXT_OF
from distill.diffusion.random import Context, generator
from distill.diffusion.solver import make_times
from distill.diffusion.trajectory import Batch
from distill.methods.base import Method
from distill.planning.counting import TEACHERS, Architecture, Cost, architecture, batch_of, cast, count, networks_of
from distill.planning.estimates import (
    Counted,
    Held,
    StoredSample,
    Traffic,
    best_interval,
    checkpoint_bytes,
    counted,
    frozen,
    held,
    lost_share,
    passes,
    sample_layout,
    snapshot_bytes,
    stored_bytes,
    traffic,
)
from distill.training.assembly import others_of
from distill.training.engine import EngineSettings
from distill.training.fitting import check_method
from distill.training.micro_batch import Split, check_cut
from distill.training.trained_network import optimizer_bytes
from distill.training.trajectories import shared_texts

GIB, GB, TERA = 2**30, 1e9, 1e12
WALKED = 2  # samples of the batch that is walked through
Way = tuple[bool, bool]
"""Whether an engine keeps masters beside the weights, as DeepSpeed does; and whether activations are recomputed."""


@dataclass(frozen=True)
class Phase:
    """Steps of a stage that have the same turns: the first and the last of them, and how many.

    They are in a row, or, where a method's turns repeat every few steps, spread over the stage.
    """

    first: int
    last: int
    steps: int

    def __str__(self) -> str:
        between = f"{self.first} ... {self.last}"
        return between if self.steps == self.last - self.first + 1 else f"{self.steps} of {between}"


@dataclass(frozen=True)
class PlannedRun:
    """A run on networks without weights.

    Args:
        engine: that it is planned with: its own, or ddp where that is one process and there are more.
        modules: trained and frozen weights of each module, by the names of the networks that share it.
        walks: what each turn of each phase costs.
        optimizer: bytes of state a trained weight.
    """

    cfg: PlanSettings
    method: Method
    engine: str
    phases: tuple[Phase, ...]
    modules: dict[tuple[str, ...], Counted]
    walks: dict[Way, list[list[Cost]]]
    optimizer: float
    sample: StoredSample

    @property
    def bf16(self) -> bool:
        """Whether weights and products have two bytes: those of fp16 are as many."""
        return self.cfg.mixed_precision != "no"

    @property
    def loading(self) -> float:
        """Bytes of host memory on a node while its processes load their networks, in float32."""
        weights = sum(w.trained + w.frozen for w in self.modules.values())
        return 4 * weights * self.cfg.cluster.gpus_per_node

    @property
    def ranks(self) -> int:
        return ranks_of(self.cfg.cluster)

    @property
    def whole(self) -> Split:
        """A process's samples of a step, before `micro_batch_size`; rounded up to a whole number."""
        accumulated = self.cfg.gradient_accumulation_steps
        parts = self.ranks * accumulated
        others = {self.samples_in(phase) for phase in range(len(self.phases))} - {self.cfg.global_batch_size}
        others_of_process = tuple(sorted(accumulated * math.ceil(size / parts) for size in others))
        return Split(math.ceil(self.cfg.global_batch_size / parts), accumulated, others_of_process)

    def samples_in(self, phase: int) -> int:
        """Samples of a step of all processes; a method with stages may have batches of its own."""
        return self.method.batch_size(self.phases[phase].first) or self.cfg.global_batch_size

    @property
    def split(self) -> Split:
        """How a process takes its samples of a step; under `auto` as many at once as the cluster's memory holds."""
        most = self.cfg.micro_batch_size
        if most == "auto":
            return self.fitting(usable(self.cfg.cluster))[0]
        return self.whole if most is None else self.whole.at_most(most)

    def fitting(self, room: float, split: Split | None = None) -> tuple[Split, float]:
        """The largest micro-batches that fit into `room` bytes, or the smallest if none fits, and the bytes they take.

        Args:
            split: the one to divide; None: all samples of a process.
        """
        split, again = self.whole if split is None else split, self.cfg.gradient_checkpointing
        while (needed := self.memory(self.engine, again, split.largest)) > room:
            smaller = split.at_most(split.largest - 1)
            if smaller.accumulated == split.accumulated:
                break
            split = smaller
        return split, needed

    @property
    def samples(self) -> int:
        """Samples of the largest micro-batch."""
        return self.split.largest

    @property
    def global_batch(self) -> int:
        return self.whole.samples * self.ranks

    def costs(self, engine: str, checkpointed: bool) -> list[list[Cost]]:
        return self.walks[_masters(engine), checkpointed]

    def trained(self) -> Iterator[tuple[str, tuple[str, ...], Counted]]:
        """Each trained network with all names of its module, and its weights."""
        for names, weights in self.modules.items():
            for name in self.method.trains:
                if name in names:
                    yield name, names, weights

    def engine_of(self, engine: str, name: str) -> str:
        """The engine for a network: the run's own may have other stages for some."""
        stages = self.cfg.engine.get("stages") or {}
        return f"zero{stages[name]}" if engine == self.engine and name in stages else engine

    def averaged(self, name: str) -> bool:
        return self.cfg.ema_decay is not None and (name == "student" or f"{name}_ema" in self.method.requires)

    def held(self, engine: str) -> Held:
        trains, total = {names for _, names, _ in self.trained()}, Held()
        for names, weights in self.modules.items():
            if names not in trains:
                total += frozen(weights, self.bf16)
        settings = (self.cfg.engine.get("deepspeed") or {}).get("zero_optimization", {})
        for name, _, weights in self.trained():
            total += held(
                weights,
                self.engine_of(engine, name),
                self.ranks,
                bf16=self.bf16,
                optimizer=self.optimizer,
                averaged=self.averaged(name),
                average_answers=f"{name}_ema" in self.method.requires,
                bucket=int(settings.get("reduce_bucket_size", 50_000_000)),
            )
        return total

    def activations(self, engine: str, checkpointed: bool) -> float:
        """Bytes of activations per sample, at most over all turns."""
        return max(cost.activations(1) for phase in self.costs(engine, checkpointed) for cost in phase)

    def memory(self, engine: str, checkpointed: bool, samples: int) -> float:
        """Bytes of a process; of a single one exactly, whose gradients come as activations go."""
        states = self.held(engine)
        if engine != "single":
            return states.total(samples * self.activations(engine, checkpointed))
        peaks = max(cost.peak(samples) for phase in self.costs(engine, checkpointed) for cost in phase)
        return max(states.states, states.states - states.gradients - self._copies() + peaks)

    def _copies(self) -> float:
        """What autocast makes of trained weights, which is among the peaks too."""
        return 2 * sum(weights.trained for _, _, weights in self.trained()) if self.bf16 else 0

    def traffic(self, engine: str, checkpointed: bool, phase: int) -> Traffic:
        total, costs = Traffic(0, 0), self.costs(engine, checkpointed)[phase]
        for name, names, weights in self.trained():
            total += traffic(
                weights,
                self.engine_of(engine, name),
                self.ranks,
                bf16=self.bf16,
                micro_batches=self.split.accumulated,
                passes=passes(costs, (*names, f"{name}_ema"), checkpointed),
                average_answers=f"{name}_ema" in self.method.requires,
            )
        return total

    def flops(self, phase: int) -> float:
        """FLOPs per sample."""
        return sum(cost.flops for cost in self.costs(self.engine, self.cfg.gradient_checkpointing)[phase])

    def checkpoint(self, engine: str) -> float:
        return sum(
            checkpoint_bytes(
                weights,
                self.engine_of(engine, name),
                bf16=self.bf16,
                optimizer=self.optimizer,
                averaged=self.averaged(name),
            )
            for name, _, weights in self.trained()
        )

    def snapshot(self, engine: str) -> float:
        """Bytes of host memory of rank 0's copy, from which a checkpoint is written; 0 if training waits for it."""
        if not self.cfg.checkpoints_in_background:
            return 0.0
        return sum(
            snapshot_bytes(
                weights,
                self.engine_of(engine, name),
                self.ranks,
                bf16=self.bf16,
                optimizer=self.optimizer,
                averaged=self.averaged(name),
            )
            for name, _, weights in self.trained()
        )


# ---- what is counted ----------------------------------------------------------------------------------------------


def prepared(cfg: PlanSettings, alone: bool = False) -> PlannedRun:
    """Builds the networks without weights and walks through every turn that differs.

    Args:
        alone: for its own engine, with its own `gradient_checkpointing`, and in this process: nothing to compare with.

    Raises:
        ConfigError: what cannot be planned, or a mistake in the settings.
    """
    run, walker = unwalked(cfg)
    with checking():
        walks = walker.walk_alone(run.engine) if alone else walker.walks(run.engine)
    run = replace(run, walks=walks)
    return run if alone or run.engine == engine_of(cfg) else replace(run, engine=recommended(run))


def unwalked(cfg: PlanSettings) -> tuple[PlannedRun, Walker]:
    """A run whose turns have not been walked through, so that it knows its states and nothing else, and what does that.

    Raises:
        ConfigError: see `prepared`.
    """
    check_cut(cfg)
    if cfg.teacher is not None and cfg.teacher not in TEACHERS:
        raise ConfigError(f"teacher={cfg.teacher}: a plan reads no export; allowed: {', '.join(TEACHERS)}, null")
    if cfg.start is not None:
        raise ConfigError("start: a plan needs none, what a student starts as takes no memory")
    engine = engine_of(cfg)
    engine = "ddp" if engine == "single" and ranks_of(cfg.cluster) > 1 else engine
    built = architecture(cfg.model, cfg.data.sizes)
    method: Method = build(cfg.method, schedule=built.teacher.schedule)
    if method.helpers:
        raise NotCounted(f"a plan knows no {' and no '.join(method.helpers)}: choose a method without")
    check_method(cfg, method)
    with checking():
        made = networks_of(cfg, built.teacher, method.requires, others_of(cfg, method))
        sample = sample_of(cfg, built)
        for start in method.starts:
            method.reads(start).check(sample.times)
    modules: dict[int, tuple[str, ...]] = {}
    for name, network in made.items():
        modules[id(network.module)] = (*modules.get(id(network.module), ()), name)
    seen: set[int] = set()
    weights = {names: counted(made[names[0]].module, seen) for names in modules.values()}
    phases = tuple(phases_of(method, cfg.max_train_steps))
    averages = {f"{name}_ema": made[name] for name in method.trains if f"{name}_ema" in method.requires}
    picked = [len(method.reads(p.first).pick(sample.times, generator("plan"))) for p in phases]
    walker = Walker(cfg, method, phases, {**made, **averages}, [batch_of(built, n, WALKED) for n in picked])
    run = PlannedRun(
        cfg=cfg,
        method=method,
        engine=engine,
        phases=phases,
        modules=weights,
        walks={},
        optimizer=optimizer_bytes(build(cfg.optimizer)),
        sample=sample,
    )
    return run, walker


def recommended(run: PlannedRun) -> str:
    """The first that fits of the engines that run on several processes, or the first of all."""
    room, again = usable(run.cfg.cluster), run.cfg.gradient_checkpointing
    fits = [e for e in engines_of(run) if run.memory(e, again, replace(run, engine=e).samples) <= room]
    return fits[0] if fits else run.engine


class NotCounted(ConfigError):
    """A run that calls what a plan cannot walk through."""


def engine_of(cfg: PlanSettings) -> str:
    """The name of the run's engine in `planning.ENGINES`."""
    engine: EngineSettings = build(cfg.engine)
    for key in (cfg.engine.get("deepspeed") or {}).get("zero_optimization", {}):
        if key.startswith("offload"):
            raise ConfigError(f"engine.deepspeed.zero_optimization.{key}: a plan knows no offloading")
    return engine.name


def _masters(engine: str) -> bool:
    return engine.startswith("zero")


def phases_of(method: Method, steps: int) -> list[Phase]:
    """The stages of a method, and the parts of them that train other networks or call them more often."""
    found: dict[tuple[int, tuple[tuple[str, str], ...]], Phase] = {}
    for step in range(steps):
        stage = sum(step >= start for start in method.starts)
        kind = stage, tuple((turn.updates, turn.kind) for turn in method.turns(step))
        found[kind] = Phase(found[kind].first, step, found[kind].steps + 1) if kind in found else Phase(step, step, 1)
    return list(found.values())


@dataclass(frozen=True)
class Walker:
    """Walks through the turns of all phases, one of `batches` each."""

    cfg: PlanSettings
    method: Method
    phases: tuple[Phase, ...]
    networks: dict[str, Any]
    batches: Sequence[Batch]

    def ways(self, engine: str) -> list[Way]:
        """Those that differ: float32 weights are the same wherever they are kept, and one process has only one way."""
        alone = ranks_of(self.cfg.cluster) == 1
        kept = [_masters(engine)] if alone or self.cfg.mixed_precision == "no" else [True, False]
        return [(masters, checkpointed) for checkpointed in (False, True) for masters in kept]

    def walks(self, engine: str) -> dict[Way, list[list[Cost]]]:
        """What each turn of each phase costs, of both kinds of engines."""
        ways, found = self.ways(engine), {}
        progress = Progress("walking through the turns", len(ways), "ways")
        processes = min(len(ways), os.cpu_count() or 1)
        with multiprocessing.get_context("fork").Pool(processes, _take, (self,)) as pool:
            for way, costs in pool.imap_unordered(_walk, ways):
                found[way] = costs
                progress.update(1)
        return found | {(not m, c): costs for (m, c), costs in found.items() if (not m, c) not in found}

    def walk_alone(self, engine: str) -> dict[Way, list[list[Cost]]]:
        """The same of the run's own way, in this process."""
        way = _masters(engine), self.cfg.gradient_checkpointing
        return {way: self.walk(*way)}

    def walk(self, masters: bool, checkpointed: bool) -> list[list[Cost]]:
        bf16 = self.cfg.mixed_precision != "no"
        cast(self.networks, self.method.trains, bf16, masters)
        repeated: dict[Any, Any] = {}
        return [
            [
                count(
                    turn,
                    self.networks,
                    batch,
                    Context(self.cfg.seed, phase.first, batch.positions),
                    checkpointed=checkpointed,
                    autocast=() if masters or not bf16 else self.method.trains,
                    repeated=repeated,
                )
                for turn in self.method.turns(phase.first)
            ]
            for phase, batch in zip(self.phases, self.batches, strict=True)
        ]


_taken: list[Walker] = []  # of a forked process


def _take(walker: Walker) -> None:
    torch.set_num_threads(1)
    _taken.append(walker)


def _walk(way: Way) -> tuple[Way, list[list[Cost]]]:
    return way, _taken[0].walk(*way)


def sample_of(cfg: PlanSettings, built: Architecture) -> StoredSample:
    """What a sample of the store looks like, and one whose text an earlier sample holds if there will be such."""
    data, teacher = cfg.data, built.teacher
    times: tuple[int, ...] = (0,)
    if data.guidance is not None:
        grid = make_times("trailing", teacher.schedule.T, data.solver_steps)
        times = kept_times(grid, data.keep, data.segments)
    dtype = STATE_DTYPES[data.dtype]
    conditioning = {
        name: torch.zeros(x.shape[1:], dtype=torch.float32 if name == "time_ids" else dtype)
        for name, x in batch_of(built, 1).conditioning.items()
    }
    states = torch.zeros(len(times), *teacher.latent_shape, dtype=dtype)
    facts = {"key": make_key(0, 0), "index": 0, "prompt": "x" * 80, "seed": 2**62, "guidance": 1.0}
    facts |= {"teacher_id": teacher.teacher_id, "teacher_hash": "0" * 16, "schedule_fingerprint": "0" * 16}
    facts |= {"solver": data.solver, "solver_steps": data.solver_steps, "spacing": "trailing"}
    layout = sample_layout(states, times, conditioning)
    sample = StoredSample(layout, times, stored_bytes(layout, facts))
    shared, prompts = shared_texts(data.share_texts, teacher), prompts_of(data)
    if not shared or not prompts or data.guidance is None:
        return sample
    bare = sample_layout(states, times, {name: x for name, x in conditioning.items() if name not in shared})
    size = stored_bytes(bare, {**facts, TEXT_OF: make_key(0, 0)})
    return replace(sample, bare=bare, bare_size=size, prompts=prompts)


def prompts_of(data: DataSettings) -> int:
    """How many different prompts a store will have; 0 where that is not known yet, or as many as samples."""
    if data.prompts is None or data.num_samples is None:
        return 0
    try:
        found = len({*read_prompts(data.prompts, data.prompt_column)})
    except (FileNotFoundError, ValueError):  # a plan needs no prompts
        return 0
    return found if found < data.num_samples else 0


def store_bytes(cfg: PlanSettings, samples: int) -> int:
    """Bytes of a store of so many samples."""
    return sample_of(cfg, architecture(cfg.model, cfg.data.sizes)).store_bytes(samples)


# ---- numbers of several parts -------------------------------------------------------------------------------------


def ranks_of(cluster: ClusterSettings) -> int:
    return cluster.nodes * cluster.gpus_per_node


def usable(cluster: ClusterSettings) -> float:
    return GIB * cluster.memory_gib * cluster.usable


def engines_of(run: PlannedRun) -> list[str]:
    """The engines to compare, the run's own among them."""
    possible = ["ddp", "zero1", "zero2", "zero3"] if run.ranks > 1 else ["single"]
    return possible if run.engine in possible else [*possible, run.engine]


def averaged_over(run: PlannedRun, value: Callable[[int], float]) -> float:
    """The mean of a phase's value over the steps of the run."""
    return sum(phase.steps * value(i) for i, phase in enumerate(run.phases)) / run.cfg.max_train_steps


def bytes_sent(run: PlannedRun, engine: str, phase: int) -> float:
    found = run.traffic(engine, run.cfg.gradient_checkpointing, phase)
    return found.reduced + found.gathered


def sent_seconds(run: PlannedRun, engine: str) -> float:
    checkpointed, cluster = run.cfg.gradient_checkpointing, run.cfg.cluster
    return averaged_over(run, lambda phase: run.traffic(engine, checkpointed, phase).seconds(cluster))


def rate_of(run: PlannedRun) -> float:
    """FLOP/s that a GPU reaches."""
    cluster = run.cfg.cluster
    return TERA * cluster.mfu * (cluster.tflops if run.bf16 else cluster.tflops_float32)


def step_seconds(run: PlannedRun, engine: str) -> float:
    """Seconds of a step: measured, or computation and then communication."""
    if run.cfg.measured_step_seconds is not None:
        return run.cfg.measured_step_seconds
    computed = averaged_over(run, lambda phase: run.samples_in(phase) / run.ranks * run.flops(phase))
    return computed / rate_of(run) + sent_seconds(run, engine)


@dataclass(frozen=True)
class Saving:
    """What checkpoints take of a run's time.

    Args:
        size: bytes of one.
        written: seconds until it is complete.
        stood: seconds of those that training stands still for.
        mtbf: seconds between failures of the job, on average.
        restart: seconds from a failure to the next step.
    """

    size: float
    written: float
    stood: float
    mtbf: float
    restart: float

    def lost(self, interval: float) -> float:
        """The share of time that saving every so many seconds and failures take.

        A failure while a checkpoint is being written costs what has been done since the one before: on average it is as
        if each took that time more to recover from.
        """
        return lost_share(interval, self.stood, self.mtbf, self.restart + self.written - self.stood)

    @property
    def best_interval(self) -> float:
        """Seconds of work between checkpoints with which the least is lost."""
        return max(self.written, best_interval(self.stood, self.mtbf))


def saving(run: PlannedRun) -> Saving:
    """As the settings have it: beside the training, which waits for a copy only, or with the training waiting."""
    cluster, size, copied = run.cfg.cluster, run.checkpoint(run.engine), run.snapshot(run.engine)
    written = size / (GB * cluster.write_gb_s)
    return Saving(
        size=size,
        written=written,
        stood=min(written, copied / (GB * cluster.host_link_gb_s)) if copied else written,
        mtbf=3600 * cluster.node_mtbf_hours / cluster.nodes,
        restart=60 * cluster.restart_minutes + size / (GB * cluster.read_gb_s * cluster.nodes),
    )


def picked(run: PlannedRun, phase: Phase) -> tuple[int, ...]:
    """Places of the states that a sample of this phase reads, one random choice."""
    return run.method.reads(phase.first).pick(run.sample.times, generator("plan"))
