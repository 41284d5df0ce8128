"""Distances between laws: what noising, sampling, Langevin dynamics and control do to them.

Fu & Wang: arXiv:2605.22586.  Lu: arXiv:2607.01693.  Laws on the line by the trapezoid rule, Gaussian
ones in closed form.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import PATHS, SMOOTH, gaussian_law, nodes_of, span
from scipy.stats import norm

from diffusers_sde.analytic import GaussianMixture
from diffusers_sde.dynamics import drift_and_diffusion
from diffusers_sde.methods import langevin
from diffusers_sde.methods.control import Transition, twisted_smc
from diffusers_sde.methods.langevin import ula
from diffusers_sde.tables import build_multistep

every_path = pytest.mark.parametrize("name", SMOOTH)
P = GaussianMixture([0.3, 0.7], [[-1.0], [1.5]], [0.09, 0.64])
Q = GaussianMixture([0.6, 0.4], [[-0.6], [1.1]], [0.25, 0.4])


def at(path, t):
    return tuple(float(v) for v in path.alpha_sigma(t))


def on_a_grid(model, level, reach=14.0, n=6001):
    """``(x, dx, log density, score)`` of noised data."""
    alpha, sigma = level
    x = torch.linspace(-reach, reach, n, dtype=torch.float64)[:, None] * math.hypot(alpha, sigma)
    score = model.score(x, alpha, sigma)[:, 0]
    return x[:, 0].numpy(), float(x[1] - x[0]), model.log_density(x, alpha, sigma).numpy(), score.numpy()


def kl(level, p=P, q=Q):
    (_, dx, log_p, _), (_, _, log_q, _) = (on_a_grid(m, level) for m in (p, q))
    return float((np.exp(log_p) * (log_p - log_q)).sum() * dx)


def total_variation(level):
    (_, dx, log_p, _), (_, _, log_q, _) = (on_a_grid(m, level) for m in (P, Q))
    return 0.5 * float(np.abs(np.exp(log_p) - np.exp(log_q)).sum() * dx)


# -- entropy dissipation --


@every_path
def test_noising_dissipates_relative_entropy(name):
    """``d KL(p_t|q_t)/dt = -g^2/2 E_p |grad log p_t - grad log q_t|^2`` in noise order, for two mixtures (Lu, chapter
    2; Fu & Wang, appendix Fokker-Planck)."""
    path = SMOOTH[name]
    t, h = float(np.mean(span(path))) + 0.21, 1e-3 * (path.noisiest - path.cleanest)
    (_, dx, log_p, score_p), (_, _, _, score_q) = (on_a_grid(m, at(path, t)) for m in (P, Q))
    information = (np.exp(log_p) * (score_p - score_q) ** 2).sum() * dx
    expected = -0.5 * float(drift_and_diffusion(path, t)[1]) * information
    assert (kl(at(path, t + h)) - kl(at(path, t - h))) / (2 * abs(h)) == pytest.approx(expected, rel=1e-3)


@every_path
def test_entropy_grows_by_the_fisher_information(name):
    """de Bruijn: ``d H(p_t)/dt = f + g^2/2 E|grad log p_t|^2`` on the line (Lu, chapter 2)."""
    path = SMOOTH[name]
    t, h = float(np.mean(span(path))) + 0.21, 1e-3 * (path.noisiest - path.cleanest)

    def entropy(t):
        _, dx, log_p, _ = on_a_grid(P, at(path, t))
        return -float((np.exp(log_p) * log_p).sum() * dx)

    _, dx, log_p, score = on_a_grid(P, at(path, t))
    f, g2 = (float(v) for v in drift_and_diffusion(path, t))
    expected = f + 0.5 * g2 * (np.exp(log_p) * score**2).sum() * dx
    assert (entropy(t + h) - entropy(t - h)) / (2 * abs(h)) == pytest.approx(expected, rel=1e-3, abs=1e-3 * g2)


def after_ula(monkeypatch, start, variance, step):
    """The variance of N(0, start) after one step for N(0, variance): run on basis vectors."""
    monkeypatch.setattr(langevin, "randn_tensor", lambda *_, **__: torch.tensor([0.0, 1.0], dtype=torch.float64))
    x = torch.tensor([math.sqrt(start), 0.0], dtype=torch.float64)
    return float(ula(lambda y: -y / variance, x, step, 1).square().sum())


@pytest.mark.parametrize("start", [0.2, 0.9, 3.0])
def test_langevin_dynamics_dissipate_relative_entropy(start, monkeypatch):
    """``d KL(p_t|p)/dt = -E|grad log p_t/p|^2`` along ``dx = grad log p dt + sqrt(2) dw``, and so at least at the rate
    of the log-Sobolev constant, ``-2 KL/v`` for N(0, v): the first step of ULA, on Gaussians (Lu, chapter 2)."""
    variance, step = 0.8, 1e-6

    def divergence(v):
        return 0.5 * (v / variance - 1 - math.log(v / variance))

    rate = (divergence(after_ula(monkeypatch, start, variance, step)) - divergence(start)) / step
    information = start * (1 / start - 1 / variance) ** 2
    assert rate == pytest.approx(-information, rel=1e-4)
    assert information > 2 / variance * divergence(start)


# -- total variation --


def gaussian_total_variation(v, w):
    """``TV(N(0, v), N(0, w))``: the densities cross at ``x^2 = v w log(v/w)/(v - w)``."""
    x = math.sqrt(v * w * math.log(v / w) / (v - w))
    return 2 * abs(norm.cdf(x / math.sqrt(v)) - norm.cdf(x / math.sqrt(w)))


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_a_wrong_start_keeps_its_total_variation_in_the_ode_and_loses_it_in_the_sde(name):
    """Started from another law than p_T, an exact sampler ends no farther from the data, in total variation, than it
    started (data processing); the ODE, a bijection, exactly as far; noise forgets, the more of it the more (Lu, chapter
    6: the initialisation error)."""
    path, std = PATHS[name], 0.5
    nodes = nodes_of(path, [-1.0, -0.2, 0.7, 2.0])
    alpha, sigma = nodes.alpha[0], nodes.sigma[0]
    right = (alpha * std) ** 2 + sigma**2
    end = (nodes.alpha[-1] * std) ** 2 + nodes.sigma[-1] ** 2
    distance = gaussian_total_variation(1.4 * right, right)
    found = []
    for tau in (0.0, 0.5, 1.0, 2.0):
        table = build_multistep(path, nodes, order=1, data_std=std, tau=tau)
        found.append(gaussian_total_variation(gaussian_law(table, std, 1.4 * right), end))
    assert found[0] == pytest.approx(distance, rel=1e-7)
    assert all(after < 0.98 * before for before, after in itertools.pairwise(found))


@every_path
def test_noise_shrinks_total_variation_and_divergence_bounds_it(name):
    """``TV(p_t, q_t)`` falls with noise (data processing), and ``2 TV^2 <= KL`` (Pinsker; Lu, chapter 1), a
    bound that is nearly attained."""
    path = SMOOTH[name]
    levels = [at(path, t) for t in np.linspace(*span(path)[::-1], 6)]
    distances = [total_variation(level) for level in levels]
    assert all(after < before for before, after in itertools.pairwise(distances))
    for level, distance in zip(levels, distances, strict=True):
        assert distance**2 < 0.5 * kl(level) < 2.2 * distance**2


# -- the evidence bound of DDPM --


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_a_step_of_ddpm_costs_the_gain_in_signal_to_noise_times_the_error(name):
    """``KL(q(x_s|x_t, x_0) | p(x_s|x_t)) = (SNR_s - SNR_t)/2 |x_0 - D|^2``, the terms of DDPM's bound: both are the row
    of order 1 at tau = 1, the one with x_0 and the other with D (Lai et al., arXiv:2510.21890, chapter 2; Kingma et al.
    2021, arXiv:2107.00630, eq. 13)."""
    path, x0, data, x = PATHS[name], 0.8, -0.3, 1.7
    nodes = nodes_of(path, [-2.0, -0.7, 0.4, 1.9])
    snr = (nodes.alpha / nodes.sigma) ** 2
    for i, row in enumerate(build_multistep(path, nodes, order=1, tau=1.0).rows):
        right, guessed = (row.a * x + row.b[0] * d for d in (x0, data))
        divergence = (right - guessed) ** 2 / (2 * row.c**2)
        assert divergence == pytest.approx(0.5 * (snr[i + 1] - snr[i]) * (x0 - data) ** 2, rel=1e-9)


# -- control --


def test_the_tilted_law_solves_kl_regularised_control():
    """``max_q E_q[r] - KL(q|p) = log E_p[e^r]``, attained at the tilted law only: any other q misses it by ``KL(q|
    tilted)`` (Lu, chapter 8), here for a linear reward and the oracle's own tilted mixture."""
    v = 0.9
    tilted = P.tilted(torch.tensor([v], dtype=torch.float64))
    x, dx, log_p, _ = on_a_grid(P, (1.0, 1e-9), reach=16, n=20001)
    log_z = math.log((np.exp(log_p + v * x)).sum() * dx)

    def objective(q):
        log_q = on_a_grid(q, (1.0, 1e-9), reach=16, n=20001)[2]
        return float((np.exp(log_q) * (v * x - log_q + log_p)).sum() * dx)

    assert objective(tilted) == pytest.approx(log_z, abs=1e-9)
    for q in (P, Q):
        gap = kl((1.0, 1e-9), q, tilted)
        assert gap > 0.05 and objective(q) == pytest.approx(log_z - gap, abs=1e-8)


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_the_optimal_control_is_the_gradient_of_log_h(name):
    """``h_t(x) = E[e^(v x_0) | x_t = x]``: the cost of the control ``g grad log h``, ``Int |u|^2/2``, and the
    divergence of the tilted start are together ``KL(tilted|p)`` (Lu, chapter 8: Doob's transform is optimal), here for
    Gaussian data, where ``log h`` is linear: ``grad log h = v dE[x_0|x]/dx``."""
    path, v, std = PATHS[name], 0.9, 0.6
    model = GaussianMixture([1.0], [[0.4]], [std**2])

    def slope(lam):
        alpha, sigma = (float(u) for u in path.alpha_sigma_of(lam))
        ends = model.posterior_mean(torch.tensor([[0.0], [1.0]], dtype=torch.float64), alpha, sigma)
        return float(ends[1] - ends[0]), alpha, sigma

    def cost(lam):
        t = float(path.time(lam))
        return 0.5 * float(drift_and_diffusion(path, t)[1]) * (v * slope(lam)[0]) ** 2 / abs(float(path.d_log_snr(t)))

    low, high = -2.0, 2.5
    nodes, weights = np.polynomial.legendre.leggauss(400)
    control = (
        0.5
        * (high - low)
        * sum(w * cost(0.5 * (low + high + (high - low) * z)) for z, w in zip(nodes, weights, strict=True))
    )
    gain, alpha, sigma = slope(low)
    start = 0.5 * (v * gain) ** 2 * ((alpha * std) ** 2 + sigma**2)
    gain, alpha, sigma = slope(high)
    whole = 0.5 * (v * gain) ** 2 * ((alpha * std) ** 2 + sigma**2)  # KL of the tilted from the plain p_t at the end
    assert start + control == pytest.approx(whole, rel=1e-3 if name == "vp_linear" else 1e-7)
    assert control > 0.3 * whole


def test_doobs_kernel_has_no_weights():
    """Where the twist is ``h_k = E[e^(beta r(x_end)) | x_k]`` itself, up to a factor, and its gradient the control,
    every particle has the same weight, whatever its path, and ``log Z`` is exact (Lu, chapter 8: the Doob kernel): a
    random walk and a linear reward."""
    beta, std, steps, v = 0.7, 0.6, 4, torch.tensor([1.0, -2.0], dtype=torch.float64)

    def kernel(k, x):
        return Transition(x, std, x)

    start = torch.zeros(3, 8, 2, dtype=torch.float64)
    found = twisted_smc(
        kernel,
        lambda x: x @ v,
        start,
        steps=steps,
        beta=beta,
        gradient=True,
        generator=torch.Generator().manual_seed(0),
    )
    exact = 0.5 * beta**2 * float(v @ v) * steps * std**2
    assert found.ess.min() == pytest.approx(8, abs=1e-9)
    assert found.log_normalizer.tolist() == pytest.approx([exact] * 3, rel=1e-9)
