"""Constant tensors that losses look numbers up in: one copy for each device, made when it is first needed there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Table:
    """A constant tensor. A tensor that is made from Python's numbers on a GPU keeps the host waiting for it each time.

    Args:
        values: numbers, nested as the tensor's dimensions are, or a tensor on the CPU.
        dtype: of the tensor; None is torch's choice.
    """

    def __init__(self, values: Any, dtype: torch.dtype | None = None) -> None:
        self.values = torch.as_tensor(values, dtype=dtype, device="cpu")
        self._copies: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.values,)  # a process that reads data has no use for the copies

    def on(self, device: torch.device) -> Tensor:
        """The tensor on `device`. It is not to be written to."""
        if device.type == "cpu":
            return self.values
        if device not in self._copies:
            self._copies[device] = self.values.to(device)
        return self._copies[device]
