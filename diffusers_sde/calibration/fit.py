"""Rows by least squares: corrections of the exact rows, fitted to the teacher on the student's own states.

Knows the ridge that makes a row without data the exact row, and how a table's error is summed over samples.  Knows
nothing of grids' choice; needs no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffusers_sde.calibration.processes import total
from diffusers_sde.calibration.rollout import Process, advance, roll
from diffusers_sde.calibration.sources import Source
from diffusers_sde.calibration.teacher import Teacher
from diffusers_sde.grids import Nodes
from diffusers_sde.schedulers.calibrated import standard_table
from diffusers_sde.tables import Row, Table

ORDER = 4  # evaluations that a fitted row may use
RIDGE = 1e-5


@dataclass(frozen=True)
class Samples:
    """Where evaluations come from, whose samples, and their targets."""

    process: Process
    source: Source
    firsts: Sequence[int]
    teacher: Teacher


def ridge_correction(gram: np.ndarray, cross: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """``delta`` minimising ``|r - B delta|^2 + ridge sum_j |B_j|^2 delta_j^2`` for ``gram = B'B``, ``cross = B'r``.

    No data (zero ``gram``) or an infinite ridge: no correction.
    """
    scale = np.sqrt(np.diag(gram))
    if np.isinf(ridge) or not scale.any():
        return np.zeros_like(cross)
    scale = np.where(scale > 0, scale, 1.0)
    unit = gram / np.outer(scale, scale) + ridge * np.eye(len(gram))
    return np.linalg.solve(unit, cross / scale) / scale


def basis(x: torch.Tensor, evaluations: Sequence[torch.Tensor], order: int = ORDER) -> list[torch.Tensor]:
    """What a row may combine: the state, then the newest ``order`` evaluations, newest first."""
    return [x, *list(reversed(evaluations))[:order]]


def inner_products(vectors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> np.ndarray:
    """Inner products in float64, divided by the number of elements of a sample."""
    left, right = (torch.stack([v.double().flatten() for v in vs]) for vs in (vectors, others))
    return (left @ right.mT).cpu().numpy() / vectors[0][0].numel()


def corrected(row: Row, delta: np.ndarray) -> Row:
    """The row with ``delta`` added to its weights on the basis."""
    b = np.zeros(max(len(row.b), len(delta) - 1))
    b[: len(row.b)] += row.b
    b[: len(delta) - 1] += delta[1:]
    return replace(row, a=float(row.a + delta[0]), b=tuple(float(v) for v in b))


def subgrid(nodes: Nodes, grid: Sequence[int]) -> Nodes:
    """These nodes and the clean end."""
    index = np.append(grid, len(nodes) - 1)
    return Nodes(nodes.time[index], nodes.alpha[index], nodes.sigma[index])


def fit_tables(
    samples: Samples, grids: Sequence[Sequence[int]], *, order: int = ORDER, ridge: float = RIDGE
) -> list[tuple[Table, float]]:
    """A fitted table and its training error for each grid of teacher nodes, all grids of one length.

    Row by row: the student's states so far are its own; each row's correction of the exact row takes them as close to
    the teacher's states at the next node as least squares over all samples (of all processes) can.
    """
    process, teacher = samples.process, samples.teacher
    assert teacher.nodes is not None
    n, last = len(grids[0]), len(teacher.nodes) - 1
    exact = [standard_table(process.path, subgrid(teacher.nodes, grid)) for grid in grids]
    rows: list[list[Row]] = [[] for _ in grids]
    states: dict[tuple[int, int], torch.Tensor] = {}
    made: dict[tuple[int, int], list[torch.Tensor]] = {}
    for i in range(n):
        size = 1 + min(i + 1, order)
        sums = np.zeros((len(grids), size, size + 1))
        for first in samples.firsts:
            with samples.source.open(first) as batch:
                device = batch.noise.device
                for g, grid in enumerate(grids):
                    key = (g, first)
                    x = states[key].to(device) if i else process.start(batch)
                    past = [f.to(device) for f in made.get(key, [])]
                    row = exact[g].rows[i]
                    past.append(process.evaluate(batch, row, x))
                    target = teacher.state(first, [*grid, last][i + 1]).to(x)
                    vectors = basis(x, past, order)
                    sums[g] += inner_products(vectors, [*vectors, target - advance(row, x, past)])
                    states[key], made[key] = x.cpu(), [f.cpu() for f in past]
        sums = total(sums)
        for g in range(len(grids)):
            delta = ridge_correction(sums[g, :, :-1], sums[g, :, -1], ridge)
            rows[g].append(corrected(exact[g].rows[i], delta))
            for first in samples.firsts:
                states[g, first] = advance(rows[g][-1], states[g, first], made[g, first])
    sums = np.zeros((len(grids), 2))
    for (g, first), x in states.items():
        errors = sample_errors(x, teacher.solution(first))
        sums[g] += errors.sum(), len(errors)
    sums = total(sums)
    tables = [Table(tuple(r), process.data_std) for r in rows]
    return [(table, float(s / count)) for table, (s, count) in zip(tables, sums, strict=True)]


def sizes(residuals: torch.Tensor) -> np.ndarray:
    """Root mean square of each sample of (B, elements), (B,) in float64; inf where it is not a number."""
    errors = residuals.double().square().mean(1).sqrt().numpy()
    return np.where(np.isfinite(errors), errors, np.inf)


def sample_errors(x: torch.Tensor, solution: torch.Tensor) -> np.ndarray:
    """:func:`sizes` of the differences of two batches."""
    return sizes((x.cpu() - solution).flatten(1))


def last_residuals(samples: Samples, table: Table) -> dict[int, torch.Tensor]:
    """Where a table ends minus the teacher's solution, for each batch, (B, elements), on the host."""
    residuals = {}
    for first in samples.firsts:
        with samples.source.open(first) as batch:
            states, _ = roll(samples.process, batch, table, samples.process.start(batch))
            residuals[first] = (states[-1].cpu() - samples.teacher.solution(first)).flatten(1)
    return residuals


def mean_size(residuals: dict[int, torch.Tensor]) -> float:
    """The mean of :func:`sizes` over the samples of all batches and processes."""
    found = np.concatenate([sizes(r) for r in residuals.values()])
    sums = total(np.array([found.sum(), len(found)]))
    return float(sums[0] / sums[1])


def mean_error(samples: Samples, table: Table) -> float:
    """The error of a table: the mean over samples of the root mean square distance to the teacher's solution."""
    return mean_size(last_residuals(samples, table))
