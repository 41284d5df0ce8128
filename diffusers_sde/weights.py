"""How an exponential step weighs the evaluations it has: the linear part exactly, the rest by interpolation.

At half log-SNR ``lambda`` (``s = sigma/alpha``, ``r^2 = data_std^2 + s^2``, ``A = 1 + tau^2``, ``xh = x/alpha``,
``D = E[x_0|x_t]``)

    F = (D - data_std^2 xh / r^2) r / s
    xh_t = (r_t/r_s)^A xh_s + A sum_j F_j Int_{lambda_s}^{lambda_t} (r_t/r_u)^A (s_u/r_u) L_j(u) dlambda_u
           + r_t sqrt(1 - (r_t/r_s)^(2 tau^2)) z

with ``L_j`` the Lagrange basis on earlier evaluations in the chosen clock.  The update is exact in law for
``x_0 ~ N(0, data_std^2 I)``.  data_std = 0 is data prediction (DPM-Solver++, Lu et al. arXiv:2211.01095; with tau
SA-Solver, Xue et al. arXiv:2309.05019), data_std = inf noise prediction (DPM-Solver, arXiv:2206.00927; DEIS, Zhang &
Chen arXiv:2204.13902; then F is ``-eps``), variance preserving with data_std = 1 minus the velocity v in the TrigFlow
angle (Lu & Song arXiv:2410.11081).

Knows one step between two points of a path.  Floats on the host only; knows no grid, no order and no table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_sde.paths import Path

CLOCKS = ("log_snr", "sigma", "angle", "time")
_GAUSS = np.polynomial.legendre.leggauss(24)
_PANEL = 2.0  # longest stretch of log-SNR for one Gauss rule
_NEGLIGIBLE = 40.0  # e^-40 is below rounding: where an infinite step may be cut


@dataclass(frozen=True)
class Point:
    """A place on a path: ``alpha``, ``sigma`` and their half log-SNR."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha) - math.log(self.sigma)


def evaluation_coefficients(data_std: float, alpha: float, sigma: float) -> tuple[float, float]:
    """``(A, B)`` with ``F = A x_0 + B eps``: ``(sigma, -data_std^2 alpha)/rho``, ``rho^2 = data_std^2 alpha^2 +
    sigma^2``; ``(1, 0)`` at data_std = 0 and, rescaled, ``(0, -1)`` at data_std = inf.

    Args:
        data_std: the data scale, 0 to inf.
        alpha, sigma: of the state.

    Returns:
        ``(A, B)``.
    """
    if data_std == 0:
        return 1.0, 0.0
    if math.isinf(data_std):
        return 0.0, -1.0
    rho = math.hypot(data_std * alpha, sigma)
    return sigma / rho, -(data_std**2) * alpha / rho


def linear_coefficients(start: Point, end: Point, data_std: float, tau: float) -> tuple[float, float]:
    """The linear part of a step, ``a = (alpha_t/alpha_s) (r_t/r_s)^A`` and ``c = alpha_t r_t sqrt(1 - (r_t/r_s)^(2
    tau^2))`` of the module docstring.

    Args:
        start, end: of the step.
        data_std: the data scale, 0 to inf.
        tau: the noise level.

    Returns:
        ``(a, c)``: the factor on the state and the standard deviation of the noise.

    Raises:
        ValueError: for noise prediction (data_std = inf) from alpha = 0.
    """
    ratio = end.sigma * start.alpha, end.alpha * start.sigma  # s_t / s_s as a quotient, free of infinities
    if math.isinf(data_std):
        if start.alpha == 0:
            raise ValueError(
                "data_std=inf (noise prediction) cannot start at zero SNR: use a finite data_std or a smaller first t."
            )
        gap = (start.sigma / start.alpha) ** 2 - (end.sigma / end.alpha) ** 2
        return end.alpha / start.alpha, end.alpha * abs(tau) * math.sqrt(max(gap, 0.0))
    rho_s, rho_t = (math.hypot(data_std * p.alpha, p.sigma) for p in (start, end))
    if data_std > 0:
        ratio = rho_t * start.alpha, rho_s * end.alpha
    shrink = ratio[0] / ratio[1] if ratio[1] else 1.0  # r_t / r_s
    scale = rho_t / rho_s if rho_s else 1.0
    if not (start.alpha and end.alpha and rho_s):
        return scale * shrink ** (tau**2), rho_t * math.sqrt(max(1 - shrink ** (2 * tau**2), 0.0))
    # 1 - shrink^(2 tau^2) without cancellation: the noise of a short step at a large data_std
    gap = ((end.sigma / end.alpha) ** 2 - (start.sigma / start.alpha) ** 2) * (start.alpha / rho_s) ** 2
    log_shrink = 0.5 * math.log1p(gap) if gap > -1 else -math.inf
    lost = -math.expm1(2 * tau**2 * log_shrink) if tau else 0.0
    return scale * shrink ** (tau**2), rho_t * math.sqrt(max(lost, 0.0))


