"""Frozen weights in 8 or 4 bits: what a LoRA is trained beside takes a half or a quarter of the memory of bfloat16.

The weights are expanded for each product and kept nowhere, in the backward pass neither. Nothing but torch is needed:
linear layers and convolutions alike, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from distill.models.families.base import Family
from distill.models.families.registry import family_of_network

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The sixteen values of a 4-bit weight, in units of the largest of its block (QLoRA, Dettmers et al. 2023, app. E)."""
BLOCK = 64
"""Weights that share a scale in 4 bits. In 8 bits those of an output channel do."""


class _Packed(nn.Module):
    """What a quantized layer is beside the layer that it takes the place of, whose class is its second base.

    `weight` holds codes, `scale` their units. These are values of bfloat16, so that a cast to it loses nothing. Until
    `pack` it is an ordinary layer: peft makes the convolutions of an adapter of the class of the layer that it adapts.
    """

    scale: nn.Parameter
    kind: str | None = None
    shape: torch.Size

    def pack(self, weight: Tensor, kind: str) -> None:
        """Takes the codes of `weight` for its weights."""
        codes, scale = KINDS[kind][0](weight.detach())
        self.kind, self.shape = kind, weight.shape
        self.register_parameter("weight", nn.Parameter(codes, requires_grad=False))
        self.scale = nn.Parameter(scale, requires_grad=False)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weights, in the shape of the layer that was quantized."""
        assert self.kind is not None
        codes: Any = self.weight
        return KINDS[self.kind][1](codes, self.scale.to(dtype), self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.kind is None else _Product.apply(x, self)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError


class QuantizedLinear(_Packed, nn.Linear):
    """A frozen linear layer."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, _as(self.bias, weight))

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight


class QuantizedConv2d(_Packed, nn.Conv2d):
    """A frozen convolution."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, _as(self.bias, weight))

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


class _Product(torch.autograd.Function):
    """The layer's output. Autograd's own products would keep the expanded weights until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear | QuantizedConv2d) -> Tensor:
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.product(x, layer.unpacked(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        weight = ctx.layer.unpacked(gradient.dtype)
        return ctx.layer.input_gradient(gradient, weight, ctx.shape).to(ctx.dtype), None


def quantize(network: nn.Module, kind: str, family: Family | None = None) -> None:
    """Puts the linear layers and convolutions of a network's blocks into `int8` or `nf4`, in place and for good.

    Its ends, its embeddings and its norms stay: a thousandth of the weights, whose errors nothing evens out.

    Args:
        family: the network's, which is found by its class where it is not given.

    Raises:
        ValueError: a kind that is neither.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize must be one of {', '.join(KINDS)}, or null, got {kind!r}")
    for block in (family or family_of_network(network)).network.parts(network):
        for part in list(block.modules()):
            for name, layer in part.named_children():
                if type(layer) in (nn.Linear, nn.Conv2d):
                    setattr(part, name, _quantized(layer, kind))


def is_quantized(module: nn.Module) -> bool:
    """Whether it has quantized layers: their weights cannot be trained."""
    return any(isinstance(part, _Packed) and part.kind is not None for part in module.modules())


def _quantized(layer: nn.Module, kind: str) -> QuantizedLinear | QuantizedConv2d:
    made: QuantizedLinear | QuantizedConv2d
    if isinstance(layer, nn.Conv2d):
        made = QuantizedConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=False,
            device="meta",
        )
    else:
        assert isinstance(layer, nn.Linear)
        made = QuantizedLinear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.bias = layer.bias  # type: ignore[assignment]
    made.pack(layer.weight, kind)
    return made.train(layer.training)


def _as(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(weight.dtype)


def _units(largest: Tensor) -> Tensor:
    """Scales that bfloat16 holds; of a block of zeros it is 1, and not the zero by which nothing is divided."""
    return torch.where(largest > 0, largest, 1.0).bfloat16().float()


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in the shape of `weight` [out, ...], and a scale for each output channel."""
    wide = weight.float()
    scale = _units(wide.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / 127)
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale


def _unpack_int8(codes: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    return codes.to(scale.dtype) * scale


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes a byte, [bytes, 1, ...] as `weight` has dimensions (peft counts them); scales [blocks, 1]."""
    blocks = F.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = _units(blocks.abs().amax(1, keepdim=True))
    values = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize((blocks / scale).contiguous(), (values[1:] + values[:-1]) / 2)
    low, high = nearest.to(torch.uint8).view(-1, 2).unbind(1)
    return (low | high << 4).view(-1, *[1] * (weight.ndim - 1)), scale


def _unpack_nf4(codes: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    values = torch.tensor(NF4, dtype=scale.dtype, device=codes.device)
    pairs = torch.stack([codes.flatten() & 15, codes.flatten() >> 4], 1).flatten().int()
    blocks = values.index_select(0, pairs).view(-1, BLOCK) * scale
    return blocks.flatten()[: shape.numel()].view(shape)


Pack = Callable[[Tensor], tuple[Tensor, Tensor]]
Unpack = Callable[[Tensor, Tensor, torch.Size], Tensor]
KINDS: dict[str, tuple[Pack, Unpack]] = {"int8": (_pack_int8, _unpack_int8), "nf4": (_pack_nf4, _unpack_nf4)}
"""How weights become codes and scales, and back."""
