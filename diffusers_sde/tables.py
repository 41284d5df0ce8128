"""Sampler tables: every known sampler is ``x <- a x + sum_j b_j F_j + c z`` with finished coefficients.

Knows how to build them from the weights of single steps (:mod:`diffusers_sde.weights`, where F and the formula are):
which evaluations a row uses.  When it may extrapolate from them is said by :mod:`diffusers_sde.extrapolation`.

Correctors (UniC, Zhao et al. arXiv:2302.04867) and the held anchors of single-step methods need no code of their own
at run time: the anchor is an affine function of the current state and of stored evaluations, so redoing a step is
another set of weights on the same evaluations.  Floats on the host only; knows nothing of networks or tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffusers_sde.extrapolation import MAX_FEEDBACK, MAX_STIFFNESS, Method
from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.prediction import DATA, Coefficients, convert
from diffusers_sde.weights import (
    CLOCKS,
    Point,
    basis_values,
    clock_values,
    evaluation_coefficients,
    linear_coefficients,
)

FINALS = ("denoise", "corrected", "exact", "second_order")
MAX_TAU = 4.0  # beyond it the state forgets itself within a step and the noise clock exp(2 tau^2 log_snr) overflows


@dataclass(frozen=True)
class Row:
    """One model evaluation: at ``(time, alpha, sigma)`` form F, then ``x <- a x + sum_j b[j] F_{i-j} + c z``.

    ``b[0]`` multiplies the evaluation of this row, ``b[j]`` the one j rows earlier.  What in b leans on earlier
    evaluations is also said apart, for a run that trusts them less (:func:`diffusers_sde.extrapolation.trust`):
    ``b = first + slope + correction gap``.  ``first`` is the weight of this row's evaluation alone; ``gap`` are the
    weights of ``F_i - P_i``, with ``P_i`` what the step before expected here; empty where b is first alone.
    """

    time: float
    alpha: float
    sigma: float
    a: float
    b: tuple[float, ...]
    c: float
    slope: tuple[float, ...] = ()
    gap: tuple[float, ...] = ()
    correction: float = 0.0


@dataclass(frozen=True)
class Table:
    """Rows of one run, and ``data_std``, which says what F is, unless ``evaluation`` does: ``(A, B)`` with
    ``F = A x_0 + B eps``."""

    rows: tuple[Row, ...]
    data_std: float
    evaluation: Coefficients | None = None

    def history(self, i: int) -> int:
        """How many evaluations, this row's included, later rows still read after row ``i``."""
        return max((len(row.b) - 1 - k for k, row in enumerate(self.rows[i + 1 :])), default=0)


def points_of(nodes: Nodes) -> tuple[Point, ...]:
    """The nodes of a grid, or of a run (``scheduler.levels``), one by one.

    Args:
        nodes: n evaluations and the terminal node.

    Returns:
        n + 1 points with ``alpha``, ``sigma`` and ``log_snr``.
    """
    return tuple(Point(float(alpha), float(sigma)) for alpha, sigma in zip(nodes.alpha, nodes.sigma, strict=True))


# -- builders --


