"""Instantaneous dynamics of a path: drift, diffusion, velocity, reverse SDE.

Knows the continuous equations (Fu & Wang, arXiv:2605.22586, setup and sections 1-3; Song et al. 2021,
arXiv:2011.13456) and the conversion from a prediction to a score.  Knows nothing of discretisation: use it with an
external ODE or SDE solver, in likelihoods, and in theory tests.  Time derivatives are with respect to the path's t.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusers_sde.paths import Path


def drift_and_diffusion(path: Path, t: Any) -> tuple[np.ndarray, np.ndarray]:
    """``(f, g^2)`` of the forward SDE ``dx = f x dt + g dw``: ``f = d log alpha / dt``,
    ``g^2 = d sigma^2/dt - 2 f sigma^2 = -2 sigma^2 d log_snr/dt`` (Fu & Wang, setup).

    Args:
        path: the forward process.
        t: times, a number or an array.

    Returns:
        ``(f, g^2)``, of t's shape; where t runs against the noise (inverted flow matching) the signs are those of the
        process in noise order.  At alpha = 0 they are their limits ``(-inf, inf)``, at sigma = 0 ``g^2`` is 0; on the
        last interval of a zero-SNR path, where the angle is linear in t, they are finite and grow like 1/alpha.

    Raises:
        ValueError: if ``g^2 < 0``: such a path is not a diffusion.
    """
    sign = 1.0 if path.noisiest >= path.cleanest else -1.0
    _, sigma = path.alpha_sigma(t)
    with np.errstate(invalid="ignore"):
        g2 = np.where(sigma == 0, 0.0, -2 * sign * sigma**2 * path.d_log_snr(t))
    f = sign * path.d_log_alpha(t)
    if np.any(g2 < 0):
        raise ValueError("g^2 < 0: the log-SNR of this path increases with t, so it is not a noising process.")
    return f, g2


def conditional_score(path: Path, t: Any, x: Any, x0: Any) -> Any:
    """The score of the forward kernel, ``grad log p(x_t | x_0) = (alpha x_0 - x)/sigma^2`` (Fu & Wang, section 1).

    Args:
        path: the forward process.
        t: the time; sigma > 0.
        x: the state, any shape.
        x0: the clean sample, of x's shape.

    Returns:
        The score, of x's shape.
    """
    alpha, sigma = path.alpha_sigma(t)
    return (alpha * x0 - x) / sigma**2


def velocity(path: Path, t: Any, x: Any, score: Any) -> Any:
    """Probability-flow velocity ``u = f x - g^2/2 score`` (Fu & Wang, sections 1-3).

    Args:
        path: the forward process.
        t: the time.
        x: the state, any shape.
        score: ``grad log p_t(x)``, of x's shape.

    Returns:
        ``dx/dt`` in noise order, of x's shape.

    Raises:
        ValueError: as :func:`drift_and_diffusion`.
    """
    f, g2 = drift_and_diffusion(path, t)
    return f * x - 0.5 * g2 * score


def reverse_drift(path: Path, t: Any, x: Any, score: Any, tau: float = 1.0) -> Any:
    """Drift of ``dx = [f x - (1 + tau^2)/2 g^2 score] dt + tau g dw`` run backwards in time (Fu & Wang, section 3);
    tau = 0 is the probability-flow ODE, tau = 1 the reverse SDE; every tau has the same marginals.

    Args:
        path, t, x, score: as in :func:`velocity`.
        tau: the noise level.

    Returns:
        The drift, of x's shape; the noise is ``tau g``.

    Raises:
        ValueError: as :func:`drift_and_diffusion`.
    """
    f, g2 = drift_and_diffusion(path, t)
    return f * x - 0.5 * (1 + tau**2) * g2 * score


def tweedie(path: Path, t: Any, x: Any, score: Any) -> Any:
    """``E[x_0 | x_t] = (x + sigma^2 score)/alpha`` (Tweedie's formula; Efron 2011).

    Args:
        path, t, x, score: as in :func:`velocity`; alpha > 0.

    Returns:
        The data prediction, of x's shape.
    """
    alpha, sigma = path.alpha_sigma(t)
    return (x + sigma**2 * score) / alpha
