"""Refinement by rollouts: Gauss-Newton on every weight and every evaluation time of a table at once.

Knows how the solution moves with each parameter, by finite differences of rollouts (forward passes only; a rollout
starts at the row that changed), how to step so that the training error never grows, and what each step teaches about
the next.  Weights move along orthonormal combinations of a row's own states and evaluations, so that nearly parallel
ones do no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from diffusers_sde.calibration.fit import (
    TaughtSamples,
    basis,
    basis_size,
    corrected,
    inner_products,
    last_residuals,
    mean_root_mean_square,
    root_mean_squares,
)
from diffusers_sde.calibration.rollout import advance, roll
from diffusers_sde.calibration.store import Store
from diffusers_sde.calibration.workers import sum_over_workers
from diffusers_sde.tables import Table

PARALLEL = 3e-3  # directions with a smaller share of the basis are left alone: their weights would amplify errors
STATE_STEP = 0.01  # of the unit scale of a state
TIME_STEP = 0.002  # of the training range
TRIALS = 6  # steps to try from one Jacobian
PATIENCE = 3  # steps without gain, each damped more, after which there is none to be had
LEAST_DAMPING = 3e-3  # of the diagonal: barely determined combinations of parameters fit noise


def refinement_memory(n: int, times: bool) -> int:
    """How many times the size of a sample a refinement of ``n`` rows keeps for each sample, at most: a column of the
    Jacobian for each parameter, an update for each trial, the residuals of the table and of its trial.  ``times``:
    whether evaluation times are parameters too."""
    return sum(basis_size(i) + times for i in range(n)) + TRIALS + 2


def refinement_cost(n: int, times: bool) -> int:
    """Evaluations a sample of one refinement of ``n`` rows, at most: each row's parameters by rollouts of the rows
    after it, the states to start them from, and the trials."""
    weights = sum(basis_size(i) * (n - 1 - i) for i in range(n))
    return weights + times * n * (n + 1) // 2 + (2 + TRIALS) * n


def refine(
    samples: TaughtSamples, store: Store, table: Table, report: Callable[[float], object]
) -> tuple[Table, float]:
    """A table refined on samples.

    Args:
        samples: what to refine on.
        store: where the Jacobian waits meanwhile; nothing is left there.
        report: told the training error before each trial.

    Returns:
        The refined table and its training error, at most that of ``table``.
    """
    try:
        refinement, failed = start_refinement(samples, store, table), 0
        for _ in range(TRIALS):
            report(refinement.error)
            failed = 0 if refinement.step() else failed + 1
            if failed == PATIENCE:
                break
        return refinement.table, refinement.error
    finally:
        for first in samples.firsts:
            store.drop(_name(first))


# -- the Jacobian of a table --


def directions(gram: np.ndarray) -> np.ndarray:
    """(r, k): orthonormal combinations of k vectors with inner products ``gram`` (k, k), the nearly parallel ones left
    out."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    values, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
    kept = values > PARALLEL**2 * values[-1]
    return (vectors[:, kept] / np.sqrt(values[kept]) / scale[:, None]).T[::-1]


def row_directions(samples: TaughtSamples, table: Table) -> list[np.ndarray]:
    """Each row's :func:`directions`, from a rollout of all samples."""
    evaluator, shapes = samples.evaluator, [basis_size(i) for i in range(len(table.rows))]
    sums = np.zeros(1 + sum(k * k for k in shapes))
    for first in samples.firsts:
        with samples.source.open(first) as batch:
            x = evaluator.start(batch)
            states, made = roll(evaluator, batch, table, x)
            grams = []
            for i, state in enumerate([x, *states[:-1]]):
                vectors = basis(state, made[: i + 1])
                grams.append(inner_products(vectors, vectors).ravel())
        sums += np.concatenate([[len(x)], *grams])
    sums = sum_over_workers(sums)
    parts = np.split(sums[1:], np.cumsum([k * k for k in shapes])[:-1])
    return [directions(p.reshape(k, k) / sums[0]) for p, k in zip(parts, shapes, strict=True)]


def measured_jacobian(samples: TaughtSamples, table: Table, each: list[np.ndarray], first: int) -> torch.Tensor:
    """The derivative of a batch's last states by each parameter, by finite differences of rollouts.

    Args:
        each: the directions in which each row's weights move; its time, in parts of the training range towards clean
            data, is the parameter after them (unless the network only knows whole times).
        first: which batch.

    Returns:
        (parameters, B, elements), on the host.
    """
    evaluator = samples.evaluator
    n, span = len(table.rows), evaluator.path.cleanest - evaluator.path.noisiest
    columns = []
    with samples.source.open(first) as batch:
        x = evaluator.start(batch)
        states, made = roll(evaluator, batch, table, x)
        states = [x, *states]
        for i, row in enumerate(table.rows):
            vectors = basis(states[i], made[: i + 1])
            for direction in each[i]:
                d = sum(c * v for c, v in zip(direction.tolist(), vectors, strict=True))
                if i + 1 < n:
                    moved = torch.add(states[i + 1], d, alpha=STATE_STEP)
                    end = roll(evaluator, batch, table, moved, made[: i + 1], i + 1)[0][-1]
                    d = (end - states[-1]) / STATE_STEP
                columns.append(d.cpu())
            if not evaluator.integer_times:
                h = TIME_STEP * span * (-1 if i + 1 == n else 1)
                evaluation = evaluator.evaluate(batch, replace(row, time=row.time + h), states[i])
                past = [*made[:i], evaluation]
                moved = advance(row, states[i], past)
                end = roll(evaluator, batch, table, moved, past, i + 1)[0][-1] if i + 1 < n else moved
                columns.append(((end - states[-1]) / (h / span)).cpu())
    return torch.stack(columns).flatten(2)


