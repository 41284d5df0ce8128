"""The mixture oracle against numerical integration, autograd and brute force, and as a diffusers model."""

import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import randn, relative, seeded

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler

ONE = {"weights": [0.3, 0.6, 0.1], "means": [[-1.0], [0.5], [2.0]], "covariances": [0.05, 0.2, 0.5]}
TWO = {
    "weights": [2.0, 1.0, 1.0],
    "means": [[-1.0, 0.3], [0.8, -0.4], [0.0, 1.0]],
    "covariances": [[[0.3, 0.1], [0.1, 0.2]], [[0.15, -0.05], [-0.05, 0.3]], [[0.2, 0.0], [0.0, 0.1]]],
}
LEVELS = [(1.0, 0.02), (0.9, math.sqrt(0.19)), (0.5, 0.5), (0.3, 0.7), (0.05, 0.999), (1.0, 20.0), (0.0, 1.0)]
KINDS = ["epsilon", "sample", "v_prediction", "flow_prediction", "score"]

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


def test_conditioning_keeps_the_process():
    """The conditioned mixture is a network for the same process, and for samples of the same shape."""
    model = GaussianMixtureModel(**TWO, in_channels=2, sample_size=1, process={"prediction_type": "v_prediction"})
    v = torch.tensor([1.0, 0.0])
    for other in (model.tilted(v), model.posterior(v[None], torch.tensor([0.0]), 0.5)):
        assert other.sample_shape == (2, 1, 1)
        alpha, sigma = (float(a) for a in model.path.alpha_sigma(400.0))
        x = randn(3, 2, 1, 1, dtype=torch.float64)
        torch.testing.assert_close(other(x, 400).sample, v_of(other, x, alpha, sigma))


def v_of(model, x, alpha, sigma):
    """alpha eps - sigma x_0."""
    mean = model.posterior_mean(x, alpha, sigma)
    return alpha * (x - alpha * mean) / sigma - sigma * mean


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


def test_samples_follow_their_generator():
    """The same generator seed gives the same samples."""
    model = GaussianMixtureModel(**TWO, in_channels=2, sample_size=1)
    assert torch.equal(model.sample(5, seeded(3)), model.sample(5, seeded(3)))
    assert model.sample(5, seeded(3)).shape == (5, 2, 1, 1)


# -- as a network --


@pytest.mark.parametrize("kind", KINDS)
def test_forward_says_what_its_process_says(kind):
    """``forward`` is the exact prediction of the process's type, from D and E[eps|x_t] = (x - alpha D)/sigma."""
    model = GaussianMixtureModel(**TWO, process={"prediction_type": kind})
    x = randn(4, 1, 1, 2, dtype=torch.float64)
    alpha, sigma = (float(a) for a in model.path.alpha_sigma(300.0))
    mean = model.posterior_mean(x, alpha, sigma)
    eps = (x - alpha * mean) / sigma
    expected = {
        "epsilon": eps,
        "sample": mean,
        "v_prediction": alpha * eps - sigma * mean,
        "flow_prediction": eps - mean,
        "score": -eps / sigma,
    }[kind]
    torch.testing.assert_close(model(x, 300).sample, expected)
    assert torch.equal(model(x, 300, return_dict=False)[0], model(x, 300).sample)


def test_forward_of_edm():
    """Under EDM it is the preconditioned output: EDMEuler's ``precondition_outputs`` turns it into E[x_0|x_t]."""
    model = GaussianMixtureModel(**TWO, process={"sigma_data": 0.5})
    stock = diffusers.EDMEulerScheduler()
    sigma = 1.7
    x = sigma * randn(4, 1, 1, 2, dtype=torch.float64)
    said = model(x, 0.25 * math.log(sigma)).sample
    torch.testing.assert_close(stock.precondition_outputs(x, said, sigma), model.posterior_mean(x, 1.0, sigma))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(dtype):
    """Results have the sample's dtype and are exact up to rounding to it, whatever the model was cast to."""
    model = GaussianMixtureModel(**TWO).to(dtype)
    x = randn(8, 1, 1, 2).to(dtype)
    out = model(x, 500).sample
    expected = GaussianMixtureModel(**TWO)(x.double(), 500).sample
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))


def test_one_timestep_per_sample():
    """A batch of timesteps gives each sample its own noise level (and keeps labels with their samples)."""
    model = GaussianMixtureModel(**TWO)
    x, times, labels = randn(4, 1, 1, 2), torch.tensor([10, 400, 400, 999]), torch.tensor([0, 3, 1, 2])
    out = model(x, times, labels).sample
    for i in range(4):
        torch.testing.assert_close(out[i : i + 1], model(x[i : i + 1], times[i], labels[i : i + 1]).sample)