def build_multistep(
    path: Path | None,
    nodes: Nodes,
    *,
    order: int = 2,
    corrector: bool | int = False,
    data_std: float = 0.0,
    clock: str = "log_snr",
    tau: float | Sequence[float] = 0.0,
    rule: str = "exact",
    final: str = "denoise",
) -> Table:
    """Exponential Adams table: predictor of ``order`` 1-4, optionally corrected when the next evaluation arrives.

    The order of a row is lowered where the history is short or where extrapolation would amplify errors.

    Args:
        path: the process; needed for the clock ``time`` only.
        nodes: of the grid.
        order: 1 to 4.
        corrector: True redoes each step with the new evaluation and ``order`` old ones (UniC, order + 1); an integer is
            the number of nodes of that redone step, the new one first (SA-Solver's corrector order).  No model
            evaluation.
        data_std, clock, rule: see :class:`Method`.
        tau: one noise level, or one per step.
        final: what a step to sigma = 0 does.  ``denoise`` returns D, noise free; ``corrected`` moves D with the
            corrected state as far as D of N(0, data_std^2) data would; ``exact`` is the limit of the formula (needs
            data_std > 0), ``second_order`` its two-node version.

    Returns:
        One row an evaluation.

    Raises:
        ValueError: for an order, clock, rule, tau or final that does not exist or does not fit.
    """
    check_solver(order, data_std, clock, rule, final)
    taus = _noise_levels(tau, len(nodes) - 1)
    method = Method(path, float(data_std), clock, rule)
    points = points_of(nodes)
    rows: list[Row] = []
    # A correction redoes the step before with the evaluation that has just arrived.  The state from which that step
    # started is gone, but it is not needed: the corrected state is the current one plus the difference of the two
    # sets of weights on evaluations that are kept.  So a row carries it in its own weights, ahead of its prediction,
    # and a corrector costs neither an evaluation nor an operation.
    previous = np.zeros(0)  # weights that produced the current state, on F_{i-1}, F_{i-2}, ...
    for i, (start, end) in enumerate(itertools.pairwise(points)):
        if end.sigma == 0 and final in ("denoise", "corrected"):
            a, c, forward = _denoise(method, start, end)
        else:
            top = order if end.sigma > 0 else 1 + (final == "second_order")
            a, c, forward = _explicit(method, start, end, points[max(i - top + 1, 0) : i + 1][::-1], taus[i])
        b, correction = forward, 0.0
        if i and corrector and not (end.sigma == 0 and final == "denoise"):
            count = len(previous) + 1 if corrector is True else min(int(corrector), i + 1)
            redone = _implicit(method, points[max(i - count + 1, 0) : i + 1][::-1], points[i - 1], taus[i - 1])
            if redone is not None:  # the corrected state is x + sum (redone - previous) F
                b, correction = add_weights(b, a * add_weights(redone, -np.append(0.0, previous))), float(a * redone[0])
        row = Row(float(nodes.time[i]), start.alpha, start.sigma, a, _floats(b), c)
        expected = points[i - len(previous) : i][::-1]
        rows.append(_with_parts(method, row, expected, correction))
        previous = forward
    return Table(tuple(rows), float(data_std))


# name -> (evaluations per step, where the extra ones sit: None on the grid itself, else fractions of the step)
SINGLESTEP_METHODS: dict[str, tuple[int, tuple[float, ...] | None]] = {
    "heun": (2, (1.0,)),
    "2s": (2, (0.5,)),
    "3s": (3, (1 / 3, 2 / 3)),
    "grid2": (2, None),
    "grid3": (3, None),
}


