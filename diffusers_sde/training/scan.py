"""Which images of a source can be read, and what those are that cannot.

Knows that every image has to be tried once, and that it must not matter which of them fails.  Knows nothing of where
images come from, of labels, captions or their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_sde.training.framing import Framing, Unreadable, decoding, is_grey

NAMED = 10  # damaged images that are named


class Damage:
    """The images that could not be read: their number, and the first :data:`NAMED` by name and reason."""

    def __init__(self) -> None:
        self.count, self.lines = 0, list[str]()
        self._file: Path | None = None

    def add(self, name: str, reason: Unreadable) -> None:
        """Count an image, and name it if it is one of the first."""
        self.count += 1
        line = " ".join(f"{name}: {reason}".split())
        if len(self.lines) < NAMED and line not in self.lines:  # a stream meets it again in every epoch
            self.lines.append(line)
            self._write([line])

    def name_in(self, file: Path, *, begin: bool) -> None:
        """Name them in ``file``, a line each, now and as they are found; no file is made while there are none.

        Args:
            file: shared by all processes that read, each of which adds those that it finds.
            begin: whether this process writes down what all of them know by now.
        """
        self._file = file
        if begin:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            self._write(self.lines)

    def _write(self, lines: Sequence[str]) -> None:
        if self._file is None or not lines:
            return
        with contextlib.suppress(OSError):  # no training ends for it
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write("".join(f"{line}\n" for line in lines))


class Pictures(Protocol):
    """Numbered images with names, opened when asked for; pickles; ``fingerprint`` changes with its content."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...

    def name(self, index: int, /) -> str: ...

    def fingerprint(self) -> str: ...


class Decoded(NamedTuple):
    """An image's uint8 pixels ``(C, h, w)`` and the size, width and height, that it came with."""

    pixels: torch.Tensor
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Scan:
    """What reading every image once has found: ``kept``, the numbers of the readable ones (N,), and, if they all fit
    into memory, their uint8 pixels one behind the other with ``shapes`` (N, 3) and ``offsets`` (N + 1,), and the
    ``sizes`` (N, 2), width and height, of the images that they were made of."""

    kept: np.ndarray
    pixels: torch.Tensor | None = None
    shapes: np.ndarray | None = None
    offsets: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def decoded(self, index: int) -> Decoded | None:
        """The readable image of this number; None where pixels are not kept."""
        if self.pixels is None or self.shapes is None or self.offsets is None or self.sizes is None:
            return None
        pixels = self.pixels[self.offsets[index] : self.offsets[index + 1]].view(*self.shapes[index].tolist())
        width, height = self.sizes[index].tolist()
        return Decoded(pixels, (width, height))


def common_channels(pictures: Pictures) -> int:
    """1 where every image that can be read is grey, else 3, by their headers."""
    grey = False
    for i in range(len(pictures)):
        with contextlib.suppress(Unreadable), decoding(), pictures[i] as image:
            if not is_grey(image):
                return 3
            grey = True
    return 1 if grey else 3


def scan_pictures(pictures: Pictures, framing: Framing, name: str, cache_bytes: int, damage: Damage) -> Scan:
    """Read every image: decoded as long as ``cache_bytes`` may hold them all, then only checked for a good header."""
    kept: list[int] = []
    chunks: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []
    size = 0
    for i in tqdm(range(len(pictures)), desc=f"Reading {name}", unit=" images", disable=None, leave=False):
        try:
            with decoding(), pictures[i] as image:
                if size < cache_bytes:
                    chunks.append(framing.pixels(image))
                    sizes.append(image.size)
                    size += chunks[-1].size
                else:
                    chunks.clear()
                    image.verify()
        except Unreadable as error:
            damage.add(pictures.name(i), error)
            continue
        kept.append(i)
    if not chunks:
        return Scan(np.array(kept, np.int64))
    # One flat buffer costs nothing to hand to workers, whatever the sizes of the images.
    return Scan(
        np.array(kept, np.int64),
        torch.from_numpy(np.concatenate([c.reshape(-1) for c in chunks])),
        np.array([c.shape for c in chunks]),
        np.cumsum([0, *(c.size for c in chunks)]),
        np.array(sizes),
    )
