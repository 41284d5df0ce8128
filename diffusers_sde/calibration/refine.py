"""Refinement by rollouts: Gauss-Newton on every weight and every evaluation time of a table at once.

Knows how the solution moves with each parameter, by finite differences of rollouts (forward passes only; a rollout
starts at the row that changed), how to step so that the training error never grows, and what each step teaches about
the next.  Weights move along orthonormal combinations of a row's own states and evaluations, so that nearly parallel
ones do no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from diffusers_sde.calibration.fit import (
    ORDER,
    Samples,
    basis,
    corrected,
    inner_products,
    last_residuals,
    mean_size,
    sizes,
)
from diffusers_sde.calibration.processes import total
from diffusers_sde.calibration.rollout import advance, roll
from diffusers_sde.calibration.teacher import Store
from diffusers_sde.tables import Table

PARALLEL = 3e-3  # directions with a smaller share of the basis are left alone: their weights would amplify errors
STATE_STEP = 0.01  # of the unit scale of a state
TIME_STEP = 0.002  # of the training range
TRIALS = 6  # steps to try from one Jacobian
PATIENCE = 3  # steps without gain, each damped more, after which there is none to be had
LEAST_DAMPING = 3e-3  # of the diagonal: barely determined combinations of parameters fit noise


def directions(gram: np.ndarray, parallel: float = PARALLEL) -> np.ndarray:
    """(r, k): orthonormal combinations of k vectors with inner products ``gram``, the nearly parallel ones left out."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    values, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
    kept = values > parallel**2 * values[-1]
    return (vectors[:, kept] / np.sqrt(values[kept]) / scale[:, None]).T[::-1]


def memory(n: int, order: int = ORDER, times: bool = True) -> int:
    """How many times the size of a sample a refinement of ``n`` rows keeps for each sample, at most: a column of the
    Jacobian for each parameter, an update for each trial, the residuals of the table and of its trial."""
    return sum(1 + min(i + 1, order) + times for i in range(n)) + TRIALS + 2


def refinement_cost(n: int, order: int = ORDER, times: bool = True) -> int:
    """Evaluations a sample of one refinement of ``n`` rows, at most: each row's parameters by rollouts of the rows
    after it, the states to start them from, and the trials."""
    weights = sum((1 + min(i + 1, order)) * (n - 1 - i) for i in range(n))
    return weights + times * n * (n + 1) // 2 + (2 + TRIALS) * n


def refine(
    samples: Samples, store: Store, table: Table, report: Callable[[float], object] = lambda _: None
) -> tuple[Table, float]:
    """The refined table and its training error, at most that of ``table``; ``report`` is told it on the way."""
    try:
        refiner, failed = Refiner(samples, store, table), 0
        for _ in range(TRIALS):
            report(refiner.error)
            failed = 0 if refiner.step() else failed + 1
            if failed == PATIENCE:
                break
        return refiner.table, refiner.error
    finally:
        for first in samples.firsts:
            store.drop(_name(first))