def build_singlestep(
    path: Path | None,
    nodes: Nodes,
    *,
    method: str = "grid2",
    data_std: float = 0.0,
    clock: str = "log_snr",
    tau: float | Sequence[float] = 0.0,
    rule: str = "exact",
    final: str = "denoise",
) -> Table:
    """Single-step table: each step restarts from its anchor with the evaluations made inside it.

    ``grid2``, ``grid3``: consecutive grid nodes are the stages (DPM-Solver singlestep, arXiv:2206.00927, algorithm 2:
    as many evaluations as nodes).  ``heun``: predictor and trapezoid (Karras et al. 2022, algorithm 1); ``2s``, ``3s``:
    stages at log-SNR midpoint / thirds.  These put their extra evaluations into the table as rows of their own.

    The anchor is not stored: the noise-free state of the stage before is an affine function of it, which makes
    every row a row like any other (and Brownian increments add up).  A step is split at a stage from which it would
    amplify errors, and where tau changes: the state there is its next anchor.

    Args:
        path: the process; needed for stages between grid nodes and for the clock ``time``.
        nodes: of the grid.
        method: one of ``SINGLESTEP_METHODS``.
        data_std, clock, tau, rule, final: as in :func:`build_multistep`; tau per step of ``nodes``.

    Returns:
        One row an evaluation.

    Raises:
        ValueError: as :func:`build_multistep`, and where the path is needed and missing.
    """
    if method not in SINGLESTEP_METHODS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(SINGLESTEP_METHODS)}.")
    order, fractions = SINGLESTEP_METHODS[method]
    check_solver(order, data_std, clock, rule, final)
    taus = _noise_levels(tau, len(nodes) - 1)
    if fractions is not None:
        nodes, taus = insert_stages(path, nodes, fractions, taus)
    weigh = Method(path, float(data_std), clock, rule)
    points = points_of(nodes)
    rows: list[Row] = []
    for first, size in _groups(points, order):
        anchor, previous = first, np.zeros(0)
        for i in range(first, first + size):
            start, end, stages = points[i], points[i + 1], points[anchor : i + 1][::-1]
            weights = None
            # a stage at the end of the step feeds the noise it has just drawn back through a noise prediction
            feedback = taus[i] > 0 and start.log_snr == end.log_snr and math.isinf(weigh.data_std)
            if i > anchor and taus[i] == taus[anchor] and not feedback:
                weights = weigh.safe_weights(points[anchor], end, stages[::-1], taus[i], stages)
            if end.sigma == 0 and final in ("denoise", "corrected"):
                a, c, forward = _denoise(weigh, start, end)
            elif weights is None:  # the step is split: the state of this stage is the next anchor
                anchor, previous = i, np.zeros(0)
                a, c, forward = _explicit(weigh, start, end, [start], taus[i])
            else:
                (a, c), forward = linear_coefficients(start, end, data_std, taus[i]), weights[::-1]
            b = add_weights(forward, -a * np.append(0.0, previous))
            row = Row(float(nodes.time[i]), start.alpha, start.sigma, a, _floats(b), c)
            rows.append(_with_parts(weigh, row, points[i - len(previous) : i][::-1], 0.0))
            previous = forward
    return Table(tuple(rows), float(data_std))


def insert_stages(
    path: Path | None, nodes: Nodes, fractions: Sequence[float], taus: Sequence[float]
) -> tuple[Nodes, list[float]]:
    """Add an evaluation at each fraction (of log-SNR) of every step that ends at a finite log-SNR.

    Args:
        path: needed for stages between grid nodes.
        nodes: of the grid.
        fractions: of a step, increasing.
        taus: the noise level of each step.

    Returns:
        All nodes, and the noise level of the step that each evaluation belongs to.

    Raises:
        ValueError: where the path is needed and missing.
    """
    time, alpha, sigma, lam = nodes.time, nodes.alpha, nodes.sigma, nodes.log_snr
    out, levels = [], []
    for i in range(len(nodes) - 1):
        out.append([time[i], alpha[i], sigma[i]])
        levels.append(taus[i])
        for f in fractions if np.isfinite(lam[i : i + 2]).all() else ():
            levels.append(taus[i])
            if f == 1.0:
                out.append([time[i + 1], alpha[i + 1], sigma[i + 1]])
            else:
                if path is None:
                    raise ValueError("Stages between grid nodes need the path: pass it.")
                stage = (1 - f) * lam[i] + f * lam[i + 1]
                out.append([float(path.time(stage)), *map(float, path.alpha_sigma_of(stage))])
    out.append([time[-1], alpha[-1], sigma[-1]])
    return Nodes(*(np.array(column, np.float64) for column in zip(*out, strict=True))), levels


