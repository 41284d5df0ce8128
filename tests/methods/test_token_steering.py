"""Steering tokens: particles of a discrete sampler, against the tilted law, which a table knows.

Lu: arXiv:2607.01693, chapter 8.
"""

import pytest
import torch
from contract_helpers import seeded
from token_laws import INITIAL, MASK, TRANSITION, chain, law_of_sampler, process_of

from diffusers_sde import MarkovChainModel, MaskedDiffusionScheduler
from diffusers_sde.discrete.oracles import JointTable
from diffusers_sde.methods.control import estimate, log_normalizer, token_kernel, twisted_smc

LENGTH, BETA, STEPS = 3, 1.2, 12
MODEL = MarkovChainModel(INITIAL, TRANSITION)


def reward(x):
    """How often token 2 occurs; of masks, nothing."""
    return (x == 2).double().sum(-1)


@pytest.fixture(scope="module")
def particles():
    scheduler = MaskedDiffusionScheduler(algorithm_type="ancestral", num_inference_steps=STEPS)
    generator = seeded()
    kernel = token_kernel(lambda x, t: MODEL(x).logits, scheduler, generator, mask_token_id=MASK)
    x = torch.full((40, 100, LENGTH), MASK)
    return twisted_smc(kernel, reward, x, steps=STEPS, beta=BETA, generator=generator)


@pytest.fixture(scope="module")
def sampler_law():
    """The law that the ancestral sampler has with its steps: what is tilted."""
    scheduler = MaskedDiffusionScheduler(algorithm_type="ancestral")
    law = law_of_sampler(scheduler, chain(LENGTH), process_of("masked"), STEPS)
    return JointTable(law.reshape((4,) * LENGTH)[:3, :3, :3])


def test_the_particles_have_the_tilted_law(particles, sampler_law):
    tilted = sampler_law.tilted(reward, BETA).probabilities.flatten()
    index = (particles.samples * torch.tensor([9, 3, 1])).sum(-1)
    shares, errors = estimate(torch.nn.functional.one_hot(index, 27), particles)
    assert float(((shares - tilted) / errors.clamp(min=2e-4)).square().mean()) < 2.5
    plain = sampler_law.probabilities.flatten()
    assert float((shares - tilted).abs().sum()) < 0.15 * float((plain - tilted).abs().sum())


def test_the_normaliser_is_the_mean_of_the_exponential_reward(particles, sampler_law):
    """``log E[exp(beta r)]``, unbiased."""
    expected = (sampler_law.probabilities.flatten() * (BETA * reward(sampler_law.sequences)).exp()).sum().log()
    found, error = log_normalizer(particles)
    assert abs(found - float(expected)) < 3 * error and error < 0.04


def test_given_tokens_are_steered_around():
    scheduler = MaskedDiffusionScheduler(algorithm_type="ancestral", num_inference_steps=4, remasking=1.0)
    given = torch.tensor([True, False, False])
    kernel = token_kernel(lambda x, t: MODEL(x).logits, scheduler, seeded(), mask_token_id=MASK, prompt_mask=given)
    x = torch.tensor([1, MASK, MASK]).expand(2, 20, 3)
    samples = twisted_smc(kernel, reward, x, steps=4, beta=1.0, generator=seeded()).samples
    assert bool((samples[..., 0] == 1).all()) and bool((samples < MASK).all())


def test_tokens_have_no_gradient_and_orders_no_law_by_positions():
    x = torch.full((1, 4, LENGTH), MASK)
    scheduler = MaskedDiffusionScheduler(algorithm_type="ancestral", num_inference_steps=2)
    kernel = token_kernel(lambda x, t: MODEL(x).logits, scheduler, mask_token_id=MASK)
    with pytest.raises(ValueError, match="gradient=False"):
        twisted_smc(kernel, reward, x, steps=2, beta=1.0, gradient=True)
    with pytest.raises(ValueError, match="ancestral"):
        MaskedDiffusionScheduler().law(MODEL(x[0]).logits, 0, x[0], mask_token_id=MASK)
