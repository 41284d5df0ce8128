"""Classifier-free guidance's training: one network with dropped labels learns the conditional and the marginal score.

Ho & Salimans 2022: arXiv:2207.12598, algorithm 1.  Fu & Wang: arXiv:2605.22586, section 6.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_sde.methods.guidance import classifier_free
from diffusers_sde.prediction import convert
from diffusers_sde.training.losses import Drawn, draw

MEANS, STDS = np.array([-1.0, 1.4]), np.array([0.3, 0.6])  # of the data of label 0 and 1
COUNT, DROPPED = 5000, 0.3


@functools.cache
def drawn() -> Drawn:
    """A batch of every position of a training whose labels alternate."""
    labels = np.arange(COUNT) % 2
    data = MEANS[labels] + STDS[labels] * np.random.default_rng(1).normal(size=COUNT)
    batch = {
        "positions": torch.arange(COUNT),
        "pixel_values": torch.from_numpy(data).reshape(-1, 1, 1, 1),
        "class_labels": torch.from_numpy(labels),
    }
    settings: Any = SimpleNamespace(seed=0, label_dropout=DROPPED, time_sampling="uniform")
    task: Any = SimpleNamespace(network=SimpleNamespace(device=torch.device("cpu")), vae=None)
    return draw(settings, task, batch, COUNT)


def test_conditions_are_dropped_whatever_the_sample() -> None:
    """Of each label, and at every time and noise, the same share: what is learnt without a condition is the law of all
    data (Ho & Salimans 2022, algorithm 1, line 3)."""
    d = drawn()
    assert d.labels is not None
    none = np.array([label is None for label in d.labels])
    error = math.sqrt(DROPPED * (1 - DROPPED) / (COUNT / 2))
    for part in (np.arange(COUNT) % 2 == 0, d.u < 0.5, d.eps.flatten().numpy() < 0):
        assert none[part].mean() == pytest.approx(DROPPED, abs=3 * error)


def test_the_minimisers_are_the_conditional_and_the_marginal_score() -> None:
    """Least squares by the condition that the network is given, on the draws of the training: with a label the affine
    fit is the score of its Gaussian, without one that of the whole data set in mean and covariance, so that one network
    has both and guidance at scale 1 and 0 samples them (Fu & Wang, section 6)."""
    d, alpha, sigma = drawn(), 0.8, 0.6
    assert d.labels is not None
    x0, eps = (v.flatten().double().numpy() for v in (d.x0, d.eps))
    x = alpha * x0 + sigma * eps
    k_x, k_m = convert((0.0, 1.0), (0.0, -1 / sigma), alpha, sigma)  # the score from eps
    at, found = np.array([-1.5, 0.0, 1.5]), {}
    spread = MEANS.mean(), math.sqrt((STDS**2 + MEANS**2).mean() - MEANS.mean() ** 2)
    laws = {0: (MEANS[0], STDS[0]), 1: (MEANS[1], STDS[1]), None: spread}
    for label, (mean, std) in laws.items():
        chosen = np.array([given == label for given in d.labels])
        slope, offset = np.polyfit(x[chosen], eps[chosen], 1)
        found[label] = k_x * at + k_m * (slope * at + offset)
        exact = (alpha * mean - at) / (alpha**2 * std**2 + sigma**2)
        np.testing.assert_allclose(found[label], exact, atol=0.12)
    conditional, null = (torch.from_numpy(found[k]) for k in (1, None))
    torch.testing.assert_close(classifier_free(null, conditional, 1.0), conditional)
    torch.testing.assert_close(classifier_free(null, conditional, 0.0), null)