# -- its use --


def start_refinement(samples: TaughtSamples, store: Store, table: Table) -> Refinement:
    """Run the network: measure the directions, the Jacobian (kept in ``store``, a batch at a time) and the residuals of
    ``table``."""
    each = row_directions(samples, table)
    for first in samples.firsts:
        store.put(_name(first), {"jacobian": measured_jacobian(samples, table, each, first)})
    residuals = last_residuals(samples, table)
    return Refinement(samples, store, each, table, residuals, mean_root_mean_square(residuals))


@dataclass
class Refinement:
    """One table being refined.

    The Jacobian is measured once, at the table that :func:`start_refinement` is given.  Each trial's rollout then
    corrects it by Broyden's update ``J += (dr - J dp) dp'D / (dp'D dp)``, per sample, D the diagonal of ``J'WJ``
    (Broyden 1965; Nocedal & Wright, Numerical Optimization, eq. 11.27): a trial costs one rollout, a Jacobian as many
    as there are parameters.

    Args:
        samples, store: whose error, and where the measured Jacobian is.
        directions: in which each row's weights move.
        table: the best one so far, with the ``residuals`` of its last states by batch, (B, elements), and its training
            ``error``.
        damping: of the next step, relative to the diagonal.
        updates: of the Jacobian, one for each trial: weights of the parameters, and what was not foreseen, by batch.
    """

    samples: TaughtSamples
    store: Store
    directions: list[np.ndarray]
    table: Table
    residuals: dict[int, torch.Tensor]
    error: float
    damping: float = LEAST_DAMPING
    updates: list[tuple[np.ndarray, dict[int, torch.Tensor]]] = field(default_factory=list)

    @property
    def times(self) -> bool:
        """Whether evaluation times are parameters too."""
        return not self.samples.evaluator.integer_times

    def step(self) -> bool:
        """Try one damped step by a rollout; whether the error went down."""
        normal, gradient = self.normal_equations()
        diagonal = np.maximum(np.diag(normal), 1e-300)
        trial, delta = self.moved(np.linalg.solve(normal + self.damping * np.diag(diagonal), -gradient))
        residuals = last_residuals(self.samples, trial)
        error = mean_root_mean_square(residuals)
        better = error < self.error
        if np.isfinite(error):
            self._learn(delta, diagonal, residuals)
        self.damping = max(self.damping / 5, LEAST_DAMPING) if better else self.damping * 10
        if better:
            self.table, self.error, self.residuals = trial, error, residuals
        return better

    def jacobian(self, first: int) -> torch.Tensor:
        """A batch's measured Jacobian with what the trials have taught, (parameters, B, elements), float64."""
        jacobian = self.store.get(_name(first), "jacobian").double()
        for weights, miss in self.updates:
            jacobian += torch.from_numpy(weights)[:, None, None] * miss[first]
        return jacobian

    def _learn(self, delta: np.ndarray, diagonal: np.ndarray, residuals: dict[int, torch.Tensor]) -> None:
        """Broyden's update: what the Jacobian did not foresee, along the step taken."""
        scaled = diagonal * delta
        miss = {}
        for first, residual in residuals.items():
            foreseen = torch.einsum("p,pbe->be", torch.from_numpy(delta), self.jacobian(first))
            miss[first] = (residual - self.residuals[first] - foreseen).float()
        self.updates.append((scaled / max(float(scaled @ delta), 1e-300), miss))

    def normal_equations(self) -> tuple[np.ndarray, np.ndarray]:
        """``J'WJ`` and ``J'Wr`` summed over samples, with weights ``W = 1/error`` of each sample: the Gauss-Newton
        model of the mean of their root mean square errors."""
        count = sum(len(d) + self.times for d in self.directions)
        sums = np.zeros((count, count + 1))
        for first, residual in self.residuals.items():
            jacobian, residual = self.jacobian(first), residual.double()
            errors = torch.from_numpy(root_mean_squares(residual))
            weights = 1 / errors.clamp(min=0.2 * self.error) / residual.shape[1]
            weighted = (jacobian * weights[:, None]).flatten(1)
            sums += (weighted @ torch.cat([jacobian, residual[None]]).flatten(1).mT).numpy()
        sums = sum_over_workers(sums)
        return sums[:, :-1], sums[:, -1]

    def moved(self, delta: np.ndarray) -> tuple[Table, np.ndarray]:
        """The table with a step of the parameters taken, and that step: times stay in the training range and in order,
        by at most half a gap a step."""
        path, rows, at = self.samples.evaluator.path, [], 0
        delta = delta.copy()
        times = np.array([row.time for row in self.table.rows])
        ends = np.concatenate([[path.noisiest], times, [path.cleanest]])
        gaps = np.abs(np.diff(ends))
        span = path.cleanest - path.noisiest
        for i, row in enumerate(self.table.rows):
            k = len(self.directions[i])
            row = corrected(row, delta[at : at + k] @ self.directions[i])
            at += k
            if self.times:
                limit = 0.45 * gaps[i + 1 if delta[at] > 0 else i] / abs(span)  # positive is towards clean data
                delta[at] = np.clip(delta[at], -limit, limit)
                row = replace(row, time=row.time + float(span * delta[at]))
                at += 1
            rows.append(row)
        return Table(tuple(rows), self.table.data_std), delta


def _name(first: int) -> str:
    return f"jacobian-{first}"
