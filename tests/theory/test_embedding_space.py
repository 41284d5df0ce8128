"""Diffusion of words in embedding space: the posterior over words, and samples that are words.

Fu & Wang: arXiv:2605.22586, section 9.
"""

import math

import numpy as np
import pytest
import torch
from contract_helpers import seeded
from pipeline_parts import PROCESSES

from diffusers_sde import EmbeddedChainModel, GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.discrete.embeddings import (
    bound_density,
    clamped,
    expected_embedding,
    joint_loss,
    normalised,
    rounded,
)
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


# -- sequences of words --

CHAIN = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.2, 0.5, 0.1, 0.2], [0.1, 0.1, 0.1, 0.7]]


def sentences(length: int = 3, process: str = "vp") -> EmbeddedChainModel:
    """Words that say something of their neighbours."""
    return EmbeddedChainModel(PRIOR.tolist(), CHAIN, EMBEDDINGS.tolist(), length, process=PROCESSES[process])


def test_noisy_embeddings_are_evidence_for_the_law_of_the_sentence():
    """``E[x_0|x]`` by forward-backward is that of the mixture of all sentences, each a point (Fu & Wang, section 9)."""
    model, alpha, sigma = sentences(2), 0.6, 0.8
    table = model.chain.table()
    points = torch.from_numpy(EMBEDDINGS)[table.sequences].flatten(1)
    mixture = GaussianMixtureModel(table.probabilities.flatten().tolist(), points.tolist(), [0.0] * len(points))
    x = torch.randn(5, 2, 3, generator=seeded(), dtype=torch.float64)
    found = expected_embedding(model.laws(x, alpha, sigma), model.embeddings)
    expected = mixture.posterior_mean(x.flatten(1), alpha, sigma).reshape(5, 2, 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("cls", "calls"), [(ProbabilityFlowScheduler, 12), (ReverseSDEScheduler, 12)])
def test_gaussian_samplers_write_sentences_with_their_law(cls, calls):
    """All positions at once in as many calls whatever the length, where masks need one call a token to be exact."""
    n, model = 4000, sentences()
    scheduler = cls(**PROCESSES["vp"])
    scheduler.set_timesteps(calls)
    found = sample(network_denoiser(model), scheduler, torch.randn(n, 1, 3, 3, generator=seeded()), generator=seeded(1))
    words_found = rounded(found[:, 0], model.embeddings)
    shares = torch.bincount((words_found * torch.tensor([16, 4, 1])).sum(-1), minlength=64) / n
    assert float((shares - model.chain.table().probabilities.flatten()).abs().sum() / 2) < 0.08  # 4000 exact ones: 0.05


def test_rounding_finds_the_word_and_clamping_its_point():
    embeddings = torch.from_numpy(EMBEDDINGS)
    chosen = torch.tensor([[2, 0], [3, 1]])
    x = embeddings[chosen] + 0.1
    assert rounded(x, embeddings).tolist() == [[2, 0], [3, 1]]
    np.testing.assert_array_equal(clamped(x, embeddings), embeddings[chosen])


def test_the_joint_loss_is_the_squared_error_and_the_cross_entropy_and_moves_the_embeddings():
    """Li et al. 2022, arXiv:2205.14217, equation 2."""
    embeddings = torch.tensor(EMBEDDINGS, dtype=torch.float32, requires_grad=True)
    laws = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]])
    loss = joint_loss(laws.log(), torch.tensor([[1, 0]]), embeddings, torch.tensor([2.0]))
    error = (laws.double().numpy() @ EMBEDDINGS - EMBEDDINGS[np.array([[1, 0]])]) ** 2
    assert float(loss.detach()) == pytest.approx(2 * error.mean() - (math.log(0.2) + math.log(0.7)) / 2, rel=1e-5)
    loss.sum().backward()
    assert float(embeddings.grad.abs().max()) > 0
    np.testing.assert_allclose(normalised(embeddings.detach()).square().mean(-1), 1, rtol=1e-5)


def test_the_bound_of_the_exact_denoiser_is_the_entropy_of_the_words():
    """``E[-log p(w)] = \\int SNR E|x_0 - D|^2 d lambda + cross entropy at the cleanest level``, the information that
    noise takes (Kingma et al. 2021, arXiv:2107.00630; Guo et al. 2005, arXiv:cs/0412108), in the mean over words."""
    model, total, generator = sentences(2), 0.0, seeded()
    table = model.chain.table()
    words_drawn = table.sample(3000, generator)
    x0, high, low = model.embeddings[words_drawn], 2.5, -4.0
    points, weights = np.polynomial.legendre.leggauss(24)
    for u, w in zip(points, weights, strict=True):
        log_snr = (u + 1) / 2 * (high - low) + low
        sigma = math.exp(-log_snr)
        x = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        prediction = expected_embedding(model.laws(x, 1.0, sigma), model.embeddings)
        total += w * (high - low) / 2 * float(bound_density(prediction, x0, sigma**-2.0).mean())
    assert total == pytest.approx(float(torch.special.entr(table.probabilities).sum()), abs=0.06)
