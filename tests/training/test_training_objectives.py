"""One regression: the objective's axes do not move its minimiser, and each weight is its published formula.

Fu & Wang: arXiv:2605.22586.  Lai et al.: arXiv:2510.21890.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import COSINE, LINEAR, SD, vp
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import truncnorm

from diffusers_sde.paths import FlowMatching, Path, VarianceExploding
from diffusers_sde.prediction import PREDICTION_TYPES, convert, prediction_coefficients
from diffusers_sde.training.ema import PowerEMA, gamma_of_width
from diffusers_sde.training.objectives import (
    LOSS_WEIGHTINGS,
    TIME_SAMPLINGS,
    check_objective,
    draw_times,
    loss_weights,
    prediction_targets,
    regression_loss,
)

ZERO_SNR = vp({**SD, "rescale_betas_zero_snr": True})
PATHS: dict[str, Path] = {
    "vp": vp(LINEAR),
    "cosine": vp(COSINE),
    "ve": VarianceExploding(0.01, 50.0, 1.0),
    "edm": VarianceExploding(0.002, 80.0, 0.5),
    "flow": FlowMatching(shift=3.0),
}
MEAN, STD = 0.3, 0.7  # of the Gaussian data


def midpoints(n: int) -> np.ndarray:
    return (np.arange(n) + 0.5) / n


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_the_minimiser_of_every_objective_is_the_same_score(name: str, kind: str, weighting: str) -> None:
    """Lai et al., chapter 6, and Fu & Wang, section 4: the weighted least-squares fit of each target by affine
    functions of x_t, on Gaussian data, where the minimiser is affine, converts to the score of N(alpha m, alpha^2 c^2 +
    sigma^2)."""
    path = PATHS[name]
    t, density = draw_times(path, "uniform", np.array([0.1, 0.35, 0.6, 0.85]))
    alpha, sigma = path.alpha_sigma(t)
    a, b = prediction_targets(path, kind, alpha, sigma)
    weights = loss_weights(weighting, path, kind, alpha, sigma, log_snr_density=density)
    assert np.all(weights > 0) and np.all(np.isfinite(weights))
    nodes, quadrature = np.polynomial.hermite_e.hermegauss(20)
    x0, eps = (v.ravel() for v in np.meshgrid(MEAN + STD * nodes, nodes))
    mass = np.outer(quadrature, quadrature).ravel() / quadrature.sum() ** 2
    for i in range(len(t)):
        x, target = alpha[i] * x0 + sigma[i] * eps, a[i] * x0 + b[i] * eps
        root = np.sqrt(weights[i] * mass)
        slope, offset = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1) * root[:, None], target * root, rcond=None)[0]
        k_x, k_m = convert((a[i], b[i]), prediction_coefficients("score", alpha[i], sigma[i]), alpha[i], sigma[i])
        at = np.array([-1.3, 0.0, 2.1])
        score = k_x * at + k_m * (slope * at + offset)
        exact = (alpha[i] * MEAN - at) / (alpha[i] ** 2 * STD**2 + sigma[i] ** 2)
        np.testing.assert_allclose(score, exact, rtol=1e-6, atol=1e-9 / sigma[i])


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_published_weight_of_each_prediction(gamma: float) -> None:
    """Hang et al. 2023, arXiv:2303.09556: min(SNR, g)/SNR on eps, min(SNR, g) on x_0, min(SNR, g)/(SNR + 1) on v."""
    path = vp(LINEAR)
    alpha, sigma = path.alpha_sigma(np.arange(0, 1000, 37.0))
    snr = (alpha / sigma) ** 2
    least = np.minimum(snr, gamma)
    for kind, formula in {"epsilon": least / snr, "sample": least, "v_prediction": least / (snr + 1)}.items():
        mine = loss_weights("min_snr", path, kind, alpha, sigma, snr_gamma=gamma)
        np.testing.assert_allclose(mine, formula, rtol=1e-9)


@pytest.mark.parametrize("weighting", [w for w in LOSS_WEIGHTINGS if w != "likelihood"])
@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction", "sample"])
def test_weights_are_finite_at_zero_snr(weighting: str, kind: str) -> None:
    """diffusers' examples divide by the SNR there and train on NaN (arXiv:2305.08891 rescales it to zero)."""
    alpha, sigma = ZERO_SNR.alpha_sigma(np.array([999.0]))
    assert alpha[0] == 0
    assert np.isfinite(loss_weights(weighting, ZERO_SNR, kind, alpha, sigma)).all()


