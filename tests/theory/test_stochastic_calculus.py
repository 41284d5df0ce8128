"""What the appendices prove: isometry, reversal, Fisher's identity, orthogonality, Girsanov, a change of clock.

Fu & Wang: arXiv:2605.22586.  Lu: arXiv:2607.01693.  Lai et al.: arXiv:2510.21890.  Expectations are quadratures and
states are run as linear functions of their noise: nothing here is sampled.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import PATHS, SMOOTH, nodes_of, run_table, span
from scipy.integrate import quad

from diffusers_sde import GaussianMixtureModel
from diffusers_sde.analytic import GaussianMixture
from diffusers_sde.dynamics import conditional_score, drift_and_diffusion
from diffusers_sde.named_grids import make_grid
from diffusers_sde.noise import brownian_weights
from diffusers_sde.paths import Path
from diffusers_sde.prediction import PREDICTION_TYPES, convert, prediction_coefficients
from diffusers_sde.tables import build_multistep
from diffusers_sde.weights import Point, linear_coefficients

every_path = pytest.mark.parametrize("name", SMOOTH)
every_tau = pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
WEIGHTS, MEANS, STDS = [0.3, 0.7], [-1.0, 1.5], [0.3, 0.8]  # mixture data in one dimension


def line(weights=WEIGHTS, means=MEANS, stds=STDS) -> GaussianMixture:
    return GaussianMixture(weights, [[m] for m in means], [s**2 for s in stds])


def at(path: Path, t: float) -> tuple[float, float]:
    alpha, sigma = path.alpha_sigma(t)
    return float(alpha), float(sigma)


def over_time(path: Path, start: float, end: float, rate) -> float:
    """``Int |dt| rate(t)`` between two times."""
    low, high = sorted((start, end))
    kinks = [float(t) for t in range(math.ceil(low), math.floor(high) + 1)] if path.alphas_cumprod is not None else []
    return sum(quad(rate, a, b, epsabs=1e-13, epsrel=1e-11)[0] for a, b in itertools.pairwise([low, *kinks, high]))


# -- isometry --


@every_path
def test_ito_isometry_of_the_noising_process(name):
    """``x_t = (a_t/a_s) x_s + Int (a_t/a_u) g_u dw_u``: the variance of the integral is the integral of the square,
    what is left of sigma_t^2 (Fu & Wang, appendix Ito isometry)."""
    path = SMOOTH[name]
    noisy, clean = span(path)
    (a1, s1), (a0, s0) = at(path, noisy), at(path, clean)
    square = over_time(path, clean, noisy, lambda u: (a1 / at(path, u)[0]) ** 2 * drift_and_diffusion(path, u)[1])
    assert square == pytest.approx(s1**2 - (a1 / a0 * s0) ** 2, rel=1e-8)


@every_tau
@every_path
@pytest.mark.parametrize("data_std", [0.0, 0.7])
def test_ito_isometry_of_a_step(name, data_std, tau):
    """The noise of a table's step is ``Int Phi(t, u) tau g_u dw_u`` with Phi the propagator of the linear drift, and
    its variance the integral of the square: with ``r^2 = c^2 + (sigma/alpha)^2`` the state over alpha shrinks as ``r^(1
    + tau^2)`` (Fu & Wang, appendix Ito isometry)."""
    path = SMOOTH[name]
    noisy, clean = span(path)

    def r(u):
        return math.hypot(data_std, at(path, u)[1] / at(path, u)[0])

    def rate(u):
        propagator = at(path, clean)[0] / at(path, u)[0] * (r(clean) / r(u)) ** (1 + tau**2)
        return propagator**2 * tau**2 * drift_and_diffusion(path, u)[1]

    log_snr = [float(path.log_snr(t)) for t in (noisy, clean)]
    row = build_multistep(path, nodes_of(path, log_snr), order=1, data_std=data_std, tau=tau).rows[0]
    assert row.c**2 == pytest.approx(over_time(path, clean, noisy, rate), rel=1e-8)


@every_tau
def test_ito_isometry_of_two_integrals(tau):
    """``E[Int f dw Int h dw] = Int f h``: the noise of a coarse step and of the fine steps inside it, on one Brownian
    path, have as covariance the integral of the product of their kernels (Fu & Wang, appendix Ito isometry)."""
    edges = np.array([-3.0, -1.25, 0.5, 2.0])  # the kernel of a step that ends at s is e^(-(1 + tau^2) s) e^(tau^2 u)

    def kernel(end, u):
        return math.exp(-(1 + tau**2) * end + tau**2 * u)

    (coarse,), fine = brownian_weights(edges[[0, -1]], tau=tau), brownian_weights(edges, tau=tau)

    def product(f, h, low, high):
        return quad(lambda u: kernel(f, u) * kernel(h, u), low, high)[0]

    for weights, (low, high) in zip(fine, itertools.pairwise(edges), strict=True):
        found = sum(w * dict(coarse).get(k, 0.0) for k, w in weights)
        sizes = product(high, high, low, high) * product(edges[-1], edges[-1], edges[0], edges[-1])
        assert found == pytest.approx(product(high, edges[-1], low, high) / math.sqrt(sizes), rel=1e-6)


# -- reversal --


def test_time_reversed_brownian_motion():
    """Data at 0 noised by a variance exploding process is a Brownian motion in the clock v = sigma^2; the reverse SDE,
    run from N(0, v_T), is that motion backwards: ``Cov(x_v, x_w) = min(v, w)`` at all pairs of times, not only the
    right variance at each (Fu & Wang, appendix time-reversed Brownian motion). For tau other than 1 only the latter."""
    path, v = PATHS["edm"], np.array([30.0, 11.0, 4.0, 1.5, 0.4, 0.01])
    nodes, basis = nodes_of(path, -0.5 * np.log(v)), np.eye(len(v))
    start = math.sqrt(v[0]) * basis[0]
    for tau in (0.5, 1.0, 2.0):
        table = build_multistep(path, nodes, order=1, tau=tau)
        states = run_table(table, lambda x, row: 0 * x, start, lambda i: basis[i + 1], states=True)
        covariance = np.array([start, *states]) @ np.array([start, *states]).T
        np.testing.assert_allclose(np.diag(covariance), v, rtol=1e-9)
        agree = np.allclose(covariance, np.minimum.outer(v, v), rtol=1e-9)
        assert agree == (tau == 1.0)


# -- conditional expectations --


@every_path
def test_fisher_identity(name):
    """``grad log p_t(x) = E[grad log p(x | x_0) | x]``: the score of the marginal is the posterior mean of the
    conditional scores (Fu & Wang, appendix Fisher identity)."""
    path, model = SMOOTH[name], line()
    t = float(np.mean(span(path)))
    alpha, sigma = at(path, t)
    for x in (-1.2 * sigma, 0.3 * alpha, 1.1 * alpha + sigma):

        def joint(x0, x=x):
            prior = sum(
                w * math.exp(-0.5 * ((x0 - m) / s) ** 2) / s for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)
            )
            return prior * math.exp(-0.5 * ((x - alpha * x0) / sigma) ** 2)

        points = sorted({-1.0, 1.5, float(np.clip(x / alpha, -7, 7))})
        options = {"points": points, "epsabs": 1e-14, "epsrel": 1e-11, "limit": 400}
        mass = quad(joint, -8, 8, **options)[0]
        mean = quad(lambda x0, x=x: joint(x0, x) * conditional_score(path, t, x, x0), -8, 8, **options)[0] / mass
        found = float(model.score(torch.tensor([[x]], dtype=torch.float64), alpha, sigma))
        assert found == pytest.approx(mean, rel=1e-7, abs=1e-9 / sigma)


def joint_quadrature(alpha, sigma, nodes=90):
    """``(x_0, eps, mass)`` of mixture data and noise: a Gauss-Hermite rule for each component."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    first, second = (v.ravel() for v in np.meshgrid(z, z))
    mass = np.outer(w, w).ravel() / w.sum() ** 2
    x0 = np.concatenate([m + s * first for m, s in zip(MEANS, STDS, strict=True)])
    return x0, np.tile(second, 2), np.concatenate([k * mass for k in WEIGHTS])


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("level", [(0.8, 0.6), (1.0, 0.9), (0.4, 0.6)], ids=["vp", "ve", "flow"])
def test_orthogonality(kind, level):
    """The error of ``m* = E[A x_0 + B eps | x]`` is orthogonal to every function of x, so that ``E|m - target|^2 =
    E|m - m*|^2 + E|m* - target|^2`` for every m (Fu & Wang, appendix orthogonality; Lai et al., chapter 6)."""
    alpha, sigma = level
    a, b = prediction_coefficients(kind, alpha, sigma)
    x0, eps, mass = joint_quadrature(alpha, sigma)
    x, target = alpha * x0 + sigma * eps, a * x0 + b * eps
    k_x, k_d = convert((1.0, 0.0), (a, b), alpha, sigma)
    mean = line().posterior_mean(torch.from_numpy(x)[:, None], alpha, sigma).numpy()[:, 0]
    best = k_x * x + k_d * mean
    least = mass @ (best - target) ** 2
    for h in (np.ones_like(x), x, x**3, np.sin(2 * x), np.tanh(x - 0.4)):
        assert mass @ ((best - target) * h) == pytest.approx(0, abs=1e-5 * math.sqrt(least * (mass @ h**2)))
        guess = best + 0.3 * h
        assert mass @ (guess - target) ** 2 == pytest.approx(0.09 * (mass @ h**2) + least, rel=1e-5)