def test_fractional_timesteps():
    """Between integer timesteps the prediction is that of the path in between."""
    model = GaussianMixtureModel(**TWO)
    x = randn(4, 1, 1, 2, dtype=torch.float64)
    alpha, sigma = (float(a) for a in model.path.alpha_sigma(300.5))
    torch.testing.assert_close(model(x, 300.5).sample, (x - alpha * model.posterior_mean(x, alpha, sigma)) / sigma)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": [0.5, 0.5]},
        {"weights": [0.5, 0.5, 0.0]},
        {"weights": [[0.3, 0.6, 0.1]]},
        {"means": [[0.0], [1.0]]},
        {"means": [0.0, 1.0, 2.0]},
        {"covariances": [1.0, 1.0]},
        {"covariances": [[1.0, 1.0]] * 3},
        {"covariances": [[[1.0, 0.0], [0.0, 1.0]]] * 3},
        {"in_channels": 2},
        {"sample_size": 3},
    ],
    ids=str,
)
def test_bad_arguments(changes):
    """Arguments that do not fit raise ValueError at once."""
    with pytest.raises(ValueError):
        GaussianMixtureModel(**{**ONE, **changes})


def test_bad_sample_shape():
    """A sample of the wrong dimension is refused with both sizes in the message, not broadcast."""
    with pytest.raises(ValueError):
        GaussianMixtureModel(**ONE)(randn(2, 1, 1, 3), 10)
    with pytest.raises(ValueError):
        GaussianMixtureModel(**TWO)(randn(2, 1, 1, 1), 10)


def test_bad_labels():
    """Neither one label nor one per sample, or a label beyond K: refused, not broadcast or clipped."""
    model, x = GaussianMixtureModel(**TWO), randn(3, 1, 1, 2)
    with pytest.raises(ValueError):
        model(x, 10, torch.tensor([0, 1]))
    with pytest.raises((ValueError, RuntimeError)):
        model(x, 10, torch.tensor([4, 0, 0]))


def test_bad_prediction_type():
    """A process with an unknown prediction type is refused, at the latest when asked for a prediction."""
    with pytest.raises(ValueError, match="noise"):
        GaussianMixtureModel(**ONE, process={"prediction_type": "noise"})(randn(1, 1, 1, 1), 10)


# -- as a diffusers model --


def test_save_and_load(tmp_path):
    """``from_pretrained`` restores the mixture, its process and its shape exactly."""
    model = GaussianMixtureModel(**TWO, in_channels=2, sample_size=1, process={"prediction_type": "v_prediction"})
    model.save_pretrained(tmp_path)
    again = GaussianMixtureModel.from_pretrained(tmp_path)
    x = randn(3, 2, 1, 1)
    assert again.sample_shape == model.sample_shape
    assert torch.equal(again(x, 321).sample, model(x, 321).sample)


def test_half_precision_load(tmp_path):
    """Loading with a dtype rounds nothing in the oracle and gives the pipeline that dtype."""
    model = GaussianMixtureModel(**TWO)
    model.save_pretrained(tmp_path)
    half = GaussianMixtureModel.from_pretrained(tmp_path, dtype=torch.float16)
    x = randn(3, 1, 1, 2)
    assert half.dtype == torch.float16
    assert torch.equal(half(x, 321).sample, model(x, 321).sample)


def test_in_ddpm_pipeline():
    """In DDPMPipeline the pictures have the mixture's mean and standard deviation (its images are (x + 1)/2)."""
    d = 3 * 8 * 8
    model = GaussianMixtureModel([0.5, 0.5], [[0.4] * d, [-0.4] * d], [0.01, 0.01], in_channels=3, sample_size=8)
    pipe = diffusers.DDPMPipeline(model, ProbabilityFlowScheduler(grid="log_snr"))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=32, generator=seeded(), num_inference_steps=30, output_type="np").images
    assert images.shape == (32, 8, 8, 3)
    means = 2 * images.mean((1, 2, 3)) - 1
    assert np.abs(np.abs(means) - 0.4).max() < 0.05
    assert 4 < (means > 0).sum() < 28  # both components
    assert (2 * images).std((1, 2, 3)).mean() == pytest.approx(0.1, rel=0.1)


def test_in_ddpm_pipeline_with_stock_scheduler():
    """A stock scheduler sees an ordinary epsilon network."""
    d = 3 * 8 * 8
    model = GaussianMixtureModel([1.0], [[0.4] * d], [0.01], in_channels=3, sample_size=8)
    pipe = diffusers.DDPMPipeline(model, diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    images = torch.as_tensor(pipe(batch_size=8, generator=seeded(), num_inference_steps=20, output_type="np").images)
    assert relative(2 * images - 1, torch.full_like(images, 0.4)) < 0.3
