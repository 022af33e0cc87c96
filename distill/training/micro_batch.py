"""How many samples a GPU takes at once, and what a run does that has no memory for them."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from distill.config.loading import ConfigError
from distill.config.recorded import given_keys
from distill.config.settings import TrainSettings
from distill.data.words import counted
from distill.training.processes import Processes

log = logging.getLogger("distill")

GIB = 2**30
USABLE = 0.9
"""The share of free memory that tensors may take: the rest is NCCL's buffers and gaps between blocks."""
TRAINING_ADVICE = (
    "set a smaller micro_batch_size (or auto), gradient_checkpointing=true or a higher stage, as engine=zero3; "
    "distill plan with the same settings says what fits where, and the same command then resumes"
)
"""Advice: settings that take less memory in training."""


@dataclass(frozen=True)
class Split:
    """How a process takes its samples of a step: `accumulated` micro-batches of `micro_batch_size` each.

    Args:
        others: its samples of a step in stages that have other sizes of batches; they come in as many micro-batches.
    """

    micro_batch_size: int
    accumulated: int
    others: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        """How many samples of a step this process takes."""
        return self.micro_batch_size * self.accumulated

    @property
    def largest(self) -> int:
        """Samples of the largest micro-batch of all stages."""
        return max(self.samples, *self.others) // self.accumulated if self.others else self.micro_batch_size

    def at_most(self, samples: float) -> Split:
        """The same samples in the fewest micro-batches with no more than so many; in the most there can be, if none."""
        common, most = math.gcd(self.samples, *self.others), max(self.samples, *self.others, 1)
        cuts = [cut for cut in range(1, common + 1) if common % cut == 0]
        cut = next((cut for cut in cuts if most // cut <= samples), cuts[-1])
        return Split(self.samples // cut, cut, self.others)


Counting = Callable[[TrainSettings, Split, int, float, bool | None], tuple[Split, float] | None]
"""Finds the largest micro-batches that fit.

It is given settings, a split, the number of processes, bytes of memory (infinite where they are unknown), and whether
the run's `teacher` is a LoRA (None: it has none). It returns the split and the bytes that it takes; None if it cannot.
"""


def split_batch(cfg: TrainSettings, world_size: int, others: Sequence[int] = ()) -> Split:
    """How each of so many processes takes its samples; under `micro_batch_size=auto` all at once, to begin with.

    Args:
        others: global batch sizes of the method's stages that are not the run's, all of them multiples of the parts.

    Raises:
        ConfigError: it does not come out even, or two settings say how it is done.
    """
    check_cut(cfg)
    parts = world_size * cfg.gradient_accumulation_steps
    if cfg.global_batch_size % parts:
        raise ConfigError(
            f"global_batch_size={cfg.global_batch_size} must be a multiple of {parts}: "
            f"{world_size} processes x gradient_accumulation_steps={cfg.gradient_accumulation_steps}"
        )
    others_of_process = tuple(size // world_size for size in others)
    split = Split(cfg.global_batch_size // parts, cfg.gradient_accumulation_steps, others_of_process)
    return split.at_most(cfg.micro_batch_size) if isinstance(cfg.micro_batch_size, int) else split


def check_cut(cfg: TrainSettings) -> None:
    """Raises ConfigError where two settings say how the samples of a step are cut."""
    accumulated = cfg.gradient_accumulation_steps
    if cfg.micro_batch_size is not None and (accumulated > 1 or "gradient_accumulation_steps" in given_keys()):
        raise ConfigError(
            f"micro_batch_size={cfg.micro_batch_size} and gradient_accumulation_steps={accumulated} both say how the "
            f"samples of a step are cut: set micro_batch_size=null, or leave gradient_accumulation_steps out"
        )


def counted_split(
    cfg: TrainSettings, split: Split, processes: Processes, counting: Counting | None, teacher_is_lora: bool | None
) -> Split:
    """The split that a run with `micro_batch_size=auto` begins with, the same on all ranks; the main one counts.

    Where no limit is known, as on a CPU, nothing is counted: all samples are taken at once.
    """
    room = min(processes.gathered(free_memory(processes.device)))
    if math.isinf(room):
        if processes.is_main:
            log.info("micro_batch_size=auto: %s at once, no limit is known here", counted(split.largest, "sample"))
        return split
    found = None
    if counting is not None and processes.is_main:
        found = counting(cfg, split, processes.world_size, room, teacher_is_lora)
    found = processes.from_main(found)
    chosen, needed = found if found is not None else (split, math.nan)
    if processes.is_main:
        takes = "cannot be counted" if math.isnan(needed) else f"take {needed / GIB:.2f} GiB by the plan's counting"
        free = f"{room / GIB:.2f} GiB are free"
        log.info("micro_batch_size=auto: %s at once %s, %s", counted(chosen.largest, "sample"), takes, free)
    return chosen


def halved(split: Split, processes: Processes) -> Split:
    """The split to try after one for which there was no memory.

    Raises:
        ConfigError: it cannot be cut further.
    """
    smaller = split.at_most(split.largest // 2)
    if smaller.accumulated == split.accumulated:
        fewest = counted(split.largest, "sample")
        raise ConfigError(f"out of memory for {fewest} at once, the fewest there can be: {TRAINING_ADVICE}")
    if processes.is_main:
        log.info(
            "micro_batch_size=auto: no memory for %s at once, trying %d",
            counted(split.largest, "sample"),
            smaller.largest,
        )
    return smaller


def free_memory(device: torch.device) -> float:
    """Bytes that tensors may take on a device; infinite where no limit is known, as on a CPU."""
    return USABLE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def give_back_memory() -> None:
    """Frees the memory that nothing refers to any more, for whatever is allocated next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or a CPU's allocator, had too little memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return any(words in said for words in ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory"))


@contextmanager
def within_memory(advice: str) -> Iterator[None]:
    """Surrounds computation: too little memory for it is one line, which ends with what takes less.

    Raises:
        ConfigError: the line.
    """
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory{_held()}: {advice}") from error


def _held() -> str:
    """What the program's tensors take, for people; nothing where it is not known."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    device = torch.cuda.current_device()
    held, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    return f" on GPU {device} ({held / GIB:.1f} of {total / GIB:.1f} GiB were taken)"
