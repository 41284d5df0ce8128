"""The mixture oracle against numerical integration, autograd and brute force."""

import math

import numpy as np
import pytest
import torch
from contract_helpers import randn, seeded

from diffusers_sde import GaussianMixtureModel
from diffusers_sde.analytic import GaussianMixture

ONE = {"weights": [0.3, 0.6, 0.1], "means": [[-1.0], [0.5], [2.0]], "covariances": [0.05, 0.2, 0.5]}
TWO = {
    "weights": [2.0, 1.0, 1.0],
    "means": [[-1.0, 0.3], [0.8, -0.4], [0.0, 1.0]],
    "covariances": [[[0.3, 0.1], [0.1, 0.2]], [[0.15, -0.05], [-0.05, 0.3]], [[0.2, 0.0], [0.0, 0.1]]],
}
LEVELS = [(1.0, 0.02), (0.9, math.sqrt(0.19)), (0.5, 0.5), (0.3, 0.7), (0.05, 0.999), (1.0, 20.0), (0.0, 1.0)]

at_levels = pytest.mark.parametrize("alpha, sigma", LEVELS)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def normal(x, variance):
    return np.exp(-0.5 * x**2 / variance) / np.sqrt(2 * np.pi * variance)


def density_1d(x):
    return sum(w * normal(x - m[0], c) for w, m, c in zip(*ONE.values(), strict=True))


def density_2d(x):
    """Of TWO, (N, 2) -> (N,), written out with inverses and determinants."""
    total, out = sum(TWO["weights"]), 0.0
    for w, m, c in zip(*TWO.values(), strict=True):
        centred, c = x - np.array(m), np.array(c)
        quadratic = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(c), centred)
        out = out + w / total * np.exp(-0.5 * quadratic) / (2 * np.pi * np.sqrt(np.linalg.det(c)))
    return out


def grid_2d(half=6.0, n=401):
    axis = np.linspace(-half, half, n)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return points, (axis[1] - axis[0]) ** 2


def flat(model, x):
    """log_density at numpy points, as numpy."""
    return model.log_density(torch.as_tensor(x)).numpy()


# -- one noise level --


@at_levels
def test_posterior_mean_is_the_integral(alpha, sigma):
    """E[x_0 | x_t] equals the ratio of two integrals over x_0 (trapezoid rule, spectrally accurate here)."""
    x0 = np.linspace(-8, 10, 40001)
    model = GaussianMixtureModel(**ONE)
    for x in (-3.0, -0.4, 0.0, 0.7, 2.5):
        x = x * math.hypot(alpha, sigma)
        weight = density_1d(x0) * normal(x - alpha * x0, sigma**2)
        expected = (weight * x0).sum() / weight.sum()
        found = float(model.posterior_mean(torch.tensor([[x]], dtype=torch.float64), alpha, sigma))
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@at_levels
def test_density_is_the_convolution(alpha, sigma):
    """log p_t(x) equals the log of the integral of p(x_0) N(x; alpha x_0, sigma^2)."""
    x0 = np.linspace(-8, 10, 40001)
    x = np.array([-2.0, 0.1, 1.5]) * math.hypot(alpha, sigma)
    joint = density_1d(x0) * normal(x[:, None] - alpha * x0, sigma**2)
    found = GaussianMixtureModel(**ONE).log_density(torch.tensor(x[:, None]), alpha, sigma)
    np.testing.assert_allclose(found.numpy(), np.log(joint.sum(1) * (x0[1] - x0[0])), rtol=1e-9, atol=1e-9)


def test_density_of_data():
    """At alpha = 1, sigma = 0 it is the mixture's own density, in two dimensions with full covariances."""
    x = randn(64, 2, dtype=torch.float64)
    np.testing.assert_allclose(flat(GaussianMixtureModel(**TWO), x), np.log(density_2d(x.numpy())), rtol=1e-12)


