"""Pictures from anywhere: their sizes from their headers, and parts of them as an autoencoder takes them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from distill.data.sizes import ImageSize, square

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 80_000_000
"""The most pixels of a picture: 0.3 GB once decoded. (Pillow itself warns from 89 million on.)"""
CROPS = ("center", "random")
TURNED = (5, 6, 7, 8)
"""EXIF's orientations whose width is the upright picture's height."""


class BadPicture(ValueError):
    """A picture that cannot be used; the message says why, in the same words every time."""


@dataclass(frozen=True)
class CutPicture:
    """A part of a picture: `pixels` [3, height, width], float32 in [-1, 1].

    `original` (height, width) is the upright picture's size in pixels before it was resized; `corner` (top, left) is
    where the part lies in the resized one.
    """

    pixels: Tensor
    original: tuple[int, int]
    corner: tuple[int, int]


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the header has them, before any rotation; a picture's first kilobytes often do.

    Raises:
        BadPicture: no header that is understood, or more than `MAX_PIXELS`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused with a sentence of our own
        with _opened(data) as image:
            return image.size


def upright_size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright picture, as far as its orientation is said before its pixels, as always in JPEG.

    Raises:
        BadPicture: see `size_of`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with _opened(data) as image:
            # Pillow's own method for PNG would decode the whole picture, to find what may follow the pixels.
            turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in TURNED
            return image.size[::-1] if turned else image.size


def upright(data: bytes) -> Image.Image:
    """Decodes a picture: turned as EXIF says, in RGB of 8 bits, on white where it is transparent; of several frames the
    first. Whatever looks at pictures sees them so: training, references, distances.

    Raises:
        BadPicture: it cannot be decoded to its end, or has more than `MAX_PIXELS`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with _opened(data) as image:
            return _rgb(ImageOps.exif_transpose(image))


def cut_square(data: bytes, side: int, generator: torch.Generator | None = None) -> CutPicture:
    """`cut_picture` to a square: the shorter side is resized to `side` pixels."""
    return cut_picture(data, square(side), generator)


def cut_picture(data: bytes, size: ImageSize, generator: torch.Generator | None = None) -> CutPicture:
    """Decodes a picture, turns it upright (EXIF), resizes it to the least that covers `size`, and cuts that out of it.

    What is cut out is the middle, or a uniformly random part by `generator`. What is transparent becomes white.

    Raises:
        BadPicture: it cannot be decoded to its end, or has more than `MAX_PIXELS`.
    """
    image = upright(data)
    width, height = image.size
    narrow = size.width * height >= size.height * width  # its width is resized to the size's, and its height is cut
    covering = (size.width, size.width * height // width) if narrow else (size.height * width // height, size.height)
    resized = image.resize(covering, Image.Resampling.LANCZOS)
    top, left = _offset(resized.height - size.height, generator), _offset(resized.width - size.width, generator)
    cut = np.array(resized.crop((left, top, left + size.width, top + size.height)))  # [height, width, 3]
    pixels = torch.from_numpy(cut).permute(2, 0, 1).float() / 127.5 - 1
    return CutPicture(pixels, (height, width), (top, left))


def _offset(slack: int, generator: torch.Generator | None) -> int:
    return slack // 2 if generator is None else int(torch.randint(slack + 1, (), generator=generator))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture whose header is read. Whatever goes wrong with it inside is a BadPicture."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture(f"{image.width} x {image.height} pixels; allowed: {MAX_PIXELS}")
            yield image
    except (BadPicture, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadPicture(f"no header of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise almost anything
        message = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "it", f"{type(error).__name__}: {error}")
        raise BadPicture(" ".join(message.split())) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 8
        levels = np.asarray(image, dtype=np.float32)
        grey = np.where(levels == image.info.get("transparency"), 255, (levels / 257).round())
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
