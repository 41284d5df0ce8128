"""What a training sees: images as tensors, in an order that is a function of the seed.

Knows the stateless order: the sample at position ``p`` of the endless sequence, its crop and its flip depend on
(seed, p) alone, so that a run resumed at any batch goes on as if it had never stopped, and any number of processes sees
what one process with the same global batch sees.  Knows nothing of folders, data sets, networks, noise or losses.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from diffusers_sde.training.framing import DataError, Framing, Unreadable, decoding
from diffusers_sde.training.randomness import seed_of
from diffusers_sde.training.scan import Damage, Decoded, Pictures, Scan, common_channels, scan_pictures

MAX_CACHED_BYTES = 2**30
SAMPLE_STREAM = 2  # the stream of random numbers of a position that makes its sample; noise and time have others
Item = dict[str, Any]


def annotation(label: int | None, caption: str | Sequence[str] | None, seed: int) -> Item:
    """The part of an item beside its image; of several captions one is drawn from ``seed``."""
    out: Item = {}
    if label is not None:
        out["class_labels"] = int(label)
    if caption is not None:
        out["caption"] = caption if isinstance(caption, str) else random.Random(seed).choice(list(caption))
    return out


def framed(framing: Framing, decoded: Decoded, seed: int) -> Item:
    """The image of an item, with the crop and flip of ``seed``, and where in the whole picture it lies."""
    frame = torch.tensor(framing.frame(decoded.size, seed))
    return {"pixel_values": framing.tensor(decoded.pixels, seed), "frame": frame}


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

    ``unit`` is what items are called.  ``class_names`` is None without labels; ``captions`` says whether items have a
    caption; ``damage`` knows the images that cannot be read (None: there can be none); ``max_workers`` bounds the
    processes that may read at once (None: any number).
    """

    unit = "images"
    framing: Framing
    class_names: list[str] | None = None
    captions: bool = False
    damage: Damage | None = None
    max_workers: int | None = None

    @property
    def skipped(self) -> int:
        """How many images could not be read."""
        return self.damage.count if self.damage else 0

    def facts(self) -> dict[str, Any]:
        """What of the data gives a checkpoint's numbers their meaning, besides number and content."""
        return {"--resolution": self.framing.resolution}

    def describe(self, classes: int) -> str:
        """A line of the plan."""
        try:
            count = str(len(self))
        except TypeError:  # its length is not known
            count = "a stream of"
        captions = "with" if self.captions else "no"
        return f"{count} images, {classes or 'no'} classes, {captions} captions, {self.skipped} unreadable ones skipped"

    def class_counts(self) -> list[int] | None:
        """How many images each class has; None where that is not known."""
        return None

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


class Images(TrainingData):
    """The readable images of a source with their labels and captions, made by :func:`read_images`.

    Items are ``{"pixel_values": float32 (C, H, W) in [-1, 1], "frame": int64 (4,), "class_labels": int, "caption":
    str}``, the last two where there are such; ``frame`` is that of :meth:`.framing.Framing.frame`.

    Args:
        pictures: the images.
        scan: which of them can be read, and their pixels if they are kept in memory.
        damage: the others.
        name: what messages call them.
        labels: ``(N,)`` numbers into ``class_names``.
        captions: N captions, each a string or several to choose from.
    """

    def __init__(
        self,
        pictures: Pictures,
        framing: Framing,
        scan: Scan,
        damage: Damage,
        *,
        name: str,
        class_names: list[str] | None = None,
        labels: np.ndarray | None = None,
        captions: Sequence[Any] | None = None,
    ) -> None:
        self.pictures, self.framing, self.scan, self.name = pictures, framing, scan, name
        self.class_names, self.captions = class_names, captions is not None
        self.damage: Damage = damage
        self._damaged: set[int] = set()  # found to be so later than in the scan
        self._labels = None if labels is None else labels[scan.kept]
        self._captions = None if captions is None else [captions[i] for i in scan.kept]

    def __len__(self) -> int:
        return len(self.scan.kept)

    def all_captions(self) -> list[str]:
        """Every caption of every image."""
        return [c for caption in self._captions or () for c in ([caption] if isinstance(caption, str) else caption)]

    def class_counts(self) -> list[int] | None:
        """How many readable images each class has."""
        if self._labels is None or self.class_names is None:
            return None
        return np.bincount(self._labels, minlength=len(self.class_names)).tolist()

    def decode(self, index: int) -> Decoded:
        """The image of this number, from memory or from its source."""
        if (decoded := self.scan.decoded(index)) is not None:
            return decoded
        with decoding(), self.pictures[int(self.scan.kept[index])] as image:
            return Decoded(torch.from_numpy(self.framing.pixels(image)), image.size)

    def readable(self, index: int) -> tuple[int, Decoded]:
        """The number and content of an image, or of the next readable one (the same in every process) where a file
        turns out to be cut off behind its good header."""
        for number in itertools.chain(range(index, len(self)), range(index)):
            try:
                return number, self.decode(number)
            except Unreadable as error:
                if number not in self._damaged:
                    self._damaged.add(number)
                    self.damage.add(self.pictures.name(int(self.scan.kept[number])), error)
                    warnings.warn(
                        f"An image of {self.name} is damaged, the next takes its place: {error}", stacklevel=3
                    )
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
        number, decoded = self.readable(index)
        return {**framed(self.framing, decoded, seed), **self.annotation(number, seed)}

    def fingerprint(self) -> str:
        """Changes with the source's content and with the framing."""
        return repr((self.pictures.fingerprint(), self.framing))


def read_images(
    pictures: Pictures,
    framing: Framing,
    *,
    name: str,
    own_channels: bool = False,
    cache_bytes: int = MAX_CACHED_BYTES,
    **annotations: Any,
) -> Images:
    """The images of a source that can be read; decoded ones stay in memory if ``cache_bytes`` hold them all.

    Args:
        own_channels: whether the images have the channels that they come with instead of the framing's.
        annotations: labels, class names and captions of :class:`Images`.

    Raises:
        DataError: if none can be read; warns of those that cannot.
    """
    if own_channels:
        framing = dataclasses.replace(framing, channels=common_channels(pictures))
    damage = Damage()
    scan = scan_pictures(pictures, framing, name, cache_bytes, damage)
    if not len(scan.kept):
        raise DataError(
            f"None of the {damage.count} images of {name} can be read: pass other data ({damage.lines[0]})."
        )
    if damage.count:
        warnings.warn(f"{damage.count} unreadable images of {name} are skipped.", stacklevel=3)
    return Images(pictures, framing, scan, damage, name=name, **annotations)


class Selection(TrainingData):
    """Some of the items of ``source``, by their numbers (N,)."""

    def __init__(self, source: TrainingData, numbers: np.ndarray) -> None:
        self.source, self.numbers = source, numbers
        self.class_names, self.captions = source.class_names, source.captions
        self.damage, self.max_workers, self.unit = source.damage, source.max_workers, source.unit

    @property
    def framing(self) -> Framing:  # type: ignore[override]
        """Of the source."""
        return self.source.framing

    def facts(self) -> dict[str, Any]:
        """Those of the source."""
        return self.source.facts()

    def describe(self, classes: int) -> str:
        """A line of the plan."""
        return f"{len(self)} of {self.source.describe(classes)}"

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
            f"--num_held_out_images {count} leaves nothing of {len(source)} {source.unit} to train on: pass fewer."
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
