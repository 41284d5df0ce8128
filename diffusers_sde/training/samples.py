"""What a training sees: images as tensors, in an order that is a function of the seed.

Knows how an image of any size and mode is framed, and the stateless order: the sample at position ``p`` of the endless
sequence, its crop and its flip depend on (seed, p) alone, so that a run resumed at any batch goes on as if it had never
stopped, and any number of processes sees what one process with the same global batch sees.  Knows nothing of folders,
data sets, networks, noise or losses.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from diffusers_sde.training.randomness import seed_of

MAX_CACHED_BYTES = 2**30
# What PIL raises for files that are no images, cut off, or refused for their size.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
SAMPLE_STREAM = 2  # the stream of random numbers of a position that makes its sample; noise and time have others
Item = dict[str, Any]


class DataError(ValueError):
    """Training data that cannot be used; the message is one sentence with the remedy."""


# -- from images to tensors --


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """``image`` in grey (1 channel) or RGB (3), transparency composited on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
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
        """uint8 ``(C, h, w)`` whose shorter side is the resolution (Lanczos), both if cropped centrally."""
        side = self.resolution
        ImageOps.exif_transpose(image, in_place=True)
        image = to_mode(image, self.channels)
        if min(image.size) != side:
            scale = side / min(image.size)
            width, height = (max(side, round(n * scale)) for n in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if self.center_crop and max(image.size) != side:
            left, top = ((n - side) // 2 for n in image.size)
            image = image.crop((left, top, left + side, top + side))
        pixels = np.array(image)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def tensor(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        """float32 ``(C, resolution, resolution)`` in [-1, 1]: crop and flip drawn from ``seed``."""
        draw, side = random.Random(seed), self.resolution
        top, left = (draw.randint(0, n - side) for n in pixels.shape[1:])
        pixels = pixels[:, top : top + side, left : left + side]
        if self.random_flip and draw.random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels.to(torch.float32).div_(127.5).sub_(1)


def annotation(label: int | None, caption: str | Sequence[str] | None, seed: int) -> Item:
    """The part of an item beside its image; of several captions one is drawn from ``seed``."""
    out: Item = {}
    if label is not None:
        out["class_labels"] = int(label)
    if caption is not None:
        out["caption"] = caption if isinstance(caption, str) else random.Random(seed).choice(list(caption))
    return out


# -- the order --


def sample_seed(seed: int, position: int) -> int:
    """The seed of the sample at a position: of its crop, its flip, its caption and its draw of latents."""
    return seed_of(seed, position, SAMPLE_STREAM)


@functools.lru_cache(maxsize=4)
def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, a function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(length)


class TrainingData(torch.utils.data.Dataset):
    """What can be trained on: numbered items, each a function of its number and a seed.

    ``class_names`` is None without labels; ``captions`` says whether items have a caption; ``skipped`` counts the
    images that cannot be read; ``max_workers`` bounds the processes that may read at once (None: any number).
    """

    framing: Framing
    class_names: list[str] | None = None
    captions: bool = False
    skipped: int = 0
    max_workers: int | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def item(self, index: int, seed: int) -> Item:
        """The item of this number, everything random in it drawn from ``seed``."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        return self.item(index, index)

    def items(self, positions: Iterable[int], seed: int) -> Iterator[Item]:
        """The items at increasing positions of the endless sequence, epoch after epoch, each epoch permuted."""
        for position in positions:
            epoch, within = divmod(position, len(self))
            yield self.item(int(epoch_order(len(self), seed, epoch)[within]), sample_seed(seed, position))


class Pictures(Protocol):
    """Numbered images, opened when asked for; pickles; ``fingerprint`` changes with its content."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...

    def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Scan:
    """What reading every image once has found: ``kept``, the numbers of the readable ones (N,), and, if they all fit
    into memory, their uint8 pixels one behind the other with ``shapes`` (N, 3) and ``offsets`` (N + 1,)."""

    kept: np.ndarray
    pixels: torch.Tensor | None = None
    shapes: np.ndarray | None = None
    offsets: np.ndarray | None = None

    def decoded(self, index: int) -> torch.Tensor | None:
        """uint8 ``(C, h, w)`` of the readable image of this number; None where pixels are not kept."""
        if self.pixels is None or self.shapes is None or self.offsets is None:
            return None
        return self.pixels[self.offsets[index] : self.offsets[index + 1]].view(*self.shapes[index].tolist())


def scan_pictures(pictures: Pictures, framing: Framing, name: str, cache_bytes: int) -> Scan:
    """Read every image: decoded as long as ``cache_bytes`` may hold them all, then only checked for a good header."""
    kept: list[int] = []
    chunks: list[np.ndarray] = []
    size = 0
    for i in tqdm(range(len(pictures)), desc=f"Reading {name}", unit=" images", disable=None, leave=False):
        try:
            with pictures[i] as image:
                if size < cache_bytes:
                    chunks.append(framing.pixels(image))
                    size += chunks[-1].size
                else:
                    chunks.clear()
                    image.verify()
        except UNREADABLE:
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
    )


class Images(TrainingData):
    """The readable images of a source with their labels and captions, made by :func:`read_images`.

    Items are ``{"pixel_values": float32 (C, H, W) in [-1, 1], "class_labels": int, "caption": str}``, the last two
    where there are such.

    Args:
        pictures: the images.
        scan: which of them can be read, and their pixels if they are kept in memory.
        name: what messages call them.
        labels: ``(N,)`` numbers into ``class_names``.
        captions: N captions, each a string or several to choose from.
    """

    def __init__(
        self,
        pictures: Pictures,
        framing: Framing,
        scan: Scan,
        *,
        name: str,
        class_names: list[str] | None = None,
        labels: np.ndarray | None = None,
        captions: Sequence[Any] | None = None,
    ) -> None:
        self.pictures, self.framing, self.scan, self.name = pictures, framing, scan, name
        self.class_names, self.captions = class_names, captions is not None
        self.skipped = len(pictures) - len(scan.kept)
        self._labels = None if labels is None else labels[scan.kept]
        self._captions = None if captions is None else [captions[i] for i in scan.kept]

    def __len__(self) -> int:
        return len(self.scan.kept)

    def all_captions(self) -> list[str]:
        """Every caption of every image."""
        return [c for caption in self._captions or () for c in ([caption] if isinstance(caption, str) else caption)]

    def decode(self, index: int) -> torch.Tensor:
        """uint8 ``(C, h, w)`` of the image of this number, from memory or from its source."""
        if (pixels := self.scan.decoded(index)) is not None:
            return pixels
        with self.pictures[int(self.scan.kept[index])] as image:
            return torch.from_numpy(self.framing.pixels(image))

    def readable(self, index: int) -> tuple[int, torch.Tensor]:
        """The number and pixels of an image, or of the next readable one (the same in every process) where a file
        turns out to be cut off behind its good header."""
        for number in itertools.chain(range(index, len(self)), range(index)):
            try:
                return number, self.decode(number)
            except UNREADABLE as error:
                warnings.warn(f"An image of {self.name} is damaged, the next takes its place: {error}", stacklevel=3)
        raise DataError(f"No image of {self.name} can be read any more: put the data back.")

    def annotation(self, index: int, seed: int) -> Item:
        """Label and caption of the image of this number."""
        return annotation(
            None if self._labels is None else self._labels[index],
            None if self._captions is None else self._captions[index],
            seed,
        )

    def item(self, index: int, seed: int) -> Item:
        """The image of this number with the crop, flip and caption of ``seed``."""
        number, pixels = self.readable(index)
        return {"pixel_values": self.framing.tensor(pixels, seed), **self.annotation(number, seed)}

    def fingerprint(self) -> str:
        """Changes with the source's content and with the framing."""
        return repr((self.pictures.fingerprint(), self.framing))


def read_images(
    pictures: Pictures, framing: Framing, *, name: str, cache_bytes: int = MAX_CACHED_BYTES, **annotations: Any
) -> Images:
    """The images of a source that can be read; decoded ones stay in memory if ``cache_bytes`` hold them all.

    Args:
        annotations: labels, class names and captions of :class:`Images`.

    Raises:
        DataError: if none can be read; warns of those that cannot.
    """
    images = Images(pictures, framing, scan_pictures(pictures, framing, name, cache_bytes), name=name, **annotations)
    if not len(images):
        raise DataError(f"None of the {images.skipped} images of {name} can be read: pass other data.")
    if images.skipped:
        warnings.warn(f"{images.skipped} unreadable images of {name} are skipped.", stacklevel=3)
    return images


class Selection(TrainingData):
    """Some of the items of ``source``, by their numbers (N,)."""

    def __init__(self, source: TrainingData, numbers: np.ndarray) -> None:
        self.source, self.numbers = source, numbers
        self.framing, self.class_names, self.captions = source.framing, source.class_names, source.captions
        self.skipped, self.max_workers = source.skipped, source.max_workers

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, index: int, seed: int) -> Item:
        """The item of this number of the selection."""
        return self.source.item(int(self.numbers[index]), seed)


def hold_out(source: TrainingData, count: int) -> tuple[TrainingData, TrainingData]:
    """``source`` without ``count`` of its items, spread evenly over it, and these.

    Raises:
        DataError: if nothing would be left to train on.
    """
    if count >= len(source):
        raise DataError(
            f"--num_held_out_images {count} leaves nothing of {len(source)} images to train on: pass fewer."
        )
    held = (np.arange(count) * len(source) + len(source) // 2) // count
    return Selection(source, np.setdiff1d(np.arange(len(source)), held)), Selection(source, held)


# -- batches --


class Batches(torch.utils.data.IterableDataset):
    """The endless batches of one process; worker w of W makes every W-th of them, and the loader interleaves them."""

    def __init__(self, samples: TrainingData, batch_size: int, seed: int, rank: int, world_size: int, first_batch: int):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.world_size, self.first_batch = rank, world_size, first_batch

    def __iter__(self) -> Iterator[Item]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = itertools.count(self.first_batch + number, workers)
        starts = ((b * self.world_size + self.rank) * self.batch_size for b in numbers)
        positions, wanted = itertools.tee(p for start in starts for p in range(start, start + self.batch_size))
        pairs = zip(positions, self.samples.items(wanted, self.seed), strict=True)
        while True:
            yield collate(list(itertools.islice(pairs, self.batch_size)))


def collate(pairs: Sequence[tuple[int, Item]]) -> Item:
    """One batch of (position, item) pairs: stacked tensors, int64 labels and positions, a list of captions."""
    positions, items = zip(*pairs, strict=True)
    batch: Item = {"positions": torch.tensor(positions)}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if isinstance(first, torch.Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = values if isinstance(first, str) else torch.tensor(values)
    return batch


def batches(
    images: TrainingData,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    first_batch: int = 0,
    num_workers: int = 0,
) -> Iterator[Item]:
    """Endless batches of one process, from global batch ``first_batch`` on.

    Global batch b takes positions ``b G ... (b + 1) G - 1`` with ``G = batch_size world_size``; rank r takes the r-th
    ``batch_size`` of them.  Position p is image ``permutation(seed, p // N)[p % N]`` with the crop and flip of
    ``sample_seed(seed, p)``.  Each batch has stacked tensors, ``positions`` (int64), and a list ``caption``.
    The result does not depend on ``num_workers``.
    """
    own = Batches(images, batch_size, seed, rank, world_size, first_batch)
    workers = num_workers if images.max_workers is None else min(num_workers, images.max_workers)
    return iter(torch.utils.data.DataLoader(own, batch_size=None, num_workers=workers))