def tau_from_eta(eta: float, nodes: Nodes) -> list[float]:
    """The per-step tau of DDIM's eta: ``exp(-2 tau^2 h) = 1 - eta^2 (1 - exp(-2h))`` with h the step in log-SNR
    (Song et al. 2021, arXiv:2010.02502, eq. 16); eta = 1 is DDPM and Euler ancestral, tau = 1.

    Args:
        eta: 0 to 1.
        nodes: of the grid.

    Returns:
        One tau a step: the limits, eta at h = 0 and 0 at h = inf, where for eta < 1 the noise of a step from alpha = 0
        needs :func:`eta_from_zero_snr` too.
    """
    taus = []
    for step in np.diff(nodes.log_snr):
        if eta == 1 or step <= 0:
            taus.append(float(eta))
        else:
            taus.append(math.sqrt(max(-math.log1p(eta**2 * math.expm1(-2 * step)), 0.0) / (2 * step)))
    return taus


def eta_from_zero_snr(table: Table, eta: float, end: Point, data_std: float) -> Table:
    """DDIM's eta in a first step from alpha = 0, where tau tends to 0 and ``exp(-2 tau^2 h)`` to ``1 - eta^2``: the
    factor on the state is ``sqrt(1 - eta^2)`` times that of the ODE and the noise ``eta rho_t``, of all that is there.

    Args:
        table: of :func:`tau_from_eta`, its first row at alpha = 0.
        eta: 0 to 1.
        end: of the first step.
        data_std: the scale in ``rho_t``.

    Returns:
        The table with this first row; unchanged where its step ends at clean data.
    """
    if end.sigma == 0:
        return table
    first = table.rows[0]
    first = replace(first, a=first.a * math.sqrt(1 - eta**2), c=eta * math.hypot(data_std * end.alpha, end.sigma))
    return replace(table, rows=(first, *table.rows[1:]))


def _groups(points: Sequence[Point], order: int) -> list[tuple[int, int]]:
    """``(first, size)`` of each step's evaluations; a step from alpha = 0 or to sigma = 0 stands alone, being first
    order."""
    evaluations = len(points) - 1
    head, tail = int(points[0].alpha == 0 and evaluations > 1), int(points[-1].sigma == 0)
    full, rest = divmod(evaluations - head - tail, order)
    sizes = [1] * head + [order] * full + [rest] * (rest > 0) + [1] * tail
    return list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))


def check_solver(
    order: int,
    data_std: float = 0.0,
    clock: str = "log_snr",
    rule: str = "exact",
    final: str = "denoise",
    orders: Sequence[int] = (1, 2, 3, 4),
) -> None:
    """Raise ``ValueError`` for settings of :func:`build_multistep` that do not exist; ``orders``: those that do."""
    if order not in orders:
        raise ValueError(f"solver_order must be {', '.join(map(str, orders[:-1]))} or {orders[-1]}, not {order}.")
    if clock not in CLOCKS:
        raise ValueError(f"clock {clock!r} is unknown: use one of {', '.join(CLOCKS)}.")
    if rule not in ("exact", "midpoint"):
        raise ValueError(f"rule must be 'exact' or 'midpoint', not {rule!r}.")
    if final not in FINALS:
        raise ValueError(f"final {final!r} is unknown: use one of {', '.join(FINALS)}.")
    if not data_std >= 0:
        raise ValueError(f"data_std must be 0 or more (inf for noise prediction), not {data_std}.")


def check_tau(tau: float | Sequence[float]) -> None:
    """Raise ``ValueError`` unless the noise level, or each of several, lies between 0 and ``MAX_TAU``."""
    for value in np.ravel(np.asarray(tau, np.float64)):
        if not 0 <= value <= MAX_TAU:
            raise ValueError(f"tau must be a number from 0 to {MAX_TAU:g}, or one for each step, not {value:g}.")


def _noise_levels(tau: float | Sequence[float], steps: int) -> list[float]:
    """One noise level for each step."""
    check_tau(tau)
    taus = [float(tau)] * steps if np.ndim(tau) == 0 else [float(x) for x in tau]  # type: ignore[arg-type, union-attr]
    if len(taus) < steps:
        raise ValueError(f"tau has {len(taus)} values for {steps} steps: pass one number, or one for each step.")
    return taus[:steps]


