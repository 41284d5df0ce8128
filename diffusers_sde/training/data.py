"""Where training images come from.

Knows how an image folder (:mod:`.folders`, :mod:`.captions`) becomes training data, and what else to ask
:mod:`.hub_data` for.  The order of images and their batches stand in :mod:`.samples`, cached latents in
:mod:`.latents`; a training needs no more than the names exported here.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path, PurePosixPath

from PIL import Image

from diffusers_sde.training.captions import METADATA, folder_captions
from diffusers_sde.training.folders import EXTENSIONS, class_folders, find_files, is_image
from diffusers_sde.training.framing import DataError, Framing, open_image, to_mode
from diffusers_sde.training.latents import LatentImages, cache_latents
from diffusers_sde.training.samples import (
    MAX_CACHED_BYTES,
    Images,
    TrainingData,
    batches,
    read_images,
    sample_seed,
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

TABLES = frozenset((".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar"))  # files for datasets to read


def load_images(
    source: str | Path,
    *,
    resolution: int,
    channels: int | None,
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

    Of a folder, two or more sub-folders are classes, in the order of their sorted names, and captions are those of
    ``metadata.jsonl`` or ``metadata.csv`` (``file_name`` and ``caption_column``), there or in sub-folders, else of text
    files beside the images; a folder of data files (Parquet, ...) and a name are given to ``datasets.load_dataset``,
    whose columns are named by the arguments (labels are a ``ClassLabel``, or integers or strings, numbered in sorted
    order).  An image is scaled so that its shorter side is ``resolution``, then cropped, centrally or at random.
    Decoded images are kept in memory if 1 GiB holds them all.

    ``channels`` None: 1 where every image is grey, else 3 (of a stream, always).
    ``streaming`` gives an :class:`ImageStream`; the files of an image folder are read when needed instead.

    Raises:
        DataError: for what does not exist, has no images, or lacks something that is asked for.
    """
    framing = Framing(resolution, 3 if channels is None else channels, center_crop, random_flip)
    cache_bytes = MAX_CACHED_BYTES if cache_in_memory and not streaming else 0
    folder = Path(source).expanduser()
    if folder.is_file():
        raise DataError(f"{source} is a file: pass the folder that it is in.")
    files = find_files(folder) if folder.is_dir() else []
    paths = [f for f in files if is_image(f)]
    if paths:
        names, labels = class_folders(paths)
        captions = folder_captions(folder, files, paths, caption_column)
        return read_images(
            Files(folder, paths),
            framing,
            own_channels=channels is None,
            name=str(source),
            class_names=names,
            labels=labels,
            captions=captions,
            cache_bytes=cache_bytes,
        )
    tables = (f for f in map(PurePosixPath, files) if f.suffix in TABLES and f.name not in METADATA)
    if folder.is_dir() and not any(tables):
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
    return hub_data.read_rows(dataset, framing, columns, own_channels=channels is None, cache_bytes=cache_bytes)


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files of a folder, by relative paths."""

    folder: Path
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return open_image(self.folder / self.paths[index])

    def name(self, index: int) -> str:
        """The relative path."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """Names, sizes and times of all files that are there."""
        found = [(path, self.folder / path) for path in self.paths]
        stats = ((path, os.stat(file)) for path, file in found if file.exists())
        return repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
