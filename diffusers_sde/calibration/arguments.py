"""What is wrong with the arguments of a calibration, in one sentence each, before the network is asked anything.

Knows which values make no sense.  Knows nothing of what is done with the others.
"""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Iterable, Sequence
from pathlib import Path as Folder
from typing import Any

from diffusers import SchedulerMixin

MOST_STEPS = 24  # a grid is a choice of at most half of the teacher's nodes


def is_whole(value: Any, least: int) -> bool:
    """Whether this is a whole number, of any integer type, and at least ``least``."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def check_whole(least: int, **values: Any) -> None:
    """Raise ``ValueError`` for a value that is neither None nor a whole number of at least ``least``."""
    for name, value in values.items():
        if value is not None and not is_whole(value, least):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def checked_counts(num_inference_steps: Any) -> list[int]:
    """The numbers of evaluations to calibrate, in order and without repetitions.

    Raises:
        ValueError: for none, and for anything but whole numbers from 1 to 24.
    """
    several = isinstance(num_inference_steps, Iterable) and not isinstance(num_inference_steps, str)
    values = list(num_inference_steps) if several else [num_inference_steps]
    if not values or not all(is_whole(v, 1) and v <= MOST_STEPS for v in values):
        raise ValueError(
            f"num_inference_steps must be whole numbers from 1 to {MOST_STEPS}, at least one, "
            f"not {num_inference_steps!r}."
        )
    return sorted({int(v) for v in values})


def check_work_dir(work_dir: str | Folder | None) -> None:
    """Raise ``ValueError`` for a folder that cannot be made or written to; makes nothing."""
    if work_dir is None:
        return
    folder = Folder(work_dir).absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir():
        raise ValueError(f"work_dir {work_dir}: {existing} is a file, pass a folder.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"work_dir {work_dir}: {existing} cannot be written to, pass another folder.")


def check_denoiser(model: Any, scheduler: Any, sample_shape: Any) -> None:
    """Raise ``ValueError`` for a model that is no pipeline and no callable with a scheduler and a shape of samples."""
    if not callable(model) or scheduler is None or sample_shape is None:
        raise ValueError("Pass a pipeline, or a callable denoiser with scheduler= and sample_shape=(C, H, W).")
    if not isinstance(scheduler, SchedulerMixin):
        raise ValueError(
            f"scheduler must be a scheduler, not a {type(scheduler).__name__}: pass for example "
            "ProbabilityFlowScheduler.from_config(config)."
        )
    if not isinstance(sample_shape, Sequence) or not sample_shape or not all(is_whole(v, 1) for v in sample_shape):
        raise ValueError(f"sample_shape must be the shape of one sample, (C, H, W), not {sample_shape!r}.")


def check_names(taker: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``ValueError`` for an input that ``taker`` does not take, with the nearest one it does take."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"{taker} takes no {name}: {f'did you mean {near[0]}' if near else 'leave it out'}.")