def _explicit(
    method: Method, start: Point, end: Point, basis: Sequence[Point], tau: float
) -> tuple[float, float, np.ndarray]:
    """``(a, c, weights)`` of a step: weights of the longest safe prefix of ``basis`` (newest first)."""
    a, c = linear_coefficients(start, end, method.data_std, tau)
    if tau and method.stiffness(start, end, tau) > MAX_STIFFNESS:  # integrate D instead, which is bounded
        data = replace(method, data_std=0.0)
        a, c = linear_coefficients(start, end, 0.0, tau)
        k_x, k_f = convert((0.0, -1.0), DATA, start.alpha, start.sigma)
        weight = data.weights(start, end, basis[:1], tau)
        return a + float(weight[0]) * k_x, c, weight * k_f
    for count in range(len(basis), 1, -1):
        weights = method.safe_weights(start, end, basis[:count], tau, basis[:count])
        if weights is not None:
            return a, c, weights
    return a, c, method.weights(start, end, basis[:1], tau)


def _implicit(method: Method, nodes: Sequence[Point], start: Point, tau: float) -> np.ndarray | None:
    """Weights of the step from ``start`` redone with the evaluation at its end, on ``nodes`` (newest first: the end,
    ``start``, older ones) or the longest safe prefix of them; None where that is impossible."""
    end = nodes[0]
    stiffness = method.stiffness(start, end, tau)
    if stiffness > 1 or (stiffness and tau):  # feedback through the noise prediction
        return None
    for count in range(len(nodes), 1, -1):
        chosen = nodes[:count]
        weights = method.safe_weights(start, end, [start, end, *chosen[2:]], tau, chosen)
        if weights is not None and method.feedback(weights[1], end) <= MAX_FEEDBACK:
            weights[[0, 1]] = weights[[1, 0]]
            return weights
    if len(nodes) > 1:
        return None
    weights = method.weights(start, end, nodes, tau)
    return weights if method.feedback(weights[0], end) <= MAX_FEEDBACK else None


def _denoise(method: Method, start: Point, end: Point) -> tuple[float, float, np.ndarray]:
    """The row that returns ``end.alpha D``, without noise."""
    evaluation = evaluation_coefficients(method.data_std, start.alpha, start.sigma)
    k_x, k_f = convert(evaluation, DATA, start.alpha, start.sigma)
    return end.alpha * k_x, 0.0, np.array([end.alpha * k_f])


def _with_parts(method: Method, row: Row, expected: Sequence[Point], correction: float) -> Row:
    """The row with the parts of b that lean on earlier evaluations: see :class:`Row`.

    The weights of an interpolation add up to the weight of a constant, and those of a correction to 0: the sum of b is
    the weight of this row's evaluation alone.

    Args:
        expected: where the evaluations were made that the step before used, newest first.
        correction: the weight of the new evaluation in the correction of that step.
    """
    if len(row.b) == 1:
        return row
    at = [p.log_snr for p in (Point(row.alpha, row.sigma), *expected)]
    clock = clock_values(method.path, method.clock, np.array(at), method.data_std) if len(at) > 2 else np.zeros(2)
    gap = np.append(1.0, -basis_values(clock[:1], clock[1:])[:, 0])
    slope = np.array(row.b)
    slope[0] -= slope.sum()
    slope = add_weights(slope, -correction * gap) if correction else slope
    return replace(row, slope=_floats(slope), gap=_floats(gap), correction=correction)


def _floats(weights: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, weights))


def add_weights(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum of two weight vectors on the same history, newest first, the shorter one continued with zeros."""
    out = np.zeros(max(len(left), len(right)))
    out[: len(left)] += left
    out[: len(right)] += right
    return out
