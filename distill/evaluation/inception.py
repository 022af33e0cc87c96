"""The Inception network of Fréchet inception distances, and how pictures are prepared for it.

The network is the one of the original TensorFlow graph (Heusel et al. 2017), which differs from torchvision's in its
pooling; its weights are the converted ones that pytorch-fid and torch-fidelity publish. Pictures are resized as
clean-fid does (Parmar et al. 2022, arXiv 2104.11222): PIL's bicubic filter, antialiased, without rounding.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from distill.models.rewards import fill, load_weights

SIDE = 299
"""Side of the squares that the network is shown, in pixels."""
FEATURES = 2048
_CLASSES = 1008


class Inception(nn.Module):
    """Pictures [B, 3, 299, 299] in [0, 1] -> features [B, 2048]."""

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        blocks = [BasicConv2d, _AverageA, InceptionB, _AverageC, InceptionD, _AverageE, InceptionAux]
        self.network = Inception3(_CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.network.Mixed_7c = _MaxE(FEATURES)
        self.network.fc = nn.Identity()
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() * 255 - 128) / 128)


def _average(x: Tensor) -> Tensor:
    """Averages over the pixels that are there, as TensorFlow does at the edges."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _AverageA(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(_average(x))]


class _AverageC(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(_average(x))]


class _AverageE(InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(_average(x))]


class _MaxE(InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(F.max_pool2d(x, 3, 1, 1))]


def load_inception(path: str) -> Inception:
    """The network with its published weights. Raises what `load_weights` and `fill` raise."""
    inception = Inception()
    weights = {name: x for name, x in load_weights(path).items() if not name.startswith("fc.")}  # the classes' layer
    counters = {name: x for name, x in inception.network.state_dict().items() if name.endswith("num_batches_tracked")}
    fill(inception.network, counters | weights, path)  # counters of training steps, which some files leave out
    return inception


def squares(images: Tensor) -> Tensor:
    """The middle squares of pictures [B, 3, H, W], as large as they can be."""
    return crops(images, min(images.shape[-2:]))


def crops(images: Tensor, side: int) -> Tensor:
    """The middle `side` x `side` pixels of pictures [B, 3, H, W], as torchvision's `center_crop` cuts them.

    Raises:
        ValueError: they are smaller.
    """
    H, W = images.shape[-2:]
    if min(H, W) < side:
        raise ValueError(f"pictures of {W} x {H} pixels have no patch of {side} x {side}")
    top, left = round((H - side) / 2), round((W - side) / 2)
    return images[..., top : top + side, left : left + side]


def resized(images: Tensor, side: int = SIDE) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] as `side` x `side`: PIL's antialiased bicubic filter, without its rounding."""
    return F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def shrunk(images: Tensor, side: int) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] as `side` x `side` by PIL's Lanczos filter, in 8 bits: as some labs show them."""
    pictures = [Image.fromarray(np.asarray(to_bytes(x).permute(1, 2, 0))) for x in images]
    small = [np.array(picture.resize((side, side), Image.Resampling.LANCZOS)) for picture in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor) -> Tensor:
    """Values in [0, 1] as the 0 ... 255 that a picture file would hold, uint8 on the CPU."""
    return (images * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def whole(images: Tensor, shown_at: int | None = None) -> Tensor:
    """What FID is computed from: the middle square of pictures [B, 3, H, W] in [0, 1], [B, 3, 299, 299].

    `shown_at`: pixels to which it is shrunk first, as a protocol may want.
    """
    square = squares(images)
    return resized(square if shown_at is None else shrunk(square, shown_at).to(images.device))


def patch(images: Tensor) -> Tensor:
    """What FID-patch is computed from: the middle 299 x 299 pixels at the pictures' own resolution."""
    return crops(images, SIDE)