@pytest.mark.parametrize("data_scale", [0.5, 1.0, 2.0])
def test_edm_weight_is_the_inverse_of_c_out_squared(data_scale: float) -> None:
    """Karras et al. 2022, table 1: lambda(sigma) c_out^2 = 1 with the path's own sigma_data, so the weight of the raw
    network output is 1."""
    path = VarianceExploding(0.002, 80.0, data_scale)
    alpha, sigma = path.alpha_sigma(path.time(-np.log(np.geomspace(0.002, 80, 9))))
    np.testing.assert_allclose(loss_weights("edm", path, "epsilon", alpha, sigma), 1.0, rtol=1e-9)


def test_edm_weight_at_unit_data_scale_is_the_plain_error_of_v() -> None:
    """Variance preserving processes have unit data: (SNR + 1) |x_0 error|^2 = |v error|^2."""
    path = vp(LINEAR)
    alpha, sigma = path.alpha_sigma(np.arange(0, 1000, 37.0))
    np.testing.assert_allclose(loss_weights("edm", path, "v_prediction", alpha, sigma), 1.0, rtol=1e-9)


def test_cosmap_is_the_published_weight_of_the_flow_velocity() -> None:
    """Esser et al. 2024, arXiv:2403.03206, eq. 21."""
    path = FlowMatching()
    alpha, sigma = path.alpha_sigma(np.array([100.0, 500.0, 900.0]))
    formula = 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))
    np.testing.assert_allclose(loss_weights("cosmap", path, "flow_prediction", alpha, sigma), formula, rtol=1e-9)


SAMPLED = [(name, s) for name in ("vp", "cosine", "ve", "edm", "flow") for s in TIME_SAMPLINGS]


@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_the_stated_density_is_that_of_the_drawn_log_snr(name: str, sampling: str) -> None:
    """The mean of g(log_snr)/p over the draws is the integral of g over the whole training range, for a g that is
    largest at its clean end and, where the range has one, does not vanish at its noisy end: nothing is lost or counted
    twice there.  Integer times know g at themselves only: the integral of its linear interpolation."""
    path = PATHS[name]
    least, most = (float(path.log_snr(t)) for t in (path.noisiest, path.cleanest))
    level = 0.5 if math.isfinite(least) else 0.0

    def g(log_snr: np.ndarray) -> np.ndarray:
        return expit(log_snr) + level

    t, density = draw_times(path, sampling, midpoints(50_000), mean=0.4, std=2.5)
    exact = np.logaddexp(0, most) - np.logaddexp(0, least) + (level * (most - least) if level else 0.0)
    found = np.mean(g(path.log_snr(t)) / density)
    # the rule of midpoints resolves a logit-normal's tails slowly
    assert found == pytest.approx(exact, rel={"logit_normal": 7e-3, "mode": 2e-3}.get(sampling, 2e-4))
    if path.alphas_cumprod is not None and sampling in ("uniform", "stratified"):
        log_snr = path.log_snr(np.arange(999, -1, -1.0))
        assert found == pytest.approx(np.trapezoid(g(log_snr), log_snr), rel=1e-12)


