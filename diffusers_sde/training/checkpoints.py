"""Checkpoints on disk: complete or absent, known by checksums, pruned only when a newer one is complete.

Knows the folder names ``checkpoint-<step>``, how to publish a folder or files with one rename, and the checksums of a
folder's files.  Knows nothing of what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

CHECKSUMS = "checksums.json"
ABANDONED, DAMAGED = ".abandoned", ".damaged"  # endings of checkpoints that are not gone on from


class NotWritten(OSError):
    """A folder could not be written, and nothing of it is left; the message says why, the caller what now."""


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a training, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


# -- which one to go on from --


def find_candidates(output_dir: Path, resume_from: str) -> list[Path]:
    """The folders that ``--resume_from_checkpoint`` may mean, the best first: for ``latest`` all of them, else the one
    of this name inside ``output_dir`` or of this path.

    Raises ``FileNotFoundError``, naming what is there, if there is none: a training never silently starts over.
    """
    known = checkpoints(output_dir)
    if resume_from == "latest":
        if known:
            return known[::-1]
        raise FileNotFoundError(
            f"{output_dir} has no complete checkpoint to resume from: leave out --resume_from_checkpoint to start anew."
        )
    for candidate in (output_dir / resume_from, Path(resume_from)):
        if candidate.is_dir() and candidate.name.removeprefix("checkpoint-").isdigit():
            return [candidate]
    names = ", ".join(p.name for p in known) or "none"
    raise FileNotFoundError(
        f"Checkpoint {resume_from} does not exist (in {output_dir}: {names}): pass one of them or 'latest', or leave "
        "out --resume_from_checkpoint to start anew."
    )


def first_whole(candidates: list[Path]) -> tuple[Path, dict[Path, str]]:
    """The first folder that is what was written, and what is wrong with each one before it.

    Raises ``ValueError`` if all are damaged.
    """
    damage: dict[Path, str] = {}
    for candidate in candidates:
        problem = find_damage(candidate)
        if problem is None:
            return candidate, damage
        damage[candidate] = problem
    what = "; ".join(f"{folder.name}: {problem}" for folder, problem in damage.items())
    raise ValueError(
        f"There is no whole checkpoint to resume from ({what}): pass another --resume_from_checkpoint, or move "
        f"{'it' if len(damage) == 1 else 'them'} away to start anew."
    )


def find_damage(folder: Path, *, thorough: bool = True) -> str | None:
    """How a folder differs from the one that was published, in words; None if it does not.

    Args:
        thorough: compare the contents and not only names and sizes.
    """
    try:
        known = json.loads((folder / CHECKSUMS).read_text())
        for name, (size, digest) in known.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} of {size} bytes"
            if thorough and checksum(file) != digest:
                return f"{name} has other content"
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def set_aside(output_dir: Path, step: int) -> list[Path]:
    """Rename what is not gone on from after a training went on from ``step``: later checkpoints, the abandoned way, and
    earlier ones that are damaged.  Returns what they are called now."""
    renamed = []
    for old in checkpoints(output_dir):
        damaged = find_damage(old, thorough=False) is not None
        if damaged or step_of(old) > step:
            target = old.with_name(old.name + (DAMAGED if damaged else ABANDONED))
            remove(target)
            renamed.append(old.rename(target))
    return renamed


# -- writing --


def hidden(target: Path) -> Path:
    """The name of a folder that is not complete yet, or not any more."""
    return target.with_name(f".{target.name.lstrip('.')}.unfinished")


def remove(folder: Path) -> None:
    """Delete a folder: gone, for everyone who looks, at once."""
    if folder.exists():
        old = hidden(folder.with_name(f"{folder.name}.old"))
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(folder.rename(old))


def clean_up(output_dir: Path) -> None:
    """Delete what killed trainings have left unfinished."""
    for left in output_dir.glob(".*unfinished"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def publish(
    target: Path,
    write: Callable[[Path], None],
    *,
    main: bool = True,
    agree: Callable[[str | None], str | None] = lambda problem: problem,
) -> None:
    """``write`` a folder under a temporary name, with checksums, through to the disk, then rename it to ``target``,
    replacing what was there.

    With several processes each one writes; only the ``main`` one renames.

    Args:
        agree: what the processes say to each other after each part: the problem of one, or None, becomes that of all.

    Raises:
        NotWritten: on every process, if any of them failed.
    """
    unfinished = hidden(target)

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def complete() -> None:
        seal(unfinished)
        remove(target)
        unfinished.rename(target)
        sync(target.parent)

    for mine, act in ((main, begin), (True, lambda: write(unfinished)), (main, complete)):
        problem = agree(attempt(act, target.parent) if mine else None)
        if problem is not None:
            if main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise NotWritten(f"{target} could not be written ({problem})")


def attempt(act: Callable[[], None], folder: Path) -> str | None:
    """Do something that writes into ``folder``; what kept it from being done, in words, or None."""
    try:
        act()
        return None
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        return f"{' '.join(str(error).split())[:200]}; {free / 2**20:.1f} MB are free"


def seal(folder: Path) -> None:
    """Write the checksums of a folder's files, and everything through to the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {p.relative_to(folder).as_posix(): (p.stat().st_size, checksum(p)) for p in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    for path in (*files, folder / CHECKSUMS, folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def publish_into(folder: Path, write: Callable[[Path], None]) -> None:
    """``write`` files and folders under a temporary name, then move each one into ``folder``.

    Raises:
        NotWritten: if that failed; what was in ``folder`` is still there.
    """
    unfinished = folder / ".unfinished"

    def all_of_it() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        for item in sorted(unfinished.iterdir()):
            target = folder / item.name
            if item.is_dir():
                remove(target)
            item.replace(target)
        unfinished.rmdir()

    problem = attempt(all_of_it, folder)
    if problem is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise NotWritten(f"The result could not be written into {folder} ({problem})")


def prune(output_dir: Path, keep: int | None) -> None:
    """Delete checkpoints until ``keep`` are left (None: all): those set aside first, then the oldest."""
    if keep is None:
        return
    aside = [p for ending in (DAMAGED, ABANDONED) for p in sorted(output_dir.glob(f"checkpoint-*{ending}"))]
    for old in [*aside, *checkpoints(output_dir)][:-keep]:
        remove(old)
