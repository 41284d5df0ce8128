"""A table in terms of what the network says, ready to execute.

Knows how F of :mod:`diffusers_sde.weights` and x_0 follow from a prediction of any type.  Floats only; knows no run and
no config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers_sde.paths import Path
from diffusers_sde.prediction import from_model
from diffusers_sde.tables import Table
from diffusers_sde.weights import evaluation_coefficients

Normals = tuple[tuple[int, float], ...]  # the normals of a row's z and their weights, see diffusers_sde.noise


@dataclass(frozen=True)
class CompiledRow:
    """A table row in terms of the model output m: ``x <- a x + sum_j weights[j] E_{i-j} + c z``, ``E = m + kappa x``.

    E is the row's evaluation F up to a factor, which the weights carry: forming it is one operation.
    ``x_0 = d_x x + d_m m = d_rest x + d_m E``; ``keep``: how many E later rows read;
    ``noise``: the normals of z and their weights.  slope, gap, correction: as in :class:`diffusers_sde.tables.Row`, in
    terms of E, the gap in units of this row's; no gap where the row is followed as it is.
    """

    a: float
    weights: tuple[float, ...]
    slope: tuple[float, ...]
    gap: tuple[float, ...]
    correction: float
    c: float
    kappa: float
    d_x: float
    d_m: float
    d_rest: float
    keep: int
    noise: tuple[tuple[int, float], ...]

    @property
    def reads(self) -> int:
        """How many evaluations, its own included, the row reads."""
        return max(len(self.weights), len(self.gap))


@dataclass(frozen=True)
class Compiled:
    """A table ready to execute from grid index ``begin`` on; ``limits``: x_0 is clipped or thresholded; ``settings``:
    the config values that it was made for."""

    begin: int
    rows: list[CompiledRow]
    limits: bool
    settings: Mapping[str, Any]

    @property
    def memoryless(self) -> bool:
        """Whether each row can be taken by itself: none reads earlier evaluations or draws noise."""
        return not any(row.keep or (row.noise and row.c) for row in self.rows)


def compiled_rows(
    table: Table, path: Path, kind: str, normals: Sequence[Normals], doubting: bool = False
) -> list[CompiledRow]:
    """The rows of ``table`` for a network whose ``prediction_type`` is ``kind``.

    A row of a table weighs F, which costs two operations on the state and the output m: ``F = k_x x + k_m m``.  Weights
    on ``E = F / k_m = m + (k_x / k_m) x`` cost one, and the factor is a number that goes into the weight of E wherever
    it is read: in this row and, since an E is kept as it was formed, with its own factor in the rows after it.

    Args:
        table, path: what to run, on which process.
        kind: the network's prediction type.
        normals: for each row the normals of its z, see :func:`diffusers_sde.noise.brownian_weights`.
        doubting: rows with a gap are followed only as far as a run's own errors let them.
    """
    rows: list[CompiledRow] = []
    scales: list[float] = []  # F = scale (m + kappa x)
    for i, row in enumerate(table.rows):
        evaluation = table.evaluation or evaluation_coefficients(table.data_std, row.alpha, row.sigma)
        k_x, k_m = from_model(path, kind, row.alpha, row.sigma, evaluation)
        scales.append(k_m)
        weights, slope = (tuple(b * scales[i - j] for j, b in enumerate(part)) for part in (row.b, row.slope))
        gap = tuple(b * scales[i - j] / k_m for j, b in enumerate(row.gap)) if doubting else ()
        d_x, d_m = from_model(path, kind, row.alpha, row.sigma)
        d_rest = d_x - d_m * k_x / k_m if table.data_std else 0.0
        parts = weights, slope, gap, row.correction * k_m
        rows.append(CompiledRow(row.a, *parts, row.c, k_x / k_m, d_x, d_m, d_rest, 0, normals[i]))
    kept = [max((row.reads - 1 - k for k, row in enumerate(rows[i + 1 :])), default=0) for i in range(len(rows))]
    return [replace(row, keep=keep) for row, keep in zip(rows, kept, strict=True)]
