"""Diffusion of words in embedding space: the posterior over words, and samples that are words.

Fu & Wang: arXiv:2605.22586, section 9.
"""

import math

import numpy as np
import pytest
import torch
from contract_helpers import seeded
from pipeline_parts import PROCESSES

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.sampling import network_denoiser, sample

PRIOR = np.array([0.4, 0.1, 0.2, 0.3])
EMBEDDINGS = np.array([[1.0, 0.2, -0.5], [-0.8, 1.0, 0.3], [0.1, -1.1, 0.9], [-0.6, -0.4, -1.2]])


def words(process: str = "vp") -> GaussianMixtureModel:
    """Data that are always one of the embeddings."""
    return GaussianMixtureModel(PRIOR.tolist(), EMBEDDINGS.tolist(), [0.0] * 4, process=PROCESSES[process])


@pytest.mark.parametrize("level", [(0.8, 0.6), (1.0, 2.0), (0.4, 0.6)], ids=["vp", "ve", "flow"])
def test_the_posterior_mean_is_the_softmax_of_the_vocabulary(level):
    """``E[x_0|x] = sum_w p(w|x) e_w`` with ``log p(w|x) = log p(w) + alpha e_w.x/sigma^2 - alpha^2 |e_w|^2/(2 sigma^2)
    + constant``: a network with a softmax over words and its embedding matrix behind it (Fu & Wang, section 9)."""
    alpha, sigma = level
    x = np.random.default_rng(0).normal(size=(6, 3)) * math.hypot(alpha, sigma)
    logits = np.log(PRIOR) + alpha * x @ EMBEDDINGS.T / sigma**2 - alpha**2 * (EMBEDDINGS**2).sum(1) / (2 * sigma**2)
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = words().posterior_mean(torch.from_numpy(x), alpha, sigma).numpy()
    np.testing.assert_allclose(found, weights @ EMBEDDINGS, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("cls", [ProbabilityFlowScheduler, ReverseSDEScheduler])
def test_samples_are_words_in_their_shares(cls, process):
    """Both samplers end at embeddings, so that rounding to the nearest word changes nothing, with the prior's shares
    (Fu & Wang, section 9)."""
    n, model = 3000, words(process)
    scheduler = cls(**PROCESSES[process])
    scheduler.set_timesteps(40)
    x = torch.randn(n, 1, 1, 3, generator=seeded())
    found = sample(network_denoiser(model), scheduler, x, generator=seeded(1)).flatten(1).double()
    distance, word = torch.cdist(found, torch.from_numpy(EMBEDDINGS)).min(1)
    assert float((distance < 1e-3).double().mean()) > 0.99
    shares = torch.bincount(word, minlength=4).numpy() / n
    np.testing.assert_allclose(shares, PRIOR, rtol=0, atol=3 * math.sqrt(0.25 / n) + 0.01)
