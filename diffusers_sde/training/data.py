"""Where training images come from.

Knows image folders (classes in sub-folders, captions in ``metadata.jsonl``) and what else to ask :mod:`.hub_data` for.
What is done with images, their order and their batches stand in :mod:`.samples`, cached latents in :mod:`.latents`; a
training needs no more than the names exported here.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_sde.training.latents import LatentImages, cache_latents
from diffusers_sde.training.samples import (
    MAX_CACHED_BYTES,
    DataError,
    Framing,
    Images,
    TrainingData,
    batches,
    read_images,
    sample_seed,
    to_mode,
)

__all__ = [
    "DataError",
    "Images",
    "LatentImages",
    "TrainingData",
    "batches",
    "cache_latents",
    "load_images",
    "sample_seed",
    "to_mode",
]

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
TABLES = frozenset((".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar"))  # files for datasets to read
METADATA = "metadata.jsonl"
SPLITS = frozenset(("train", "test", "validation", "val"))


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
    config_name: str | None = None,
    split: str = "train",
) -> TrainingData:
    """The images of a folder, or of a data set of the Hub.

    Of a folder, two or more sub-folders are classes, in the order of their sorted names, and ``metadata.jsonl`` gives
    captions (lines with ``file_name`` and ``caption_column``); a folder of data files (Parquet, ...) and a name are
    given to ``datasets.load_dataset``, whose columns are named by the arguments (labels are a ``ClassLabel``, or
    integers or strings, numbered in sorted order).  An image is scaled so that its shorter side is ``resolution``, then
    cropped, centrally or at random.  Decoded images are kept in memory if 1 GiB holds them all.

    ``streaming`` gives an :class:`ImageStream`; the files of an image folder are read when needed instead.

    Raises:
        DataError: for what does not exist, has no images, or lacks something that is asked for.
    """
    framing = Framing(resolution, channels, center_crop, random_flip)
    cache_bytes = MAX_CACHED_BYTES if cache_in_memory and not streaming else 0
    folder = Path(source).expanduser()
    if folder.is_file():
        raise DataError(f"{source} is a file: pass the folder that it is in.")
    paths = find_images(folder) if folder.is_dir() else []
    if paths:
        names, labels = class_folders(paths)
        return read_images(
            Files(folder, paths),
            framing,
            name=str(source),
            class_names=names,
            labels=labels,
            captions=read_captions(folder, paths, caption_column),
            cache_bytes=cache_bytes,
        )
    if folder.is_dir() and not any(f.suffix in TABLES and f.name != METADATA for f in folder.rglob("*")):
        raise DataError(f"{source} has no images: pass a folder that has some ({', '.join(sorted(EXTENSIONS))}).")
    if not folder.is_dir() and (Path(source).is_absolute() or str(source).startswith((".", "~"))):
        raise DataError(f"{source} does not exist: pass a folder of images or the name of a data set on the Hub.")
    try:
        from diffusers_sde.training import hub_data
    except ImportError as error:
        raise DataError(
            "Data sets need the package datasets: `pip install datasets`, or pass an image folder."
        ) from error
    dataset = hub_data.open_dataset(str(source), config_name, split, streaming)
    columns = hub_data.read_columns(dataset, str(source), image_column, caption_column, label_column)
    if streaming:
        return hub_data.ImageStream(dataset, framing, columns)
    return hub_data.read_rows(dataset, framing, columns, cache_bytes)


# -- folders --


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files of a folder, by relative paths."""

    folder: Path
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(self.folder / self.paths[index])

    def fingerprint(self) -> str:
        """Names, sizes and times of all files."""
        stats = ((path, os.stat(self.folder / path)) for path in self.paths)
        return repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


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


def read_captions(folder: Path, paths: Sequence[str], column: str) -> list[str | list[str]] | None:
    """The captions in ``metadata.jsonl`` of these images, each a string or a list to draw from; None without the file
    or without the column."""
    file = folder / METADATA
    if not file.exists():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        captions = {Path(row["file_name"]).as_posix(): row[column] for row in rows if column in row}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not JSON lines with a file_name each ({error!r}): correct it.") from error
    if not captions:
        return None
    missing = [p for p in paths if p not in captions]
    if missing:
        raise DataError(f"{file} has no {column!r} for {missing[0]}: add the line, or remove the image.")
    found = [captions[p] for p in paths]
    return [[str(c) for c in caption] if isinstance(caption, list) else str(caption) for caption in found]
