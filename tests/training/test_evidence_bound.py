"""When a training loss is an evidence bound, against the exact log-likelihood of a mixture.

Kingma et al. 2021: arXiv:2107.00630.  Kingma & Gao 2023: arXiv:2303.00848.  Lai et al.: arXiv:2510.21890, chapters 2
and 6.  Expectations over noise are Gauss-Hermite rules, those over times the training's own draws at equal quantiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import norm

from diffusers_sde.analytic import GaussianMixture
from diffusers_sde.dynamics import drift_and_diffusion, reverse_drift
from diffusers_sde.paths import VarianceExploding
from diffusers_sde.prediction import convert
from diffusers_sde.training.objectives import draw_times, loss_weights, prediction_targets, regression_loss

PATH = VarianceExploding(0.02, 30.0, 1.0)
DATA = GaussianMixture([0.3, 0.7], [[-1.0], [1.5]], [0.09, 0.64])
LEVELS = 400
NODES, MASS = np.polynomial.hermite_e.hermegauss(100)
MASS = MASS / MASS.sum()

Denoise = Callable[[torch.Tensor, float, float], torch.Tensor]


@functools.cache
def times() -> tuple[np.ndarray, np.ndarray]:
    return draw_times(PATH, "uniform", (np.arange(LEVELS) + 0.5) / LEVELS)


def noised(x: float, t: float) -> tuple[torch.Tensor, float, float]:
    """``alpha x + sigma eps`` at the nodes of the rule (n, 1)."""
    alpha, sigma = (float(v) for v in PATH.alpha_sigma(t))
    return torch.from_numpy(alpha * x + sigma * NODES)[:, None], alpha, sigma


def losses(x: float, denoise: Denoise, kind: str, weighting: str) -> np.ndarray:
    """The training loss of each drawn time on the datum x, in expectation over the noise."""
    t, density = times()
    alpha, sigma = PATH.alpha_sigma(t)
    a, b = prediction_targets(PATH, kind, alpha, sigma)
    weights = loss_weights(weighting, PATH, kind, alpha, sigma, log_snr_density=density)
    found = []
    for i, time in enumerate(t):
        z, al, si = noised(x, float(time))
        k_x, k_d = convert((1.0, 0.0), (a[i], b[i]), al, si)
        target = torch.from_numpy(a[i] * x + b[i] * NODES)[:, None]
        each = regression_loss(k_x * z + k_d * denoise(z, al, si), target, torch.full((len(z),), weights[i]))
        found.append(MASS @ each.numpy())
    return np.array(found)


def divergence(x: float, t: float, model: GaussianMixture = DATA) -> float:
    """``KL(q(z_t|x) | p_t)``."""
    z, alpha, sigma = noised(x, t)
    return float(MASS @ (norm.logpdf(NODES) - math.log(sigma) - model.log_density(z, alpha, sigma).numpy()))


def reconstruction(x: float, model: GaussianMixture = DATA) -> float:
    """``-E log p(x | z)`` at the cleanest level, with the exact posterior of x given z."""
    z, alpha, sigma = noised(x, PATH.cleanest)
    one, datum = torch.eye(1, dtype=torch.float64), torch.tensor([[x]], dtype=torch.float64)
    logs = [float(model.posterior(one, v / alpha, sigma / alpha).log_density(datum)) for v in z]
    return -float(MASS @ np.array(logs))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("x", [-1.1, 0.3, 2.4])
def test_the_likelihood_weighted_loss_is_the_evidence_bound(x: float, kind: str) -> None:
    """``-log p(x) = E[-log p(x|z_0)] + E_t w E|m - target|^2 + KL(q(z_T|x)|p_T)``: with the exact denoiser the bound is
    the log-likelihood of each datum, in whatever is predicted (Kingma et al. 2021, eq. 11 and 18; Lai et al., chapter
    2)."""
    loss = losses(x, DATA.posterior_mean, kind, "likelihood").mean()
    bound = reconstruction(x) + loss + divergence(x, PATH.noisiest)
    assert loss > 1
    assert bound == pytest.approx(-float(DATA.log_density(torch.tensor([[x]], dtype=torch.float64))), abs=1e-3)


def test_the_evidence_bound_is_that_of_the_networks_own_law() -> None:
    """A network that is right about other data has their log-likelihood as its bound (Lai et al., chapter 2)."""
    other, x = GaussianMixture([0.5, 0.5], [[-0.4], [0.8]], [0.3, 0.2]), 1.1
    loss = losses(x, other.posterior_mean, "epsilon", "likelihood").mean()
    bound = reconstruction(x, other) + loss + divergence(x, PATH.noisiest, other)
    assert bound == pytest.approx(-float(other.log_density(torch.tensor([[x]], dtype=torch.float64))), abs=1e-3)


@pytest.mark.parametrize("drift", [0.0, 0.5])
@pytest.mark.parametrize("x", [-1.5, 0.0, 0.7, 2.0])
def test_the_evidence_bound_of_a_network_that_fits_no_law_lies_below_its_log_likelihood(x: float, drift: float) -> None:
    """A denoiser that takes the data for N(0, c^2) with another c at each level: its reverse SDE ends in a Gaussian law
    of known variance, a decoder removes the last noise, and the bound is strictly below the log-likelihood of
    that; with one c they are equal (Lai et al., chapter 2)."""

    def scale(sigma: float) -> float:
        return 0.6 + drift * sigma / (1 + sigma)

    def denoise(z: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        return z * scale(sigma) ** 2 / (scale(sigma) ** 2 + sigma**2)

    def rate(t: float, v: np.ndarray) -> np.ndarray:
        sigma = float(PATH.alpha_sigma(t)[1])
        slope = reverse_drift(PATH, t, 1.0, -1 / (scale(sigma) ** 2 + sigma**2))
        return np.array(2 * slope * v - drift_and_diffusion(PATH, t)[1])

    low, high = (float(PATH.alpha_sigma(t)[1]) for t in (PATH.cleanest, PATH.noisiest))
    start = scale(high) ** 2 + high**2
    variance = solve_ivp(rate, (PATH.noisiest, PATH.cleanest), [start], rtol=1e-9, method="LSODA").y[0, -1]
    gain = scale(low) ** 2 / (scale(low) ** 2 + low**2)  # the decoder: N(gain z, gain low^2)
    log_likelihood = norm.logpdf(x, scale=math.sqrt(gain**2 * variance + gain * low**2))
    decoder, prior = (GaussianMixture([1.0], [[0.0]], [scale(sigma) ** 2]) for sigma in (low, high))
    loss = losses(x, denoise, "epsilon", "likelihood").mean()
    bound = -reconstruction(x, decoder) - loss - divergence(x, PATH.noisiest, prior)
    if drift:
        assert log_likelihood - 0.1 < bound < log_likelihood - 1e-3
    else:
        assert bound == pytest.approx(log_likelihood, abs=2e-4)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "soft_min_snr", "edm"])
def test_a_monotone_weighting_is_an_evidence_bound(weighting: str) -> None:
    """Where the weight of the noise error falls with log-SNR, the loss is ``sum_t (w_t - w_(t-)) KL(q(z_t|x)|p_t)``
    with weights that are not negative: the bounds of data noised to random levels (Kingma & Gao 2023, theorem 1; Lai et
    al., chapter 6). Weights are those of the loss, its times included."""
    x = 0.3
    t, density = times()
    alpha, sigma = PATH.alpha_sigma(t)
    on_data = loss_weights(weighting, PATH, "sample", alpha, sigma)
    weight = on_data * (sigma / alpha) ** 2 * density  # of E|eps - eps_theta|^2 d log_snr
    order = np.argsort(PATH.log_snr(t))
    between = np.interp(np.arange(LEVELS - 1) + 0.5, np.arange(LEVELS), t[order])
    falls = -np.diff(weight[order])
    assert np.all(falls >= -1e-12)
    ends = [PATH.cleanest, PATH.noisiest]
    top, bottom = (float(weight[order][k]) * divergence(x, end) for k, end in zip((-1, 0), ends, strict=True))
    inner = sum(fall * divergence(x, float(s)) for fall, s in zip(falls, between, strict=True) if fall)
    loss = losses(x, DATA.posterior_mean, "sample", weighting).mean()
    assert loss == pytest.approx(top - bottom + inner, rel=2e-3)


def test_a_weighting_that_rises_is_no_evidence_bound() -> None:
    """sigma_sqrt on the flow velocity grows towards clean data: some of the weights of the statement above are
    negative."""
    t, density = times()
    alpha, sigma = PATH.alpha_sigma(t)
    on_data = loss_weights("sigma_sqrt", PATH, "sample", alpha, sigma)
    weight = (on_data * (sigma / alpha) ** 2 * density)[np.argsort(PATH.log_snr(t))]
    assert np.diff(weight).min() < 0 < np.diff(weight).max()