# -- Girsanov --


@pytest.mark.parametrize("name", ["edm", "flow", "vp_linear"])
@every_tau
def test_girsanov(name, tau):
    """Two reverse SDEs whose scores differ by e have paths whose divergence is ``Int ((1 + tau^2)/(2 tau))^2 g^2
    |e|^2/2 dt``, least at tau = 1; the steps of the tables of two denoisers, Gaussian kernels of one variance, add up
    to it (Lu, appendix A)."""
    path, apart = PATHS[name], 0.3  # what the denoisers differ by, D_1 - D_2
    low, high = -2.0, 1.5

    def rate(lam):
        t = float(path.time(lam))
        alpha, sigma = at(path, t)
        error = alpha * apart / sigma**2
        g2, speed = drift_and_diffusion(path, t)[1], abs(float(path.d_log_snr(t)))
        return 0.5 * ((1 + tau**2) / (2 * tau)) ** 2 * g2 * error**2 / speed

    exact = quad(rate, low, high, epsrel=1e-6, limit=400)[0]
    found = []
    for n in (100, 200):
        nodes = nodes_of(path, np.linspace(low, high, n + 1))
        rows = build_multistep(path, nodes, order=1, tau=tau).rows
        found.append(sum((row.b[0] * apart) ** 2 / (2 * row.c**2) for row in rows))
    assert 2 * found[1] - found[0] == pytest.approx(exact, rel=2e-3)
    assert abs(found[1] - exact) < 0.03 * exact


