"""Rows by least squares: corrections of the exact rows, fitted to the teacher on the student's own states.

Knows the ridge that makes a row without data the exact row, and how a table's error is summed over samples.  Knows
nothing of grids' choice; needs no gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffusers_sde.calibration.rollout import Evaluator, advance, roll
from diffusers_sde.calibration.sources import Source
from diffusers_sde.calibration.teacher import Teacher
from diffusers_sde.calibration.workers import sum_over_workers
from diffusers_sde.defaults import standard_table
from diffusers_sde.grids import Nodes
from diffusers_sde.tables import Row, Table

ORDER = 4  # evaluations that a fitted row may use
RIDGE = 1e-5


@dataclass(frozen=True)
class TaughtSamples:
    """Samples with their targets: this worker's batches, by the index of the first sample of each in ``firsts``, who
    evaluates them, and the teacher that knows their solutions."""

    evaluator: Evaluator
    source: Source
    firsts: Sequence[int]
    teacher: Teacher


def ridge_correction(gram: np.ndarray, cross: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """``delta`` minimising ``|r - B delta|^2 + ridge sum_j |B_j|^2 delta_j^2`` (Hoerl & Kennard 1970, each column at
    its own scale).

    Args:
        gram: ``B'B``, (k, k).
        cross: ``B'r``, (k,).
        ridge: relative to the squared size of a column; infinite: no correction.

    Returns:
        (k,); zeros where there are no data (zero ``gram``).
    """
    scale = np.sqrt(np.diag(gram))
    if np.isinf(ridge) or not scale.any():
        return np.zeros_like(cross)
    scale = np.where(scale > 0, scale, 1.0)
    unit = gram / np.outer(scale, scale) + ridge * np.eye(len(gram))
    return np.linalg.solve(unit, cross / scale) / scale


def basis_size(i: int) -> int:
    """How many vectors row ``i`` combines."""
    return 1 + min(i + 1, ORDER)


def basis(x: torch.Tensor, evaluations: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a row may combine: the state, then the newest evaluations, newest first."""
    return [x, *list(reversed(evaluations))[:ORDER]]


def inner_products(vectors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> np.ndarray:
    """Inner products of batches (B, ...), summed over samples and averaged over their elements, float64."""
    left, right = (torch.stack([v.double().flatten() for v in vs]) for vs in (vectors, others))
    return (left @ right.mT).cpu().numpy() / vectors[0][0].numel()


def corrected(row: Row, delta: np.ndarray) -> Row:
    """The row with ``delta`` added to its weights on the basis; it is followed as it is from then on."""
    b = np.zeros(max(len(row.b), len(delta) - 1))
    b[: len(row.b)] += row.b
    b[: len(delta) - 1] += delta[1:]
    return replace(linear(row), a=float(row.a + delta[0]), b=tuple(float(v) for v in b))


def linear(row: Row) -> Row:
    """The row as it is, whatever its evaluations say."""
    return replace(row, slope=(), gap=(), correction=0.0)


def subgrid(nodes: Nodes, grid: Sequence[int]) -> Nodes:
    """These nodes and the clean end."""
    index = np.append(grid, len(nodes) - 1)
    return Nodes(nodes.time[index], nodes.alpha[index], nodes.sigma[index])


def fit_tables(
    samples: TaughtSamples, grids: Sequence[Sequence[int]], *, ridge: float = RIDGE
) -> list[tuple[Table, float]]:
    """A fitted table for each of several grids, in one pass over the batches for each row.

    Row by row: the student's states so far are its own; each row's correction of the exact row takes them as close to
    the teacher's states at the next node as least squares over the samples of all workers can.

    Args:
        samples: what to fit to.
        grids: indices of teacher nodes, all grids of one length.
        ridge: see :func:`ridge_correction`.

    Returns:
        Table and training error for each grid.
    """
    evaluator, teacher = samples.evaluator, samples.teacher
    n, last = len(grids[0]), len(teacher.nodes) - 1
    exact = [standard_table(evaluator.path, subgrid(teacher.nodes, grid)) for grid in grids]
    rows: list[list[Row]] = [[] for _ in grids]
    states: dict[tuple[int, int], torch.Tensor] = {}
    made: dict[tuple[int, int], list[torch.Tensor]] = {}
    for i in range(n):
        size = basis_size(i)
        sums = np.zeros((len(grids), size, size + 1))
        for first in samples.firsts:
            with samples.source.open(first) as batch:
                device = batch.noise.device
                for g, grid in enumerate(grids):
                    key = (g, first)
                    x = states[key].to(device) if i else evaluator.start(batch)
                    past = [f.to(device) for f in made.get(key, [])]
                    row = linear(exact[g].rows[i])
                    past.append(evaluator.evaluate(batch, row, x))
                    target = teacher.state(first, [*grid, last][i + 1]).to(x)
                    vectors = basis(x, past)
                    sums[g] += inner_products(vectors, [*vectors, target - advance(row, x, past)])
                    states[key], made[key] = x.cpu(), [f.cpu() for f in past]
        sums = sum_over_workers(sums)
        for g in range(len(grids)):
            delta = ridge_correction(sums[g, :, :-1], sums[g, :, -1], ridge)
            rows[g].append(corrected(exact[g].rows[i], delta))
            for first in samples.firsts:
                states[g, first] = advance(rows[g][-1], states[g, first], made[g, first])
    tables = [Table(tuple(r), evaluator.data_std) for r in rows]
    ends = [{first: states[g, first] for first in samples.firsts} for g in range(len(grids))]
    return [(table, error_of_ends(samples, end)) for table, end in zip(tables, ends, strict=True)]


# -- errors --


def root_mean_squares(residuals: torch.Tensor) -> np.ndarray:
    """Root mean square of each sample of (B, elements), (B,) in float64; inf where it is not a number."""
    values = residuals.double().square().mean(1).sqrt().numpy()
    return np.where(np.isfinite(values), values, np.inf)


def mean_root_mean_square(residuals: Mapping[int, torch.Tensor]) -> float:
    """The mean of :func:`root_mean_squares` over the samples of all batches and workers."""
    values = np.concatenate([root_mean_squares(r) for r in residuals.values()])
    sums = sum_over_workers(np.array([values.sum(), len(values)]))
    return float(sums[0] / sums[1])


def residuals_of(samples: TaughtSamples, ends: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Last states of each batch (B, ...) minus the teacher's solution, (B, elements), on the host."""
    return {first: (ends[first].cpu() - samples.teacher.solution(first)).flatten(1) for first in samples.firsts}


def last_residuals(samples: TaughtSamples, table: Table) -> dict[int, torch.Tensor]:
    """:func:`residuals_of` a rollout of ``table``."""
    ends = {}
    for first in samples.firsts:
        with samples.source.open(first) as batch:
            ends[first] = roll(samples.evaluator, batch, table, samples.evaluator.start(batch))[0][-1].cpu()
    return residuals_of(samples, ends)


def error_of_ends(samples: TaughtSamples, ends: Mapping[int, torch.Tensor]) -> float:
    """The error of last states, by batch: the mean over samples of the root mean square distance to the teacher's
    solution, in units of a sample."""
    return mean_root_mean_square(residuals_of(samples, ends))


def table_error(samples: TaughtSamples, table: Table) -> float:
    """:func:`error_of_ends` of a rollout of ``table``."""
    return mean_root_mean_square(last_residuals(samples, table))
