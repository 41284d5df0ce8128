"""What one sampling run knows, one per thread.

Knows the nodes of the run, its table once compiled to finished coefficients, the evaluations later rows still read,
and the seeds of its noise.  Knows nothing of configs or of how tables are made.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from diffusers_sde.grids import Nodes
from diffusers_sde.schedulers.compiled import Compiled


@dataclass
class Run:
    """One sampling run: what ``set_timesteps`` laid out and what the steps have left so far."""

    nodes: Nodes
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    labels: np.ndarray  # the sigmas as first written (float32), to notice what a pipeline changed
    begin_index: int | None = None
    step_index: int | None = None
    compiled: Compiled | None = None
    history: list[torch.Tensor] = field(default_factory=list)
    seeds: torch.Tensor | None = None

    def fresh(self) -> Run:
        """The same layout, nothing run yet."""
        return Run(self.nodes, self.timesteps, self.sigmas.clone(), self.labels)


class PerThread:
    """Holds one Run per thread, so that threads can share a scheduler.  Copies and pickles with the current run.

    A thread that has laid out no run of its own starts from a fresh copy of the last one laid out anywhere.
    """

    def __init__(self, run: Run | None = None):
        self._local = threading.local()
        self._last = self._local.run = run

    def get(self) -> Run | None:
        run = getattr(self._local, "run", None)
        if run is None and self._last is not None:
            run = self._local.run = self._last.fresh()
        return run

    def set(self, run: Run | None) -> None:
        self._last = self._local.run = run

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return PerThread(copy.deepcopy(self.get(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, (self.get(),)