@every_path
def test_the_divergence_of_paths_is_that_of_the_data(name):
    """Reverse SDEs at tau = 1 are the noising processes of two data laws backwards: the divergence of the starts and
    Girsanov's integral of the difference of scores are together that of the data at the end of the run (Lu,
    appendix A), here N(m, c^2) against N(0, c^2)."""
    path, mean, std = SMOOTH[name], 0.8, 0.6
    noisy, clean = span(path)
    one, other = (GaussianMixtureModel([1.0], [[m]], [std**2]) for m in (mean, 0.0))
    x = torch.zeros(1, 1, dtype=torch.float64)

    def apart(t):  # the same at every x
        return float(one.score(x, *at(path, t)) - other.score(x, *at(path, t)))

    def divergence(t):
        alpha, sigma = at(path, t)
        return (alpha * mean) ** 2 / (2 * ((alpha * std) ** 2 + sigma**2))

    paths = over_time(path, clean, noisy, lambda t: 0.5 * drift_and_diffusion(path, t)[1] * apart(t) ** 2)
    assert paths > 0.1 * divergence(clean)
    assert divergence(noisy) + paths == pytest.approx(divergence(clean), rel=1e-8)


# -- stochastic localisation --


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_stochastic_localisation_is_the_reverse_sde_in_another_clock(name):
    """In the clock ``t = SNR`` the observation ``y = alpha x/sigma^2`` of the reverse SDE moves by ``dy = E[x_0|y] dt +
    dB``: a step of order 1 at tau = 1 is ``y + D dt + sqrt(dt) z`` exactly (Lu, chapter 4)."""
    path = PATHS[name]
    nodes = nodes_of(path, [-2.0, -0.7, 0.4, 1.9])
    t = (nodes.alpha / nodes.sigma) ** 2
    rows = build_multistep(path, nodes, order=1, tau=1.0).rows
    for i, row in enumerate(rows):
        before, after = (nodes.alpha[k] / nodes.sigma[k] ** 2 for k in (i, i + 1))
        assert after * row.a / before == pytest.approx(1, rel=1e-9)
        assert after * row.b[0] == pytest.approx(t[i + 1] - t[i], rel=1e-9)
        assert after * row.c == pytest.approx(math.sqrt(t[i + 1] - t[i]), rel=1e-9)


