"""From a recipe and nodes to the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.published import _extended_reverse
from diffusers_sde.published._recipes import Recipe
from diffusers_sde.published._stages import in_sigma, levels, lower_level, step_groups
from diffusers_sde.tables import Row, Table, add_weights
from diffusers_sde.weights import Point, lagrange_weights, linear_coefficients

VELOCITY = (1.0, -1.0)  # F = x_0 - eps of flow matching, minus the velocity


def noise_levels(path: Path, nodes: Nodes, recipe: Recipe, eta: float = 1.0) -> list[float]:
    """The tau of each step: of the reverse SDE that the recipe follows, 1 where its noise has a law of its own.

    Args:
        path: the forward process.
        nodes: of the run.
        recipe: what is run.
        eta: the amount of noise.

    Returns:
        One a step.
    """
    steps = len(nodes) - 1
    if recipe.noise == "interval":
        left = (nodes.time[1:] - path.cleanest) / (path.noisiest - path.cleanest)
        return [eta if 0.2 <= u <= 0.8 else 0.0 for u in left]
    return [{"none": 0.0, "sde": math.sqrt(eta)}.get(recipe.noise, 1.0)] * steps


def build_published(path: Path, nodes: Nodes, recipe: Recipe, *, taus: Sequence[float], eta: float = 1.0) -> Table:
    """The table of a recipe.

    Args:
        path: the forward process.
        nodes: of the run, with its stages (:func:`with_stages`).
        recipe: what is run.
        taus: of :func:`noise_levels`, one a step.
        eta: of an ancestral method.

    Returns:
        One row an evaluation.  A row that draws the noise of a whole step (ancestral methods with stages) is that
        step's last.

    Raises:
        ValueError: for a method that integrates the noise prediction, from pure noise on a process where that says
            nothing.
    """
    method = _Formula(path, recipe, levels(path, nodes, recipe), taus)
    if method.data_std and method.points[0].alpha == 0:
        raise ValueError(
            "This method integrates the noise prediction, which says nothing of the data at zero terminal SNR: choose "
            "one that integrates the data prediction, as dpmpp_2m, res_2s or unipc."
        )
    rows: list[Row] = []
    previous = np.zeros(0)  # weights that produced the state of the last row from its anchor, on F_{i-1}, F_{i-2}, ...
    for first, size in step_groups(path, nodes, recipe, eta):
        start, end = method.points[first], method.points[first + size]
        target = lower_level(start, end, recipe, eta)
        scale = 1.0  # of the anchor in the present state
        for i in range(first, first + size):
            last = i == first + size - 1
            a, forward = method.move(first, i, target if last else method.points[i + 1], target, staged=size > 1)
            c = 0.0 if recipe.noise == "ancestral" else method.linear(i, i + 1)[1]
            if last and recipe.noise == "ancestral":
                up, c = _renoised(target, end, nodes.alpha[first + size], in_sigma(path, recipe))
                a, forward = up * a, up * forward
            if size > 1:  # the anchor is an affine function of the present state
                b = add_weights(forward, -a / scale * np.append(0.0, previous if i > first else ()))
            else:
                b = add_weights(forward, a * method.correction(i, previous)) if recipe.corrector else forward
            row_a = a / scale
            rows.append(
                Row(float(nodes.time[i]), float(nodes.alpha[i]), float(nodes.sigma[i]), row_a, tuple(b.tolist()), c)
            )
            scale, previous = a, forward
    velocity = VELOCITY if method.data_std and in_sigma(path, recipe) else None
    return Table(tuple(rows), method.data_std, velocity)


class _Formula:
    """A recipe on the points of a run."""

    def __init__(self, path: Path, recipe: Recipe, points: Sequence[Point], taus: Sequence[float]):
        self.path, self.recipe, self.points, self.taus = path, recipe, points, taus
        self.data_std = math.inf if recipe.evaluates == "noise" else 0.0

    def linear(self, i: int, j: int) -> tuple[float, float]:
        """``(a, c)`` of the SDE, or ODE, from point i to point j."""
        return self._linear(self.points[i], self.points[j], self.taus[i])

    def _linear(self, start: Point, end: Point, tau: float) -> tuple[float, float]:
        if self.recipe.noise == "extended":
            return _extended_reverse.decay(start, end)
        tau = 0.0 if self.recipe.noise == "ancestral" else tau
        return linear_coefficients(start, end, self.data_std, tau)

    def move(self, first: int, i: int, target: Point, end: Point, *, staged: bool) -> tuple[float, np.ndarray]:
        """``(a, weights)`` with which the state at ``target`` follows from the anchor, point ``first``, and the
        evaluations up to point i, newest first; ``end``: where the step goes."""
        start, tau = self.points[first], self.taus[first]
        a = self._linear(start, target, tau)[0]
        if target.sigma == 0 and self.recipe.denoises:
            return a, self._constant(start, target, tau)
        if staged:
            return a, self._staged(start, target, end, i - first, tau)
        return a, self._explicit(i, target, tau)

    def _constant(self, start: Point, end: Point, tau: float) -> np.ndarray:
        if end.sigma == 0 and not self.data_std:
            return np.array([end.alpha])
        return self._interpolated(start, end, [start], tau)

    def _interpolated(self, start: Point, end: Point, basis: Sequence[Point], tau: float) -> np.ndarray:
        """Weights of the evaluations at ``basis`` by exact integration of their polynomial."""
        if start.log_snr == end.log_snr:
            return np.zeros(len(basis))
        if self.recipe.noise == "extended":
            return _extended_reverse.weights(start, end, basis)
        tau = 0.0 if self.recipe.noise == "ancestral" else tau
        clock = self.recipe.clock
        return lagrange_weights(self.path, start, end, basis, data_std=self.data_std, clock=clock, tau=tau)

    def _explicit(self, i: int, end: Point, tau: float) -> np.ndarray:
        """Of a multistep prediction from point i."""
        n, ending, start = len(self.points) - 1, self.recipe.ending, self.points[i]
        count = self.recipe.history if ending is None else min(self.recipe.history, max(n - i - ending, 1))
        finite = [p for p in self.points[max(i - count + 1, 0) : i][::-1] if math.isfinite(p.log_snr)]
        basis = [start, *finite] if math.isfinite(start.log_snr) else [start]
        return self._ruled(start, end, basis, tau)

    def correction(self, i: int, previous: np.ndarray) -> np.ndarray:
        """What the corrected state at point i has more than the predicted one, as weights of F_i, F_{i-1}, ...: those
        of the step before redone with the new evaluation minus those that it was made with."""
        n = len(self.points) - 1
        if i == 0 or self.points[i + 1].sigma == 0:
            return np.zeros(1)
        count = min(self.recipe.corrector, i + 1, n - i if self.recipe.ending else n)
        older = [p for p in self.points[i - count + 1 : i][::-1] if math.isfinite(p.log_snr)]
        start, end = self.points[i - 1], self.points[i]
        if count < 2 or not older or not math.isfinite(start.log_snr):
            return add_weights(self._interpolated(start, end, [end], self.taus[i - 1]), -np.append(0.0, previous))
        weights = self._ruled(start, end, [start, end, *older[1:]], self.taus[i - 1])
        weights[[0, 1]] = weights[[1, 0]]
        return add_weights(weights, -np.append(0.0, previous))

    def _ruled(self, start: Point, end: Point, basis: Sequence[Point], tau: float) -> np.ndarray:
        """Weights of evaluations at ``basis``, that of ``start`` first, by the recipe's rule."""
        recipe = self.recipe
        if recipe.fixed:
            return self._constant(start, end, tau) * np.array(recipe.fixed[len(basis) - 1])
        if len(basis) != 2 or recipe.rule == "exact":
            return self._interpolated(start, end, basis, tau)
        h, total = end.log_snr - start.log_snr, self._constant(start, end, tau)[0]
        flat = end.alpha * h if recipe.rule == "bh1" else total
        slope = 0.5 * h / (basis[1].log_snr - start.log_snr) * flat
        return np.array([total - slope, slope])

    def _staged(self, start: Point, target: Point, end: Point, evaluated: int, tau: float) -> np.ndarray:
        """Of the move after the stage ``evaluated`` of a step, newest first."""
        stage = self.recipe.stages[evaluated]
        total = float(self._constant(start, target, tau)[0])
        ramp = self._ramp(start, target, end, stage.at, total, tau)
        weights = np.zeros(evaluated + 1)
        weights[1 : len(stage.slopes) + 1] = ramp * np.array(stage.slopes)
        if stage.carried:
            at = self.recipe.stages[0].at
            first = self._place(start, end, at)
            whole = self._ramp(start, first, end, at, math.nan, tau) / at
            weights[1] += stage.carried * whole * target.alpha / first.alpha
        weights[0] = total - weights[1:].sum()
        return weights[::-1]

    def _ramp(self, start: Point, target: Point, end: Point, at: float, total: float, tau: float) -> float:
        """The weight, at ``target``, of an evaluation that rises from 0 at ``start`` to 1 at ``end``."""
        if self.recipe.rule == "midpoint":
            return total * at / 2
        return float(self._interpolated(start, target, [start, end], tau)[1])

    def _place(self, start: Point, end: Point, at: float) -> Point:
        """The point at a fraction of log-SNR of a step."""
        alpha, sigma = self.path.alpha_sigma_of((1 - at) * start.log_snr + at * end.log_snr)
        if in_sigma(self.path, self.recipe):
            return Point(1.0, math.exp(-(1 - at) * start.log_snr - at * end.log_snr))
        return Point(float(alpha), float(sigma))


def _renoised(lower: Point, end: Point, alpha: float, flow: bool) -> tuple[float, float]:
    """Factor on the state at the lower level, and the noise added, for the law at ``end``: ``alpha_t/alpha_d`` and
    ``sqrt(sigma_t^2 - (alpha_t/alpha_d)^2 sigma_d^2)``; in coordinates with the alpha of the end the factor is 1."""
    up = alpha / (1 - lower.sigma) if flow else 1.0
    return up, math.sqrt(max(end.sigma**2 - (up * lower.sigma) ** 2, 0.0))
