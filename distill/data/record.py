"""One sample of the store: `KEY.safetensors` with its tensors and `KEY.json` with where they come from.

The tensors of a store have one shape, so the safetensors header is the same bytes in every sample. That makes the place
of any state computable from the index, and the check of a sample's schema a comparison of bytes.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from distill.data.errors import BadSample as BadSample
from distill.data.errors import BadShard as BadShard
from distill.data.errors import StoreError as StoreError
from distill.data.errors import short as short
from distill.diffusion.prediction import Conditioning

STATES, TIMES, GUIDANCE, CONDITIONING = "states", "times", "guidance", "conditioning."
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_AS_INTEGERS: Mapping[torch.dtype, tuple[torch.dtype, type[np.unsignedinteger[Any]], int]] = {
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float32: (torch.int32, np.uint32, 0x7F800000),
    torch.float64: (torch.int64, np.uint64, 0x7FF0000000000000),
}
"""Integers as wide as a float, with and without a sign, and infinity as one of them."""
STATE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
TEXT_DTYPES = {**STATE_DTYPES, "bfloat16": torch.bfloat16}
"""Some text encoders' states are beyond what float16 holds."""
MAX_HEADER_BYTES = 1 << 16
MAX_PAYLOAD_BYTES = 1 << 30
MAX_JSON_BYTES = 1 << 20
MAX_DIMENSIONS = 8
SHARD = re.compile(r"shard-([0-9]{6}|[1-9][0-9]{6,11})\.tar")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's place among the data of a safetensors payload: bytes begin ... end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """What every payload of a store looks like: its header, byte for byte, and where the tensors lie after it."""

    header: bytes
    tensors: Mapping[str, TensorSpec]
    payload_bytes: int

    @classmethod
    def parse(cls, payload: bytes) -> Layout:
        """Reads the header at the start of a payload; no more than 64 KiB of it.

        Raises:
            StoreError: the header is cut, too long, not JSON, or its tensors are too large or do not fill the data
                without gaps.
        """
        if len(payload) < 8:
            raise StoreError("safetensors header is cut short")
        (length,) = struct.unpack("<Q", payload[:8])
        if length > MAX_HEADER_BYTES:
            raise StoreError(f"safetensors header claims {length} bytes; allowed: {MAX_HEADER_BYTES}")
        header = bytes(payload[: 8 + length])
        if len(header) < 8 + length:
            raise StoreError("safetensors header is cut short")
        try:
            entries = parse_json(header[8:])
            tensors = {name: _spec(entry) for name, entry in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"safetensors header is not understood ({short(error)})") from None
        return cls(header, tensors, len(header) + _data_bytes(tensors))

    def start(self, name: str) -> int:
        """Where a tensor's bytes begin, counted from the start of the payload."""
        return len(self.header) + self.tensors[name].begin

    @property
    def state_bytes(self) -> int:
        """Bytes of one state."""
        spec = self.tensors[STATES]
        return (spec.end - spec.begin) // spec.shape[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.tensors.items()}


def _spec(entry: dict[str, Any]) -> TensorSpec:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"{entry} has what is not a number of bytes or of entries")
    # An empty tensor has no bytes, and yet sizes that can be too large for one.
    if len(shape) > MAX_DIMENSIONS or dtype.itemsize * math.prod(max(n, 1) for n in shape) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{entry} is too large; allowed: {MAX_DIMENSIONS} dimensions, {MAX_PAYLOAD_BYTES} bytes")
    if end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{entry} is inconsistent")
    return TensorSpec(dtype, shape, begin, end)


def _data_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    end = 0
    for name, spec in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if spec.begin != end:
            raise StoreError(f"safetensors header leaves a gap or overlap before tensor {short(repr(name))}")
        end = spec.end
    if end > MAX_PAYLOAD_BYTES:
        raise StoreError(f"safetensors header claims {end} bytes of tensors; allowed: {MAX_PAYLOAD_BYTES}")
    return end


@dataclass(frozen=True)
class Sample:
    """Some states of one trajectory.

    `states` [n, C, h, w] at `times` [n] (int64); `conditioning` holds tensors without a batch dimension; `prompt` is
    read only where it is wanted.
    """

    key: str
    states: Tensor
    times: Tensor
    conditioning: Conditioning
    guidance: float
    prompt: str = ""


def make_key(shard: int, row: int) -> str:
    """The key of a sample: unique in its store, without dots, and it carries its shard."""
    return f"{shard:06d}-{row:06d}"


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def encode(states: Tensor, times: tuple[int, ...], guidance: float, conditioning: Conditioning) -> bytes:
    """A sample's tensors (on the CPU) as safetensors; the same values give the same bytes.

    Raises:
        StoreError: a value is not finite.
    """
    tensors = {CONDITIONING + name: x for name, x in conditioning.items()}
    tensors |= {STATES: states, TIMES: torch.tensor(times, dtype=torch.int32), GUIDANCE: torch.tensor([guidance])}
    tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    for name, x in tensors.items():
        if not finite(x):
            raise StoreError(f"{name} has values that are not finite")
    return safetensors.torch.save(tensors)


def describe(**facts: object) -> bytes:
    """A sample's JSON: where it comes from. The same facts give the same bytes.

    Raises:
        StoreError: longer than a reader accepts, or not text.
    """
    try:
        data = json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"its JSON is not text ({error})") from None
    if len(data) > MAX_JSON_BYTES:
        raise StoreError(f"its JSON has {len(data)} bytes; allowed: {MAX_JSON_BYTES}")
    return data


def parse_json(data: bytes | bytearray) -> Any:
    """What a JSON text says. Raises ValueError for whatever is none, however deep or odd."""
    try:
        return json.loads(data, parse_constant=_not_a_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def view(buffer: bytearray, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over the bytes from `start`, without a copy."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape)


def finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Such values have all bits of the exponent set: read as integers, the positive ones are the largest with a sign, the
    negative ones the largest without. Two maxima are several times faster than a question to each value.
    """
    if not x.is_floating_point() or x.numel() == 0:
        return True
    signed, unsigned, infinity = _AS_INTEGERS[x.dtype]
    bits = x.contiguous().view(signed).numpy()
    negative = infinity + (1 << (8 * x.element_size() - 1))
    return int(bits.max()) < infinity and int(bits.view(unsigned).max()) < negative
