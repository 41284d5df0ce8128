"""Refinement by rollouts: Gauss-Newton on every weight and every evaluation time of a table at once.

Knows how the solution moves with each parameter, by finite differences of rollouts (forward passes only; a rollout
starts at the row that changed), and how to step so that the training error never grows.  Weights move along
orthonormal combinations of a row's own states and evaluations, so that nearly parallel ones do no harm.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from diffusers_sde.calibration.fit import ORDER, Samples, basis, corrected, inner_products, sample_errors
from diffusers_sde.calibration.processes import total
from diffusers_sde.calibration.rollout import advance, roll
from diffusers_sde.tables import Table

PARALLEL = 3e-3  # directions with a smaller share of the basis are left alone: their weights would amplify errors
STATE_STEP = 0.01  # of the unit scale of a state
TIME_STEP = 0.002  # of the training range
TRIALS = 3  # damped steps to try for one Jacobian
LEAST_DAMPING = 3e-3  # of the diagonal: barely determined combinations of parameters fit noise


def directions(gram: np.ndarray, parallel: float = PARALLEL) -> np.ndarray:
    """(r, k): orthonormal combinations of k vectors with inner products ``gram``, the nearly parallel ones left out."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    values, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
    kept = values > parallel**2 * values[-1]
    return (vectors[:, kept] / np.sqrt(values[kept]) / scale[:, None]).T[::-1]


def iteration_cost(n: int, order: int = ORDER, times: bool = True) -> int:
    """Evaluations a sample of one Jacobian with its states and trial steps, at most, for ``n`` rows."""
    weights = sum((1 + min(i + 1, order)) * (n - 1 - i) for i in range(n))
    return weights + times * n * (n + 1) // 2 + n + TRIALS * n


class Refiner:
    """One table being refined: ``table``, its training ``error``, and what it ``spent`` (evaluations a sample)."""

    def __init__(self, samples: Samples, table: Table, *, order: int = ORDER):
        self.samples, self.order = samples, order
        self.times = not samples.process.integer_times
        self.damping, self.spent = LEAST_DAMPING, 0
        self.table = table
        self.error, self._directions = self._measure(table)

    def _measure(self, table: Table) -> tuple[float, list[np.ndarray]]:
        """The mean error, and each row's directions."""
        process, n = self.samples.process, len(table.rows)
        sizes = [1 + min(i + 1, self.order) for i in range(n)]
        sums = np.zeros(2 + sum(k * k for k in sizes))
        for first in self.samples.firsts:
            with self.samples.source.open(first) as batch:
                x = process.start(batch)
                states, made = roll(process, batch, table, x)
                errors = sample_errors(states[-1], self.samples.teacher.solution(first))
                grams = []
                for i, state in enumerate([x, *states[:-1]]):
                    vectors = basis(state, made[: i + 1], self.order)
                    grams.append(inner_products(vectors, vectors).ravel())
            sums += np.concatenate([[errors.sum(), len(errors)], *grams])
        self.spent += n
        sums = total(sums)
        if not np.isfinite(sums).all():
            return np.inf, []
        parts = np.split(sums[2:], np.cumsum([k * k for k in sizes])[:-1])
        found = [directions(p.reshape(k, k) / sums[1]) for p, k in zip(parts, sizes, strict=True)]
        return float(sums[0] / sums[1]), found

    def step(self) -> bool:
        """One Jacobian and up to :data:`TRIALS` damped steps; whether the error went down."""
        normal, gradient = self._normal_equations()
        for _ in range(TRIALS):
            damped = normal + self.damping * np.diag(np.maximum(np.diag(normal), 1e-300))
            trial = self._moved(np.linalg.solve(damped, -gradient))
            error, found = self._measure(trial)
            if error < self.error:
                self.damping = max(self.damping / 5, LEAST_DAMPING)
                self.table, self.error, self._directions = trial, error, found
                return True
            self.damping *= 10
        return False

    def _normal_equations(self) -> tuple[np.ndarray, np.ndarray]:
        """``J'WJ`` and ``J'Wr`` summed over samples, with weights ``W = 1/error`` of each sample: the Gauss-Newton
        model of the mean of their root mean square errors."""
        process, table = self.samples.process, self.table
        n, found = len(table.rows), self._directions
        count = sum(len(d) for d in found) + self.times * n
        normal, gradient = np.zeros((count, count)), np.zeros(count)
        span = process.path.cleanest - process.path.noisiest
        for first in self.samples.firsts:
            solution = self.samples.teacher.solution(first)
            with self.samples.source.open(first) as batch:
                x = process.start(batch)
                states, made = roll(process, batch, table, x)
                states = [x, *states]
                columns = []
                for i, row in enumerate(table.rows):
                    vectors = basis(states[i], made[: i + 1], self.order)
                    for direction in found[i]:
                        d = sum(c * v for c, v in zip(direction.tolist(), vectors, strict=True))
                        if i + 1 < n:
                            moved = torch.add(states[i + 1], d, alpha=STATE_STEP)
                            end = roll(process, batch, table, moved, made[: i + 1], i + 1)[0][-1]
                            d = (end - states[-1]) / STATE_STEP
                        columns.append(d.cpu())
                    if self.times:
                        h = TIME_STEP * span * (-1 if i + 1 == n else 1)
                        evaluation = process.evaluate(batch, replace(row, time=row.time + h), states[i])
                        past = [*made[:i], evaluation]
                        moved = advance(row, states[i], past)
                        end = roll(process, batch, table, moved, past, i + 1)[0][-1] if i + 1 < n else moved
                        columns.append(((end - states[-1]) / (h / span)).cpu())
                residual = (states[-1].cpu() - solution).double().flatten(1)
                errors = sample_errors(states[-1], solution)
            weights = torch.from_numpy(1 / np.maximum(errors, 0.2 * self.error)) / residual.shape[1]
            jacobian = torch.stack([c.double().flatten(1) for c in columns])
            weighted = (jacobian * weights[:, None]).flatten(1)
            normal += (weighted @ jacobian.flatten(1).mT).numpy()
            gradient += (weighted @ residual.flatten()).numpy()
        size = sum((1 + min(i + 1, self.order)) * (n - 1 - i) for i in range(n))
        self.spent += n + size + self.times * n * (n + 1) // 2
        sums = total(np.concatenate([normal.ravel(), gradient]))
        return sums[: count * count].reshape(count, count), sums[count * count :]

    def _moved(self, delta: np.ndarray) -> Table:
        """The table with a step taken; times stay in the training range and in order, by at most half a gap a step."""
        process, rows, at = self.samples.process, [], 0
        times = np.array([row.time for row in self.table.rows])
        ends = np.concatenate([[process.path.noisiest], times, [process.path.cleanest]])
        gaps = np.abs(np.diff(ends))
        span = process.path.cleanest - process.path.noisiest
        for i, row in enumerate(self.table.rows):
            k = len(self._directions[i])
            row = corrected(row, delta[at : at + k] @ self._directions[i])
            at += k
            if self.times:
                limit = 0.45 * gaps[i + 1 if delta[at] > 0 else i]  # positive is towards clean data
                time = row.time + float(np.clip(span * delta[at], -limit, limit))
                at += 1
                row = replace(row, time=time)
            rows.append(row)
        return Table(tuple(rows), self.table.data_std)
