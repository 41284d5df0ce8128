"""The noise law of ER-SDE (Cui et al. 2023, arXiv:2309.06169): ``phi(s) = s (e^(s^0.3) + 10)``.

The reverse SDE whose state decays as ``x_t = phi(s_t)/phi(s) x``: tau varies with the level,
``1 + tau^2 = d log phi / d log s``, and ``phi = s^(1 + tau^2)`` for a constant one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffusers_sde.weights import Point, gauss_rule

_NEGLIGIBLE = 40.0  # of log-SNR: what lies further back has decayed below rounding


def _log_gain(lam: np.ndarray) -> np.ndarray:
    """``log(phi/s)``."""
    return np.logaddexp(np.exp(-0.3 * lam), math.log(10))


def decay(start: Point, end: Point) -> tuple[float, float]:
    """``(a, c)`` of a step: ``alpha_t phi_t/(alpha phi)`` and ``alpha_t sqrt(s_t^2 - s^2 (phi_t/phi)^2)``."""
    if start.alpha == 0 or end.sigma == 0:
        return 0.0, end.sigma
    loss = float(_log_gain(np.array(end.log_snr)) - _log_gain(np.array(start.log_snr)))
    ratio = end.sigma / start.sigma  # alpha_t s_t / (alpha s)
    return ratio * math.exp(loss), end.sigma * math.sqrt(max(-math.expm1(2 * loss), 0.0))


def weights(start: Point, end: Point, basis: Sequence[Point]) -> np.ndarray:
    """Weights of evaluations of D in a step, by interpolation in s: ``alpha_t Int phi_t/phi (1 + tau^2) L_j dlambda``.

    Args:
        start, end: of the step, ``end`` at a positive noise level.
        basis: where the k evaluations were made.

    Returns:
        (k,), in the order of ``basis``.
    """
    high = end.log_snr
    lam, w = gauss_rule(max(start.log_snr, high - _NEGLIGIBLE), high)
    power = np.exp(-0.3 * lam)
    rate = 1 + 0.3 * power / (1 + 10 * np.exp(-power))
    w = end.alpha * w * rate * np.exp(lam - high + _log_gain(np.array(high)) - _log_gain(lam))
    s, at = np.exp(-lam), [math.exp(-p.log_snr) for p in basis]
    shares = [[(s - o) / (me - o) for k, o in enumerate(at) if k != j] for j, me in enumerate(at)]
    return np.array([np.prod([np.ones_like(s), *factors], axis=0) @ w for factors in shares])
