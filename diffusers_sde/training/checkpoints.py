"""Checkpoints on disk: complete or absent, pruned only when a newer one is complete.

Knows the folder names ``checkpoint-<step>`` and how to publish a folder or a file with one rename.  Knows nothing of
what is in them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a training, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: Path, resume_from: str) -> Path:
    """The folder that ``--resume_from_checkpoint`` means: ``latest``, a name inside ``output_dir``, or a path.

    Raises ``FileNotFoundError``, naming what is there, if it does not exist: a training never silently starts over.
    """
    known = checkpoints(output_dir)
    if resume_from == "latest":
        if known:
            return known[-1]
        raise FileNotFoundError(
            f"{output_dir} has no complete checkpoint to resume from: leave out --resume_from_checkpoint to start anew."
        )
    for candidate in (output_dir / resume_from, Path(resume_from)):
        if candidate.is_dir() and candidate.name.removeprefix("checkpoint-").isdigit():
            return candidate
    names = ", ".join(p.name for p in known) or "none"
    raise FileNotFoundError(
        f"Checkpoint {resume_from} does not exist (in {output_dir}: {names}): pass one of them or 'latest', or leave "
        "out --resume_from_checkpoint to start anew."
    )


def publish(
    target: Path, write: Callable[[Path], None], *, main: bool = True, wait: Callable[[], None] = lambda: None
) -> None:
    """``write`` a folder under a temporary name, then rename it to ``target``, replacing what was there.

    With several processes each one writes and ``wait`` is their barrier; only the ``main`` one renames.
    """
    unfinished = target.with_name(f".{target.name}.unfinished")
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    wait()
    write(unfinished)
    wait()
    if main:
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    wait()


def publish_into(folder: Path, write: Callable[[Path], None]) -> None:
    """``write`` files and folders under a temporary name, then move each one into ``folder``."""
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    for item in sorted(unfinished.iterdir()):
        target = folder / item.name
        if item.is_dir() and target.exists():
            shutil.rmtree(target)
        item.replace(target)
    unfinished.rmdir()


def prune(output_dir: Path, keep: int | None) -> None:
    """Delete the oldest complete checkpoints until ``keep`` are left (None: all)."""
    for old in checkpoints(output_dir)[: -keep or None] if keep is not None else ():
        shutil.rmtree(old)
