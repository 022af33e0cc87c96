"""What is read of a sample, part by part, and the tensors of a batch that the parts are read into: nothing is copied.

A sample begins with its tar header. Its parts are the head (that and the safetensors header), the tensors, the states
that are wanted, and its JSON if prompts are; parts that lie close together are read at once, with the gap between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distill.data import tar
from distill.data.record import CONDITIONING, GUIDANCE, STATES, TIMES, Layout, Sample, TensorSpec
from distill.diffusion.prediction import Conditioning

MERGE_BYTES = 4096
HEAD, FACTS, GAP = "head", "facts", "gap"  # of a sample's bytes, what is no tensor; names of tensors differ from these


@dataclass(frozen=True)
class Piece:
    """Bytes begin ... end of a sample, counted from its tar header; of a state, its place in the trajectory."""

    name: str
    begin: int
    end: int
    state: int = 0


@dataclass(frozen=True)
class Span:
    """Parts that are read at once: each begins where the one before it ends."""

    parts: tuple[Piece, ...]

    @property
    def begin(self) -> int:
        return self.parts[0].begin

    @property
    def end(self) -> int:
        return self.parts[-1].end


def plan_reads(layout: Layout, states: tuple[int, ...], facts: Piece | None = None) -> tuple[Span, ...]:
    """What to read of a sample for its head, these states and, if it is given, its JSON, in the order of its bytes.

    Raises:
        IndexError: no states, or one that its trajectory does not have.
    """
    K = layout.tensors[STATES].shape[0]
    if any(not 0 <= k < K for k in states) or not states:
        raise IndexError(f"states {list(states)} of samples that have {K}")
    spans = _spans(layout.header, states)
    return spans if facts is None else _merged([*(part for span in spans for part in span.parts), facts])


def plan_text(layout: Layout) -> tuple[Span, ...]:
    """What to read of a sample for its text: all but its states and its JSON, which one checksum is of."""
    return _spans(layout.header, ())


@lru_cache(maxsize=4096)
def _spans(layout_bytes: bytes, states: tuple[int, ...]) -> tuple[Span, ...]:
    layout = Layout.parse(layout_bytes)
    parts = [Piece(HEAD, 0, tar.BLOCK + len(layout.header))]
    for name, spec in layout.tensors.items():
        start, size = tar.BLOCK + layout.start(name), spec.end - spec.begin
        if name != STATES:
            parts.append(Piece(name, start, start + size))
    first, size = tar.BLOCK + layout.start(STATES), layout.state_bytes
    parts += [Piece(STATES, first + k * size, first + (k + 1) * size, state=k) for k in sorted(set(states))]
    return _merged(parts)


def _merged(parts: Iterable[Piece]) -> tuple[Span, ...]:
    """Parts that lie within a page of each other become one span: one read is cheaper than two."""
    spans: list[list[Piece]] = []
    for part in sorted(parts, key=lambda part: (part.begin, part.end)):
        if part.name == GAP:
            continue
        if not spans or part.begin - spans[-1][-1].end > MERGE_BYTES:
            spans.append([part])
            continue
        if part.begin > spans[-1][-1].end:
            spans[-1].append(Piece(GAP, spans[-1][-1].end, part.begin))
        spans[-1].append(part)
    return tuple(map(Span, map(tuple, spans)))


ALIGNED = 64
"""Tensors of a batch begin at multiples of so many bytes, as torch's own do."""
Memory = Callable[[int], Tensor]
"""Gives so many bytes of memory, [bytes] of uint8, with anything in them."""


def ordinary_memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@lru_cache(maxsize=256)
def _places(layout_bytes: bytes, samples: int, states: int) -> tuple[dict[str, TensorSpec], int]:
    """Of each tensor of a batch its dtype and shape, and where it lies in the batch's memory; and the size of that."""
    found, end = {}, 0
    for name, spec in Layout.parse(layout_bytes).tensors.items():
        shape = (samples, states, *spec.shape[1:]) if name == STATES else (samples, *spec.shape)
        size = spec.dtype.itemsize * math.prod(shape)
        found[name] = TensorSpec(spec.dtype, shape, end, end + size)
        end += -(-size // ALIGNED) * ALIGNED
    return found, end


class Rows:
    """The samples of a batch, as tensors that are read into; all lie in one piece of memory, which `memory` gives.

    Attributes:
        layout: of each of them.
        states: [B, n, C, h, w].
        times: [B, n], int64.
        conditioning: keyword tensors, [B, ...].
        guidance: [B], float32.
        keys, prompts: a text for each sample, "" until it is read.
    """

    def __init__(self, layout: Layout, samples: int, states: int, memory: Memory = ordinary_memory) -> None:
        self.layout = layout
        places, size = _places(layout.header, samples, states)
        whole = memory(size)
        self._tensors = {
            name: whole.narrow(0, one.begin, one.end - one.begin).view(one.dtype).view(one.shape)
            for name, one in places.items()
        }
        data: Any = whole.numpy()
        self._bytes = {name: memoryview(data)[one.begin : one.end] for name, one in places.items()}
        self.times = torch.zeros(samples, states, dtype=torch.int64)
        self._times = self.times.numpy()  # the same memory, which is set in a tenth of the time
        self.keys, self.prompts = [""] * samples, [""] * samples

    @property
    def states(self) -> Tensor:
        return self._tensors[STATES]

    @property
    def conditioning(self) -> Conditioning:
        named = self._tensors.items()
        return {name.removeprefix(CONDITIONING): x for name, x in named if name.startswith(CONDITIONING)}

    @property
    def guidance(self) -> Tensor:
        return self._tensors[GUIDANCE].reshape(len(self.keys)).float()

    def buffer(self, part: Piece, row: int, states: tuple[int, ...]) -> memoryview:
        """Where a part of the sample in `row` is read to; what is no tensor has memory of its own.

        Args:
            states: those wanted of this sample, in their order.
        """
        if part.name not in self._bytes:
            return memoryview(bytearray(part.end - part.begin))
        size = part.end - part.begin
        if part.name == STATES:
            row = row * len(states) + states.index(part.state)
        return self._bytes[part.name][row * size : (row + 1) * size]

    def repeat(self, row: int, states: tuple[int, ...]) -> None:
        """Fills the second place of a state that is wanted twice, and read once."""
        for at, k in enumerate(states):
            if (first := states.index(k)) != at:
                self.states[row, at] = self.states[row, first]

    def name(self, row: int, key: str, states: tuple[int, ...], times: Sequence[int], prompt: str) -> None:
        """Says which sample, and which of its states, a row holds."""
        self._times[row] = [times[k] for k in states]
        self.keys[row], self.prompts[row] = key, prompt

    def sample(self, row: int) -> Sample:
        """One of them; its tensors are views."""
        conditioning = {name: x[row] for name, x in self.conditioning.items()}
        guidance = float(self.guidance[row])
        return Sample(self.keys[row], self.states[row], self.times[row], conditioning, guidance, self.prompts[row])

    def tensors_of(self, row: int) -> dict[str, Tensor]:
        """The values of a row that have to be finite, by names for messages."""
        found = {name: x[row] for name, x in self.conditioning.items()}
        return found | {GUIDANCE: self._tensors[GUIDANCE][row], STATES: self.states[row]}

    def stored_times(self, part: memoryview) -> list[int]:
        """The times that a sample's part with them says."""
        spec = self.layout.tensors[TIMES]
        return [] if not part else torch.frombuffer(bytearray(part), dtype=spec.dtype).tolist()
