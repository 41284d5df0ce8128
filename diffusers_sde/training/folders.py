"""What lies in an image folder: its files, and the classes that sub-folders are.

Knows how a folder is walked, whatever links there are in it, and what systems leave behind in it.  Opens no file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from diffusers_sde.training.framing import DataError

# fmt: off
EXTENSIONS = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".avif", ".jp2", ".tga", ".ico", ".pcx",
))
SPLITS = frozenset(("train", "test", "validation", "val"))
# In lower case: what systems, network stores and photo programs leave behind.  Hidden folders (".thumbnails", ".Trash",
# ".ipynb_checkpoints", ...) are left out anyway.
SYSTEM_FOLDERS = frozenset((
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "__pycache__",
    "lost+found", "$recycle.bin", "system volume information", "found.000", "network trash folder", "temporary items",
    "icloud photos cache", "ipod photo cache",
))
# fmt: on


def find_files(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, sorted; hidden ones and those of systems are left out.

    No folder is entered twice, however many links lead to it: a link to a folder that is there anyway adds nothing.

    Raises:
        DataError: for a folder below that may not be read.
    """
    found: list[str] = []
    entered: set[tuple[int, int]] = set()
    waiting = [folder]  # links come after everything that needs none
    while waiting:
        for root, folders, files in os.walk(waiting.pop(0), onerror=_refuse):
            identity = os.stat(root)
            if (identity.st_dev, identity.st_ino) in entered:
                folders.clear()
                continue
            entered.add((identity.st_dev, identity.st_ino))
            folders[:] = sorted(f for f in folders if not _is_left_out(f))
            waiting += [Path(root, f) for f in folders if os.path.islink(os.path.join(root, f))]
            here = Path(root).relative_to(folder)
            found += [(here / f).as_posix() for f in files if not f.startswith(".") and _is_file(Path(root, f))]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise DataError(f"The folder {error.filename} cannot be read ({error.strerror}): permit it, or move it elsewhere.")


def _is_left_out(folder: str) -> bool:
    return folder.startswith(".") or folder.lower() in SYSTEM_FOLDERS


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a link to nothing, which shows when it is opened; a pipe would be waited for."""
    return path.is_file() or not path.exists()


def is_image(path: str) -> bool:
    """Whether a file is named like an image."""
    return PurePosixPath(path).suffix.lower() in EXTENSIONS


def class_folders(paths: Sequence[str]) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and labels by the first sub-folder of each path (inside ``train/`` or the like, if all are there);
    None unless all images lie in two or more."""
    parts = [p.split("/") for p in paths]
    if len({p[0] for p in parts}) == 1 and parts[0][0] in SPLITS:
        parts = [p[1:] for p in parts]
    names = sorted({p[0] for p in parts})
    if any(len(p) == 1 for p in parts) or len(names) < 2:
        return None, None
    if set(names) <= SPLITS:
        raise DataError(f"The sub-folders {', '.join(names)} are splits, not classes: pass one of them.")
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[p[0]] for p in parts])