@pytest.mark.parametrize("name", ["vp", "ve", "edm", "flow"])
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (3.0, 4.0), (-7.0, 1.5), (8.0, 1.0)])
def test_lognormal_times_are_a_truncated_normal(name: str, mean: float, std: float) -> None:
    """log(sigma/alpha) at the quantiles u of N(mean, std^2) cut to the training range, and its density, as scipy has
    them; integer times are the nearest ones."""
    path, u = PATHS[name], midpoints(101)
    most, least = (float(path.log_snr(t)) for t in (path.cleanest, path.noisiest))
    law = truncnorm((-most - mean) / std, (-least - mean) / std, mean, std)
    t, density = draw_times(path, "lognormal", u, mean=mean, std=std)
    exact = path.time(-law.ppf(u))
    np.testing.assert_allclose(t, exact if path.alphas_cumprod is None else np.round(exact), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(density, law.pdf(law.ppf(u)), rtol=1e-7)


def test_lognormal_times_outside_the_training_range_are_refused() -> None:
    with pytest.raises(ValueError, match="use another --time_mean"):
        draw_times(PATHS["edm"], "lognormal", midpoints(3), mean=200.0, std=1.0)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode", "lognormal"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_likelihood_weighting_makes_the_time_sampling_irrelevant(sampling: str, kind: str) -> None:
    """Lai et al., chapter 6, and Kingma et al. 2021 eq. 18: with it the expected loss is the integral over log-SNR
    whatever p(t) is, up to the ends of the range, where this error of eps is largest."""
    path = vp(LINEAR)
    t, density = draw_times(path, sampling, midpoints(50_000), mean=-0.5, std=2.5)
    alpha, sigma = path.alpha_sigma(t)
    weights = loss_weights("likelihood", path, kind, alpha, sigma, log_snr_density=density)
    pairs = zip(*prediction_targets(path, kind, alpha, sigma), strict=True)
    k = [convert(pair, (0.0, 1.0), a, s)[1] for pair, a, s in zip(pairs, alpha, sigma, strict=True)]
    error_of_prediction = np.cosh(0.2 * path.log_snr(t)) / k
    low, high = (float(path.log_snr(end)) for end in (999, 0))
    exact = 0.5 * (high - low) + (np.sinh(0.4 * high) - np.sinh(0.4 * low)) / 0.8
    assert np.mean(weights * error_of_prediction**2) == pytest.approx(exact, rel=2e-3)


@given(st.integers(1, 7), st.integers(0, 10))
def test_uniform_times_of_a_variance_preserving_path_are_its_integers(n: int, shift: int) -> None:
    """As in diffusers' examples: every integer timestep is equally likely."""
    u = (np.arange(1000 * n) + (shift + 0.5) / 11) / (1000 * n)
    t, _ = draw_times(vp(LINEAR), "uniform", u)
    assert np.array_equal(np.unique(t, return_counts=True)[1], np.full(1000, n))


def test_pseudo_huber_is_quadratic_for_small_and_linear_for_large_errors() -> None:
    """Song & Dhariwal 2023, arXiv:2310.14189, section 3.3."""
    zero, one = torch.zeros(1, 1, 2, 2), torch.ones(1)
    small = regression_loss(zero + 1e-3, zero, one, "huber", huber_c=0.1)
    large = regression_loss(zero + 1e3, zero, one, "huber", huber_c=0.1)
    assert small.item() == pytest.approx(1e-6, rel=1e-2) and large.item() == pytest.approx(2 * 0.1 * 1e3, rel=1e-3)


@pytest.mark.parametrize(
    ("path", "kind", "weighting", "loss", "remedy"),
    [
        (PATHS["flow"], "epsilon", "none", "l2", "v_prediction"),
        (PATHS["flow"], "score", "none", "l2", "flow_prediction"),
        (ZERO_SNR, "epsilon", "min_snr", "l2", "v_prediction"),
        (PATHS["vp"], "epsilon", "likelihood", "huber", "--loss l2"),
        (ZERO_SNR, "v_prediction", "likelihood", "l2", "another --loss_weighting"),
    ],
)
def test_impossible_pairs_are_refused_with_the_remedy(
    path: Path, kind: str, weighting: str, loss: str, remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        check_objective(path, kind, weighting, loss)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, 0.28])
def test_the_average_weighs_steps_by_a_power_function_of_the_given_width(sigma_rel: float) -> None:
    """Karras et al. 2024, arXiv:2312.02696, section 3.1: p(s) ~ s^gamma, relative standard deviation sigma_rel.

    A weight that is s at step s averages to the profile's mean, its square to the second moment.
    """
    steps, gamma = 4000, gamma_of_width(sigma_rel)
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    ema = PowerEMA([weight], sigma_rel)
    for s in range(1, steps + 1):
        with torch.no_grad():
            weight.copy_(torch.tensor([s / steps, (s / steps) ** 2]))
        ema.update()
    mean, square = ema.average[0].tolist()
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=2e-3)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=2e-2)


def test_averaged_weights_stand_in_and_go_away_again() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    ema = PowerEMA([weight])
    with torch.no_grad():
        ema.update()
        weight.add_(1)
    with ema.applied():
        assert weight.tolist() == [1, 1, 1]
    assert weight.tolist() == [2, 2, 2]