@pytest.mark.parametrize("log_snr", [-1.0, 0.3])
def test_the_localised_measure_is_the_posterior(log_snr):
    """``mu_t(dx) ~ p(x) exp(y x - t x^2/2)`` with y and t of the statement above has the oracle's posterior mean (Lu,
    chapter 4)."""
    model, path = line(), PATHS["vp_linear"]
    alpha, sigma = (float(v) for v in path.alpha_sigma_of(log_snr))
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    for x in (-0.8, 0.4, 1.3):
        y, t = alpha * x / sigma**2, (alpha / sigma) ** 2
        log_mu = model.log_density(grid[:, None]) + y * grid - t * grid**2 / 2
        mean = float((log_mu.softmax(0) * grid).sum())
        found = float(model.posterior_mean(torch.tensor([[x]], dtype=torch.float64), alpha, sigma))
        assert found == pytest.approx(mean, rel=1e-8)


def test_the_posterior_localises_at_the_rate_of_its_variance():
    """``d E[Var(x_0|y)]/dt = -E[Var(x_0|y)^2]`` in the clock t = SNR (Lu, chapter 4), Var from the slope of the
    oracle's posterior mean, ``(sigma^2/alpha) dD/dx``."""
    model, h = line(), 1e-3
    z, w = np.polynomial.hermite_e.hermegauss(120)

    def moments(t):
        """E Var and E Var^2 at alpha = 1, sigma^2 = 1/t."""
        sigma, total = t**-0.5, np.zeros(2)
        for k, m, s in zip(WEIGHTS, MEANS, STDS, strict=True):
            x = torch.from_numpy(m + math.hypot(s, sigma) * z)[:, None].requires_grad_()
            (slope,) = torch.autograd.grad(model.posterior_mean(x, 1.0, sigma).sum(), x)
            variance = sigma**2 * slope[:, 0].numpy()
            total += k * np.array([w @ variance, w @ variance**2]) / w.sum()
        return total

    for t in (0.3, 1.0, 3.0):
        rate = (moments(t + h)[0] - moments(t - h)[0]) / (2 * h)
        assert rate == pytest.approx(-moments(t)[1], rel=1e-4)


# -- geometric grids --


def test_geometric_grids_spend_the_same_on_every_level():
    """Noise levels in geometric progression: a step with the upper variance costs ``KL <= psi(q) = (q - 1 - log q)/2``
    a dimension, q the ratio of sigma^2/alpha^2, at every level and for all data; points attain it. The sum falls as 1/n
    and grows with the square of the logarithm of the range only, where equal steps of sigma^2 do not even converge
    below 1/range (Lu, chapter 6)."""
    path, range_ = PATHS["edm"], (80.0 / 0.002) ** 2

    def cost(log_snr, std):
        """KL of each step, from the exact kernel of N(0, std^2) to the one with the upper variance."""
        points = [Point(1.0, math.exp(-lam)) for lam in log_snr]
        ratios = [
            (linear_coefficients(p, q, std, 1.0)[1] / linear_coefficients(p, q, math.inf, 1.0)[1]) ** 2
            for p, q in itertools.pairwise(points)
        ]
        return np.array([0.5 * (ratio - 1 - math.log(ratio)) for ratio in ratios])

    totals = []
    for n in (100, 200, 400):
        log_snr = path.log_snr(make_grid(path, "log_snr", n))
        q = range_ ** (-1 / (n - 1))
        psi = 0.5 * (q - 1 - math.log(q))
        np.testing.assert_allclose(cost(log_snr, 0.0), psi, rtol=1e-6)
        for std in (0.01, 0.5, 5.0):
            assert np.all(cost(log_snr, std) <= psi * (1 + 1e-6))
        totals.append(cost(log_snr, 0.0).sum() * n)
    assert totals[-1] == pytest.approx(math.log(range_) ** 2 / 4, rel=0.05)  # sum ~ log^2/(4 n)
    equal = np.linspace(80.0**2, 0.002**2, 400)
    assert cost(-0.5 * np.log(equal), 0.0).sum() > 20 * totals[-1] / 400
