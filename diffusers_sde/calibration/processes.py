"""Several processes, one calibration: each has its share of the samples, sums are over all of them.

Knows Accelerate.  Everything decided is decided from such sums, so that all processes decide alike.
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
    return bool(_state().is_main_process)


def share(items: Sequence[Any]) -> list[Any]:
    """This process's part of ``items``."""
    return list(items[_state().process_index :: _state().num_processes])


def total(values: np.ndarray) -> np.ndarray:
    """The sum of a float64 array over all processes."""
    if _state().num_processes == 1:
        return values
    bits = torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(_state().device)
    return gather(bits[None]).sum(0).cpu().numpy()


def wait() -> None:
    """Until every process is here."""
    _state().wait_for_everyone()


def part() -> None:
    """The end of a program of several processes: nobody leaves before the others are done."""
    if _state().num_processes > 1:
        wait()
        _state().destroy_process_group()
