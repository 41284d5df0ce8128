"""Training images out of ``datasets``: tables and streams, local ones and those of the Hub.

Knows the columns of such a data set and how its rows hold images; makes of them :class:`Images` or an
:class:`ImageStream`.  Imported only where one is asked for: ``datasets`` is an extra.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import random
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image

from diffusers_sde.training.captions import Caption, caption_of
from diffusers_sde.training.framing import DataError, Framing, Unreadable, decoding, open_image
from diffusers_sde.training.randomness import seed_of
from diffusers_sde.training.samples import Images, Item, TrainingData, annotation, epoch_order, read_images, sample_seed
from diffusers_sde.training.scan import Damage

SHUFFLE_BUFFER = 1000  # images of a stream that are shuffled at a time
NO_LABEL = "{name} has rows without a label: remove them or pass another --label_column."
MAX_UNREADABLE_RUN = 1000  # unreadable images in a row after which a stream is given up


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a data set that are used, and the class names if the labels have some."""

    name: str
    image: str
    caption: str | None
    label: str | None
    class_names: list[str] | None


@dataclasses.dataclass(frozen=True)
class Rows:
    """The image column of a ``datasets.Dataset``, undecoded."""

    dataset: Any
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image.Image:
        return open_encoded(self.dataset[index][self.column])

    def name(self, index: int) -> str:
        """The number of the row."""
        return f"row {index}"

    def fingerprint(self) -> str:
        """That of ``datasets``: a hash of the files and of what was done to them."""
        return str(self.dataset._fingerprint)


def open_encoded(value: Any) -> Image.Image:
    """An image as ``datasets`` stores it: its bytes, or the path of its file, which may be remote or in an archive."""
    if not value or (value["bytes"] is None and not value["path"]):
        raise OSError("no image in this row")
    if (data := value["bytes"]) is None:
        with fsspec.open(value["path"], "rb") as file:
            data = file.read()
    return open_image(io.BytesIO(data))


def open_dataset(source: str, config_name: str | None, split: str, streaming: bool) -> Any:
    """``datasets.load_dataset``; raises :class:`DataError` with its reason where that fails."""
    try:
        return datasets.load_dataset(source, config_name, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{source} is no folder of images and no data set ({reason}): check the name, or the connection."
        ) from error


