"""Error bounds on Gaussians: what the package's own samplers, paths and drifts end with, against bounds whose noise
levels are the published ones, so that a wrong alpha or sigma breaks them.

Lu: arXiv:2607.01693, chapter 6.
"""

import math

import numpy as np
import pytest
import torch
from helpers import PATHS, SMOOTH, order_of, run_table
from hypothesis import given
from hypothesis import strategies as st

from diffusers_sde import GaussianMixtureModel
from diffusers_sde.dynamics import drift_and_diffusion, reverse_drift
from diffusers_sde.grids import nodes_from_times
from diffusers_sde.tables import build_multistep

# (alpha, sigma) at the cleanest training time, from the definition of each process
CLEANEST = {
    "vp_linear": (math.sqrt(1 - 1e-4), 1e-2),
    "vp_scaled_linear": (math.sqrt(1 - 0.00085), math.sqrt(0.00085)),
    "vp_trained_betas": (math.sqrt(0.98), math.sqrt(0.02)),
    "edm": (1.0, 0.002),
    "ve_atan": (1.0, 0.3),
    "flow": (0.999, 0.001),
    "flow_shift": (0.999, 0.001),
    "mochi": (0.999, 0.001),
}


def stopped(name, mean, std, tau, steps=4):
    """Mean and standard deviation of what the sampler that is exact for N(mean, std^2) data, from p_T, leaves when it
    stops at the cleanest training time: the state is affine in the first normal and in those of the steps."""
    path = PATHS[name]
    nodes = nodes_from_times(path, np.linspace(path.noisiest, path.cleanest, steps + 1)[:-1], "sigma_min")
    table = build_multistep(path, nodes, order=1, data_std=std, tau=tau)
    one, first, *noises = np.eye(steps + 2)

    def denoise(x, row):
        gain = row.alpha * std**2 / (row.alpha**2 * std**2 + row.sigma**2)
        return mean * one + gain * (x - row.alpha * mean * one)

    start = nodes.alpha[0] * mean * one + math.hypot(nodes.alpha[0] * std, nodes.sigma[0]) * first
    end = run_table(table, denoise, start, lambda i: noises[i])
    return end[0], np.linalg.norm(end[1:])


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("name", CLEANEST)
def test_early_stopping_costs_what_the_bound_says_for_points(name, tau):
    """W2^2 = (1 - a_1)^2 |x_0|^2 + sigma_1^2 for data that is one point: the bound is attained."""
    alpha, sigma = CLEANEST[name]
    for point in (0.0, -2.5):
        mean, std = stopped(name, point, 0.0, tau)
        cost = (mean - point) ** 2 + std**2
        assert cost == pytest.approx((1 - alpha) ** 2 * point**2 + sigma**2, rel=1e-6)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("name", CLEANEST)
@given(std=st.floats(0.05, 3))
def test_early_stopping_bound(name, tau, std):
    """W2^2 <= (1 - a_1)^2 E|X_0|^2 + sigma_1^2, and it is (sqrt(a_1^2 s^2 + sigma_1^2) - s)^2 on N(0, s^2)."""
    alpha, sigma = CLEANEST[name]
    mean, end = stopped(name, 0.0, std, tau)
    assert mean == 0
    assert end == pytest.approx(math.hypot(alpha * std, sigma), rel=1e-9)
    assert (end - std) ** 2 <= (1 - alpha) ** 2 * std**2 + sigma**2


def kl_of_starting_at(path, data, top):
    """KL(p_T | N(0, top)) of data on a line under a path, by quadrature of the oracle's density."""
    x, dx = np.linspace(-12 * math.sqrt(top), 12 * math.sqrt(top), 4001, retstep=True)
    alpha, sigma = (float(v) for v in path.alpha_sigma(path.noisiest))
    log_p = data.log_density(torch.from_numpy(x)[:, None], alpha, sigma).numpy()
    log_start = -0.5 * x**2 / top - 0.5 * math.log(2 * math.pi * top)
    return float(np.sum(np.exp(log_p) * (log_p - log_start)) * dx)


@pytest.mark.parametrize(("name", "sigma_max"), [("edm", 80.0), ("ve_atan", 500.0)])
def test_ve_initialisation_bound(name, sigma_max):
    """Starting VE from N(0, T) costs KL(p_T | N(0, T)) <= E|X_0|^2 / 2T, T = sigma_max^2; for points with equality, and
    for a mixture to leading order |E X_0|^2 / 2T."""
    top = sigma_max**2
    point = kl_of_starting_at(PATHS[name], GaussianMixtureModel([1.0], [[30.0]], [0.0]), top)
    assert point == pytest.approx(30.0**2 / (2 * top), rel=1e-8)
    mixture = GaussianMixtureModel([0.3, 0.7], [[-10.0], [25.0]], [4.0, 100.0])
    mean, square = 0.3 * -10 + 0.7 * 25, 0.3 * (100 + 4) + 0.7 * (625 + 100)
    cost = kl_of_starting_at(PATHS[name], mixture, top)
    assert mean**2 / (2 * top) <= cost <= square / (2 * top)
    assert cost == pytest.approx(mean**2 / (2 * top), rel=0.05)


# -- one step of Euler-Maruyama --

# dv/dt in the clock v = sigma^2: sigma = exp(4 t), and sigma = tan(pi t/2)
CLOCK_RATES = {"edm": lambda v: 8 * v, "ve_atan": lambda v: math.pi * math.sqrt(v) * (1 + v)}


def euler_maruyama(path, rate, v, h, std):
    """Slope and variance of one step of length h in v of the package's reverse SDE on N(0, std^2) data."""
    t = path.time(-0.5 * math.log(v))
    slope = float(reverse_drift(path, t, 1.0, -1.0 / (std**2 + v), 1.0)) / rate(v)
    return 1 - h * slope, h * float(drift_and_diffusion(path, t)[1]) / rate(v)


@pytest.mark.parametrize("name", CLOCK_RATES)
def test_one_step_euler_maruyama_error(name):
    """KL of the exact kernel (Bayes' rule) from one step of the package's reverse SDE, averaged over p_v, is at most
    d L^2 h^2 with L the Lipschitz constant of the score, and the order 2 in h is attained."""
    v, std = 2.0, 0.8
    total = std**2 + v
    steps, errors = 0.4 / 2.0 ** np.arange(8), []
    for h in steps:
        slope, variance = euler_maruyama(SMOOTH[name], CLOCK_RATES[name], v, h, std)
        late = total - h
        exact_slope, exact_variance = late / total, h * late / total
        ratio = exact_variance / variance
        errors.append(0.5 * (ratio - 1 - math.log(ratio) + (exact_slope - slope) ** 2 * total / variance))
    assert np.all(errors <= steps**2 / (total - steps) ** 2)
    assert order_of(errors)[-1] == pytest.approx(2, abs=0.01)
    assert errors[-1] == pytest.approx(0.25 * (steps[-1] / total) ** 2, rel=0.02)
