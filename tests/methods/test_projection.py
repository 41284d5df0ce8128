"""Projection on the observation: the imputation of Score-SDE and ILVR, on oracles whose law is known.

Song et al. 2021: arXiv:2011.13456.  Choi et al. 2021: arXiv:2108.02938.  Lai et al.: arXiv:2510.21890, chapter 8.
"""

import functools

import pytest
import torch
from contract_helpers import randn, seeded
from pipeline_parts import PROCESSES, ddpm, tiny_unet, tiny_vae
from snippets import load

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.methods.posterior import (
    Measurement,
    gaussian_blur,
    inpainting,
    linear_map,
    project,
    super_resolution,
)
from diffusers_sde.weights import Point

LEVEL = Point(0.8, 0.6)


@functools.cache
def pipeline():
    return type(load("posterior_sampling", FASHION_MODEL))


def test_with_a_mask_it_is_the_imputation_of_score_sde():
    """Known pixels become ``alpha y + sigma z``, unknown ones stay (arXiv:2011.13456, appendix I.2)."""
    mask = torch.arange(16).reshape(4, 4) % 3 == 0
    x, z, truth = (randn(2, 3, 4, 4, seed=k, dtype=torch.float64) for k in range(3))
    measurement = Measurement(inpainting(mask), inpainting(mask)(truth), 0.1)
    expected = torch.where(mask, 0.8 * truth + 0.6 * z, x)
    torch.testing.assert_close(project(x, LEVEL, measurement, z, 1), expected)


def test_with_block_means_it_is_ilvr():
    """``x + phi(y_t) - phi(x)`` with ``y_t = alpha ref + sigma z`` and the low-pass filter phi, means of blocks put
    back into the blocks, of any reference with these means (arXiv:2108.02938, eq. 8)."""
    x, z, reference = (randn(2, 3, 8, 8, seed=k, dtype=torch.float64) for k in range(3))

    def low_pass(v):
        return torch.nn.functional.interpolate(super_resolution(4)(v), scale_factor=4.0, mode="nearest")

    measurement = Measurement(super_resolution(4), super_resolution(4)(reference), 0.1)
    expected = x + low_pass(0.8 * reference + 0.6 * z) - low_pass(x)
    torch.testing.assert_close(project(x, LEVEL, measurement, z, 1), expected)


@pytest.mark.parametrize("operator", [linear_map(randn(3, 16, seed=5, dtype=torch.float64)), gaussian_blur(0.5)])
def test_it_is_the_nearest_state_that_agrees(operator):
    """``A x' = alpha y + sigma A z``, and what A does not see is kept: ``x' - x`` is orthogonal to the kernel of A."""
    x, z, truth = (randn(2, 1, 4, 4, seed=k, dtype=torch.float64) for k in range(3))
    found = project(x, LEVEL, Measurement(operator, operator(truth), 0.1), z, 60)
    torch.testing.assert_close(operator(found), operator(0.8 * truth + 0.6 * z), rtol=1e-4, atol=1e-4)
    matrix = torch.stack([operator(e.reshape(1, 1, 4, 4)).flatten() for e in torch.eye(16, dtype=x.dtype)], 1)
    seen = torch.linalg.pinv(matrix) @ matrix
    torch.testing.assert_close((found - x).flatten(1) @ seen.T, (found - x).flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_the_posterior_is_exact_where_seen_and_unseen_are_independent(process):
    """Gaussian data whose first two values are independent of the last two, the first of which are seen, with a
    sampler that is exact for the rest: these have their own mean and standard deviation, the seen ones are y."""
    mean, variances = [0.5, -0.3, 0.8, -1.0], [0.2, 0.4, 0.25, 0.25]
    model = GaussianMixtureModel([1.0], [mean], [variances], process=PROCESSES[process])
    scheduler = ReverseSDEScheduler(**PROCESSES[process], data_std=0.5)
    pipe = pipeline()(unet=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    y, operator = torch.tensor([[1.0, 0.4]]), linear_map(torch.eye(4)[:2])
    options = {"method": "projection", "num_inference_steps": 20, "num_images": 4000, "generator": seeded()}
    found = pipe(y, operator, 0.1, output_type="latent", **options).images.flatten(1)
    torch.testing.assert_close(found[:, :2], y.expand(4000, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 2:].mean(0), torch.tensor(mean[2:]), rtol=0, atol=0.03)
    torch.testing.assert_close(found[:, 2:].std(0), torch.full((2,), 0.5), rtol=0, atol=0.02)


def test_two_steps_of_the_pipeline_are_the_published_loop():
    """DDIM and a mask: after each step the known pixels are those of y noised to the level that the step reached."""
    model = GaussianMixtureModel([1.0], [[0.5, -0.3, 0.2, 0.0]], [0.3], process=PROCESSES["vp"])
    pipe = pipeline()(unet=model, scheduler=ProbabilityFlowScheduler(solver_order=1))
    pipe.set_progress_bar_config(disable=True)
    x, y, operator = randn(1, 1, 1, 4, seed=3), torch.tensor([[0.7]]), linear_map(torch.eye(4)[1:2])
    options = {"method": "projection", "timesteps": [600, 300], "latents": x, "output_type": "latent"}
    found = pipe(y, operator, 0.1, generator=seeded(4), **options).images
    generator, x = seeded(4), x.flatten().double()
    (a0, s0), (a1, s1) = (map(float, model.path.alpha_sigma(t)) for t in (600.0, 300.0))
    for alpha, sigma, next_alpha, next_sigma in ((a0, s0, a1, s1), (a1, s1, 1.0, 0.0)):
        data = model.mixture.posterior_mean(x[None], alpha, sigma)[0]
        x = next_alpha * data + next_sigma * (x - alpha * data) / sigma
        x[1] = next_alpha * 0.7 + next_sigma * torch.randn(1, 1, 1, 4, generator=generator).flatten()[1]
    torch.testing.assert_close(found.flatten().double(), x, rtol=1e-4, atol=1e-4)


def test_latents_are_refused():
    pipe = pipeline()(tiny_unet(channels=4), ddpm(), tiny_vae())
    with pytest.raises(ValueError, match="Projection replaces pixels, not latents"):
        pipe(torch.zeros(1, 3, 4, 4), super_resolution(4), 0.1, method="projection")


def test_it_forgets_what_the_observation_says_of_the_rest():
    """Where seen and unseen values are correlated (0.9) projection is not the posterior: the noised observation is
    drawn afresh at each level, so that the unseen value learns too little of it, and less than with mmps, which is
    exact."""
    model = GaussianMixtureModel([1.0], [[0.0, 0.0]], [[[1.0, 0.9], [0.9, 1.0]]], process=PROCESSES["vp"])
    pipe = pipeline()(unet=model, scheduler=ReverseSDEScheduler(**PROCESSES["vp"], data_std=1.0))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 40, "num_images": 1000, "max_noise": float("inf"), "output_type": "latent"}
    unseen = {}
    for method in ("projection", "mmps"):
        found = pipe(
            torch.tensor([[1.5]]), linear_map(torch.eye(2)[:1]), 1e-2, method=method, generator=seeded(), **options
        )
        unseen[method] = found.images.flatten(1)[:, 1]
    exact = 0.9 * 1.5, (1 - 0.9**2) ** 0.5
    assert float(unseen["mmps"].mean()) == pytest.approx(exact[0], abs=0.06)
    assert float(unseen["mmps"].std()) == pytest.approx(exact[1], abs=0.04)
    assert float(unseen["projection"].mean()) == pytest.approx(0.91, abs=0.07)
    assert float(unseen["projection"].std()) == pytest.approx(0.58, abs=0.05)
