"""A laid-out run as a pure function of row, state and evaluations, for methods that take many rows at once.

Knows one compiled table, the noise of its run and the limits on its data prediction.  Knows no position: nothing here
remembers which rows have been taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_sde import noise
from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.schedulers.compiled import CompiledRow
from diffusers_sde.schedulers.execution import data_prediction, evaluate_row, for_arithmetic, next_mean


@dataclass(frozen=True)
class Transitions:
    """The rows of a run from noise to data, each ``x <- a x + sum_j b_j E_{i-j} + c z`` on noise that is fixed.

    Args:
        rows: of the compiled table, n of them.
        nodes: the levels of the n evaluations and of the end.
        path: the forward process.
        times: what the network is asked at, (n,), on the device of the states.
        seeds: of the noise of each sample (N,); None: the rows draw none.
        limits: the config whose clipping or thresholding holds; None: x_0 is not limited.
        variance_type: the config's; outputs with learned variances are split.
    """

    rows: Sequence[CompiledRow]
    nodes: Nodes
    path: Path
    times: torch.Tensor
    seeds: torch.Tensor | None
    limits: Any
    variance_type: str

    def __len__(self) -> int:
        """The number of evaluations."""
        return len(self.rows)

    def reach(self, i: int) -> int:
        """How many evaluations row ``i`` reads, its own included."""
        return self.rows[i].reads

    def evaluation(self, i: int, sample: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
        """The evaluation E of row ``i`` at the state ``sample`` (N, ...), from what the network said there."""
        model_output, sample = for_arithmetic(model_output, sample, self.variance_type)
        return evaluate_row(self.rows[i], model_output, sample, self.limits)[0]

    def data_prediction(self, i: int, sample: torch.Tensor, evaluation: torch.Tensor) -> torch.Tensor:
        """``E[x_0|x]`` that an evaluation of row ``i`` says at the state ``sample``."""
        return data_prediction(self.rows[i], sample, evaluation)

    def supposed(self, i: int, sample: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """The evaluation of row ``i`` at ``sample`` that says ``x0``."""
        return torch.sub(x0, sample, alpha=self.rows[i].d_rest).div_(self.rows[i].d_m)

    def advance(
        self, i: int, sample: torch.Tensor, evaluations: Sequence[torch.Tensor], chosen: Sequence[int] | slice
    ) -> torch.Tensor:
        """Execute row ``i``: the next state (N, ...).

        Args:
            i: the row.
            sample: the state (N, ...) before it.
            evaluations: E of this row and of those before it, newest first, at least :meth:`reach` of them.
            chosen: which samples of the run these are.
        """
        row = self.rows[i]
        mean = next_mean(row, sample, evaluations[0], evaluations[1:])
        if row.noise and row.c and self.seeds is not None:
            mean.add_(noise.combine(row.noise, self.seeds[chosen], sample.shape).to(mean.dtype), alpha=row.c)
        return mean
