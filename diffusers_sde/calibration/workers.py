"""The workers of one ``accelerate launch``, operating-system processes that share the samples of one calibration.

Knows Accelerate.  Everything decided is decided from sums over all workers, so that all of them decide alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather


@functools.cache
def _state() -> Any:
    return PartialState()


def is_main() -> bool:
    """Whether this worker prints and writes for all."""
    return bool(_state().is_main_process)


def share(items: Sequence[Any]) -> list[Any]:
    """This worker's part of ``items``."""
    return list(items[_state().process_index :: _state().num_processes])


def sum_over_workers(values: np.ndarray) -> np.ndarray:
    """The sum of a float64 array over all workers."""
    if _state().num_processes == 1:
        return values
    bits = torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(_state().device)
    return gather(bits[None]).sum(0).cpu().numpy()


def wait() -> None:
    """Until every worker is here."""
    _state().wait_for_everyone()


def leave_together() -> None:
    """The end of a program of several workers: nobody leaves before the others are done."""
    if _state().num_processes > 1:
        wait()
        _state().destroy_process_group()
