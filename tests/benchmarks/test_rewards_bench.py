"""The frontier of reward and divergence that the rewards section measures against, and what lies below it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusers_sde.benchmarks import rewards
from diffusers_sde.training.rollouts import make_chain


@pytest.mark.parametrize("beta", rewards.BETAS)
def test_the_frontier_is_that_of_samples_of_the_tilted_law(beta: float) -> None:
    """Divergence and reward as means of ``log q - log p`` and r over exact samples."""
    law = rewards.tilted(beta)
    x = law.sample(20000, torch.Generator().manual_seed(0))
    away = law.log_density(x) - rewards.MIXTURE.log_density(x)
    for exact, drawn in zip(rewards.frontier(beta), (away, rewards.reward(x)), strict=True):
        assert exact == pytest.approx(float(drawn.mean()), abs=5 * float(drawn.std()) / math.sqrt(20000))


def reward_at(kl: float) -> float:
    """The most reward at a divergence."""
    kls, means = zip(*(rewards.frontier(float(beta)) for beta in np.geomspace(30, 0.01, 200)), strict=True)
    return float(np.interp(kl, kls, means))


def test_search_lies_at_or_below_the_frontier() -> None:
    for n in rewards.BEST_OF[:3]:
        kl, mean = rewards.best_of(n, 0)
        assert reward_at(kl) - 0.1 < mean < reward_at(kl) + 0.01
    kl, mean = rewards.steered(rewards.FLOW, 0.2, 0)
    assert (kl, mean) == pytest.approx(rewards.frontier(0.2), abs=0.1)


@pytest.mark.parametrize("path", rewards.PATHS)
def test_the_correction_begins_as_nothing(path: str) -> None:
    chain = make_chain(rewards.PATHS[path], 4, data_std=rewards.DATA_STD)
    assert rewards.measured(chain, rewards.Corrected(chain))[0] == 0


def test_a_few_updates_along_the_adjoint_go_to_the_goal() -> None:
    """At the divergence that they have cost, no more reward than the frontier allows."""
    kl, x = rewards.measured(*rewards.learn("adjoint matching", rewards.FLOW, 0.5, updates=8))
    start = float(rewards.reward(rewards.MIXTURE.sample(4096, torch.Generator().manual_seed(0))).mean())
    assert start + 0.02 < float(rewards.reward(x).mean()) < reward_at(kl) + 0.05
