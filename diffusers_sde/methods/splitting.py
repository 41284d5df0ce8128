"""One batch split over the processes of an ``accelerate launch``, each with the whole model on its device.

Knows Accelerate.  Every process makes the same calls with the same batches and gets all of the results, so that all of
them decide alike; what could differ between them at the start is the main one's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather

Evaluate = Callable[[torch.Tensor, Sequence[Any], Sequence[Any]], torch.Tensor]


def split_over_processes(evaluate: Evaluate) -> Evaluate:
    """A function of a batch and of two lists of its length, of which each process computes its part.

    Args:
        evaluate: ``evaluate(states (P, ...), list of P, list of P)``, (P, ...), the same on all processes.

    Returns:
        The same function on every process; parts are as equal as they can be, a last one filled up with copies.
    """
    state = PartialState()
    if state.num_processes == 1:
        return evaluate

    def split(x: torch.Tensor, first: Sequence[Any], second: Sequence[Any]) -> torch.Tensor:
        each = -(-len(x) // state.num_processes)
        own = [min(state.process_index * each + i, len(x) - 1) for i in range(each)]
        part = evaluate(x[own], [first[i] for i in own], [second[i] for i in own])
        return gather(part.to(state.device).contiguous())[: len(x)].to(part.device)

    return split


def of_main_process(value: torch.Tensor) -> torch.Tensor:
    """A tensor of which the main process has the right value, on every process."""
    state = PartialState()
    return value if state.num_processes == 1 else broadcast(value.to(state.device).clone()).to(value.device)
