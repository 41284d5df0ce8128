"""One image: opened, decoded, and made a tensor of the right size.

Knows the formats that are read, what an image of any size and mode becomes, and that a file of unknown content can fail
in any way, which is always the same :class:`Unreadable` here.  Knows nothing of folders, data sets or their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps

# JPEG includes MPO.  No others: some of Pillow's decoders start further programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "PCX")
MAX_ASPECT = 8  # of what is kept of an image that is cropped at random: a strip may be thousands of times as long
SCALED_MODES = frozenset(("L", "LA", "RGB", "RGBA"))  # as they are: what is converted afterwards is small
GREY_MODES = frozenset(("1", "L", "LA", "La", "F"))


class DataError(ValueError):
    """Training data that cannot be used; the message is one sentence with the remedy."""


class Unreadable(Exception):
    """An image that cannot be decoded; the message says why."""


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Whatever goes wrong inside is :class:`Unreadable`: decoders of damaged files raise nearly everything (OSError,
    SyntaxError, struct.error, AttributeError, MemoryError, ...)."""
    try:
        yield
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that the installed Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file: str | IO[bytes] | Any) -> Image.Image:
    """The image of a file or a path in one of :data:`FORMATS`, not yet decoded."""
    return Image.open(file, formats=known_formats())


def is_grey(image: Image.Image) -> bool:
    """Whether the mode of an image has no colours."""
    return image.mode in GREY_MODES or image.mode.startswith("I")


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """``image`` in grey (1 channel) or RGB (3), transparency composited on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


@dataclasses.dataclass(frozen=True)
class Framing:
    """How an image of any size and mode becomes ``(channels, resolution, resolution)``."""

    resolution: int
    channels: int
    center_crop: bool = True
    random_flip: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise DataError(f"--resolution must be at least 1, not {self.resolution}.")
        if self.channels not in (1, 3):
            raise DataError(f"Images have 1 or 3 channels, not {self.channels}: choose a model with as many.")

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 ``(C, h, w)`` whose shorter side is the resolution (Lanczos); the longer one too if cropped centrally,
        else at most :data:`MAX_ASPECT` times as long, the middle of a longer image.

        Only what is kept is ever scaled.
        """
        side = self.resolution
        ImageOps.exif_transpose(image, in_place=True)
        if "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode not in SCALED_MODES:
            image = to_mode(image, self.channels)
        longest = side if self.center_crop else MAX_ASPECT * side
        scaled = [max(side, round(n * side / min(image.size))) for n in image.size]
        kept = [min(n, longest) for n in scaled]
        margins = [(n - k) // 2 for n, k in zip(scaled, kept, strict=True)]
        left, top = (m * n / s for m, n, s in zip(margins, image.size, scaled, strict=True))
        right, bottom = ((m + k) * n / s for m, k, n, s in zip(margins, kept, image.size, scaled, strict=True))
        image = image.resize((kept[0], kept[1]), Image.Resampling.LANCZOS, (left, top, right, bottom))
        pixels = np.array(to_mode(image, self.channels))
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def tensor(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        """float32 ``(C, resolution, resolution)`` in [-1, 1]: crop and flip drawn from ``seed``."""
        draw, side = random.Random(seed), self.resolution
        top, left = (draw.randint(0, n - side) for n in pixels.shape[1:])
        pixels = pixels[:, top : top + side, left : left + side]
        if self.random_flip and draw.random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels.to(torch.float32).div_(127.5).sub_(1)
