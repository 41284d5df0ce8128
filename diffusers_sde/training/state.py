"""What a checkpoint holds: Accelerate's files of network, optimizer and loss scale, the average of the weights as
safetensors, and as JSON how far the training is and what it was made with.

Knows those files.  Nothing in them can run code: Accelerate's pickles are read with ``weights_only`` or not at all.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import load
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusers_sde.errors import UsageError
from diffusers_sde.training.ema import PowerEMA

PROGRESS, AVERAGE = "training.json", "average.safetensors"
PLAIN = (".json", ".safetensors")


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: optimizer steps made.
        greatest_loss: of a step up to the last good checkpoint; None before the first.
    """

    step: int = 0
    greatest_loss: float | None = None


def write_state(
    folder: Path, accelerator: Accelerator, ema: PowerEMA | None, progress: Progress, made_with: dict[str, Any]
) -> None:
    """Each process its part of a checkpoint.

    Args:
        made_with: what the training was asked for, see :mod:`.resuming`.
    """
    accelerator.save_state(str(folder), safe_serialization=True)
    if accelerator.is_main_process:
        if ema is not None:
            save_file({str(i): tensor.contiguous() for i, tensor in enumerate(ema.average)}, folder / AVERAGE)
        state = {"step": progress.step, "greatest_loss": progress.greatest_loss, "made_with": made_with}
        (folder / PROGRESS).write_text(json.dumps(state, indent=1))


def read_made_with(folder: Path) -> dict[str, Any]:
    """What the training of a checkpoint was asked for.

    Raises:
        UsageError: for a folder that is no checkpoint of this version.
    """
    return _read_progress(folder)["made_with"]


def _read_progress(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / PROGRESS).read_text())
        if not isinstance(state["step"], int) or not isinstance(state["made_with"], dict):
            raise ValueError("wrong types")
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} has no {PROGRESS} that can be read ({error}): pass another --resume_from_checkpoint."
        ) from error


def read_state(folder: Path, accelerator: Accelerator, ema: PowerEMA | None) -> Progress:
    """Put network, optimizer, loss scale and average back; returns how far the training was.

    Raises:
        UsageError: for files that do not fit what is trained, and for pickles that hold more than tensors and numbers.
    """
    state = _read_progress(folder)
    refuse_pickled_code(folder)
    try:
        accelerator.load_state(str(folder))
        if ema is not None:
            saved = load_file(folder / AVERAGE)
            ema.load([saved[str(i)] for i in range(len(saved))], state["step"])
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{folder} does not fit what is to be trained ({reason}): resume with the arguments that it was made with."
        ) from error
    return Progress(state["step"], state.get("greatest_loss"))


def refuse_pickled_code(folder: Path) -> None:
    """Raise ``UsageError`` for any file of a checkpoint, besides JSON and safetensors, that ``weights_only`` cannot
    read: Accelerate would pass over some of them in silence, and PyTorch's sharded formats run what is in them."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in PLAIN):
        try:
            load(file, map_location="meta")
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, AttributeError) as error:
            raise UsageError(
                f"{file} holds more than tensors and numbers, and reading it could run code: pass a checkpoint of this "
                "script (of a sharded training: one with full state dicts)."
            ) from error
