"""How networks are executed: their dtype, compiled blocks, and the order of images in memory."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Compile = bool | Literal["inductor", "aot_eager", "eager"]

RECOMPILATIONS = 64
"""How often a block may be compiled: gradients or none, LoRA on or off, batch sizes, widths. torch stops at 8."""


def bare(module: nn.Module) -> nn.Module:
    """The network inside DDP's or DeepSpeed's wrapper."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def base_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a network expects its inputs in: that of its first weight that is neither a LoRA's nor a code."""
    weights = bare(module).named_parameters()
    return next(p.dtype for name, p in weights if p.is_floating_point() and ".lora_" not in name)


def execute(module: nn.Module, compile: Compile = False, channels_last: bool = False, weights: bool = True) -> None:
    """Sets how a network is computed; the names and values of its weights stay.

    Args:
        weights: `channels_last` is of the weights too, not of images alone.
    """
    if channels_last:
        use_channels_last(module, weights)
    if compile is not False:
        compile_blocks(module, "inductor" if compile is True else compile)


def compile_blocks(module: nn.Module, backend: str) -> None:
    """Compiles each block of the kinds that a diffusers network repeats, when it is first called.

    Blocks of one kind share what is compiled, so it takes a fraction of the time of compiling the whole network.
    """
    kinds = {kind for part in module.modules() for kind in getattr(part, "_repeated_blocks", None) or ()}
    blocks = [part for part in module.modules() if type(part).__name__ in kinds]
    if not blocks:
        log.warning("compile: %s has no repeated blocks, and is computed as it is", type(module).__name__)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    for block in blocks:
        block.compile(backend=backend)


def use_channels_last(module: nn.Module, weights: bool = True) -> None:
    """Keeps images, and the weights of convolutions, with their channels innermost, as tensor cores want them."""
    if weights:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in module.modules():
        if isinstance(part, nn.Conv2d):  # the first one decides for what follows, and others where it is lost
            part.register_forward_pre_hook(_innermost)


def _innermost(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Tensor = args[0]
    return (x.contiguous(memory_format=torch.channels_last), *args[1:]) if x.ndim == 4 else args