@at_levels
def test_score_is_the_gradient(alpha, sigma):
    """The score equals autograd of the log-density."""
    model = GaussianMixtureModel(**TWO)
    x = (2 * math.hypot(alpha, sigma) * randn(32, 2, dtype=torch.float64)).requires_grad_()
    (expected,) = torch.autograd.grad(model.log_density(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(model.score(x.detach(), alpha, sigma), expected, rtol=1e-8, atol=1e-8)


def test_score_of_the_mixture_alone_is_the_gradient_also_of_one_component():
    """GaussianMixture, without a network around it: grad log p_t, for all components and for one."""
    data, x = GaussianMixture(**TWO), randn(16, 2, dtype=torch.float64).requires_grad_()
    alone = GaussianMixture([1.0], [TWO["means"][1]], [TWO["covariances"][1]])
    for law, components in ((data, None), (alone, torch.full((16,), 1))):
        (expected,) = torch.autograd.grad(law.log_density(x, 0.5, 0.7).sum(), x)
        torch.testing.assert_close(data.score(x.detach(), 0.5, 0.7, components), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("label", range(3))
def test_class_label_is_the_component(label):
    """Label k: the posterior mean of a mixture that has component k only."""
    model = GaussianMixtureModel(**TWO)
    alone = GaussianMixtureModel([1.0], [TWO["means"][label]], [TWO["covariances"][label]])
    x = randn(8, 2, dtype=torch.float64)
    found = model.posterior_mean(x, 0.8, 0.6, torch.full((8,), label))
    torch.testing.assert_close(found, alone.posterior_mean(x, 0.8, 0.6))


def test_last_label_is_unconditional():
    """Label K is the null class, also next to other labels in one batch."""
    model = GaussianMixtureModel(**TWO)
    x = randn(4, 2, dtype=torch.float64)
    found = model.posterior_mean(x, 0.8, 0.6, torch.tensor([3, 0, 3, 1]))
    torch.testing.assert_close(found[[0, 2]], model.posterior_mean(x[[0, 2]], 0.8, 0.6))
    torch.testing.assert_close(found[1:2], model.posterior_mean(x[1:2], 0.8, 0.6, torch.tensor([0])))


def test_diagonal_and_isotropic_covariances():
    """(K, d) and (K,) covariances are the diagonal matrices they stand for."""
    x = randn(8, 2, dtype=torch.float64)
    full = GaussianMixtureModel([1.0, 1.0], [[0.0, 1.0], [1.0, 0.0]], [[[0.2, 0], [0, 0.2]], [[0.5, 0], [0, 0.5]]])
    for covariances in ([[0.2, 0.2], [0.5, 0.5]], [0.2, 0.5]):
        model = GaussianMixtureModel([1.0, 1.0], [[0.0, 1.0], [1.0, 0.0]], covariances)
        torch.testing.assert_close(model.posterior_mean(x, 0.6, 0.8), full.posterior_mean(x, 0.6, 0.8))


def test_degenerate_covariance():
    """Point masses (C = 0): the posterior mean is the softmax average of the points, and stays finite far away."""
    model = GaussianMixtureModel([0.5, 0.5], [[-1.0], [1.0]], [0.0, 0.0])
    x = double([[0.3], [50.0]])
    expected = torch.tanh(0.6 * x / 0.64)  # alpha x / sigma^2
    torch.testing.assert_close(model.posterior_mean(x, 0.6, 0.8), expected)


# -- conditioning --


@pytest.mark.parametrize("beta", [-2.0, 0.5, 3.0])
def test_tilted_1d(beta):
    """The tilted mixture is p(x) exp(beta v x), normalised numerically."""
    x = np.linspace(-15, 20, 60001)
    tilted = density_1d(x) * np.exp(beta * 0.7 * x)
    expected = tilted / (tilted.sum() * (x[1] - x[0]))
    found = np.exp(flat(GaussianMixtureModel(**ONE).tilted(double([0.7]), beta), x[:, None]))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_tilted_2d():
    """The same in two dimensions with full covariances."""
    points, cell = grid_2d()
    tilted = density_2d(points) * np.exp(points @ np.array([0.8, -0.6]))
    found = np.exp(flat(GaussianMixtureModel(**TWO).tilted(double([0.8, -0.6])), points))
    np.testing.assert_allclose(found, tilted / (tilted.sum() * cell), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_posterior_1d(noise):
    """The posterior mixture is p(x) N(y; h x, noise^2), normalised numerically."""
    x = np.linspace(-8, 10, 60001)
    joint = density_1d(x) * normal(0.9 - 1.5 * x, noise**2)
    model = GaussianMixtureModel(**ONE).posterior(double([[1.5]]), double([0.9]), noise)
    expected = joint / (joint.sum() * (x[1] - x[0]))
    np.testing.assert_allclose(np.exp(flat(model, x[:, None])), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("operator", [[[1.0, 0.5]], [[1.0, 0.5], [-0.3, 2.0]], [[1, 0], [0, 1], [1, 1]]], ids=str)
def test_posterior_2d(operator):
    """The same in two dimensions for one, two and three observations."""
    h = np.array(operator, float)
    y = np.linspace(0.4, -0.2, len(h))
    points, cell = grid_2d()
    joint = density_2d(points) * normal(y - points @ h.T, 0.3**2).prod(-1)
    model = GaussianMixtureModel(**TWO).posterior(torch.tensor(h), torch.tensor(y), 0.3)
    np.testing.assert_allclose(np.exp(flat(model, points)), joint / (joint.sum() * cell), rtol=1e-8, atol=1e-11)


# -- samples --


def test_sample_moments():
    """Mean and covariance of samples are those of the mixture, within four standard errors."""
    n = 40000
    x = GaussianMixtureModel(**TWO).sample(n, seeded()).reshape(n, 2)
    w, m, c = (torch.tensor(v, dtype=torch.float64) for v in TWO.values())
    w = w / w.sum()
    mean = w @ m
    covariance = torch.einsum("k,kij->ij", w, c + m[:, :, None] * m[:, None, :]) - mean[:, None] * mean
    assert ((x.mean(0) - mean).abs() < 4 * (covariance.diagonal() / n).sqrt()).all()
    centred = x - mean
    products = centred[:, :, None] * centred[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(n)).all()


def test_samples_are_those_of_their_generator():
    """The component and the place within it are drawn from the generator that is passed, and from nothing else."""
    data = GaussianMixture(**TWO)
    torch.manual_seed(0)
    first = data.sample(50, seeded())
    torch.manual_seed(1)
    torch.testing.assert_close(data.sample(50, seeded()), first, rtol=0, atol=0)
