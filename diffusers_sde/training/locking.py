"""One training to an output folder.  Knows file locks, and nothing of what is in the folder."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from diffusers_sde.errors import UsageError
from diffusers_sde.training.processes import on_main

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two trainings apart
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and keep other processes from entering here.

    The system lets go of the lock however this process ends, so that one that was killed stands in nobody's way; it is
    POSIX's kind of lock, which the readers of images that a process has forked do not hold on to.

    Raises:
        UsageError: if another process is in here.
    """
    file = folder / NAME
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while fcntl is not None:
                stream = stack.enter_context(open(file, "a+"))
                if not _lock(stream):
                    stream.seek(0)
                    raise UsageError(
                        f"{stream.read().strip() or 'Another process'} is training into {folder}: wait for it or stop "
                        "it, or pass another --output_dir."
                    )
                if file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                    stream.truncate(0)
                    stream.write(f"Process {os.getpid()} on {platform.node()}")
                    stream.flush()
                    stack.callback(file.unlink, missing_ok=True)
                    break  # else the one before us has just left and taken the file along
        except OSError as error:
            raise UsageError(
                f"--output_dir {folder} cannot be written into ({error.strerror}): make room there, or pass another."
            ) from error
        yield


def _lock(stream: IO[str]) -> bool:
    """Lock an open file; whether that could be done at once."""
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
            raise
    return True


@contextlib.contextmanager
def alone(accelerator: Any, folder: Path) -> Iterator[None]:
    """:func:`locked` for all processes of a training together."""
    with contextlib.ExitStack() as stack:
        on_main(accelerator, lambda: stack.enter_context(locked(folder)))
        yield
