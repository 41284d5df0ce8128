r"""Steps of a reverse chain whose rates are held: tau-leaping, its second-order correction, hitting times, remasking.

Knows rates and laws of single positions as tensors (..., S).  Knows no network and no schedule but survival
probabilities; the steps of ancestral sampling stand in :mod:`.processes`.
"""

from __future__ import annotations

import math

import torch


def log_odds(alpha: float) -> float:
    """``log(alpha/(1 - alpha))``, the clock of leaps, in which the forward rate is ``1 - alpha`` and the reverse rates
    of masked and uniform noise are finite at both ends: what the log-SNR is to Gaussian noise."""
    return math.log(alpha) - math.log1p(-alpha)


def survival(clock: float) -> float:
    """The inverse of :func:`log_odds`."""
    return 1 / (1 + math.exp(-clock))


def tau_leap(x: torch.Tensor, rates: torch.Tensor, duration: float) -> torch.Tensor:
    """The law (..., S) of each position after ``duration`` if the rates at which it jumps to other states stay what
    they are: it stays with probability ``exp(-sum rates duration)`` (Campbell et al. 2022, arXiv:2205.14987, section
    4.3; first order).

    Args:
        x: states (...).
        rates: to each state (..., S); that to the state itself is ignored.
        duration: of the leap.
    """
    here = torch.nn.functional.one_hot(x, rates.shape[-1]).to(rates)
    rates = rates * (1 - here)
    total = rates.sum(-1, keepdim=True)
    jump = -torch.expm1(-total * duration)
    return (1 - jump) * here + jump * rates / total.clamp(min=1e-300)


def trapezoidal_rates(first: torch.Tensor, second: torch.Tensor, theta: float) -> torch.Tensor:
    r"""Rates of the second stage of a theta-trapezoidal step: extrapolated over its rest, and not negative.

    The first stage leaps the share theta of the step with ``first``; from there the rest is leapt with ``(a_1 second -
    a_2 first)_+``, ``a_1 = 1/(2 theta (1 - theta))``, ``a_2 = a_1 - 1``: second order (Ren et al. 2025,
    arXiv:2502.00234, algorithm 2) where the rates change too little for the positive part to act.

    Args:
        first: rates at the beginning of the step (..., S).
        second: at its intermediate state and time.
        theta: in (0, 1).
    """
    a_1 = 1 / (2 * theta * (1 - theta))
    return (a_1 * second - (a_1 - 1) * first).clamp(min=0)


def first_hitting(masks: torch.Tensor, alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    r"""The survival probability at which the next of ``masks`` masked tokens is unmasked: ``1 - (1 - alpha) u^{1/n}``
    (Zheng et al. 2024, arXiv:2409.02908, proposition 4.1); which one it is is uniform, and independent of the time.

    Args:
        masks: their number n (...), at least 1.
        alpha: now (...).
        u: uniform in (0, 1).

    Returns:
        (...).
    """
    return 1 - (1 - alpha) * u ** (1 / masks)


def remasking_probability(strength: float, alpha_t: float, alpha_s: float) -> float:
    r"""The probability that a token is masked again in a step, ``strength`` times the largest possible one,
    ``min(1, (1 - alpha_s)/alpha_t)`` (Wang et al. 2025, arXiv:2503.00307, equation 6 and section 4.1)."""
    return strength * min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 0.0


def unmasking_probability(alpha_t: float, alpha_s: float, remasking: float = 0.0) -> float:
    r"""The probability that a mask becomes a token in a step, ``(alpha_s - (1 - sigma) alpha_t)/(1 - alpha_t)``: with
    tokens masked again with probability sigma, every such step leaves the marginals ``alpha_s delta_{x_0} + (1 -
    alpha_s) delta_mask`` (Wang et al. 2025, arXiv:2503.00307, equation 5)."""
    return (alpha_s - (1 - remasking) * alpha_t) / (1 - alpha_t)
