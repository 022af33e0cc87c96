"""Sizes of images: as text, lists of them by name, and which of them suits an image. Without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from distill.data.errors import short

MOST_SIDE = 65_536
MOST_SIZES = 256
"""The most sizes of a store: every one of them is trained on alone."""


class ImageSize(NamedTuple):
    """Pixels of an image. Its text is `WIDTHxHEIGHT`, as people write it."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def shape(self, channels: int, factor: int) -> tuple[int, int, int]:
        """(C, h, w) of its latents under an autoencoder that makes `factor` pixels of each side one."""
        return channels, self.height // factor, self.width // factor


def square(side: int) -> ImageSize:
    return ImageSize(side, side)


def read_size(text: str) -> ImageSize:
    """What `WIDTHxHEIGHT` says. Raises ValueError for another text."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})[x×]([1-9][0-9]{0,5})", text)
    if not found:
        raise ValueError(f"{short(repr(text))} is no size: WIDTHxHEIGHT in pixels, such as 1152x896")
    size = ImageSize(int(found[2]), int(found[1]))
    if max(size) > MOST_SIDE:
        raise ValueError(f"{short(repr(text))} is no size: a side has at most {MOST_SIDE} pixels")
    return size


_SDXL_WIDE = (
    *("1024x1024", "1024x960", "1088x960", "1088x896", "1152x896", "1152x832", "1216x832", "1280x768", "1344x768"),
    *("1344x704", "1408x704", "1472x704", "1536x640", "1600x640", "1664x576", "1728x576", "1792x576"),
    *("1856x512", "1920x512", "1984x512", "2048x512"),
)
PRESETS: dict[str, tuple[str, ...]] = {
    "sdxl": (*_SDXL_WIDE, *("x".join(reversed(size.split("x"))) for size in _SDXL_WIDE[1:])),
}
"""Lists of sizes by name. `sdxl`: what SDXL was trained on, multiples of 64 of some 1024² pixels (Podell et al. 2023,
arXiv 2307.01952, appendix I), lying and standing."""


def read_sizes(said: str | Sequence[str]) -> tuple[ImageSize, ...]:
    """The sizes that a list, a name in `PRESETS` or one size says, in that order.

    Raises:
        ValueError: neither of them, none, one of them twice, or too many.
    """
    if isinstance(said, str) and said not in PRESETS and "x" not in said:
        raise ValueError(f"{short(repr(said))} is no list of sizes: [1024x1024,1152x896], or {', '.join(PRESETS)}")
    sizes = tuple(read_size(text) for text in (PRESETS.get(said, (said,)) if isinstance(said, str) else said))
    if not 1 <= len(sizes) <= MOST_SIZES:
        raise ValueError(f"{len(sizes)} sizes; at least 1 and at most {MOST_SIZES}")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"{next(size for size in sizes if sizes.count(size) > 1)} is among the sizes twice")
    return sizes


def covers(image: ImageSize, size: ImageSize) -> bool:
    """Whether an image can be cut to a size without being enlarged."""
    return image.height >= size.height and image.width >= size.width


def nearest(image: ImageSize, sizes: Sequence[ImageSize]) -> int:
    """Which of `sizes` an image is cut to: the one whose aspect ratio is nearest, as a factor, so that least is cut.

    Of several with that ratio it is the largest that does not enlarge the image, or else the smallest.
    """
    aspect = math.log(image.width / image.height)

    def rank(number: int) -> tuple[float, bool, int]:
        size = sizes[number]
        distance = round(abs(math.log(size.width / size.height) - aspect), 9)
        enlarged = not covers(image, size)
        return distance, enlarged, size.pixels if enlarged else -size.pixels

    return min(range(len(sizes)), key=rank)