def read_columns(dataset: Any, name: str, image: str, caption: str, label: str) -> Columns:
    """Which of the wanted columns there are; only that of the images must be there."""
    present = list(dataset.column_names or next(iter(dataset), {}))
    if image not in present:
        raise DataError(f"{name} has no column {image!r}: pass one of {', '.join(present)} as --image_column.")
    features = dataset.features or {}
    if not holds_images(features.get(image)):
        raise DataError(f"Column {image!r} of {name} holds no images ({features[image]}): pass another --image_column.")
    feature = features.get(label)
    return Columns(
        name,
        image,
        caption if caption in present else None,
        label if label in present else None,
        list(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
    )


def holds_images(feature: Any) -> bool:
    """Whether a column of this type (None: unknown) can be read as images: images, encoded ones, or their paths."""
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return feature is None or isinstance(feature, datasets.Image | dict)


def number_labels(dataset: Any, columns: Columns) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and the label of each row: those of a ``ClassLabel``, else its integers or strings, sorted."""
    if columns.label is None:
        return None, None
    values = list(dataset[columns.label])
    if columns.class_names is not None:
        labels = np.array([-1 if v is None else v for v in values])
        if labels.min(initial=0) < 0:
            raise DataError(NO_LABEL.format(name=columns.name))
        return columns.class_names, labels
    if not all(isinstance(v, int | str) for v in values):
        raise DataError(f"Column {columns.label!r} of {columns.name} has no labels: pass another --label_column.")
    names, labels = np.unique(np.array(values), return_inverse=True)
    return [str(n) for n in names], labels


def image_rows(dataset: Any, columns: Columns) -> Any:
    """The columns that are used, and no others, which might not be readable; images undecoded."""
    used = [name for name in (columns.image, columns.caption, columns.label) if name is not None]
    return dataset.select_columns(used).cast_column(columns.image, datasets.Image(decode=False))


def read_rows(dataset: Any, framing: Framing, columns: Columns, *, own_channels: bool, cache_bytes: int) -> Images:
    """The rows of a ``datasets.Dataset``; labels without a ``ClassLabel`` are numbered in sorted order."""
    names, labels = number_labels(dataset, columns)
    return read_images(
        Rows(image_rows(dataset, columns), columns.image),
        framing,
        own_channels=own_channels,
        name=columns.name,
        class_names=names,
        labels=labels,
        captions=columns.caption
        and [caption_of(c, f"{columns.name}, row {i}") for i, c in enumerate(dataset[columns.caption])],
        cache_bytes=cache_bytes,
    )


def shuffled(rows: Iterable[Any], size: int, draw: random.Random) -> Iterator[Any]:
    """``rows`` shuffled in a buffer: each comes at the earliest when ``size`` others wait."""
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        else:
            i = draw.randrange(size)
            buffer[i], row = row, buffer[i]
            yield row
    draw.shuffle(buffer)
    yield from buffer


class ImageStream(TrainingData):
    """The images of a ``datasets.IterableDataset``, epoch after epoch: files in the order of (seed, epoch), their rows
    shuffled in a buffer.  (The shuffling of ``datasets`` depends on whether a worker reads.)

    Its length is unknown, and an item is found by reading up to it, so that a resumed training first passes over what
    it has seen, undecoded.  Position p is the p-th row of the endless stream or, where that cannot be read, the next
    one that can.  Every process reads the whole stream and decodes its own part.  Labels must be a ``ClassLabel``.
    """

    max_workers = 1  # datasets would give each of several workers only some of the files

    def __init__(self, dataset: Any, framing: Framing, columns: Columns) -> None:
        self.dataset = image_rows(dataset, columns)
        self.framing, self.columns = framing, columns
        self.damage: Damage = Damage()
        self.class_names, self.captions = columns.class_names, columns.caption is not None

    def __len__(self) -> int:
        raise TypeError("The length of a stream is not known: pass --max_train_steps.")

    def item(self, index: int, seed: int) -> Item:
        raise TypeError("The items of a stream are only found in order: use batches.")

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """All rows, without end."""
        for epoch in itertools.count():
            row = None
            for row in shuffled(self.epoch_rows(seed, epoch), SHUFFLE_BUFFER, random.Random(seed_of(seed, epoch))):
                yield row
            if row is None:
                raise DataError(f"The stream of {self.columns.name} is empty: pass other data.")

    def epoch_rows(self, seed: int, epoch: int) -> Iterator[dict[str, Any]]:
        """The rows of an epoch, file after file in an order of its own."""
        files = self.dataset.num_shards
        for file in epoch_order(files, seed, epoch).tolist():
            yield from self.dataset.shard(num_shards=files, index=file)

    def items(self, positions: Iterable[int], seed: int) -> Iterator[Item]:
        """The items at increasing positions."""
        wanted = iter(positions)
        coming, waiting, run = next(wanted, None), collections.deque[int](), 0
        for position, row in enumerate(self.rows(seed)):
            if position == coming:
                waiting.append(position)
                coming = next(wanted, None)
            if not waiting:
                if coming is None:
                    return
                continue
            try:
                with decoding(), open_encoded(row[self.columns.image]) as image:
                    pixels = torch.from_numpy(self.framing.pixels(image))
            except Unreadable as error:
                run += 1
                self.damage.add((row[self.columns.image] or {}).get("path") or f"position {position}", error)
                warnings.warn(f"An image of {self.columns.name} is damaged and skipped: {error}", stacklevel=2)
                if run == MAX_UNREADABLE_RUN:
                    raise DataError(
                        f"{run} images of {self.columns.name} in a row are damaged: pass other data."
                    ) from error
                continue
            run = 0
            label, caption = self.annotations(row, position)
            while waiting:
                own = sample_seed(seed, waiting.popleft())
                yield {"pixel_values": self.framing.tensor(pixels, own), **annotation(label, caption, own)}

    def annotations(self, row: dict[str, Any], position: int) -> tuple[int | None, Caption | None]:
        """Label and caption of a row, None where the data set has none."""
        columns, label = self.columns, None
        if columns.label and columns.class_names:
            label = row[columns.label]
            if label is None or label < 0:
                raise DataError(NO_LABEL.format(name=columns.name))
        if columns.caption is None:
            return label, None
        return label, caption_of(row[columns.caption], f"{columns.name}, position {position}")
