"""Conditional and marginal dynamics, their discretisation, and what score matching learns.

Fu & Wang: arXiv:2605.22586.  Lu: arXiv:2607.01693.  Lai et al.: arXiv:2510.21890.  Moments of linear equations
are ordinary differential equations and expectations of polynomials are quadratures: nothing here is sampled.
"""

import numpy as np
import pytest
import torch
from helpers import SMOOTH, mixture, noise_like, span
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm

from diffusers_sde import GaussianMixtureModel
from diffusers_sde.dynamics import conditional_score, drift_and_diffusion, reverse_drift, tweedie, velocity
from diffusers_sde.prediction import PREDICTION_TYPES, convert, prediction_coefficients

every_path = pytest.mark.parametrize("name", SMOOTH)
every_tau = pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
TIGHT = {"rtol": 1e-10, "atol": 1e-12, "method": "LSODA"}

MEAN, STD = 1.3, 0.6  # Gaussian data
WEIGHTS, MEANS, STDS = np.array([[0.3, 0.7], [-1.0, 1.5], [0.3, 0.8]])  # mixture data in one dimension


def noise_order(path):
    """+1 where time grows with noise: dynamics.py counts time in noise order."""
    return np.sign(path.noisiest - path.cleanest)


def gaussian_score(path):
    """Score of the marginals of N(MEAN, STD^2)."""

    def score(t, x):
        alpha, sigma = path.alpha_sigma(t)
        return -(x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return score


def marginal(path, t):
    """Mean and variance of p_t."""
    alpha, sigma = path.alpha_sigma(t)
    return np.array([alpha * MEAN, alpha**2 * STD**2 + sigma**2])


def reverse_moments(path, drift, tau, start, end, first):
    """Mean and variance at ``end`` of the process with affine ``drift(t, x)`` and noise tau g, run towards the data."""
    sign = noise_order(path)

    def rate(t, state):
        mean, variance = state
        slope = drift(t, 1.0) - drift(t, 0.0)
        g2 = drift_and_diffusion(path, t)[1]
        return sign * np.array([drift(t, mean), 2 * slope * variance - tau**2 * g2])

    return solve_ivp(rate, (start, end), first, **TIGHT).y[:, -1]


def forward_moments(path, start, end, first):
    """Mean and variance at ``end`` of the noising SDE dx = f x dt + g dw."""

    def rate(t, state):
        f, g2 = drift_and_diffusion(path, t)
        return noise_order(path) * np.array([f * state[0], 2 * f * state[1] + g2])

    return solve_ivp(rate, (start, end), first, **TIGHT).y[:, -1]


# -- the conditional path --


@every_path
def test_conditional_score_is_the_gradient_of_the_kernel(name):
    """grad log N(x; alpha x_0, sigma^2) = (alpha x_0 - x)/sigma^2 = -eps/sigma (Fu & Wang, section 1)."""
    path, x, x0 = SMOOTH[name], 0.4, MEAN
    t = np.mean(span(path))
    alpha, sigma = path.alpha_sigma(t)
    h = 1e-4 * sigma
    numeric = (norm.logpdf(x + h, alpha * x0, sigma) - norm.logpdf(x - h, alpha * x0, sigma)) / (2 * h)
    assert conditional_score(path, t, x, x0) == pytest.approx(numeric, rel=1e-7)
    assert conditional_score(path, t, alpha * x0 + sigma * 0.9, x0) == pytest.approx(-0.9 / sigma, rel=1e-12)


@every_path
def test_conditional_ode_follows_the_interpolation(name):
    """The velocity f x - g^2/2 score carries alpha x_0 + sigma eps along itself, for one eps (Fu & Wang, section 1)."""
    path, x0, eps = SMOOTH[name], np.array([MEAN, -0.4]), np.array([0.8, -1.7])
    start, end = span(path)
    at = {t: path.alpha_sigma(t)[0] * x0 + path.alpha_sigma(t)[1] * eps for t in (start, end)}

    def rate(t, x):
        return noise_order(path) * velocity(path, t, x, conditional_score(path, t, x, x0))

    np.testing.assert_allclose(solve_ivp(rate, (start, end), at[start], **TIGHT).y[:, -1], at[end], rtol=1e-7)


@every_path
def test_conditional_velocity_is_the_derivative_of_the_interpolation(name):
    """u = alpha' x_0 + sigma' eps (Fu & Wang, section 1; Lai et al., chapter 5)."""
    path, x0, eps = SMOOTH[name], MEAN, 0.8
    t, h = np.mean(span(path)) + 0.21, 1e-6 * abs(path.noisiest - path.cleanest)
    (a0, s0), (a, s), (a1, s1) = (path.alpha_sigma(v) for v in (t - h, t, t + h))
    expected = noise_order(path) * ((a1 - a0) * x0 + (s1 - s0) * eps) / (2 * h)
    x = a * x0 + s * eps
    assert velocity(path, t, x, conditional_score(path, t, x, x0)) == pytest.approx(expected, rel=1e-6)


@every_path
def test_forward_sde_reproduces_the_conditional_path(name):
    """dx = f x dt + g dw takes N(alpha_s x_0, sigma_s^2) to N(alpha_t x_0, sigma_t^2) (Fu & Wang, section 1)."""
    path = SMOOTH[name]
    noisy, clean = span(path)
    (a0, s0), (a1, s1) = path.alpha_sigma(clean), path.alpha_sigma(noisy)
    moments = forward_moments(path, clean, noisy, [a0 * MEAN, s0**2])
    np.testing.assert_allclose(moments, [a1 * MEAN, s1**2], rtol=1e-7)


@every_tau
@every_path
def test_conditional_sde_reproduces_the_conditional_path(name, tau):
    """dx = [f x - (1 + tau^2)/2 g^2 score(x|x_0)] dt + tau g dw run backwards has the moments of the path
    (Fu & Wang, section 1)."""
    path = SMOOTH[name]
    start, end = span(path)
    (a1, s1), (a0, s0) = path.alpha_sigma(start), path.alpha_sigma(end)

    def drift(t, x):
        return reverse_drift(path, t, x, conditional_score(path, t, x, MEAN), tau)

    moments = reverse_moments(path, drift, tau, start, end, [a1 * MEAN, s1**2])
    np.testing.assert_allclose(moments, [a0 * MEAN, s0**2], rtol=1e-6)


# -- the marginal path --


@every_path
def test_forward_sde_reproduces_the_marginals(name):
    """Averaged over the data the noising SDE has the marginals p_t (Fu & Wang, section 2)."""
    path = SMOOTH[name]
    noisy, clean = span(path)
    moments = forward_moments(path, clean, noisy, marginal(path, clean))
    np.testing.assert_allclose(moments, marginal(path, noisy), rtol=1e-7)


@every_tau
@every_path
def test_reverse_sde_and_probability_flow_share_the_marginals(name, tau):
    """Every tau runs p_t backwards, from the ODE (0) over the reverse SDE (1) and beyond (Fu & Wang, section 3; Song
    et al. 2021)."""
    path, score = SMOOTH[name], gaussian_score(SMOOTH[name])
    start, end = span(path)

    def drift(t, x):
        return reverse_drift(path, t, x, score(t, x), tau)

    moments = reverse_moments(path, drift, tau, start, end, marginal(path, start))
    np.testing.assert_allclose(moments, marginal(path, end), rtol=1e-6)


@every_path
def test_probability_flow_velocity_is_the_reverse_drift_without_noise(name):
    """velocity = reverse_drift at tau = 0; noise adds (tau^2/2) g^2 score to the pull (Fu & Wang, section 3)."""
    path, x, score = SMOOTH[name], 0.7, -1.1
    t = np.mean(span(path))
    g2 = drift_and_diffusion(path, t)[1]
    assert reverse_drift(path, t, x, score, 0.0) == velocity(path, t, x, score)
    extra = reverse_drift(path, t, x, score, 1.5) - velocity(path, t, x, score)
    assert extra == pytest.approx(-0.5 * 1.5**2 * g2 * score, rel=1e-12)


def mixture_1d(path, t):
    """Component means and standard deviations of p_t."""
    alpha, sigma = path.alpha_sigma(t)
    return alpha * MEANS, np.sqrt(alpha**2 * STDS**2 + sigma**2)


def mixture_density(path, t, x):
    m, s = mixture_1d(path, t)
    return float(WEIGHTS @ norm.pdf(x, m, s))


def mixture_score(path, t, x):
    m, s = mixture_1d(path, t)
    return float(WEIGHTS @ (norm.pdf(x, m, s) * (m - x) / s**2)) / mixture_density(path, t, x)


@every_path
def test_probability_flow_preserves_quantiles_of_a_mixture(name):
    """In one dimension the ODE of the marginals moves each quantile of p_t along itself: exact transport
    (Fu & Wang, section 2)."""
    path = SMOOTH[name]
    start, end = span(path)
    m, s = mixture_1d(path, start)
    for x in (m[0] - s[0], m.mean(), m[1] + 1.5 * s[1]):
        before = WEIGHTS @ norm.cdf(x, m, s)

        def rate(t, y):
            return noise_order(path) * velocity(path, t, y, mixture_score(path, t, float(y[0])))

        y = solve_ivp(rate, (start, end), [x], **TIGHT).y[0, -1]
        assert WEIGHTS @ norm.cdf(y, *mixture_1d(path, end)) == pytest.approx(before, abs=1e-7)


@every_tau
@pytest.mark.parametrize("name", ["edm", "flow", "mochi"])
def test_reverse_density_equation(name, tau):
    """d_t p = -d_x(b p) - tau^2 g^2/2 d_xx p for the reverse drift b of every tau (Fu & Wang, section 3, appendix
    Fokker-Planck)."""
    path = SMOOTH[name]
    t = float(np.mean(span(path)))
    m, s = mixture_1d(path, t)
    g2, dt, dx = drift_and_diffusion(path, t)[1], 1e-4 * abs(path.noisiest - path.cleanest), 1e-3 * s.min()
    sign = noise_order(path)
    for x in np.linspace(m[0] - s[0], m[1] + s[1], 5):
        p = {k: mixture_density(path, t, x + k * dx) for k in (-1, 0, 1)}
        flux = {k: reverse_drift(path, t, x + k * dx, mixture_score(path, t, x + k * dx), tau) * p[k] for k in (-1, 1)}
        rhs = -(flux[1] - flux[-1]) / (2 * dx) - 0.5 * tau**2 * g2 * (p[1] - 2 * p[0] + p[-1]) / dx**2
        lhs = sign * (mixture_density(path, t + dt, x) - mixture_density(path, t - dt, x)) / (2 * dt)
        assert rhs == pytest.approx(lhs, abs=1e-5 * g2 * p[0] / s.min() ** 2)


# -- the score --


@every_path
def test_tweedie(name):
    """E[x_0 | x] = (x + sigma^2 score)/alpha, against the integral that defines the posterior mean
    (Fu & Wang, section 4; Lu, chapter 3)."""
    path = SMOOTH[name]
    t = float(np.mean(span(path)))
    alpha, sigma = path.alpha_sigma(t)

    def moment(k):
        def integrand(x0):
            return x0**k * (WEIGHTS @ norm.pdf(x0, MEANS, STDS)) * norm.pdf(x, alpha * x0, sigma)

        return quad(integrand, -8, 8, limit=400, points=[-1.0, 0.0, 1.5, x / alpha], epsabs=1e-14, epsrel=1e-12)[0]

    for x in (-1.2 * sigma, 0.3 * sigma, 1.1 * alpha):
        exact = moment(1) / moment(0)
        assert tweedie(path, t, x, mixture_score(path, t, x)) == pytest.approx(exact, rel=1e-8, abs=1e-10)


@every_path
def test_score_is_minus_the_expected_noise_over_sigma(name):
    """score = -E[eps | x]/sigma: the gradient of the mixture's log-density by autograd, E[eps | x] from its posterior
    mean (Fu & Wang, section 4; Lai et al., chapter 3)."""
    path, model = SMOOTH[name], mixture()
    for t in np.linspace(*span(path), 5):
        alpha, sigma = (float(v) for v in path.alpha_sigma(t))
        x = (noise_like(8) * (alpha + sigma)).requires_grad_()
        (gradient,) = torch.autograd.grad(model.log_density(x, alpha, sigma).sum(), x)
        expected_noise = (x - alpha * model.posterior_mean(x, alpha, sigma)) / sigma
        torch.testing.assert_close(-expected_noise / sigma, gradient, rtol=1e-9, atol=1e-10 / sigma)
        torch.testing.assert_close(model.score(x.detach(), alpha, sigma), gradient, rtol=1e-9, atol=1e-10 / sigma)


@every_path
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_prediction_is_one_regression(kind, name):
    """The minimiser of E|m(x) - (A x_0 + B eps)|^2 is the conversion of E[x_0 | x]: the normal equations hold (Lai
    et al., chapter 6)."""
    path = SMOOTH[name]
    alpha, sigma = (float(v) for v in path.alpha_sigma(np.mean(span(path))))
    a, b = prediction_coefficients(kind, alpha, sigma)
    k_x, k_d = convert((1.0, 0.0), (a, b), alpha, sigma)
    variance = alpha**2 * STD**2 + sigma**2
    # Gaussian data: E[x_0|x] = MEAN + gain (x - alpha MEAN), so the prediction is linear, slope k_x + k_d gain.
    slope = k_x + k_d * alpha * STD**2 / variance
    best = (a * alpha * STD**2 + b * sigma) / variance  # Cov(target, x)/Var(x)
    assert slope == pytest.approx(best, rel=1e-9, abs=1e-12)


@every_path
def test_noise_loss_is_score_matching_plus_a_constant(name):
    """E|eps_theta - eps|^2 = sigma^2 E|s_theta - score|^2 + Var(eps | x): the difference does not depend on theta, and
    both have the same minimiser (Fu & Wang, section 4).  Linear scores on Gaussian data, expectations by Gauss-Hermite
    quadrature."""
    path = SMOOTH[name]
    t = float(np.mean(span(path)))
    alpha, sigma = (float(v) for v in path.alpha_sigma(t))
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    weights = np.outer(weights, weights).ravel() / weights.sum() ** 2
    x0, eps = (v.ravel() for v in np.meshgrid(MEAN + STD * nodes, nodes))
    x = alpha * x0 + sigma * eps
    model = GaussianMixtureModel([1.0], [[MEAN]], [STD**2])
    score = model.score(torch.from_numpy(x)[:, None], alpha, sigma).numpy()[:, 0]

    def losses(theta):
        guess = theta[0] * x + theta[1]
        return weights @ (-sigma * guess - eps) ** 2, sigma**2 * (weights @ (guess - score) ** 2)

    variance = alpha**2 * STD**2 + sigma**2
    constant = alpha**2 * STD**2 / variance  # Var(eps | x)
    thetas = np.random.default_rng(0).normal(size=(6, 2)) / sigma
    for theta in thetas:
        noise_loss, score_loss = losses(theta)
        assert score_loss > 0.01  # far from the minimum: the difference is no accident of it
        assert noise_loss - score_loss == pytest.approx(constant, rel=1e-9)
    best = losses((-1 / variance, alpha * MEAN / variance))
    assert best[1] == pytest.approx(0, abs=1e-12)
    assert best[0] == pytest.approx(constant, rel=1e-9)


# -- discretisation --


def test_exact_kernel_of_one_step_is_the_reverse_sde():
    """The kernel that the one-step bound (test_error_bounds.py) compares with solves the reverse SDE of the package's
    VE path (Lu, chapter 6)."""
    path, std, v, h, x = SMOOTH["edm"], 0.8, 2.0, 0.4, 1.7
    start, end = (float(path.time(-0.5 * np.log(u))) for u in (v, v - h))

    def drift(t, y):
        return reverse_drift(path, t, y, -y / (std**2 + path.alpha_sigma(t)[1] ** 2), 1.0)

    late, total = std**2 + v - h, std**2 + v
    moments = reverse_moments(path, drift, 1.0, start, end, [x, 0.0])
    np.testing.assert_allclose(moments, [x * late / total, h * late / total], rtol=1e-7)
