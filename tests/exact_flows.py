"""The probability-flow ODE of mixtures to many digits, by a method that shares nothing with the package's."""

from __future__ import annotations

import math

import torch

from diffusers_sde import GaussianMixtureModel


def exact_flow(model: GaussianMixtureModel, x: torch.Tensor, steps: int = 300) -> torch.Tensor:
    """Where the flow carries states x (N, ...) of the noisiest training time: classical Runge-Kutta of order 4 on
    ``d(x/alpha)/d lambda = E[x_0|x] - x/alpha``, from there (from lambda = -9 where that is alpha = 0, up to which x is
    pure noise) to lambda = 12, where what is left of the noise is 6e-6."""
    path = model.path
    first = float(path.log_snr(path.noisiest))
    start = max(first, -9.0)
    alpha, sigma = (float(v) for v in path.alpha_sigma_of(start))
    state = x / alpha if first == start else x * sigma / alpha + model.posterior_mean(x * sigma, alpha, sigma)

    def slope(state: torch.Tensor, log_snr: float) -> torch.Tensor:
        alpha, sigma = (float(v) for v in path.alpha_sigma_of(log_snr))
        return model.posterior_mean(state * alpha, alpha, sigma) - state

    h = (12.0 - start) / steps
    for i in range(steps):
        at = start + i * h
        k1 = slope(state, at)
        k2 = slope(state + h / 2 * k1, at + h / 2)
        k3 = slope(state + h / 2 * k2, at + h / 2)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(state + h * k3, at + h))
    assert math.isfinite(float(state.sum()))
    return state