class Refiner:
    """One table being refined: ``table`` and its training ``error``.

    The Jacobian is measured once, at the table that it is given.  Each trial's rollout then corrects it by Broyden's
    update ``J += (dr - J dp) dp'D / (dp'D dp)``, per sample, D the diagonal of ``J'WJ`` (Broyden 1965; Nocedal &
    Wright, Numerical Optimization, eq. 11.27): a trial costs one rollout, a Jacobian as many as there are parameters.
    It waits in ``store``, and is worked on a batch at a time.
    """

    def __init__(self, samples: Samples, store: Store, table: Table, *, order: int = ORDER):
        self.samples, self.order, self._store = samples, order, store
        self.times = not samples.process.integer_times
        self.damping, self.table = LEAST_DAMPING, table
        self._directions = self._find_directions()
        self._updates: list[tuple[np.ndarray, dict[int, torch.Tensor]]] = []
        for first in samples.firsts:
            store.put(_name(first), {"jacobian": self._measured_jacobian(first)})
        self._residuals = last_residuals(samples, table)
        self.error = mean_size(self._residuals)

    def step(self) -> bool:
        """Try one damped step; whether the error went down."""
        normal, gradient = self._normal_equations()
        diagonal = np.maximum(np.diag(normal), 1e-300)
        trial, delta = self._moved(np.linalg.solve(normal + self.damping * np.diag(diagonal), -gradient))
        residuals = last_residuals(self.samples, trial)
        error = mean_size(residuals)
        better = error < self.error
        if np.isfinite(error):
            self._learn(delta, diagonal, residuals)
        self.damping = max(self.damping / 5, LEAST_DAMPING) if better else self.damping * 10
        if better:
            self.table, self.error, self._residuals = trial, error, residuals
        return better

    def _find_directions(self) -> list[np.ndarray]:
        """Each row's directions, from all samples."""
        process, n = self.samples.process, len(self.table.rows)
        sizes = [1 + min(i + 1, self.order) for i in range(n)]
        sums = np.zeros(1 + sum(k * k for k in sizes))
        for first in self.samples.firsts:
            with self.samples.source.open(first) as batch:
                x = process.start(batch)
                states, made = roll(process, batch, self.table, x)
                grams = []
                for i, state in enumerate([x, *states[:-1]]):
                    vectors = basis(state, made[: i + 1], self.order)
                    grams.append(inner_products(vectors, vectors).ravel())
            sums += np.concatenate([[len(x)], *grams])
        sums = total(sums)
        parts = np.split(sums[1:], np.cumsum([k * k for k in sizes])[:-1])
        return [directions(p.reshape(k, k) / sums[0]) for p, k in zip(parts, sizes, strict=True)]

    def _measured_jacobian(self, first: int) -> torch.Tensor:
        """The derivative of a batch's last states by each parameter, (parameters, B, elements)."""
        process, table = self.samples.process, self.table
        n, span = len(table.rows), process.path.cleanest - process.path.noisiest
        columns = []
        with self.samples.source.open(first) as batch:
            x = process.start(batch)
            states, made = roll(process, batch, table, x)
            states = [x, *states]
            for i, row in enumerate(table.rows):
                vectors = basis(states[i], made[: i + 1], self.order)
                for direction in self._directions[i]:
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
        return torch.stack(columns).flatten(2)

    def _jacobian(self, first: int) -> torch.Tensor:
        """The measured one with what the trials have taught."""
        jacobian = self._store.get(_name(first), "jacobian").double()
        for weights, miss in self._updates:
            jacobian += torch.from_numpy(weights)[:, None, None] * miss[first]
        return jacobian

    def _learn(self, delta: np.ndarray, diagonal: np.ndarray, residuals: dict[int, torch.Tensor]) -> None:
        """Broyden's update: what the Jacobian did not foresee, along the step taken."""
        scaled = diagonal * delta
        miss = {}
        for first, residual in residuals.items():
            foreseen = torch.einsum("p,pbe->be", torch.from_numpy(delta), self._jacobian(first))
            miss[first] = (residual - self._residuals[first] - foreseen).float()
        self._updates.append((scaled / max(float(scaled @ delta), 1e-300), miss))

    def _normal_equations(self) -> tuple[np.ndarray, np.ndarray]:
        """``J'WJ`` and ``J'Wr`` summed over samples, with weights ``W = 1/error`` of each sample: the Gauss-Newton
        model of the mean of their root mean square errors."""
        count = sum(len(d) + self.times for d in self._directions)
        sums = np.zeros((count, count + 1))
        for first, residual in self._residuals.items():
            jacobian, residual = self._jacobian(first), residual.double()
            errors = torch.from_numpy(sizes(residual))
            weights = 1 / errors.clamp(min=0.2 * self.error) / residual.shape[1]
            weighted = (jacobian * weights[:, None]).flatten(1)
            sums += (weighted @ torch.cat([jacobian, residual[None]]).flatten(1).mT).numpy()
        sums = total(sums)
        return sums[:, :-1], sums[:, -1]

    def _moved(self, delta: np.ndarray) -> tuple[Table, np.ndarray]:
        """The table with a step taken, and that step: times stay in the training range and in order, by at most half a
        gap a step."""
        process, rows, at = self.samples.process, [], 0
        delta = delta.copy()
        times = np.array([row.time for row in self.table.rows])
        ends = np.concatenate([[process.path.noisiest], times, [process.path.cleanest]])
        gaps = np.abs(np.diff(ends))
        span = process.path.cleanest - process.path.noisiest
        for i, row in enumerate(self.table.rows):
            k = len(self._directions[i])
            row = corrected(row, delta[at : at + k] @ self._directions[i])
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