def quadrature(start: Point, end: Point, data_std: float, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """A Gauss rule for the integral of the module docstring: ``sum_u w_u L(lambda_u)`` is the weight in ``x_t`` of an
    evaluation with Lagrange basis L.

    Args:
        start, end: of the step.
        data_std: the data scale, 0 to inf.
        tau: the noise level.

    Returns:
        ``(lambda_u, w_u)``, each (nodes,) float64; the factor ``alpha_t`` is in the weights.
    """
    A = 1 + tau**2
    low, high = start.log_snr, end.log_snr
    if data_std == 0:
        if high == math.inf:  # the whole weight sits at the end: only constants are ever integrated here
            return np.array([low if math.isfinite(low) else 0.0]), np.array([end.alpha])
        lam, w = _gauss(max(low, high - _NEGLIGIBLE / A), high)
        return lam, end.alpha * A * w * np.exp(-A * (high - lam))
    # the kernel rises like e^(A lambda) up to the log-SNR of the data scale and falls like e^-lambda from there on
    places = [lam for lam in (low, high, -math.log(data_std)) if lam not in (-math.inf, math.inf)]
    span = min(places) - _NEGLIGIBLE / A, max(places) + _NEGLIGIBLE
    lam, w = _gauss(*(min(max(end_of_step, span[0]), span[1]) for end_of_step in (low, high)))
    if math.isinf(data_std):
        return lam, end.alpha * A * w * np.exp(-lam)
    rho_t = math.hypot(data_std * end.alpha, end.sigma)
    # tan(theta) = e^-lambda / c, so d theta = -sin cos d lambda
    tan = np.exp(-lam) / data_std
    cos = 1 / np.sqrt(1 + tan**2)
    w = rho_t / data_std * A * w * cos**2 * tan
    return lam, w * (cos * rho_t / (data_std * end.alpha)) ** (tau**2) if tau else w


def _gauss(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """A composite rule on panels of equal length, from ``low`` to ``high`` in either direction."""
    x, w = _GAUSS
    panels = max(1, math.ceil(abs(high - low) / _PANEL))
    edges = np.linspace(low, high, panels + 1)
    half = (high - low) / panels / 2
    return ((edges[:-1] + half)[:, None] + half * x).ravel(), np.tile(half * w, panels)


def clock_values(path: Path | None, clock: str, log_snr: np.ndarray, data_std: float) -> np.ndarray:
    """The coordinate in which evaluations are interpolated: ``log_snr``, ``sigma`` (s), ``angle``
    (``atan(s / data_std)``, ``atan(s)`` at data_std 0 and inf) or ``time``.

    Args:
        path: the forward process; needed for ``time`` only.
        clock: one of ``CLOCKS``.
        log_snr: half log-SNRs, an array of any shape.
        data_std: the data scale.

    Returns:
        The coordinates, of log_snr's shape.

    Raises:
        ValueError: for an unknown clock, and for ``time`` without a path.
    """
    if clock == "log_snr":
        return log_snr
    s = np.exp(-log_snr)
    if clock == "sigma":
        return s
    if clock == "angle":
        return np.arctan(s / (data_std if 0 < data_std < math.inf else 1.0))
    if clock == "time" and path is not None:
        return path.time(log_snr)
    raise ValueError(f"clock {clock!r} is unknown: use one of {', '.join(CLOCKS)}.")


def lagrange_weights(
    path: Path | None, start: Point, end: Point, basis: Sequence[Point], *, data_std: float, clock: str, tau: float
) -> np.ndarray:
    """Weights of a step by interpolation of the evaluations, exact up to quadrature.

    Args:
        path: the forward process; needed for the clock ``time`` only.
        start, end: of the step.
        basis: where the k evaluations were made, distinct in the clock.
        data_std: the data scale.
        clock: see :func:`clock_values`.
        tau: the noise level.

    Returns:
        (k,), in the order of ``basis``.
    """
    lam, w = quadrature(start, end, data_std, tau)
    if len(basis) == 1:
        return np.array([w.sum()])
    u = clock_values(path, clock, lam, data_std)
    at = clock_values(path, clock, np.array([p.log_snr for p in basis]), data_std)
    return basis_values(u, at) @ w


def basis_values(u: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The Lagrange basis on the nodes ``at`` (k,), distinct, at the coordinates ``u`` (m,): (k, m)."""
    others = [np.delete(at, j) for j in range(len(at))]
    return np.array([np.prod((u - o[:, None]) / (me - o)[:, None], axis=0) for me, o in zip(at, others, strict=True)])


def midpoint_weights(
    path: Path | None, start: Point, end: Point, basis: Sequence[Point], *, data_std: float, tau: float
) -> np.ndarray:
    """The ``midpoint`` rule of DPM-Solver++ 2M and UniPC: the slope of F in log-SNR enters as if the kernel were flat,
    ``total (F_0 + h/2 F')``.  Second order like the exact weights, with another error constant (Lu et al.
    arXiv:2211.01095, algorithm 2).

    Args:
        path, start, end, data_std, tau: as in :func:`lagrange_weights`.
        basis: where the two evaluations were made, that of ``start`` first.

    Returns:
        (2,), in the order of ``basis``.
    """
    total = lagrange_weights(path, start, end, basis[:1], data_std=data_std, clock="log_snr", tau=tau)[0]
    slope = 0.5 * (end.log_snr - start.log_snr) / (basis[1].log_snr - basis[0].log_snr)
    return np.array([total * (1 - slope), total * slope])
