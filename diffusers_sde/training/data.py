"""Images for training: where they come from, how they become tensors, and in which order they are seen.

Knows folders (classes in sub-folders, captions in ``metadata.jsonl``), data sets of the Hub, and their streams.  The
order is stateless: the sample at position ``p`` of the endless sequence, its crop and its flip depend on (seed, p)
alone, so that a run resumed at any batch goes on as if it had never stopped, and any number of processes sees what one
process with the same global batch sees.  Knows nothing of networks, noise or losses.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

MAX_CACHED_BYTES = 2**30
EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
SPLITS = frozenset(("train", "test", "validation", "val"))
# What PIL raises for files that are no images, cut off, or refused for their size.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class DataError(ValueError):
    """Training data that cannot be used; the message is one sentence with the remedy."""


# -- from image files to tensors --


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """``image`` in grey (1 channel) or RGB (3), transparency composited on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


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

    def resized(self, image: Image.Image) -> np.ndarray:
        """uint8 ``(C, h, w)`` whose shorter side is the resolution (Lanczos), cropped if the crop is central."""
        image = to_mode(ImageOps.exif_transpose(image), self.channels)
        scale = self.resolution / min(image.size)
        if scale != 1:
            width, height = (max(self.resolution, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if self.center_crop:
            image = ImageOps.fit(image, (self.resolution, self.resolution))
        pixels = np.asarray(image)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def tensor(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        """float32 ``(C, resolution, resolution)`` in [-1, 1]: crop and flip drawn from ``seed``."""
        draw, side = random.Random(seed), self.resolution
        top, left = (draw.randint(0, n - side) for n in pixels.shape[1:])
        pixels = pixels[:, top : top + side, left : left + side]
        if self.random_flip and draw.random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels.to(torch.float32).div_(127.5).sub_(1)


# -- the order --


def sample_seed(seed: int, position: int) -> int:
    """A 63-bit seed for the sample at a position: a hash, so that neighbouring positions and seeds are unrelated."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@functools.lru_cache(maxsize=4)
def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, a function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(length)


class Samples(torch.utils.data.Dataset):
    """What can be trained on: numbered items, each a function of its number and a seed.

    ``class_names`` is None without labels; ``captions`` says whether items have a caption.
    """

    class_names: list[str] | None
    captions: bool

    def __len__(self) -> int:
        raise NotImplementedError

    def item(self, index: int, seed: int) -> dict[str, Any]:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, index)

    def items(self, positions: Iterable[int], seed: int) -> Iterator[dict[str, Any]]:
        """The items at increasing positions of the endless sequence, epoch after epoch, each epoch permuted."""
        for position in positions:
            epoch, within = divmod(position, len(self))
            yield self.item(int(epoch_order(len(self), seed, epoch)[within]), sample_seed(seed, position))


class Images(Samples):
    """Readable images of a source with their labels and captions.

    Items are ``{"pixel_values": float32 (C, H, W) in [-1, 1], "class_labels": int, "caption": str}``, the last two
    where there are such.  Decoded images stay in memory as uint8 if ``cache_bytes`` hold them all.

    Args:
        source: ``source[i]`` is an open ``PIL.Image``.
        labels: ``(N,)`` numbers into ``class_names``.
        captions: N strings.

    Attributes:
        skipped: number of images left out because they could not be read.
    """

    def __init__(
        self,
        source: Any,
        framing: Framing,
        *,
        name: str,
        class_names: list[str] | None = None,
        labels: np.ndarray | None = None,
        captions: Sequence[str] | None = None,
        cache_bytes: int = MAX_CACHED_BYTES,
    ) -> None:
        self.framing, self.name, self.class_names, self.captions = framing, name, class_names, captions is not None
        self._source, self._pixels = source, None
        kept = self._scan(cache_bytes)
        self.skipped = len(source) - len(kept)
        if not len(kept):
            raise DataError(f"None of the {self.skipped} images of {name} can be read: pass other data.")
        if self.skipped:
            warnings.warn(f"{self.skipped} unreadable images of {name} are skipped.", stacklevel=3)
        self._kept = kept
        self._labels = None if labels is None else labels[kept]
        self._captions = None if captions is None else [captions[i] for i in kept]

    def _scan(self, cache_bytes: int) -> np.ndarray:
        """Numbers of the readable images; decodes them all as long as the cache holds them, then checks headers."""
        kept, chunks, total = [], [], 0
        for i in tqdm(range(len(self._source)), desc=f"Reading {self.name}", unit=" images", disable=None, leave=False):
            try:
                with self._source[i] as image:
                    if total < cache_bytes:
                        chunks.append(self.framing.resized(image))
                        total += chunks[-1].size
                    else:
                        chunks.clear()
                        image.verify()
            except UNREADABLE:
                continue
            kept.append(i)
        if chunks:
            # One flat buffer costs nothing to hand to workers, whatever the sizes of the images.
            self._pixels = torch.from_numpy(np.concatenate([c.reshape(-1) for c in chunks]))
            self._shapes = np.array([c.shape for c in chunks])
            self._offsets = np.cumsum([0, *(c.size for c in chunks)])
            self._source = None
        return np.array(kept, np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def _read(self, index: int) -> torch.Tensor:
        if self._pixels is not None:
            return self._pixels[self._offsets[index] : self._offsets[index + 1]].view(*self._shapes[index].tolist())
        with self._source[self._kept[index]] as image:
            return torch.from_numpy(self.framing.resized(image).copy())

    def item(self, index: int, seed: int) -> dict[str, Any]:
        """The image of this number with the crop and flip of ``seed``."""
        for substitute in (*range(index, len(self)), *range(index)) if self._pixels is None else (index,):
            try:
                pixels = self._read(substitute)
                break
            except UNREADABLE:
                # Broken behind a good header: the next image takes its place, the same one in every process.
                warnings.warn(f"An image of {self.name} is cut off; another one takes its place.", stacklevel=2)
        else:
            raise DataError(f"No image of {self.name} can be read any more: was the folder removed?")
        out: dict[str, Any] = {"pixel_values": self.framing.tensor(pixels, seed)}
        if self._labels is not None:
            out["class_labels"] = int(self._labels[substitute])
        if self._captions is not None:
            out["caption"] = self._captions[substitute]
        return out


# -- sources --


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])


def load_images(
    source: str | Path,
    *,
    resolution: int,
    channels: int,
    center_crop: bool = True,
    random_flip: bool = False,
    caption_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
    streaming: bool = False,
    cache_in_memory: bool = True,
) -> Images:
    """The images of a folder.

    Two or more sub-folders are classes, in the order of their sorted names; ``metadata.jsonl`` gives captions.
    Raises :class:`DataError` for what cannot be used.
    """
    framing = Framing(resolution, channels, center_crop, random_flip)
    cache_bytes = MAX_CACHED_BYTES if cache_in_memory else 0
    folder = Path(source)
    if not folder.exists():
        raise DataError(f"{source} does not exist: pass a folder of images or the name of a data set on the Hub.")
    paths = find_images(folder)
    if not paths:
        raise DataError(f"{source} has no images ({', '.join(sorted(EXTENSIONS))}): pass a folder that has some.")
    captions = read_captions(folder, paths, caption_column)
    names, labels = class_folders(paths)
    return Images(
        Files([str(folder / p) for p in paths]),
        framing,
        name=str(source),
        class_names=names,
        labels=labels,
        captions=captions,
        cache_bytes=cache_bytes,
    )


def find_images(folder: Path) -> list[str]:
    """Relative paths of all images below a folder, sorted; hidden files and folders are left out."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        here = Path(root).relative_to(folder)
        found += [
            (here / f).as_posix() for f in files if Path(f).suffix.lower() in EXTENSIONS and not f.startswith(".")
        ]
    return sorted(found)


def class_folders(paths: Sequence[str]) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and labels by the first sub-folder of each path; None unless all images lie in two or more."""
    parts = [p.split("/", 1) for p in paths]
    names = sorted({p[0] for p in parts})
    if any(len(p) == 1 for p in parts) or len(names) < 2:
        return None, None
    if set(names) <= SPLITS:
        raise DataError(f"The sub-folders {', '.join(names)} are splits, not classes: pass one of them.")
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[p[0]] for p in parts])


def read_captions(folder: Path, paths: Sequence[str], column: str) -> list[str] | None:
    """The captions in ``metadata.jsonl`` of these images; None without the file or without the column."""
    file = folder / "metadata.jsonl"
    if not file.exists():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        captions = {Path(row["file_name"]).as_posix(): row[column] for row in rows if column in row}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not JSON lines with a file_name each ({error!r}): correct it.") from error
    if not captions:
        return None
    missing = [p for p in paths if p not in captions]
    if missing:
        raise DataError(f"{file} has no {column!r} for {missing[0]}: add the line, or remove the image.")
    return [str(captions[p]) for p in paths]


# -- batches --


class Batches(torch.utils.data.IterableDataset):
    """The endless batches of one process; worker w of W makes every W-th of them, which the loader interleaves."""

    def __init__(self, images: Samples, batch_size: int, seed: int, rank: int, world_size: int, first_batch: int):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size, self.first_batch = rank, world_size, first_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        starts = (
            (b * self.world_size + self.rank) * self.batch_size
            for b in itertools.count(self.first_batch + number, workers)
        )
        wanted = (p for start in starts for p in range(start, start + self.batch_size))
        ours, theirs = itertools.tee(wanted)
        stream = zip(ours, self.images.items(theirs, self.seed), strict=True)
        while True:
            yield collate(list(itertools.islice(stream, self.batch_size)))


def collate(pairs: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """One batch of (position, item) pairs: stacked tensors, int64 labels and positions, a list of captions."""
    positions, items = zip(*pairs, strict=True)
    batch: dict[str, Any] = {"positions": torch.tensor(positions)}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if isinstance(first, torch.Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = values if isinstance(first, str) else torch.tensor(values)
    return batch


def batches(
    images: Samples,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    first_batch: int = 0,
    num_workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """Endless batches of one process, from global batch ``first_batch`` on.

    Global batch b takes positions ``b G ... (b + 1) G - 1`` with ``G = batch_size world_size``; rank r takes the r-th
    ``batch_size`` of them.  Position p is image ``permutation(seed, p // N)[p % N]`` with the crop and flip of
    ``sample_seed(seed, p)``.  Each batch has stacked tensors, ``positions`` (int64), and a list ``caption``.
    The result does not depend on ``num_workers``.
    """
    loader = Batches(images, batch_size, seed, rank, world_size, first_batch)
    return iter(torch.utils.data.DataLoader(loader, batch_size=None, num_workers=num_workers))
