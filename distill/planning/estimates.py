"""What a run needs of machines: bytes, seconds and failures, worked out from counted networks and counted turns.

Memory is what one process of the run holds, by the engine that it runs under; the parts that only DeepSpeed decides
(which copies it keeps, what it sends) are those of its version 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor, nn

from distill.config.settings import ClusterSettings
from distill.data import tar
from distill.data.record import Layout, describe, encode
from distill.data.rows import plan_reads, plan_text
from distill.planning.counting import Cost

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3")
BUCKET = 5 * 10**8
"""Elements that DeepSpeed flattens for one all-reduce of stage 1, its default."""
LIVE = 10**9
"""Elements of weights that DeepSpeed keeps gathered at stage 3, its default."""


@dataclass(frozen=True)
class Counted:
    """Weights of a network that are trained, and that are not.

    Args:
        shared: of the frozen ones, those that are in memory with another network already.
        packed: bytes of quantized weights, which are not among the frozen ones; 0 of shared ones.
    """

    trained: int
    frozen: int
    shared: int = 0
    packed: int = 0


def counted(module: nn.Module, seen: set[int] | None = None) -> Counted:
    """Counts the weights of a network, on whatever device.

    Args:
        seen: ids of parameters that were counted with other networks, and from now on those of this one too.
    """
    seen = set() if seen is None else seen
    there, parameters = set(seen), list(module.parameters())
    seen.update(id(p) for p in parameters)
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    return Counted(
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(p.numel() for p in frozen),
        shared=sum(p.numel() for p in frozen if id(p) in there),
        packed=sum(p.nbytes for p in parameters if not p.is_floating_point() and id(p) not in there),
    )


@dataclass(frozen=True)
class Held:
    """Bytes of one process, of all its networks.

    Args:
        weights: as the networks compute with them, frozen ones and copies that autocast makes among them.
        masters: float32 copies that an optimizer updates.
        gradients: that stay until the step ends.
        optimizer: its state.
        average: the moving average.
        buffers: that are allocated once, or last as long as the activations do.
        step: that live for a moment after the backward pass, when activations are gone.
    """

    weights: float = 0.0
    masters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0
    buffers: float = 0.0
    step: float = 0.0

    def __add__(self, other: Held) -> Held:
        return Held(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def states(self) -> float:
        """What stays between steps."""
        return self.weights + self.masters + self.gradients + self.optimizer + self.average + self.buffers

    def total(self, activations: float) -> float:
        """The most at once."""
        return self.states + max(activations, self.step)


def frozen(network: Counted, bf16: bool) -> Held:
    """A network beside the trained ones, all of it on every process: a teacher."""
    return Held(weights=(2 if bf16 else 4) * (network.frozen + network.trained - network.shared) + network.packed)


def held(
    network: Counted,
    engine: str,
    ranks: int,
    *,
    bf16: bool,
    optimizer: float,
    averaged: bool,
    average_answers: bool = False,
    bucket: int = BUCKET,
) -> Held:
    """A trained network on each of `ranks`.

    Args:
        engine: one of `ENGINES`.
        optimizer: bytes of state per trained weight (`trained_network.optimizer_bytes`).
        averaged: whether its moving average is kept.
        average_answers: whether losses call that average, which then takes the masters' place.
        bucket: `reduce_bucket_size` of the engine.
    """
    T, F = network.trained, network.frozen
    if engine != "zero3":  # whose engines have frozen weights of their own
        F -= network.shared
    if engine in ("single", "ddp"):
        weights = 4 * T + (2 * F + 2 * T if bf16 else 4 * F)  # under autocast, bfloat16 copies of what is trained
        weights += network.packed
        return Held(weights=weights, gradients=4 * T, optimizer=optimizer * T, average=4 * T if averaged else 0)
    low, share = (2 if bf16 else 4), T / ranks
    common = Held(
        weights=low * (T + F) + network.packed,
        masters=4 * share,
        optimizer=optimizer * share,
        average=4 * share if averaged else 0,
        buffers=low * bucket + (4 * share if average_answers else 0),
    )
    if engine == "zero1" and bf16:  # gradients add up in float32 on every rank, and are flattened to be sent
        return common + Held(gradients=4 * T, buffers=-low * bucket, step=(4 if ranks == 1 else 6) * min(T, BUCKET))
    if engine in ("zero1", "zero2"):
        kept = T if engine == "zero1" else share
        return common + Held(gradients=low * kept, step=4 * share)
    gathered = low * min(T + F, LIVE)
    full, sharded = low * (T + F), low * (T + F) / ranks
    return common + Held(
        weights=sharded - full, gradients=4 * share, buffers=gathered if ranks > 1 else 0, step=4 * share
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends in a step, in rings: reduced are gradients, gathered are weights."""

    reduced: float
    gathered: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.reduced + other.reduced, self.gathered + other.gathered)

    def seconds(self, cluster: ClusterSettings) -> float:
        """Seconds at the slowest link of the ring, if nothing overlaps with it."""
        link = cluster.node_link_gb_s
        if cluster.nodes > 1:
            link = min(link, cluster.network_gb_s / cluster.gpus_per_node)
        return (self.reduced + self.gathered) / (1e9 * link * cluster.link_efficiency)


