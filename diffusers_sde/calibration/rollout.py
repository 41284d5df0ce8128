"""Running tables on a batch of samples: the student's side of a calibration.

Knows how a table's evaluations are formed from a network's predictions and how to start in the middle of a run.
Knows nothing of where predictions come from or how tables are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from diffusers_sde.calibration.sources import Batch
from diffusers_sde.grids import distinct_integers, make_grid
from diffusers_sde.paths import Path
from diffusers_sde.prediction import from_model
from diffusers_sde.tables import Row, Table
from diffusers_sde.weights import evaluation_coefficients

Tick = Callable[[], object]


@dataclass(frozen=True)
class Evaluator:
    """A network's predictions on its path as evaluations ``F``, which ``data_std`` defines.

    Args:
        path: the forward process.
        prediction_type: what the network says.
        data_std: the data scale, in units of a sample.
        integer_times: the network only knows whole timesteps.
        tick: called after each evaluation of a batch.
    """

    path: Path
    prediction_type: str
    data_std: float
    integer_times: bool = False
    tick: Tick = field(default=lambda: None, compare=False)

    def start(self, batch: Batch) -> torch.Tensor:
        """The state of pure noise: ``sqrt(sigma_max^2 + sigma_data^2) noise`` for EDM, the noise itself otherwise."""
        return batch.noise * self.path.start_scale

    def evaluate(self, batch: Batch, row: Row, x: torch.Tensor) -> torch.Tensor:
        """``F`` of a row at the state ``x``: the network sees ``row.time``, the algebra uses the row's level."""
        evaluation = evaluation_coefficients(self.data_std, row.alpha, row.sigma)
        k_x, k_m = from_model(self.path, self.prediction_type, row.alpha, row.sigma, evaluation)
        # as a scheduler hands it out
        time = torch.tensor(row.time, dtype=torch.int64 if self.integer_times else torch.float32)
        scale = self.path.input_scale(row.sigma)
        output = batch.evaluate(x if scale == 1.0 else x * scale, time)
        self.tick()
        return torch.mul(output.to(x.dtype), k_m).add_(x, alpha=k_x)

    def times(self, grid: str, n: int, **options: Any) -> np.ndarray:
        """The ``n`` times of a grid (:func:`diffusers_sde.grids.make_grid`), distinct whole numbers for a network that
        only knows these."""
        times = make_grid(self.path, grid, n, **options)
        return distinct_integers(times) if self.integer_times else times

    def normaliser(self, alpha: float, sigma: float) -> float:
        """``rho = sqrt(data_std^2 alpha^2 + sigma^2)``: states over it have unit scale for data of this scale."""
        return math.hypot(self.data_std * alpha, sigma)


def advance(row: Row, x: torch.Tensor, evaluations: Sequence[torch.Tensor]) -> torch.Tensor:
    """``a x + sum_j b[j] F_{i-j}`` for a row i whose evaluation is the last of ``evaluations``."""
    out = torch.mul(x, row.a)
    for weight, evaluation in zip(row.b, reversed(evaluations), strict=False):
        out.add_(evaluation, alpha=weight)
    return out


def roll(
    evaluator: Evaluator,
    batch: Batch,
    table: Table,
    x: torch.Tensor,
    evaluations: Sequence[torch.Tensor] = (),
    first: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run the rows of a table from ``first`` on.

    Args:
        x: the state before row ``first``, (B, ...).
        evaluations: those of the rows before it, the oldest first, (B, ...) each.

    Returns:
        The states that rows ``first ..`` lead to, and all evaluations.
    """
    states, made = [], list(evaluations)
    for row in table.rows[first:]:
        made.append(evaluator.evaluate(batch, row, x))
        x = advance(row, x, made)
        states.append(x)
    return states, made