def traffic(
    network: Counted,
    engine: str,
    ranks: int,
    *,
    bf16: bool,
    micro_batches: int,
    passes: int,
    average_answers: bool = False,
) -> Traffic:
    """What a trained network makes each of `ranks` send in a step.

    Args:
        passes: over its weights in a micro-batch: forward, backward and recomputed ones.
        average_answers: see `held`; it is spread over the ranks and taken back in every micro-batch.
    """
    T, F, ring = network.trained, network.frozen, (ranks - 1) / ranks
    low = 2 if bf16 else 4
    if engine in ("single", "ddp"):
        return Traffic(2 * 4 * T * ring, 0)
    spread = (1 + (2 * micro_batches if average_answers else 0)) * low * T * ring
    if engine == "zero1":
        return Traffic(2 * low * T * ring, spread)
    if engine == "zero2":  # an all-reduce of each bucket, of which a rank keeps its share
        return Traffic(2 * low * T * ring * micro_batches, spread)
    return Traffic(low * T * ring * micro_batches, passes * micro_batches * low * (T + F) * ring)


def passes(costs: Sequence[Cost], names: Sequence[str], checkpointed: bool) -> int:
    """Passes over the weights of the networks `names`, which share a module, in a micro-batch of each turn."""
    called = sum(cost.calls.get(name, 0) for cost in costs for name in names)
    graded = sum(cost.calls_with_gradient.get(name, 0) for cost in costs for name in names)
    return called + (2 if checkpointed else 1) * graded


def checkpoint_bytes(network: Counted, engine: str, *, bf16: bool, optimizer: float, averaged: bool) -> float:
    """Bytes for a trained network: its weights, their average, and every rank's share of the optimizer's state."""
    T = network.trained
    weights = 4 * T * (2 if averaged else 1)
    if engine in ("single", "ddp"):
        return weights + optimizer * T
    return weights + (4 + optimizer) * T + (2 if bf16 else 4) * T  # with the masters, and DeepSpeed's file of weights


def snapshot_bytes(network: Counted, engine: str, ranks: int, *, bf16: bool, optimizer: float, averaged: bool) -> float:
    """Bytes of host memory of the copy that rank 0, which has the most, writes a trained network from."""
    T, each = network.trained, 4 + optimizer + (4 if averaged else 0)
    if engine in ("single", "ddp"):
        return each * T
    low = (2 if bf16 else 4) * T  # DeepSpeed's file of weights as the network computes with them
    return each * T / ranks + (low / ranks if engine == "zero3" else low)


def sample_layout(states: Tensor, times: Sequence[int], conditioning: Mapping[str, Tensor]) -> Layout:
    """What a stored sample looks like: states [K, C, h, w] at K times, conditioning without a batch dimension."""
    return Layout.parse(encode(states, tuple(times), 1.0, conditioning))


def stored_bytes(layout: Layout, facts: Mapping[str, object]) -> int:
    """Bytes of a sample in its shard: both members of the archive, `facts` being those of its JSON."""
    return sum(tar.BLOCK + size + tar.padding(size) for size in (layout.payload_bytes, len(describe(**facts))))


def read_bytes(layout: Layout, states: Sequence[int], holder: Layout | None = None) -> int:
    """Bytes that are read of a sample for some of its states, and of the `holder` of its text if that is another."""
    spans = (*plan_reads(layout, tuple(states)), *(() if holder is None else plan_text(holder)))
    return sum(span.end - span.begin for span in spans)


@dataclass(frozen=True)
class StoredSample:
    """What a sample of a store looks like, and what it takes.

    Args:
        times: of its states.
        size: its bytes in a shard.
        bare, bare_size: the same of one whose text an earlier sample of its prompt holds; None where there are none.
        prompts: how many samples hold a text, where not all do.
    """

    layout: Layout
    times: tuple[int, ...]
    size: int
    bare: Layout | None = None
    bare_size: int = 0
    prompts: int = 0

    def store_bytes(self, samples: int) -> int:
        """Bytes of a store of so many samples."""
        if self.bare is None:
            return samples * self.size
        held = min(samples, self.prompts)
        return held * self.size + (samples - held) * self.bare_size

    def read_bytes(self, states: Sequence[int]) -> int:
        """The most bytes that are read of a sample for some of its states."""
        if self.bare is None:
            return read_bytes(self.layout, states)
        return read_bytes(self.bare, states, self.layout)


def best_interval(save: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that lose the least (Daly 2006, eq. 37; Young 1974 is its first term).

    Args:
        save: seconds a checkpoint takes.
        mtbf: mean seconds between failures of any part of the job.
    """
    if save >= 2 * mtbf:
        return mtbf
    x = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - save


def lost_share(interval: float, save: float, mtbf: float, restart: float) -> float:
    """The share of time that goes into checkpoints, work done twice and restarts (Daly 2006, eq. 20).

    Failures come at random (a Poisson process), also while the job saves or restarts; all are seconds.
    """
    exponent = (interval + save + restart) / mtbf
    if exponent > 700:
        return 1.0
    return 1 - interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf))


def most_samples(memory: float, held: Held, activations: float) -> int:
    """The largest micro-batch in so many bytes, of which a sample takes `activations`; 0 if not even the states fit."""
    if held.total(0) > memory:
        return 0
    return int((memory - held.states) // activations)
